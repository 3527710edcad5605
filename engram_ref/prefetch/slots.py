"""Whose buffers are whose, among fetches in flight.

A fetch has a lease on a slot, and the slot is lent again when that lease is over: released, or in nobody's hands any
more (an exception, Ctrl-C, a fetch that was forgotten).
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.tables.base import Pending, Table
from engram_ref.threads.errands import Errand, call_off
from engram_ref.threads.users import Users


class Slots:
    """Room for so many fetches in flight; of whoever calls, one at a time."""

    def __init__(self, count: int) -> None:
        self._all = [_Slot() for _ in range(count)]

    def lend(self, users: Users) -> Lease:
        """A lease on a slot that no fetch has.

        Raises:
            RuntimeError: there is none.
        """
        slot = self._free()
        if slot is None:
            gc.collect()  # a fetch that was forgotten may be part of a circle
            slot = self._free()
        if slot is None:
            raise RuntimeError(
                f"{len(self._all)} fetches are in flight, one per buffer: release one (`with prefetcher.start(...)`)"
            )
        return slot.lend(users)

    def _free(self) -> _Slot | None:
        """A slot that no fetch has, best one that nobody writes to."""
        written = None
        for slot in self._all:
            if slot.is_free():
                if not slot.is_written():
                    return slot
                written = written or slot
        return written

    def empty(self) -> None:
        """Let go of all buffers, as soon as nobody writes to them."""
        for slot in self._all:
            slot.empty()


class Lease:
    """The right of one fetch to a slot and the buffers in it, until it ends it or nobody has it any more."""

    def __init__(self, slot: _Slot, buffers: Buffers, users: Users) -> None:
        self.slot = slot
        self.buffers = buffers
        self.users = users  # of the prefetcher
        self.errands: list[Errand[Pending]] = []  # each is here before anybody can begin it
        self._ended = threading.Lock()  # locked once, by the first who ends it
        self.ending = False  # too late to write; to be looked at inside of `writing`
        self._writers: list[tuple[int, Any]] = []  # processes, and what is locked while somebody there writes

    @property
    def over(self) -> bool:
        """Whether the slot may be lent to another fetch."""
        return self._ended.locked()

    def writing(self) -> Any:
        """A lock, to be held by `with` while writing to the buffers: until then nobody else gets them."""
        # Not a generator: Ctrl-C could leave it suspended, and locked for as long as somebody keeps the exception.
        lock = threading.RLock()
        # Before `ending` is looked at: either who writes sees that the lease ends, or who ends it sees the lock.
        self._writers.append((os.getpid(), lock))
        return lock

    def end(self) -> None:
        """Give the slot and the buffers back, once nobody writes to them."""
        self.ending = True
        for process, lock in self._writers:
            if process == os.getpid():  # a fork has no other thread
                with lock:
                    pass
        if self._ended.acquire(False):
            self.slot.kept = self.buffers


class _Slot:
    """Room for one fetch in flight; at any time one lease on it is valid, or none.

    Attributes:
        kept: buffers that were given back; those of a forgotten lease were not, and stay with whoever has rows of it.
    """

    def __init__(self) -> None:
        self.kept: Buffers | None = None
        self._lease: weakref.ref[Lease] | None = None
        self._errands: list[Errand[Pending]] = []  # of the last lease

    def is_free(self) -> bool:
        """Whether no fetch has it."""
        lease = None if self._lease is None else self._lease()
        return lease is None or lease.over

    def is_written(self) -> bool:
        """Whether somebody still works for a lease that is over."""
        return bool(self._errands) and any(errand.is_being_done for errand in self._errands)

    def lend(self, users: Users) -> Lease:
        """A new lease, as soon as nobody works for the old one."""
        if self._errands:
            call_off(self._errands)  # what writes is waited for, and what has not begun never will
        lease = Lease(self, self.kept or Buffers(), users)
        self.kept, self._errands, self._lease = None, lease.errands, weakref.ref(lease)
        return lease

    def empty(self) -> None:
        """Let go of all buffers, as soon as nobody writes to them."""
        call_off(self._errands)
        self.kept = None


class Buffers:
    """Where the rows of one fetch arrive on a CPU; on an accelerator the table brings the memory."""

    def __init__(self) -> None:
        self._arrivals: dict[int, Tensor] = {}
        self.numbers: dict[int, Tensor] = {}  # of the rows of the last fetch, by layer id

    def room(self, layer_id: int, table: Table, count: int) -> Tensor | None:
        """[count, D] to receive rows, kept from fetch to fetch: new memory costs more than the gather."""
        if table.device.type != "cpu" or table.trained:
            return None
        kept = self._arrivals.get(layer_id)
        # What somebody asked gradients of stays his.
        if kept is None or kept.shape[0] < count or kept.requires_grad:
            with torch.inference_mode(False):  # written to in whatever mode a later fetch runs
                kept = torch.empty((count, table.format.width), dtype=table.format.dtype, device="cpu")
            self._arrivals[layer_id] = kept
        return kept if kept.shape[0] == count else kept[:count]  # a slice takes longer than a lookup
