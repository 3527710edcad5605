"""When rows are fetched: as soon as the token ids are known, joined just before they are used.

    with Prefetcher(NgramHasher(plan), {1: table_1, 15: table_15}) as prefetcher:
        with prefetcher.start(compressed_ids, history) as fetch:     # [B, T]; hashing and gathering begin
            hidden = first_block(hidden)
            hidden = engram_1(hidden, fetch[1])                      # the layer joins: fetch[1].wait()

Tables that the CPU gathers from are served by one worker thread, which also hashes; tables that the accelerator
reads by itself by a side stream, with hashing on the device. Waiting at once (`background=False`) is the
synchronous schedule: the same code, nothing overlapped. At most `buffers` fetches are in flight, two at least:
one is being used while the next is filled. An error in the background is raised at the join.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Union

import engram_ref.needs_torch  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from engram_ref.hashing import NgramHasher, TokenHistory
from engram_ref.hashing_torch import DeviceHasher, DeviceHistory
from engram_ref.tables.base import Pending, Ready, Table
from engram_ref.tables.delivery import Arriving

_Job = Union["Future[Pending]", "_Done"]
Observer = Callable[[str, int, float, float], None]  # stage, layer id, begin and end by time.perf_counter
LEAST_BUFFERS = 2
# Handing a fetch to the thread costs some 50 us; rows in memory of up to this many bytes are gathered in less.
INLINE_BYTES = 64 * 1024


class FetchError(RuntimeError):
    """A fetch that was running in the background failed; the cause is chained."""


class Prefetcher:
    """Starts the fetches of all Engram layers for one batch of tokens.

    Args:
        hasher: `NgramHasher` for tables whose row numbers are wanted on the CPU, else `DeviceHasher`.
        tables: the table of each layer, by layer id. They stay the caller's to close.
        buffers: fetches that may be in flight at a time.
        background: False waits for nothing else: hash, gather and copy run in the caller's thread and stream.
        observer: is told how long each stage took (hash, gather, wait), from whichever thread it ran in.

    Raises:
        ValueError: no table, a layer the plan does not have, or a hasher on another device than a table.
    """

    def __init__(
        self,
        hasher: NgramHasher | DeviceHasher,
        tables: Mapping[int, Table],
        buffers: int = LEAST_BUFFERS,
        background: bool = True,
        observer: Observer | None = None,
    ) -> None:
        if not tables:
            raise ValueError("no tables: give the table of each layer, by layer id")
        if buffers < LEAST_BUFFERS:
            raise ValueError(f"buffers={buffers}: with fewer than {LEAST_BUFFERS} nothing overlaps")
        self.tables = dict(tables)
        self.hasher = hasher
        for layer_id, table in self.tables.items():
            hasher.plan.layer(layer_id)
            _check_hasher(hasher, table)
        self._background = background
        self._observer = observer
        self._slots = [_Slot() for _ in range(buffers)]
        self._stream = self._side_stream()
        self._worker = ThreadPoolExecutor(1, "engram-prefetch") if self._wants_thread() else None
        self._closed = False

    def _on_device(self) -> bool:
        return isinstance(self.hasher, DeviceHasher)

    def _side_stream(self) -> Any:
        device = next(iter(self.tables.values())).device
        wanted = self._background and self._on_device() and device.type == "cuda"
        return torch.cuda.Stream(device) if wanted else None

    def _wants_thread(self) -> bool:
        return self._background and not self._on_device()

    def start(self, compressed_ids: np.ndarray | Tensor, history: TokenHistory | DeviceHistory | None = None) -> Fetch:
        """Begin to fetch the rows of every layer for compressed ids [B, T].

        Args:
            compressed_ids: for a `DeviceHasher` a tensor on its device. A later change of an array does no harm.
            history: what came before; it is read, and may be advanced as soon as this returns.

        Raises:
            RuntimeError: as many fetches as there are buffers are in flight: release one.
        """
        slot = self._free_slot()
        jobs = (
            self._on_stream(compressed_ids, history)
            if self._on_device()
            else self._on_cpu(compressed_ids, history, slot)
        )
        slot.busy = True
        return Fetch(slot, jobs, self._observer)

    def start_lookup(self, lookup: Callable[[], tuple[Mapping[int, Tensor], Tensor]]) -> tuple[Fetch, Pending]:
        """Begin what brings the rows of all layers by itself, `engram_ref.lookup`, on the side stream.

        Args:
            lookup: called at once, on the stream that is to do it: gives the values [B*T*C, D] by layer id, and one
                more tensor that it has written.

        Returns:
            The fetch, and the other tensor, to be waited for where it is used.

        Raises:
            RuntimeError: as many fetches as there are buffers are in flight: release one.
        """
        slot = self._free_slot()
        arrive: Callable[[Tensor], Pending] = Ready
        if self._stream is None:
            values, other = lookup()
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                values, other = lookup()
                arrive = functools.partial(Arriving, arrived=self._stream.record_event())
        slot.busy = True
        jobs: dict[int, _Job] = {layer_id: _Done(arrive(rows)) for layer_id, rows in values.items()}
        return Fetch(slot, jobs, self._observer), arrive(other)

    def _free_slot(self) -> _Slot:
        if self._closed:
            raise RuntimeError("this prefetcher is closed: make a new one")
        slot = next((slot for slot in self._slots if not slot.busy), None)
        if slot is None:
            raise RuntimeError(
                f"{len(self._slots)} fetches are in flight, one per buffer: release one (`with prefetcher.start(...)`)"
            )
        return slot

    def _on_cpu(self, ids: Any, history: Any, slot: _Slot) -> dict[int, _Job]:
        here = self._worker is None or self._is_small(ids)
        if not here:
            ids, history = np.array(ids), copy.copy(history)  # the caller may go on with both
        jobs: dict[int, _Job] = {}
        for layer_id, table in self.tables.items():
            if here:
                jobs[layer_id] = _run_now(self._fetch, layer_id, table, ids, history, slot)
            else:
                assert self._worker is not None
                jobs[layer_id] = self._worker.submit(self._fetch, layer_id, table, ids, history, slot)
        return jobs

    def _is_small(self, ids: Any) -> bool:
        tables = self.tables.values()
        nbytes = sum(np.size(ids) * self._columns(i) * t.format.row_bytes for i, t in self.tables.items())
        return nbytes <= INLINE_BYTES and not any(table.waits for table in tables)

    def _columns(self, layer_id: int) -> int:
        return len(self.hasher.plan.layer(layer_id).primes)

    def _fetch(
        self, layer_id: int, table: Table, ids: np.ndarray, history: TokenHistory | None, slot: _Slot
    ) -> Pending:
        assert isinstance(self.hasher, NgramHasher)
        begin = time.perf_counter()
        rows = torch.from_numpy(self.hasher(ids, layer_id, history=history).reshape(-1))  # [B*T*C]
        hashed = time.perf_counter()
        pending = table.start(rows, slot.room(layer_id, table, len(rows)))
        if self._observer:
            self._observer("hash", layer_id, begin, hashed)
            self._observer("gather", layer_id, hashed, time.perf_counter())
        return pending

    def _on_stream(self, ids: Any, history: Any) -> dict[int, _Job]:
        """Hash and gather on the device; on a side stream, which first waits for the token ids."""
        assert isinstance(self.hasher, DeviceHasher)
        if self._stream is None:
            rows = self.hasher(ids, history)
            return {i: _run_now(table.start, rows[i].reshape(-1)) for i, table in self.tables.items()}
        jobs: dict[int, _Job] = {}
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            ids.record_stream(self._stream)  # the caller may let go of it
            rows = self.hasher(ids, history)
            for layer_id, table in self.tables.items():
                jobs[layer_id] = _run_now(_arrive, table, rows[layer_id].reshape(-1), self._stream)
        return jobs

    def close(self) -> None:
        """Wait for what is in flight, end the thread, give back all staging memory."""
        self._closed = True
        if self._worker is not None:
            self._worker.shutdown()
        for slot in self._slots:
            slot.free()
        for table in self.tables.values():
            table.trim()
        if isinstance(self.hasher, DeviceHasher):
            self.hasher.check()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a Prefetcher of Engram rows has a thread, and fetches in flight: make a new one instead of a copy"
        )

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Fetch(Mapping[int, Pending]):
    """The started fetch of one batch: per layer id something to wait for.

    The rows stay as they are until `release`; use the fetch as a context manager and they are released at its end.
    """

    def __init__(self, slot: _Slot, jobs: dict[int, _Job], observer: Observer | None) -> None:
        self._slot = slot
        self._joins = {layer_id: _Join(layer_id, job, observer) for layer_id, job in jobs.items()}

    def __getitem__(self, layer_id: int) -> _Join:
        return self._joins[layer_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._joins)

    def __len__(self) -> int:
        return len(self._joins)

    def release(self) -> None:
        """Let the buffers be filled again. An error that no join has raised is raised here."""
        try:
            for join in self._joins.values():
                join.settle()
        finally:
            self._slot.busy = False

    def __enter__(self) -> Fetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _Join:
    """The pending fetch of one layer, wherever it is running."""

    def __init__(self, layer_id: int, job: _Job, observer: Observer | None) -> None:
        self._layer_id = layer_id
        self._job = job
        self._observer = observer
        self._told = False

    def wait(self) -> Tensor:
        """The rows, [B*T*C, D], safe to use on the current stream.

        Raises:
            FetchError: the fetch failed; the cause is chained.
        """
        begin = time.perf_counter()
        values = self._started().wait()
        if self._observer:
            self._observer("wait", self._layer_id, begin, time.perf_counter())
        return values

    def settle(self) -> None:
        """Wait until nobody writes into the buffers any more."""
        if not self._told:
            self._started()

    def _started(self) -> Pending:
        error = self._job.exception()
        self._told = True
        if error is not None:
            raise FetchError(f"fetching the rows of layer {self._layer_id} failed: {error}") from error
        return self._job.result()


class _Slot:
    """The buffers of one fetch in flight: where rows arrive on a CPU; on an accelerator the table brings them."""

    def __init__(self) -> None:
        self.busy = False
        self._arrivals: dict[int, Tensor] = {}

    def room(self, layer_id: int, table: Table, count: int) -> Tensor | None:
        """[count, D] to receive rows, kept from fetch to fetch: new memory costs more than the gather."""
        if table.device.type != "cpu" or table.trained:
            return None
        kept = self._arrivals.get(layer_id)
        if kept is None or len(kept) < count:
            with torch.inference_mode(False):  # written to in whatever mode a later fetch runs
                kept = torch.empty((count, table.format.width), dtype=table.format.dtype)
            self._arrivals[layer_id] = kept
        return kept[:count]

    def free(self) -> None:
        self._arrivals.clear()


def _check_hasher(hasher: NgramHasher | DeviceHasher, table: Table) -> None:
    device = hasher.device if isinstance(hasher, DeviceHasher) else torch.device("cpu")
    if device.type != table.index_device.type:
        raise ValueError(
            f"a hasher on {device} for a {table.placement} table that wants row numbers on {table.index_device}: "
            "use NgramHasher for the CPU, DeviceHasher for an accelerator"
        )


def _arrive(table: Table, rows: Tensor, stream: Any) -> Pending:
    """A fetch on a side stream, which is current: whoever uses the rows waits for what is on it now."""
    return Arriving(table.start(rows).wait(), stream.record_event())


@dataclass(frozen=True)
class _Done:
    """The outcome of a fetch that ran in the caller's thread; what failed is raised at the join, too."""

    pending: Pending | None
    error: Exception | None = None

    def exception(self) -> Exception | None:
        return self.error

    def result(self) -> Pending:
        assert self.pending is not None
        return self.pending


def _run_now(function: Callable[..., Pending], *arguments: Any) -> _Done:
    try:
        return _Done(function(*arguments))
    except Exception as error:  # nothing is swallowed: the join raises it
        return _Done(None, error)
