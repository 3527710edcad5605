"""When rows are fetched: as soon as the token ids are known, joined just before they are used.

    with Prefetcher(NgramHasher(plan), {1: table_1, 15: table_15}) as prefetcher:
        with prefetcher.start(compressed_ids, history) as fetch:     # [B, T]; hashing and gathering begin
            hidden = first_block(hidden)
            hidden = engram_1(hidden, fetch[1])                      # the layer joins: fetch[1].wait()

Tables that the CPU gathers from are served by one worker thread, which also hashes; tables that the accelerator
reads by itself by a side stream, with hashing on the device. A few rows are asked for by whoever starts the fetch, and
so are rows that the caller waits for before he does anything else (`waited_for`), on his own stream.
Waiting at once (`background=False`) is the synchronous schedule: the same code, nothing overlapped. At most `buffers`
fetches are in flight. An error in the background is raised at the join.

Whose buffers are whose: a fetch has a lease on a slot, and the slot is lent again when that lease is over: released, or
in nobody's hands any more (an exception, Ctrl-C, a fetch that was forgotten).
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import engram_ref.needs_torch  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from engram_ref.devices import side_stream
from engram_ref.hashing.device import DeviceHasher, DeviceHistory
from engram_ref.hashing.ngram import Hashed, NgramHasher, TokenHistory
from engram_ref.hashing.plan import LayerPlan
from engram_ref.tables.base import Pending, Ready, Table
from engram_ref.tables.staging import Arriving
from engram_ref.threads.errands import Done, Errand, Pool, call_off
from engram_ref.threads.forks import renew_after_fork
from engram_ref.threads.users import Users

if TYPE_CHECKING:
    from engram_ref.vocab import CompressedVocab

_Outcome = Errand[Pending] | Done[Pending]  # of one layer
_Way = Callable[[Table], Callable[..., Pending]]  # picks `start`, or what does it in other ways
Observer = Callable[[str, int, float, float], None]  # stage, layer id, begin and end by time.perf_counter
LEAST_BUFFERS = 2  # one fetch is used while the next is filled


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
        ValueError: no table, a layer the plan does not have, a table of other rows than the plan's, or a hasher on
            another device than a table.
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
            _check_rows(hasher.plan.layer(layer_id), table)
            _check_hasher(hasher, table)
        self._inline_tokens = self._most_inline_tokens()
        # A table that waits by itself, for a disk or for other processes, keeps the order of the worker.
        self._inline_at_most = sys.maxsize if all(table.inline_rows for table in self.tables.values()) else 0
        self._to_gpu = any(table.device.type == "cuda" for table in self.tables.values())
        self._background = background
        self._observer = observer
        self._buffers = buffers
        self._users = Users("this prefetcher")
        self._stream = self._side_stream()
        self._worker = Pool(1, "engram-prefetch") if background and not self._on_device() else None
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """In a forked process: slots that nobody uses."""
        # Whoever writes for fetches of before the fork does so in the parent, and would never end here.
        self._slots = [_Slot() for _ in range(self._buffers)]

    def _on_device(self) -> bool:
        return isinstance(self.hasher, DeviceHasher)

    def _most_inline_tokens(self) -> int:
        """Whoever starts a fetch of so many tokens asks for their rows himself; none where that means to wait."""
        # A thread works in turns with the model, whose operations wait for the interpreter lock meanwhile: for a few
        # rows it takes more than it hides (`INLINE_BYTES`).
        shares = []
        for layer_id, table in self.tables.items():
            if not table.inline_rows:
                return 0
            shares.append(Fraction(len(self.hasher.plan.layer(layer_id).primes), table.inline_rows))
        return int(1 / sum(shares))

    def _side_stream(self) -> Any:
        device = next(iter(self.tables.values())).device
        wanted = self._background and self._on_device() and device.type == "cuda"
        return side_stream(device) if wanted else None

    def start(
        self,
        compressed_ids: np.ndarray | Tensor,
        history: TokenHistory | DeviceHistory | None = None,
        *,
        waited_for: bool = False,
    ) -> Fetch:
        """Begin to fetch the rows of every layer for compressed ids [B, T].

        Args:
            compressed_ids: for a `DeviceHasher` a tensor on its device. A later change of an array does no harm.
            history: what came before; it is read, and may be advanced as soon as this returns.
            waited_for: the caller will do nothing before he waits, so that the worker could only be slower than he.

        Raises:
            RuntimeError: as many fetches as there are buffers are in flight: release one. Also of a closed prefetcher,
                and from within one of its own fetches.
        """
        if self._on_device():
            return self._lent(lambda lease: self._on_stream(compressed_ids, history, lease.buffers))
        way = self._way(np.size(compressed_ids), waited_for)
        return self._lent(lambda lease: self._on_cpu(compressed_ids, history, lease, way))

    def is_done_here(self, tokens: int, waited_for: bool = False) -> bool:
        """Whether whoever starts a fetch of so many tokens hashes them by himself, rather than the worker."""
        # `waited_for`: on a machine with an H200, handing 384 or 1,536 rows over and back cost more than it hid.
        return self._worker is None or tokens <= (self._inline_at_most if waited_for else self._inline_tokens)

    def hash_tokens(self, token_ids: np.ndarray, vocab: CompressedVocab, history: TokenHistory | None = None) -> Hashed:
        """Compress and hash token ids [B, T] for all layers in one pass, in the caller's thread, for `start_hashed`.

        For a step of a few tokens. The worker hashes a long prompt beside the caller: see `is_done_here`.

        Raises:
            ValueError: as `NgramHasher.from_tokens`; tell the tables, `excuse`.
        """
        assert isinstance(self.hasher, NgramHasher), "tables that the device reads look up by `start_lookup`"
        begin = time.perf_counter()
        hashed = self.hasher.from_tokens(token_ids, vocab, history)
        self._tell_hashed(next(iter(self.tables)), begin)  # for all of them
        return hashed

    def start_hashed(self, hashed: Hashed, *, waited_for: bool = False) -> Fetch:
        """As `start`, of what `hash_tokens` found.

        Raises:
            RuntimeError: as `start`.
        """
        rows = {layer.layer_id: found.reshape(-1) for layer, found in zip(self.hasher.plan.layers, hashed.rows)}
        way = self._way(hashed.compressed.size, waited_for)
        return self._lent(lambda lease: self._by_layer(lease, way, partial(self._gather, rows, lease.buffers)))

    def start_lookup(self, lookup: Callable[[], tuple[Mapping[int, Tensor], Tensor]]) -> tuple[Fetch, Pending]:
        """Begin what brings the rows of all layers by itself, `engram_ref.lookup.device`, on the side stream.

        Args:
            lookup: called at once, on the stream that is to do it: gives the values [B*T*C, D] by layer id, and one
                more tensor that it has written.

        Returns:
            The fetch, and the other tensor, to be waited for where it is used.

        Raises:
            RuntimeError: as `start`.
        """
        others: list[Pending] = []

        def begin(lease: _Lease) -> dict[int, _Outcome]:
            arrive: Callable[[Tensor], Pending] = Ready
            if self._stream is None:
                values, other = lookup()
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
                with torch.cuda.stream(self._stream):
                    values, other = lookup()
                    arrive = partial(Arriving, arrived=self._stream.record_event())
            others.append(arrive(other))
            return {layer_id: Done(partial(arrive, rows)) for layer_id, rows in values.items()}

        return self._lent(begin), others[0]

    def _lent(self, begin: Callable[[_Lease], Mapping[int, _Outcome]]) -> Fetch:
        """A fetch with a slot for it, and what `begin` has begun."""
        with self._users.here():
            if self._users.closed:
                raise RuntimeError("this prefetcher is closed: make a new one")
            lease = self._lend()
            try:
                return Fetch(lease, begin(lease), self._observer)
            except BaseException:  # nobody has the fetch, so nobody else would release it
                lease.end()
                raise

    def _lend(self) -> _Lease:
        with self._users.alone:
            slot = self._free_slot()
            if slot is None:
                gc.collect()  # a fetch that was forgotten may be part of a circle
                slot = self._free_slot()
            if slot is None:
                raise RuntimeError(
                    f"{self._buffers} fetches are in flight, one per buffer: release one (`with prefetcher.start(...)`)"
                )
            return slot.lend(self._users)

    def _free_slot(self) -> _Slot | None:
        """A slot that no fetch has, best one that nobody writes to."""
        written = None
        for slot in self._slots:
            if slot.is_free():
                if not slot.is_written():
                    return slot
                written = written or slot
        return written

    def _way(self, tokens: int, waited_for: bool) -> _Way | None:
        """How whoever starts a fetch asks a table by himself; None where the worker does."""
        if not self.is_done_here(tokens, waited_for):
            return None
        if self._worker is None or (waited_for and self._to_gpu):
            return lambda table: table.bring
        return lambda table: table.ask

    def _on_cpu(self, ids: Any, history: Any, lease: _Lease, way: _Way | None) -> Mapping[int, _Outcome]:
        if way is None:
            ids, history = np.array(ids), copy.copy(history)  # the caller may go on with both
        return self._by_layer(lease, way, partial(self._fetch, ids, history, lease.buffers))

    def _by_layer(self, lease: _Lease, way: _Way | None, fetch: Callable[..., Pending]) -> Mapping[int, _Outcome]:
        """Do `fetch(layer_id, table, how to start)` for all layers: here, or in the worker."""
        if way is not None:
            return {i: Done(partial(fetch, i, table, way(table))) for i, table in self.tables.items()}
        assert self._worker is not None
        errands: dict[int, Errand[Pending]] = {}
        for layer_id, table in self.tables.items():
            errands[layer_id] = errand = Errand(partial(fetch, layer_id, table, table.start))
            lease.errands.append(errand)
            self._worker.give(partial(self._beside, errand))
        return errands

    def _beside(self, errand: Errand[Pending]) -> None:
        with self._users.here():
            errand()

    def _fetch(
        self,
        ids: np.ndarray,
        history: TokenHistory | None,
        buffers: _Buffers,
        layer_id: int,
        table: Table,
        start: Callable[..., Pending],
    ) -> Pending:
        assert isinstance(self.hasher, NgramHasher)
        begin = time.perf_counter()
        try:
            rows = self.hasher(ids, layer_id, history=history).reshape(-1)  # [B*T*C]
        except ValueError as error:
            table.excuse(error)  # other processes may be waiting for this one's part
            raise
        self._tell_hashed(layer_id, begin)
        return self._gather({layer_id: rows}, buffers, layer_id, table, start)

    def _gather(
        self,
        rows: Mapping[int, np.ndarray],
        buffers: _Buffers,
        layer_id: int,
        table: Table,
        start: Callable[..., Pending],
    ) -> Pending:
        begin = time.perf_counter()
        buffers.numbers[layer_id] = numbers = torch.from_numpy(rows[layer_id])
        pending = start(numbers, buffers.room(layer_id, table, len(numbers)))
        if self._observer:
            self._observer("gather", layer_id, begin, time.perf_counter())
        return pending

    def _tell_hashed(self, layer_id: int, begin: float) -> None:
        if self._observer:
            self._observer("hash", layer_id, begin, time.perf_counter())

    def _on_stream(self, ids: Any, history: Any, buffers: _Buffers) -> dict[int, _Outcome]:
        """Hash and gather on the device; on a side stream, which first waits for the token ids."""
        assert isinstance(self.hasher, DeviceHasher)
        if self._stream is None:
            rows = self.hasher(ids, history)
            buffers.numbers |= {layer_id: rows[layer_id].reshape(-1) for layer_id in self.tables}
            return {i: Done(partial(table.start, rows[i].reshape(-1))) for i, table in self.tables.items()}
        outcomes: dict[int, _Outcome] = {}
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            ids.record_stream(self._stream)  # the caller may let go of it
            rows = self.hasher(ids, history)
            buffers.numbers |= {layer_id: rows[layer_id].reshape(-1) for layer_id in self.tables}
            for layer_id, table in self.tables.items():
                arrive = partial(_arrive, table, rows[layer_id].reshape(-1), self._stream)
                outcomes[layer_id] = Done(arrive)
        return outcomes

    def counters(self) -> dict[int, dict[str, int]]:
        """By layer, what was asked of its table so far: see `Table.counters`."""
        return {layer_id: table.counters() for layer_id, table in self.tables.items()}

    def excuse(self, error: BaseException) -> None:
        """Instead of `start`, where there is nothing to fetch because of an error: other processes may be waiting.

        Args:
            error: why; the caller raises it, unless it is raised here, in the words that all processes use.
        """
        errands = [Errand(partial(table.excuse, error)) for table in self.tables.values()]
        for errand in errands:
            if self._worker is None:
                errand()
            else:
                self._worker.give(errand)  # behind the fetches that are under way
        for errand in errands:
            errand.wait()
        for errand in errands:
            errand.result()

    def close(self) -> None:
        """Wait for what is in flight, end the thread, give back all staging memory; again, it does nothing more.

        Raises:
            RuntimeError: called from within one of its own fetches.
        """
        self._users.close()
        if self._worker is not None:
            self._worker.close()
        with self._users.here(), self._users.alone:  # others may close it, too
            for slot in self._slots:
                slot.empty()
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
    A fetch that was forgotten is given back when it is collected; rows of it that somebody has kept stay as they are.
    """

    def __init__(self, lease: _Lease, outcomes: Mapping[int, _Outcome], observer: Observer | None) -> None:
        self._lease = lease
        self._joins = {layer_id: _Join(layer_id, outcome, lease, observer) for layer_id, outcome in outcomes.items()}

    def __getitem__(self, layer_id: int) -> _Join:
        return self._joins[layer_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._joins)

    def __len__(self) -> int:
        return len(self._joins)

    def release(self) -> None:
        """Let the buffers be filled again, once nobody writes to them; a second time does nothing.

        Raises:
            FetchError: the fetch of a layer failed, and no join has raised it.
        """
        if self._lease.over:
            return
        try:
            for join in self._joins.values():
                join.settle()
            self._lease.errands.clear()  # all have ended
        finally:
            self._lease.end()
        for join in self._joins.values():
            if not join.told:
                join.tell()

    def __enter__(self) -> Fetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except FetchError:
            if error is None:  # otherwise what ended the block is raised, which came first
                raise


