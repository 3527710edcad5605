"""The rows of a step: from the token ids at the model's entry to the join before its second block, for every variant.

    lookup.enter(ids)       the ids of a step are known; what must not overlap with anything, happens here
    lookup.begin()          the first block has been given to the device
    rows = lookup.join()    [B*T*C, D], on the device
    lookup.leave()          the rows have been used

A step either begins sequences (`slots` and `lengths` are given then) or goes on with those in all places. Ids are
compressed and hashed where the variant's table wants its row numbers: on the CPU, to which they are copied first, or on
the device. The resident table is looked up as well as it can be: by two kernels that are part of the first graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bench.instruments.clocks import Clock
from engram_ref.hashing import DEAD, HashPlan, TokenHistory
from engram_ref.hashing.device import DeviceHasher, DeviceHistory, DeviceVocab
from engram_ref.lookup.device import DeviceLookup
from engram_ref.prefetch import Fetch, Prefetcher
from engram_ref.vocab import CompressedVocab


class Lookup(Protocol):
    """Where the rows of each step come from."""

    def enter(self, ids: Tensor, lengths: np.ndarray | None = None, slots: np.ndarray | None = None) -> None:
        """A step with token ids [B, T] begins; prompts are padded on the right and have `lengths`."""
        ...

    def begin(self) -> None:
        """The first block runs."""
        ...

    def join(self) -> Tensor | None:
        """The rows, or None where there is no Engram layer."""
        ...

    def leave(self) -> None:
        """The step has been given to the device."""
        ...


class NoLookup:
    """A model without an Engram layer."""

    def enter(self, ids: Tensor, lengths: np.ndarray | None = None, slots: np.ndarray | None = None) -> None:
        """Nothing."""

    def begin(self) -> None:
        """Nothing."""

    def join(self) -> None:
        """No rows."""

    def leave(self) -> None:
        """Nothing."""


class OnHand(NoLookup):
    """Rows of all steps of a round, fetched beforehand: what is left is the layer's own compute.

    Args:
        rows: of each step in turn.
    """

    def __init__(self, rows: list[Tensor]) -> None:
        self._rows: Iterator[Tensor] = iter(rows)

    def join(self) -> Tensor:  # type: ignore[override]
        """The next step's rows."""
        return next(self._rows)


