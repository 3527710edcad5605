"""Where the time of a fetch by the CPU goes, on the host's clock: its parts, the hand-over to a thread, more threads.

    with StagedParts(plan, vocab, table, batch) as parts:
        parts.fetch(ids, before)        # {"hash": s, "start": s, "join": s, "whole": s, "arrive": s}
        parts.hand_over(ids, before)    # s
    with SharedGather(rows, most, threads=4, pinned=True) as shared:
        shared.time(numbers)            # s, of the gather alone

Parts are those of one fetch, as the prefetcher tells its observer of them, begun on an idle device: `hash` token ids to
row numbers, `start` check them, gather, and submit the copy, `join` let the stream wait for it. With the Python between
them they are the `whole`. `arrive` is what the device still takes after that. `hand_over` is a whole fetch that the
worker does while the caller waits for it, however few its rows are. `disturbance` is what else kept the host from it.
"""

from __future__ import annotations

import os
import resource
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.setup.sizes import LAYER
from engram_ref.hashing import HashPlan, NgramHasher, TokenHistory
from engram_ref.prefetch import Prefetcher
from engram_ref.rows.gather import gather_parts
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables.base import Table
from engram_ref.threads.errands import Errand, Pool
from engram_ref.vocab import CompressedVocab

_STEAL = 8  # its word in the first line of /proc/stat, behind "cpu"
_STAGES = {"hash": "hash", "gather": "start", "wait": "join"}  # by the prefetcher's name


def disturbance() -> dict[str, float]:
    """What came between this process and its processors so far: of two of these, the difference.

    Seconds that the host of a virtual machine took from all of its processors together (0 where the system does not
    tell), how often the process was switched away before it was done, and pages that it touched for the first time.
    """
    used, stolen = resource.getrusage(resource.RUSAGE_SELF), 0.0
    with suppress(OSError):
        stolen = int(Path("/proc/stat").read_text(encoding="utf-8").split()[_STEAL]) / os.sysconf("SC_CLK_TCK")
    return {"stolen_s": stolen, "switched_away": used.ru_nivcsw, "page_faults": used.ru_minflt}


class _HandsOver(Prefetcher):
    """One whose caller does nothing himself."""

    def is_done_here(self, tokens: int, waited_for: bool = False) -> bool:
        """Never, though a few rows would take him less time than to hand them over."""
        return False


class StagedParts(AbstractContextManager[Any]):
    """Times fetches from a table that the CPU gathers from.

    Args:
        plan: of its layer.
        vocab: token id -> compressed id.
        table: its rows.
        batch: tokens of a step, one of each sequence.
    """

    def __init__(self, plan: HashPlan, vocab: CompressedVocab, table: Table, batch: int) -> None:
        self._vocab, self._device = vocab, table.device
        self._history = TokenHistory(plan, batch)
        self._found: dict[str, float] = {}
        with ExitStack() as stack:
            hasher, tables = NgramHasher(plan), {LAYER: table}
            self._here = stack.enter_context(Prefetcher(hasher, tables, background=False, observer=self._note))
            self._worker = stack.enter_context(_HandsOver(hasher, tables))
            self._stack = stack.pop_all()

    def _note(self, stage: str, layer_id: int, begin: float, end: float) -> None:
        self._found[_STAGES[stage]] = end - begin

    def fetch(self, ids: np.ndarray, before: np.ndarray) -> dict[str, float]:
        """Seconds of each part of one fetch.

        Args:
            ids: token ids [B, 1].
            before: compressed ids before them, [B, N-1].
        """
        self._history.ids = before
        self._found = {}
        self._settle()  # the device is idle, so that what it still takes at the end is this fetch's alone
        begin = time.perf_counter()
        hashed = self._here.hash_tokens(ids, self._vocab, self._history)
        with self._here.start_hashed(hashed) as fetch:
            fetch[LAYER].wait()
        end = time.perf_counter()
        self._settle()
        arrived = time.perf_counter()
        return {**self._found, "whole": end - begin, "arrive": arrived - end}

    def hand_over(self, ids: np.ndarray, before: np.ndarray) -> float:
        """Seconds of a fetch that the worker does, until the caller has joined it."""
        self._history.ids = before
        self._settle()
        begin = time.perf_counter()
        with self._worker.start(self._vocab(ids), self._history) as fetch:
            fetch[LAYER].wait()
        return time.perf_counter() - begin

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class SharedGather(AbstractContextManager[Any]):
    """Gathers rows into staging memory with so many threads, the caller's among them; they stay between gathers.

    Args:
        rows: of a table in host memory.
        most: rows of the largest gather.
        threads: one at least.
        pinned: whether the staging memory is page-locked, for a GPU.
    """

    def __init__(self, rows: Rows, most: int, threads: int, pinned: bool) -> None:
        self._rows, self._threads = rows, threads
        self._memory = HostMemory(most * rows.format.row_bytes)
        self._memory.bytes.zero_()  # touched
        if pinned:
            self._memory.pin(self._memory.nbytes)
        self._pool = Pool(max(1, threads - 1), "shared-gather")

    def gather(self, numbers: Tensor) -> Tensor:
        """The rows of some numbers, int32 or int64 [N], as they are stored, uint8 [N, row_bytes]."""
        count, row_bytes = len(numbers), self._rows.format.row_bytes
        out = self._memory.bytes[: count * row_bytes].view(count, row_bytes)
        bounds = [count * part // self._threads for part in range(self._threads + 1)]
        shares = [slice(*bounds[part : part + 2]) for part in range(self._threads)]
        errands = [Errand(partial(gather_parts, self._rows.parts, numbers[share], out[share])) for share in shares[1:]]
        for errand in errands:
            self._pool.give(errand)
        gather_parts(self._rows.parts, numbers[shares[0]], out[shares[0]])
        for errand in errands:
            errand.result()
        return out

    def time(self, numbers: Tensor) -> float:
        """Seconds of a gather."""
        begin = time.perf_counter()
        self.gather(numbers)
        return time.perf_counter() - begin

    def __exit__(self, *error: object) -> None:
        self._pool.close()
        self._memory.close()
