"""Where token ids come from: texts through a real tokenizer, named and digested, so that a result can say what it read.

    text = standard_library(vocab)                               # encode once, for all that reads it
    text = text_source("book.txt", vocab)                        # a file, standard input, or Python's help topics
    stream = text.window(128, seed=0)                            # 128 tokens to measure, others to calibrate on

The sources of the running Python's standard library are on every machine. Random ids stand for texts without reuse, or
with no more of it than their frequencies bring.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
import tokenize
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from bench.setup.encoding import encode_texts
from engram_ref.files.texts import TEXT_CHARACTERS, read_text
from engram_ref.vocab import CompressedVocab, load_tokenizer

CALIBRATION_TOKENS = 16_384
RANDOM_TOKENS = 4 * CALIBRATION_TOKENS
TEXT_BYTES = 8 << 20
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_CHARACTERS_PER_TOKEN = 16  # more than any prose has


@dataclass(frozen=True)
class Source:
    """A whole text, or what stands for one.

    Attributes:
        name: where it comes from.
        sha256: digest of the text that was read, UTF-8; of random ids, as little-endian int64.
        ids: compressed ids, int64 [tokens].
        tokens: the same before compression; random ids are drawn compressed, and stand in both.
    """

    name: str
    sha256: str
    ids: np.ndarray
    tokens: np.ndarray

    def part(self, first: int = 0, end: int | None = None) -> Source:
        """Tokens `first` .. `end` - 1; name and digest stay those of the whole text."""
        return replace(self, ids=self.ids[first:end], tokens=self.tokens[first:end])

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
        # Behind the calibration text: hot rows are chosen on other text than they are charged on.
        start = half + int(random.Random(seed).random() * (total - half - length + 1))
        measured, calibration = self.ids[start : start + length], self.ids[max(0, half - CALIBRATION_TOKENS) : half]
        return Stream(self.name, self.sha256, total, start, measured.tolist(), calibration.tolist())


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


def text_source(
    path: str | Path | None,
    vocab: CompressedVocab,
    tokenizer: str | Path | None = None,
    most: int = TEXT_CHARACTERS,
) -> Source:
    """A whole text, or the first `most` characters of a long one; `path` and errors as for `read_text`."""
    name, text = read_text(path, most)
    return _encoded(name, [text], vocab, tokenizer)


def standard_library(
    vocab: CompressedVocab, tokenizer: str | Path | None = None, nbytes: int = TEXT_BYTES, folder: Path | None = None
) -> Source:
    """The standard library's sources in the order of their names, without tests, until `nbytes` are full.

    Args:
        vocab, tokenizer: of the same model; None for the packaged DeepSeek tokenizer.
        folder: another one with Python sources.

    Raises:
        ValueError: there are no sources.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    left = nbytes
    for path in _sources(folder):
        if left <= 0:
            break
        with tokenize.open(path) as source:  # knows the encoding that a source declares
            texts.append(source.read())
        left -= path.stat().st_size
    if not texts:
        raise ValueError(f"no Python sources in {folder}: name a text file instead")
    return _encoded("python-stdlib", texts, vocab, tokenizer)


def _sources(folder: Path) -> Iterator[Path]:
    """Files in the order of their paths; what is left out is not even looked into."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in _LEFT_OUT:
            yield from _sources(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def _encoded(name: str, texts: list[str], vocab: CompressedVocab, tokenizer: str | Path | None) -> Source:
    tokens = encode_texts(load_tokenizer(tokenizer), texts)
    ids = vocab(tokens[None])[0] if len(tokens) else tokens
    return Source(name, hashlib.sha256("".join(texts).encode()).hexdigest(), ids, tokens)


def halves(path: Path | None, vocab: CompressedVocab, tokens: int) -> tuple[np.ndarray, Source]:
    """Compressed ids to calibrate on, and the text behind them that is measured.

    Args:
        path: a file, of which no more is read than `tokens` tokens need, or the standard library would give; None for
            the standard library.
    """
    most = max(TEXT_BYTES, _CHARACTERS_PER_TOKEN * tokens)
    whole = text_source(path, vocab, most=most) if path else standard_library(vocab)
    half = len(whole.ids) // 2
    return whole.ids[:half], whole.part(half)


def random_source(name: str, size: int, tokens: int = RANDOM_TOKENS) -> Source:
    """Independent ids of a vocabulary of `size`: "uniform", or "zipf", where id i is drawn as often as 1/(i + 1)."""
    draw = random.Random(name).random  # Python promises never to change it: the same ids on every machine
    if name == "uniform":
        drawn = [int(draw() * size) for _ in range(tokens)]
    else:
        below = list(accumulate(1.0 / (i + 1) for i in range(size)))
        drawn = [bisect(below, draw() * below[-1]) for _ in range(tokens)]
    ids = np.array(drawn, dtype="<i8")
    return Source(name, hashlib.sha256(ids.tobytes()).hexdigest(), ids, ids)
