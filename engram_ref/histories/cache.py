"""The past of the sequences that a cache of keys and values holds, and of as many positions.

`CacheHistory.settle` compares the two lengths before every step, so that one cannot get ahead of the other unnoticed.
Cropping is followed as far as the ids are remembered (SLACK positions); a layer with a convolution refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.fusion.base import ShortConvHistory
from engram_ref.hashing.plan import HashPlan
from engram_ref.ids import DEAD
from engram_ref.layer import Engram
from engram_ref.tables.base import Pending, Ready

SLACK = 64  # positions that may be cropped away


def _written_to(tensor: Tensor) -> Tensor:
    """A tensor that may be written to under `no_grad`, even if it was made under `inference_mode`."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def convolved(engrams: Mapping[int, Engram]) -> list[int]:
    """The layers that have a convolution, and so a past besides ids."""
    return [layer_id for layer_id, engram in engrams.items() if engram.fusion.reach]


class CacheHistory:
    """The past of some sequences, for all Engram layers of a model.

    Args:
        plan: of the hash.
        batch_size: sequences.
        device: of the ids.
        engrams: the layers.

    Attributes:
        length: positions so far, padding included.
        recent: compressed ids of the last of them, at least max_ngram - 1 and at most SLACK more: [B, R]. They are
            replaced, never written to, and may still be on their way: reading them lets the current stream wait.
        convolutions: by layer id, the past of those that have a convolution.
        open: a step has begun and not ended.
        packed: several sequences lie in one row, so that none can go on.
        slack: ids that are remembered beyond those that the hash needs.
    """

    slack = SLACK

    def __init__(self, plan: HashPlan, batch_size: int, device: torch.device, engrams: Mapping[int, Engram]) -> None:
        self.plan = plan
        self._context = plan.max_ngram - 1
        self.length = 0
        self.recent = torch.full((batch_size, self._context), DEAD, dtype=torch.int64, device=device)
        self.convolutions: dict[int, ShortConvHistory] = {}
        for layer_id in convolved(engrams):
            past = self.convolutions[layer_id] = ShortConvHistory(engrams[layer_id].fusion, batch_size)
            past.values = _written_to(past.values)
        self.open = False
        self.packed = False

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.recent)

    @property
    def context(self) -> Tensor:
        """The max_ngram - 1 ids before the next position, [B, N-1]."""
        return self.recent[:, -self._context :]

    @property
    def recent(self) -> Tensor:
        """See the attributes."""
        return self._recent if isinstance(self._recent, Tensor) else self._recent.wait()

    @recent.setter
    def recent(self, ids: Tensor) -> None:
        self._recent: Tensor | Pending = ids

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": self.recent}  # a copy has the ids, not an event of a stream

    def followed_by(self, ids: Tensor) -> Tensor:
        """What `recent` is after some more positions [B, T]."""
        return torch.cat([self.recent, ids], dim=1)[:, -(self._context + self.slack) :]

    def room_after(self, count: int) -> Tensor:
        """Memory for what `recent` is after so many more positions."""
        recent = self.recent
        return recent.new_empty((len(recent), min(recent.shape[1] + count, self._context + self.slack)))

    def begin(self) -> None:
        """A step begins: until `end`, blocks write what cannot be taken back."""
        self.open = True

    def end(self) -> None:
        """It has ended well, or no block has run."""
        self.open = False

    def append(self, ids: Tensor) -> None:
        """Go on by some positions, [B, T]."""
        self.go_on(Ready(self.followed_by(ids)), ids.shape[1])

    def go_on(self, recent: Pending, count: int) -> None:
        """Go on by so many positions, which have been put behind the others already."""
        self._recent = recent
        self.length += count

    def settle(self, length: int) -> None:
        """Go back to the `length` positions that the cache holds.

        Raises:
            ValueError: the cache is longer than this history, a step was broken off, or more is gone than remembered.
        """
        self.require_whole()  # also of an empty cache, in which may be states that nobody counts
        if length == 0:
            return self.reset()
        if self.packed:
            raise ValueError("a cache of several sequences packed into one row, of which none can go on: use a new one")
        if length > self.length:
            raise ValueError(_apart(length, self.length))
        if length < self.length:
            self._crop(self.length - length)

    def require_whole(self) -> None:
        """Refuse to go on behind a step that was broken off.

        Raises:
            ValueError: one was.
        """
        if self.open:
            raise ValueError(
                "an earlier step with this cache was broken off, so cache and Engram may differ: begin with a new "
                "cache, or, where that empties it, reset() this one"
            )

    def _crop(self, count: int) -> None:
        if self.convolutions:  # their past is kept for the end alone
            raise ValueError(
                f"the cache was cropped by {count} positions; the short convolution cannot go back: use a form without "
                "one, or generate without an assistant"
            )
        most = self.recent.shape[1] - self._context
        if count > most:
            raise ValueError(
                f"the cache was cropped by {count} positions; what is remembered of it can follow {most}: begin with a "
                "new cache, or tell `remember` of more tokens"
            )
        self.recent = self.recent[:, :-count]
        self.length -= count

    def reset(self) -> None:
        """Back to before the first position."""
        self.length, self.open, self.packed = 0, False, False
        self.recent = torch.full_like(self.recent[:, : self._context], DEAD)
        for past in self.convolutions.values():
            past.values.zero_()  # in place: a captured graph goes on reading there

    def require_movable(self) -> None:
        """Refuse that sequences are reordered, selected or repeated; asked before it is done to the cache."""

    def numbers(self, sequences: Any) -> Tensor:
        """Of the sequences that are named as a cache takes them: by numbers, booleans or a slice."""
        device = sequences.device if isinstance(sequences, Tensor) else None
        return torch.arange(self.batch_size, device=device)[sequences, ...]

    def select(self, sequences: Tensor) -> None:
        """The sequences of these numbers, in this order: beams are reordered, or some are left."""
        self.recent = self.recent[sequences.to(self.recent.device)]
        for past in self.convolutions.values():
            chosen = past.values[sequences.to(past.values.device)]
            same = chosen.shape == past.values.shape
            past.values = past.values.copy_(chosen) if same else _written_to(chosen)

    def repeat(self, times: int) -> None:
        """Each sequence so many times, one after the other."""
        self.recent = self.recent.repeat_interleave(times, dim=0)
        for past in self.convolutions.values():
            past.values = _written_to(past.values.repeat_interleave(times, dim=0))


def _apart(length: Any, remembered: Any) -> str:
    return (
        f"the cache holds {length} positions, Engram's history {remembered}: some were put there by another model, or "
        "while nothing was attached; begin with a new cache"
    )


class LengthsOnDevice:
    """Lengths that only the accelerator knows, compared there, so that the CPU need not wait for it."""

    def __init__(self) -> None:
        self._differed: Tensor | None = None  # [2], what the cache held and what was remembered, where they differed

    def compare(self, length: Tensor, remembered: int) -> None:
        """Note whether a cache is as long as its history."""
        pair = torch.stack([length.to(torch.int64).reshape(()), torch.full_like(length, remembered).reshape(())])
        before = torch.zeros_like(pair) if self._differed is None else self._differed
        self._differed = torch.where(pair[0] == pair[1], before, pair)

    def check(self) -> None:
        """Wait for the device, and raise if one was not.

        Raises:
            ValueError: a cache and its history differed.
        """
        if self._differed is None:
            return
        length, remembered = self._differed.tolist()
        self._differed = None
        if length != remembered:
            raise ValueError(_apart(length, remembered))