class _Join:
    """The pending fetch of one layer, wherever it is running."""

    def __init__(self, layer_id: int, errand: _Outcome, lease: _Lease, observer: Observer | None) -> None:
        self._layer_id = layer_id
        self._errand = errand
        self._lease = lease  # while somebody may still wait, nobody else gets the slot
        self._observer = observer
        self.told = False

    def wait(self) -> Tensor:
        """The rows, [B*T*C, D], safe to use on the current stream.

        Raises:
            FetchError: the fetch failed; the cause is chained.
            RuntimeError: the fetch was released.
        """
        begin = time.perf_counter()
        self.settle()
        if self._lease.over:
            raise self._released()
        self.tell()
        pending = self._errand.result()
        values = pending.values if type(pending) is Ready else self._write(pending)
        if self._observer:
            self._observer("wait", self._layer_id, begin, time.perf_counter())
        return values

    @property
    def row_numbers(self) -> Tensor:
        """The numbers of the rows, [B*T*C], where the table wanted them; there once `wait` has returned."""
        return self._lease.buffers.numbers[self._layer_id]

    def settle(self) -> None:
        """Wait until nobody writes into the buffers any more."""
        if self._errand.ended or self._lease.over:
            return
        if self._lease.users.is_here():
            raise RuntimeError("a fetch is waited for from within one of the same prefetcher (observer): return first")
        self._errand.wait()

    def _write(self, pending: Pending) -> Tensor:
        """Rows that arrive only while somebody waits for them."""
        with self._lease.writing() as in_time:
            if not in_time:
                raise self._released()
            try:
                return pending.wait()
            except (OSError, ValueError) as error:
                raise self._failed(error) from error

    def _released(self) -> RuntimeError:
        return RuntimeError(f"the rows of layer {self._layer_id} were released: wait for them before release()")

    def tell(self) -> None:
        """Raise what went wrong in the background."""
        self.told = True
        error = self._errand.error
        if error is not None:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> FetchError:
        return FetchError(f"fetching the rows of layer {self._layer_id} failed: {error}")


