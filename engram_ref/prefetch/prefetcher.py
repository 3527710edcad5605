"""Which rows are asked for, by whom and when: one worker, a side stream, or whoever starts the fetch."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import engram_ref.needs_torch  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from engram_ref.devices import beside, side_stream
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory
from engram_ref.hashing.ngram import Hashed, NgramHasher, TokenHistory
from engram_ref.hashing.plan import LayerPlan
from engram_ref.prefetch.fetch import Fetch, Observer, Outcome
from engram_ref.prefetch.slots import Buffers, Lease, Slots
from engram_ref.tables.base import Pending, Ready, Table
from engram_ref.tables.staging import Arriving
from engram_ref.threads.errands import Done, Errand, Pool
from engram_ref.threads.forks import renew_after_fork
from engram_ref.threads.users import Users

if TYPE_CHECKING:
    from engram_ref.vocab import CompressedVocab

_Way = Callable[[Table], Callable[..., Pending]]  # picks `start`, or what does it in other ways
LEAST_BUFFERS = 2  # one fetch is used while the next is filled


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
        self._slots = Slots(self._buffers)

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
        """As `start`, of what `hash_tokens` found; as there, a later change does no harm.

        Raises:
            RuntimeError: as `start`.
        """
        way = self._way(hashed.compressed.size, waited_for)
        numbers = hashed.rows.copy() if way is None else hashed.rows
        rows = {layer.layer_id: found.reshape(-1) for layer, found in zip(self.hasher.plan.layers, numbers)}
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

        def begin(lease: Lease) -> dict[int, Outcome]:
            arrive: Callable[[Tensor], Pending] = Ready
            with beside(self._stream):
                values, other = lookup()
                if self._stream is not None:
                    arrive = partial(Arriving, arrived=self._stream.record_event())
            others.append(arrive(other))
            return {layer_id: Done(partial(arrive, rows)) for layer_id, rows in values.items()}

        return self._lent(begin), others[0]

    def _lent(self, begin: Callable[[Lease], Mapping[int, Outcome]]) -> Fetch:
        """A fetch with a slot for it, and what `begin` has begun."""
        lease = None
        try:  # around both locks: Ctrl-C may come behind either, and whoever keeps the exception keeps what is here
            with self._users.here():
                if self._users.closed:
                    raise RuntimeError("this prefetcher is closed: make a new one")
                with self._users.alone:
                    lease = self._slots.lend(self._users)
                return Fetch(lease, begin(lease), self._observer)
        except BaseException:  # nobody has the fetch, so nobody else would release it
            if lease is not None:
                lease.end()
            raise

    def _way(self, tokens: int, waited_for: bool) -> _Way | None:
        """How whoever starts a fetch asks a table by himself; None where the worker does."""
        if not self.is_done_here(tokens, waited_for):
            return None
        if self._worker is None or (waited_for and self._to_gpu):
            return lambda table: table.bring
        return lambda table: table.ask

    def _on_cpu(self, ids: Any, history: Any, lease: Lease, way: _Way | None) -> Mapping[int, Outcome]:
        if way is None:
            ids, history = np.array(ids), copy.copy(history)  # the caller may go on with both
        return self._by_layer(lease, way, partial(self._fetch, ids, history, lease.buffers))

    def _by_layer(self, lease: Lease, way: _Way | None, fetch: Callable[..., Pending]) -> Mapping[int, Outcome]:
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
        buffers: Buffers,
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
        buffers: Buffers,
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

    def _on_stream(self, ids: Any, history: Any, buffers: Buffers) -> dict[int, Outcome]:
        """Hash and gather on the device; on a side stream, which first waits for the token ids."""
        assert isinstance(self.hasher, DeviceHasher)
        with beside(self._stream):
            if self._stream is not None:
                ids.record_stream(self._stream)  # the caller may let go of it
            rows = self.hasher(ids, history)
            buffers.numbers |= {layer_id: rows[layer_id].reshape(-1) for layer_id in self.tables}
            return {
                i: Done(partial(_arrive, table, buffers.numbers[i], self._stream)) for i, table in self.tables.items()
            }

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
            self._slots.empty()
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

    def __exit__(self, *error: object) -> None:
        self.close()


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
    """A fetch on the current stream; if that is a side stream, whoever uses the rows waits for what is on it now."""
    pending = table.start(rows)
    return pending if stream is None else Arriving(pending.wait(), stream.record_event())
