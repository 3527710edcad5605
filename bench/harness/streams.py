"""Token streams: real text through a real tokenizer, named and digested, so that a result can say what it read."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from engram_ref.vocab import CompressedVocab, load_tokenizer

CALIBRATION_TOKENS = 16_384


@dataclass(frozen=True)
class Stream:
    """A window of text to measure, and other text before it to calibrate on.

    Attributes:
        name: where the text comes from.
        sha256: digest of the whole text, UTF-8.
        tokens: length of the whole text in tokens.
        start: position of the window's first token.
        measured, calibration: compressed ids.
    """

    name: str
    sha256: str
    tokens: int
    start: int
    measured: list[int]
    calibration: list[int]


def read_text(path: str | Path | None) -> tuple[str, str]:
    """Name and content of a text: a UTF-8 file, or (None) Python's own help topics, English prose about Python."""
    if path is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).name, Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def text_stream(
    path: str | Path | None, tokenizer: str | Path | None, vocab: CompressedVocab, length: int, seed: int
) -> Stream:
    """`length` tokens from the second half of a text, where the seed says, and calibration text from the first.

    Raises:
        ValueError: the text is shorter than twice `length` tokens.
        OSError: the file cannot be read.
    """
    name, text = read_text(path)
    ids = load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    half = len(ids) // 2
    if half < length:
        raise ValueError(f"{name} has {len(ids)} tokens: {length} to measure need a text of at least {2 * length}")
    start = half + int(random.Random(seed).random() * (len(ids) - half - length + 1))
    compressed = vocab([ids])[0].tolist()
    return Stream(
        name=name,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=len(ids),
        start=start,
        measured=compressed[start : start + length],
        calibration=compressed[max(0, half - CALIBRATION_TOKENS) : half],
    )
