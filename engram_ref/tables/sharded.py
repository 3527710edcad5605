"""A table that several processes hold together: each owns some rows, on one machine or many, and asks for the others.

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))      # nccl between GPUs
    plan = ShardPlan.of_layer(hash_plan.layer(1), dist.get_world_size())
    with make_table("sharded", StoredRows.find(path), device, plan=plan) as table:      # reads its own rows only
        values = table.start(rows).wait()       # row numbers of the whole table; every rank takes part

Every rank starts the same number of fetches, in one order, each for any rows, or for none: an owner serves the others
while it fetches for itself (`serve_others`, once it has nothing left to fetch). Rows travel as they are stored and are
decoded where they arrive. What is wrong on one rank, a row that does not exist or a disk that fails, is raised on all
of them when they join, with the same words; `excuse` says so of a fetch that did not begin.

    python -m pytest tests/ref/tables/test_sharded.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engram_ref.devices import as_device
from engram_ref.rows.rows import Rows
from engram_ref.sharding.agreement import RankLost, agreed, require_same
from engram_ref.sharding.exchange import AllGather, AllToAll, Arrival, Asked, Exchange
from engram_ref.sharding.plan import ShardPlan, Traffic
from engram_ref.sharding.routing import Route, route_rows
from engram_ref.tables.base import Pending, Table, check_out, check_rows
from engram_ref.tables.hot import HotTable
from engram_ref.tables.staging import Delivery, Once

_NONE = np.empty(0, dtype=np.int64)


class ShardedTable(Table):
    """One rank's view of a table whose rows several ranks own.

    Args:
        local: this rank's own rows, as any table; it is closed with this one.
        plan: which rank owns which rows; the same on all.
        group: of `torch.distributed`, used by this table alone, or by tables that one thread fetches from in turn.
        device: where fetched rows arrive.
        same_tokens: all ranks run the same tokens (tensor parallel), and fetch the same rows.
        unique: ask for each row of a fetch once, however often it is wanted.
        own_group: end the group with the table.

    Raises:
        ValueError: another rank has another plan, row format or way to exchange; shards that do not fit the plan; rows
            that are trained; or a group that cannot move rows to this device.
        RankLost: a rank did not come.
    """

    placement = "sharded"
    waits = True  # for the others: always in the prefetcher's thread, which keeps one order on all ranks

    def __init__(
        self,
        local: Table,
        plan: ShardPlan,
        group: Any,
        device: str | torch.device = "cpu",
        *,
        same_tokens: bool = False,
        unique: bool = False,
        own_group: bool = False,
    ) -> None:
        super().__init__(plan.rows, local.format, as_device(device), torch.device("cpu"))
        self.plan = plan
        self.group = group
        self.unique = unique
        row_bytes = self.format.row_bytes
        exchange = AllGather if same_tokens else AllToAll
        self.exchange: Exchange = exchange(plan, group, row_bytes)
        with agreed(group):
            _check(self, local)
        way = f"{self.format} {same_tokens} {unique and same_tokens}"
        require_same(group, plan.checksum, "plan of shards")
        require_same(group, hashlib.sha256(way.encode()).hexdigest(), "row format or way to exchange rows")
        self._local = local
        self._own_group = own_group
        self._in_step = True  # with the other ranks: between two fetches
        self._delivery = Delivery(self.device, self.format)

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Ask the owners, serve those who ask this rank, and let the rows come.

        Args:
            rows: row numbers [N] of the whole table, int32 or int64, on the CPU; N differs from rank to rank.
            out: as for every table.

        Returns:
            The fetch. Its `wait` raises what was wrong on any rank.

        Raises:
            RankLost: a rank ended, or did not come in time; or an earlier fetch broke off here between its messages,
                by Ctrl-C or for want of memory.
            ValueError: a closed table; with `same_tokens`, what is wrong on any rank.
        """
        arrival, places, asked = self._take_part(rows, out)
        self.count(len(places))  # none, where the rows were refused
        return Once(_Fetch(self, arrival, places, asked, out))

    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored, uint8 [N, row_bytes], in host memory; all ranks take part."""
        arrival, places, _ = self._take_part(rows, None)
        return arrival.wait().cpu()[torch.from_numpy(places)]

    def excuse(self, error: BaseException) -> None:
        """Take part in a fetch of the others, with an error; it is raised here as it is on all ranks."""
        self._take_part(None, None, error)[0].wait()

    def idle(self) -> bool:
        """Take part in a fetch of the others, wanting nothing; whether nobody wanted anything (`serve_others`)."""
        arrival, _, asked = self._take_part(None, None, idle=True)
        arrival.wait()
        return asked.idle

    def _take_part(
        self, rows: Tensor | None, out: Tensor | None, error: BaseException | None = None, idle: bool = False
    ) -> tuple[Arrival, np.ndarray, Asked]:
        with self._users.here(), self._users.alone:  # a thread at a time: the collectives of two must not mix
            self._require_open()
            route, room = Route(_NONE.astype(np.int32), [0] * self.plan.ranks, _NONE), None
            if rows is not None:
                try:
                    wanted = self._route(rows, out)
                    route, room = wanted, self.exchange.room(wanted.counts)
                except Exception as found:  # whatever it is, the others must hear of it: they would wait
                    error = found
            arrival, asked = self._ask_and_answer(route, room, error, idle)
            return arrival, route.places, asked

    def _ask_and_answer(
        self, route: Route, room: Tensor | None, error: BaseException | None, idle: bool
    ) -> tuple[Arrival, Asked]:
        if not self._in_step:
            raise RankLost(
                f"rank {self.exchange.rank} of {self.plan.ranks}: an earlier exchange of rows broke off on this rank, "
                "which is out of step with the others: start all ranks anew"
            )
        # Should anything end this between two messages, as Ctrl-C or a lack of memory does where the caller goes on.
        self._in_step = False
        asked = self.exchange.ask(route, error, idle)
        if asked.refused is not None:
            self._in_step = True  # all ranks raise this one
            raise asked.refused
        stopped = None
        try:
            own = self._own(asked.ids)
        except BaseException as found:  # Ctrl-C, too: the others have asked
            error, stopped = error or found, None if isinstance(found, Exception) else found
            own = torch.zeros((len(asked.ids), self.format.row_bytes), dtype=torch.uint8, device="cpu")
        arrival = self.exchange.answer(asked, own.to(self.exchange.device), error, room)
        self._in_step = True
        if stopped is not None:
            raise stopped
        return arrival, asked

    def _route(self, rows: Tensor, out: Tensor | None) -> Route:
        numbers = check_rows(rows, self.rows).numpy()
        if out is not None:
            check_out(out, len(rows), self.format, self.device)
        return route_rows(numbers, self.plan, self.unique)

    def _own(self, ids: Tensor) -> Tensor:
        """Bytes of rows that this rank owns, by their numbers in the whole table: uint8 [n, row_bytes]."""
        numbers = ids - self.plan.first(self.exchange.rank)
        rows = self._local.in_place() if numbers.is_cuda else None
        if rows is not None and rows.device == numbers.device:
            found = torch.cat([part.index_select(0, numbers) for part in rows.parts], dim=1)
        else:
            found = self._local.stored(numbers.cpu())
        self._local.count(len(numbers))
        return found

    def counters(self) -> dict[str, int]:
        """As for every table: `rows` are those that this rank asked for, and none of them is a hit.

        Bytes are counted where they are read, by the owner: those of this rank's own rows, for itself and for the
        others. What came from the others is in `report`.
        """
        return {**self._local.counters(), "rows": self._asked, "row_hits": 0}

    def report(self) -> Traffic:
        """What this rank received from the others so far."""
        return self.exchange.traffic

    @property
    def local(self) -> Table:
        """The rows that this rank owns, as a table of their own, numbered from 0."""
        return self._local

    def _held(self) -> dict[str, int]:
        return self._local.bytes_held()

    @property
    def bytes_copied(self) -> int:
        """Bytes that copies have brought from host memory to an accelerator, for all fetches so far."""
        return self._local.bytes_copied + self._delivery.bytes_copied

    def trim(self) -> None:
        """Give back staging memory; the next fetch makes it anew."""
        self._delivery.trim()
        self._local.trim()

    def _give_back(self) -> None:
        self._delivery.trim()
        self._local.close()
        own_group, self._own_group = self._own_group, False
        if own_group and dist.is_initialized():
            dist.destroy_process_group(self.group)


@dataclass(frozen=True)
class _Fetch:
    """Rows on their way from their owners; waited for once, as they are put where they are wanted then."""

    table: ShardedTable
    arrival: Arrival
    places: np.ndarray
    asked: Asked
    out: Tensor | None

    def wait(self) -> Tensor:
        """The rows, [N, D]; raises what was wrong on any rank."""
        raw = self.arrival.wait()  # [M, row_bytes], in the order of the owners; each row once, if `unique`
        places, delivery = torch.from_numpy(self.places), self.table._delivery
        row_format = self.table.format
        if raw.is_cuda:
            raw.record_stream(torch.cuda.current_stream(raw.device))  # the thread that asked had another one, maybe
            return row_format.decode(raw.index_select(0, places.to(raw.device)), self.out)
        return delivery.take(Rows(row_format, (raw,)), places, self.out).wait()


def serve_others(tables: Iterable[Table]) -> None:
    """Answer the other ranks until none of them wants anything more: when this rank has no tokens left, and they do.

    Args:
        tables: of all layers, in the order in which a fetch asks them (the prefetcher's): sharded ones, with hot rows
            in front or without; others ask nobody, and are passed over.

    Raises:
        ValueError: a table that cannot tell, what is no table, or what is wrong on a rank that still fetches.
        RankLost: a rank ended.
    """
    shared = [table for table in map(_of_all_rows, tables) if isinstance(table, ShardedTable)]
    for table in shared:
        if not isinstance(table.exchange, AllToAll):
            raise ValueError("serve_others: with same_tokens all ranks have tokens in every step")
    idle = not shared
    while not idle:
        idle = sum(table.idle() for table in shared) == len(shared)  # each table is asked in each round


def _of_all_rows(table: Table) -> Table:
    """What a fetch of this table asks of the other ranks is asked by this one."""
    while isinstance(table, HotTable):
        table = table.behind
    if not isinstance(table, Table):  # passed over in silence, the others would wait
        raise ValueError(f"serve_others: a {type(table).__name__} is no table: give those of the layers, engram.table")
    return table


def _check(table: ShardedTable, local: Table) -> None:
    rank, plan = table.exchange.rank, table.plan
    if dist.get_world_size(table.group) != plan.ranks:
        raise ValueError(f"a plan for {plan.ranks} ranks in a group of {dist.get_world_size(table.group)}: make one")
    if local.rows != plan.size(rank):
        raise ValueError(
            f"{local.rows} rows on rank {rank}; the plan gives it {plan.size(rank)}: {plan.first(rank)} on"
        )
    if local.trained:
        raise ValueError(
            "rows of a sharded table are not trained: gradients do not travel back to their owners; give rows.detach()"
        )
    if table.exchange.device.type == "cuda" and table.device.type != "cuda":
        raise ValueError(
            f"nccl brings rows to GPUs, this table delivers to {table.device}: give group=dist.new_group(backend="
            "'gloo')"
        )
