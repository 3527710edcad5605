"""Batches of compressed token ids for the hardware benchmark, fresh ones every iteration.

    text = standard_library(vocab)                               # encode once, for all shapes
    batches = text_batches(vocab, batch=8, tokens=4096, seed=0, corpus=text)
    ids = batches.next()                                         # [B, T]

    batches = text_batches(vocab, batch=64, tokens=1, seed=0, plan=plan)      # decoding
    ids = batches.next()                                         # [B, 1], each sequence a token further
    before = batches.history                                     # what came before these ids

Real text is the default: the sources of the running Python's standard library, which every machine has. Uniform
random ids are the worst case: hardly an n-gram comes twice.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from bench.setup.encoding import encode_texts
from engram_ref.config import require_int
from engram_ref.files.texts import read_text
from engram_ref.hashing import HashPlan, TokenHistory
from engram_ref.vocab import CompressedVocab, load_tokenizer

TEXT_BYTES = 8 << 20
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_CHARACTERS_PER_TOKEN = 16  # more than any prose has
_Draw = tuple[np.ndarray, bool]  # ids [B, T], and whether they begin new sequences


@dataclass(frozen=True)
class Corpus:
    """A text as compressed ids.

    Attributes:
        name: where it comes from.
        sha256: digest of the text, UTF-8.
        ids: int64 [tokens].
        tokens: the same before compression.
    """

    name: str
    sha256: str
    ids: np.ndarray
    tokens: np.ndarray

    def since(self, first: int) -> Corpus:
        """From a token on; name and digest stay those of the whole text."""
        return Corpus(self.name, self.sha256, self.ids[first:], self.tokens[first:])


def standard_library(
    vocab: CompressedVocab, tokenizer: str | Path | None = None, nbytes: int = TEXT_BYTES, folder: Path | None = None
) -> Corpus:
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
    return _encode("python-stdlib", texts, vocab, tokenizer)


def _sources(folder: Path) -> Iterator[Path]:
    """Files in the order of their paths; what is left out is not even looked into."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in _LEFT_OUT:
            yield from _sources(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def text_file(path: str | Path, vocab: CompressedVocab, tokenizer: str | Path | None = None, tokens: int = 0) -> Corpus:
    """A UTF-8 file; of a long one no more is read than `tokens` tokens need, or the standard library would give.

    Raises:
        ValueError: not a regular file, or not UTF-8.
        OSError: it cannot be read.
    """
    name, text = read_text(path, max(TEXT_BYTES, _CHARACTERS_PER_TOKEN * tokens))
    return _encode(name, [text], vocab, tokenizer)


def halves(path: Path | None, vocab: CompressedVocab, tokens: int) -> tuple[np.ndarray, Corpus]:
    """Compressed ids to calibrate on, and the text behind them that is measured; of a file, `tokens` in all, or more.

    Args:
        path: None for the standard library.
    """
    whole = text_file(path, vocab, tokens=tokens) if path else standard_library(vocab)
    half = len(whole.ids) // 2
    return whole.ids[:half], whole.since(half)


def _encode(name: str, texts: list[str], vocab: CompressedVocab, tokenizer: str | Path | None) -> Corpus:
    tokens = encode_texts(load_tokenizer(tokenizer), texts)
    ids = vocab(tokens[None])[0] if len(tokens) else tokens
    return Corpus(name, hashlib.sha256("".join(texts).encode()).hexdigest(), ids, tokens)


class TokenBatches:
    """An endless row of batches.

    Attributes:
        name: of the stream.
        sha256: digest of its text; of random ids, the digest of their generator's state before the first.
        tokens: length of the text; None for random ids, which do not end.
        history: what came before the batch that `next` returned last, a TokenHistory of its own; None where
            every batch begins new sequences.
    """

    def __init__(
        self, name: str, sha256: str, tokens: int | None, draws: Iterator[_Draw], plan: HashPlan | None
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.tokens = tokens
        self.history: TokenHistory | None = None
        self._draws = draws
        self._plan = plan
        self._last: np.ndarray | None = None

    def next(self) -> np.ndarray:
        """Compressed ids [B, T], int64."""
        ids, begins = next(self._draws)
        if self._plan is not None:
            self.history = self._before(self._plan, len(ids), begins)
            self._last = ids
        return ids

    def _before(self, plan: HashPlan, batch: int, begins: bool) -> TokenHistory:
        if begins or self.history is None or self._last is None:
            return TokenHistory(plan, batch)
        history = self.history.copy()  # whoever was given the last one may still be hashing with it
        history.advance(self._last)
        return history


def text_batches(
    vocab: CompressedVocab,
    batch: int,
    tokens: int,
    seed: int,
    plan: HashPlan | None = None,
    corpus: Corpus | None = None,
) -> TokenBatches:
    """Batches of real text: every sequence walks along its own part of it, `tokens` a batch.

    No window comes twice until the parts are exhausted. Then the walk starts over at another offset: the windows are
    cut differently, but the text is the same.

    Args:
        seed: where the first walk starts.
        plan: with it sequences go on from batch to batch, and `history` is kept: decoding. Without it every batch
            begins new sequences: prefill.
        corpus: None for the standard library, with the packaged tokenizer.

    Raises:
        ValueError: the text is too short for two batches, or single tokens without a plan.
    """
    _check(batch, tokens, plan)
    corpus = corpus or standard_library(vocab)
    length = len(corpus.ids) // batch
    if length < 2 * tokens:
        raise ValueError(
            f"{corpus.name} has {len(corpus.ids):,} tokens: {batch} sequences of {tokens} need at least "
            f"{2 * batch * tokens:,}; take a longer text or a smaller batch"
        )
    parts = corpus.ids[: batch * length].reshape(batch, length)
    return TokenBatches(corpus.name, corpus.sha256, len(corpus.ids), _walk(parts, tokens, seed), plan)


def _walk(parts: np.ndarray, tokens: int, seed: int) -> Iterator[_Draw]:
    length = parts.shape[1]
    offsets = max(2, tokens, length // 8)  # the text before an offset is left out, so they stay near the start
    generator = np.random.default_rng(seed)
    start = int(generator.integers(offsets))
    while True:
        for at in range(start, length - tokens + 1, tokens):
            yield np.ascontiguousarray(parts[:, at : at + tokens]), at == start  # [B, T]
        start = (start + int(generator.integers(1, offsets))) % offsets


def uniform_batches(
    vocab: CompressedVocab, batch: int, tokens: int, seed: int, plan: HashPlan | None = None
) -> TokenBatches:
    """Batches of uniform random ids, never the same; arguments and errors as `text_batches`."""
    _check(batch, tokens, plan)
    generator = np.random.default_rng(seed)
    state = repr(generator.bit_generator.state).encode()
    draws = _draw(generator, len(vocab), (batch, tokens))
    return TokenBatches("uniform", hashlib.sha256(state).hexdigest(), None, draws, plan)


def _draw(generator: np.random.Generator, size: int, shape: tuple[int, int]) -> Iterator[_Draw]:
    for number in count():
        yield generator.integers(0, size, shape, dtype=np.int64), number == 0


def _check(batch: int, tokens: int, plan: HashPlan | None) -> None:
    require_int("batch", batch, 1)
    require_int("tokens", tokens, 1)
    if tokens == 1 and plan is None:
        raise ValueError("tokens=1: a token alone has no n-grams; give the plan, so that its history is kept")
