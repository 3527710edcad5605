"""Batches of compressed token ids for the hardware benchmark, fresh ones every iteration.

    text = standard_library(vocab)                               # of bench.setup.streams
    batches = text_batches(text, batch=8, tokens=4096, seed=0)
    ids = batches.next()                                         # [B, T]

    batches = text_batches(text, batch=64, tokens=1, seed=0, plan=plan)  # decoding
    ids = batches.next()                                         # [B, 1], each sequence a token further
    before = batches.history                                     # what came before these ids

Uniform random ids are the worst case: hardly an n-gram comes twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import count

import numpy as np

from bench.setup.streams import Source
from engram_ref.config import require_int
from engram_ref.hashing import HashPlan, TokenHistory
from engram_ref.vocab import CompressedVocab

_Draw = tuple[np.ndarray, bool]  # ids [B, T], and whether they begin new sequences


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


def text_batches(text: Source, batch: int, tokens: int, seed: int, plan: HashPlan | None = None) -> TokenBatches:
    """Batches of real text: every sequence walks along its own part of it, `tokens` a batch.

    No window comes twice until the parts are exhausted. Then the walk starts over at another offset: the windows are
    cut differently, but the text is the same.

    Args:
        seed: where the first walk starts.
        plan: with it sequences go on from batch to batch, and `history` is kept: decoding. Without it every batch
            begins new sequences: prefill.

    Raises:
        ValueError: the text is too short for two batches, or single tokens without a plan.
    """
    _check(batch, tokens, plan)
    length = len(text.ids) // batch
    if length < 2 * tokens:
        raise ValueError(
            f"{text.name} has {len(text.ids):,} tokens: {batch} sequences of {tokens} need at least "
            f"{2 * batch * tokens:,}; take a longer text or a smaller batch"
        )
    parts = text.ids[: batch * length].reshape(batch, length)
    return TokenBatches(text.name, text.sha256, len(text.ids), _walk(parts, tokens, seed), plan)


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
    draws = (
        (generator.integers(0, len(vocab), (batch, tokens), dtype=np.int64), number == 0) for number in count()
    )  # [B, T]
    return TokenBatches("uniform", hashlib.sha256(state).hexdigest(), None, draws, plan)


def _check(batch: int, tokens: int, plan: HashPlan | None) -> None:
    require_int("batch", batch, 1)
    require_int("tokens", tokens, 1)
    if tokens == 1 and plan is None:
        raise ValueError("tokens=1: a token alone has no n-grams; give the plan, so that its history is kept")
