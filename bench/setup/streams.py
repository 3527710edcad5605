"""Token streams: real text through a real tokenizer, named and digested, so that a result can say what it read."""

from __future__ import annotations

import hashlib
import random
from array import array
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from bench.setup.encoding import encode_texts
from engram_ref.files.texts import read_text
from engram_ref.vocab import CompressedVocab, load_tokenizer

CALIBRATION_TOKENS = 16_384
RANDOM_TOKENS = 4 * CALIBRATION_TOKENS


@dataclass(frozen=True)
class Source:
    """A whole text, or what stands for one.

    Attributes:
        name: where it comes from.
        sha256: digest of the text that was read, UTF-8; of random ids, as little-endian int64.
        ids: compressed ids.
    """

    name: str
    sha256: str
    ids: list[int]

    def window(self, length: int, seed: int) -> Stream:
        """`length` tokens from the second half, where the seed says, and calibration text from the first.

        Raises:
            ValueError: the text is shorter than twice `length` tokens.
        """
        total = len(self.ids)
        half = total // 2
        if half < length:
            raise ValueError(
                f"{self.name} has {total} tokens: {length} to measure need a text of at least {2 * length}"
            )
        start = half + int(random.Random(seed).random() * (total - half - length + 1))
        measured, calibration = self.ids[start : start + length], self.ids[max(0, half - CALIBRATION_TOKENS) : half]
        return Stream(self.name, self.sha256, total, start, measured, calibration)


@dataclass(frozen=True)
class Stream:
    """A window of text to measure, and other text before it to calibrate on.

    Attributes:
        name: where the text comes from.
        sha256: digest of the whole text that was read, UTF-8.
        tokens: its length in tokens.
        start: position of the window's first token.
        measured, calibration: compressed ids.
    """

    name: str
    sha256: str
    tokens: int
    start: int
    measured: list[int]
    calibration: list[int]


def text_source(path: str | Path | None, tokenizer: str | Path | None, vocab: CompressedVocab) -> Source:
    """A whole text, or the beginning of a long one; `path` and errors as for `read_text`."""
    name, text = read_text(path)
    ids = encode_texts(load_tokenizer(tokenizer), [text])
    compressed = vocab(ids[None])[0].tolist() if len(ids) else []
    return Source(name, hashlib.sha256(text.encode()).hexdigest(), compressed)


def text_stream(
    path: str | Path | None, tokenizer: str | Path | None, vocab: CompressedVocab, length: int, seed: int
) -> Stream:
    """A window of a text: see `text_source` and `Source.window`."""
    return text_source(path, tokenizer, vocab).window(length, seed)


def random_source(name: str, size: int, tokens: int = RANDOM_TOKENS) -> Source:
    """Independent ids of a vocabulary of `size`: "uniform", or "zipf", where id i is drawn as often as 1/(i + 1).

    The same on every machine, drawn from the generator that Python promises never to change.
    """
    draw = random.Random(name).random
    if name == "uniform":
        ids = [int(draw() * size) for _ in range(tokens)]
    else:
        below = list(accumulate(1.0 / (i + 1) for i in range(size)))
        ids = [bisect(below, draw() * below[-1]) for _ in range(tokens)]
    return Source(name, hashlib.sha256(array("q", ids).tobytes()).hexdigest(), ids)