class Sequences:
    """Compressed ids and the histories of all places, on the CPU or on a device.

    Args:
        vocab: token id -> compressed id.
        plan: of the hash.
        slots: places.
        device: where ids are hashed; None for the CPU, by what is made for it.
    """

    def __init__(self, vocab: CompressedVocab, plan: HashPlan, slots: int, device: torch.device | None) -> None:
        self._plan, self._slots, self._device = plan, slots, device
        self._on_device = device is not None
        self._vocab: Any = vocab if device is None else DeviceVocab(vocab, device)
        self.history: Any = (
            TokenHistory(plan, slots) if device is None else DeviceHistory(plan, slots, device)
        )  # before the next step

    def compress(self, ids: Tensor) -> Any:
        """Compressed ids [B, T]."""
        return self._vocab(ids if self._on_device else ids.numpy())

    def advance(self, compressed: Any) -> None:
        """Every place has got one more token."""
        self.history.advance(compressed)

    def start(self, compressed: Any, lengths: np.ndarray, slots: np.ndarray) -> None:
        """New sequences stand in these places, behind their prompts; whoever hashes with the old history keeps it."""
        last, before = last_places(lengths, self._plan.max_ngram - 1)
        ids = self.history.ids.clone() if self._on_device else self.history.ids.copy()
        if self._on_device:
            ids[self._put(slots)] = compressed.gather(1, self._put(last)).masked_fill(self._put(before), DEAD)
        else:
            ids[slots] = np.where(before, DEAD, np.take_along_axis(compressed, last, 1))
        self.history.ids = ids

    def _put(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def last_places(lengths: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the last `reach` tokens of prompts stand, and which of these places lie before the prompt; [b, reach]."""
    places = lengths[:, None] - reach + np.arange(reach)
    return places.clip(0), places < 0


class ResidentLookup:
    """Rows of a table that the device reads by itself, by the two kernels of `engram_ref.lookup.device`.

    In a decode step `step` reads ids, history and rows where they always lie, so it can be captured in a graph together
    with the first block; without graphs the join calls it.

    Args:
        lookup: of the table.
        layer_id: of the Engram layer.
        slots: places.
        captured: decode steps are graphs, which hold `step`.

    Attributes:
        rows: of a decode step, [slots * C, D], always in the same memory.
    """

    def __init__(self, lookup: DeviceLookup, layer_id: int, slots: int, captured: bool) -> None:
        self._lookup, self._layer_id, self._captured = lookup, layer_id, captured
        self._tail = lookup.new_tail(slots)  # [slots, N-1], compressed ids before the next step
        self._out = lookup.new_rows(slots, 1)
        self.rows: Tensor = self._out[0]

    def restart(self) -> None:
        """No place has a sequence."""
        self._tail.fill_(DEAD)

    def step(self, ids: Tensor) -> None:
        """Look up one token of every place, ids [slots, 1], and remember it."""
        self._lookup(ids, before=self._tail, after=self._tail, out=self._out)

    def enter(self, ids: Tensor, lengths: np.ndarray | None = None, slots: np.ndarray | None = None) -> None:
        """See Lookup."""
        self._ids, self._lengths, self._slots = ids, lengths, slots

    def begin(self) -> None:
        """Nothing: the graph has it."""

    def join(self) -> Tensor | None:
        """The rows; None in a graph, which has written them where it reads them."""
        if self._lengths is not None and self._slots is not None:
            return self._prompts(self._lengths, self._slots)
        if self._captured:
            return None
        self.step(self._ids)
        return self.rows

    def _prompts(self, lengths: np.ndarray, slots: np.ndarray) -> Tensor:
        found = self._lookup(self._ids)
        device = self._tail.device
        last, before = (torch.from_numpy(x).to(device) for x in last_places(lengths, self._tail.shape[1]))
        self._tail[torch.from_numpy(slots).to(device)] = found.compressed.gather(1, last).masked_fill(before, DEAD)
        return found.values[self._layer_id]

    def leave(self) -> None:
        """Nothing."""


class TableLookup:
    """Rows from a table.

    Args:
        prefetcher: of the variant.
        schedule: synchronous (at the entry, waited for at once), prefetched (begun at the entry), or in place (begun
            at the join).
        layer_id: of the Engram layer.
        sequences: of this variant's places.
        clock: is told how long the model waits.
    """

    def __init__(
        self, prefetcher: Prefetcher, schedule: str, layer_id: int, sequences: Sequences, clock: Clock
    ) -> None:
        self._prefetcher, self._schedule, self._layer_id = prefetcher, schedule, layer_id
        self._sequences, self._clock = sequences, clock
        self._on_device = isinstance(prefetcher.hasher, DeviceHasher)
        self._fetch: Fetch | None = None
        self._copied: Any = None

    def enter(self, ids: Tensor, lengths: np.ndarray | None = None, slots: np.ndarray | None = None) -> None:
        """See Lookup."""
        self._ids, self._lengths, self._slots = ids, lengths, slots
        if not self._on_device and ids.device.type == "cuda":
            self._copy_down()
        if self._schedule == "synchronous":
            self._clock.mark("entered")
            self._start()
            self._wait()
            self._clock.mark("joined")
        elif self._schedule == "prefetched" and (self._on_device or self._copied is None):
            self._start()  # a side stream waits for what the main one was given; so would a later start

    def _copy_down(self) -> None:
        """Ask for the ids before the first block is launched, so that they do not wait for it."""
        staged = torch.empty(self._ids.shape, dtype=self._ids.dtype, pin_memory=True)
        staged.copy_(self._ids, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        self._ids = staged

    def begin(self) -> None:
        """See Lookup."""
        if self._schedule == "prefetched" and self._fetch is None:
            self._start()

    def join(self) -> Tensor:
        """See Lookup."""
        if self._fetch is None:
            self._start()
        return self._wait()

    def _wait(self) -> Tensor:
        assert self._fetch is not None
        return self._fetch[self._layer_id].wait()

    def _start(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        compressed = self._sequences.compress(self._ids)
        if self._slots is None:
            self._fetch = self._prefetcher.start(compressed, self._sequences.history)
            self._sequences.advance(compressed)
        else:
            assert self._lengths is not None
            self._fetch = self._prefetcher.start(compressed)
            self._sequences.start(compressed, self._lengths, self._slots)

    def leave(self) -> None:
        """See Lookup."""
        if self._fetch is not None:
            self._fetch.release()
        self._fetch = self._copied = None