class _Lease:
    """The right of one fetch to a slot and the buffers in it, until it ends it or nobody has it any more."""

    def __init__(self, slot: _Slot, buffers: _Buffers, users: Users) -> None:
        self.slot = slot
        self.buffers = buffers
        self.users = users  # of the prefetcher
        self.errands: list[Errand[Pending]] = []  # each is here before anybody can begin it
        self._ended = threading.Lock()  # locked once, by the first who ends it
        self._ending = False
        self._writers: list[tuple[int, Any]] = []  # processes, and what is locked while somebody there writes

    @property
    def over(self) -> bool:
        """Whether the slot may be lent to another fetch."""
        return self._ended.locked()

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Around writing to the buffers while waiting: until then nobody else gets them. Whether it is not too late."""
        lock = threading.RLock()
        with lock:
            # In this order: either this sees that the lease ends, or who ends it sees this.
            self._writers.append((os.getpid(), lock))
            yield not self._ending

    def end(self) -> None:
        """Give the slot and the buffers back, once nobody writes to them."""
        self._ending = True
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
        self.kept: _Buffers | None = None
        self._lease: weakref.ref[_Lease] | None = None
        self._errands: list[Errand[Pending]] = []  # of the last lease

    def is_free(self) -> bool:
        """Whether no fetch has it."""
        lease = None if self._lease is None else self._lease()
        return lease is None or lease.over

    def is_written(self) -> bool:
        """Whether somebody still works for a lease that is over."""
        return bool(self._errands) and any(errand.is_being_done for errand in self._errands)

    def lend(self, users: Users) -> _Lease:
        """A new lease, as soon as nobody works for the old one."""
        if self._errands:
            call_off(self._errands)  # what writes is waited for, and what has not begun never will
        lease = _Lease(self, self.kept or _Buffers(), users)
        self.kept, self._errands, self._lease = None, lease.errands, weakref.ref(lease)
        return lease

    def empty(self) -> None:
        """Let go of all buffers, as soon as nobody writes to them."""
        call_off(self._errands)
        self.kept = None


class _Buffers:
    """Where the rows of one fetch arrive on a CPU; on an accelerator the table brings the memory."""

    def __init__(self) -> None:
        self._arrivals: dict[int, Tensor] = {}
        self.numbers: dict[int, Tensor] = {}  # of the rows of the last fetch, by layer id

    def room(self, layer_id: int, table: Table, count: int) -> Tensor | None:
        """[count, D] to receive rows, kept from fetch to fetch: new memory costs more than the gather."""
        if table.device.type != "cpu" or table.trained:
            return None
        kept = self._arrivals.get(layer_id)
        if kept is None or kept.shape[0] < count:
            with torch.inference_mode(False):  # written to in whatever mode a later fetch runs
                kept = torch.empty((count, table.format.width), dtype=table.format.dtype, device="cpu")
            self._arrivals[layer_id] = kept
        return kept if kept.shape[0] == count else kept[:count]  # a slice takes longer than a lookup


def _check_rows(layer: LayerPlan, table: Table) -> None:
    """Refuse a plan that names other rows: of a larger table it would fetch wrong ones in silence."""
    if table.rows != layer.rows:
        raise ValueError(
            f"a plan of {layer.rows} rows for the table of layer {layer.layer_id}, which has {table.rows}: give the "
            "plan that the table was made with"
        )


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
