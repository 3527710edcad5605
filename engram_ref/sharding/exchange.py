"""The collectives of one fetch: how many, which, the rows. Every rank takes part in each, in the same order.

    exchange = AllToAll(plan, group, row_bytes)
    asked = exchange.ask(route)                 # waits until the others have asked, too
    arrival = exchange.answer(asked, rows)      # rows [n, row_bytes] of asked.ids; nobody waits
    answers = arrival.wait()                    # [M, row_bytes] in the order of route.ids

`AllToAll`: every rank has tokens of its own. Row numbers go to the owners, and rows as they are stored come back.
`AllGather`: all ranks have the same tokens, so nobody asks: each brings its rows, and all get all.

A rank that has an error takes part all the same, with rows that mean nothing: its notice says so to everybody, and
every rank raises it when it joins. With row numbers all in range this cannot happen, and costs 256 B from each rank.

    python -m pytest tests/ref/sharding/test_exchange.py
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
import torch.distributed as dist
from torch import Tensor

from engram_ref.sharding.agreement import first_error, gather, group_device, notice, raise_first, watched
from engram_ref.sharding.plan import COUNT_BYTES, NOTICE_BYTES, ShardPlan, Traffic
from engram_ref.sharding.routing import Route


@dataclass(frozen=True)
class Asked:
    """Rows that this rank is to bring.

    Attributes:
        ids: row numbers of the whole table, [n], on the exchange's device.
        given: how many of them each rank asked for.
        wanted: how many this rank asked each one for.
        idle: whether no rank asked for anything.
        refused: what all ranks raise now, instead of going on.
    """

    ids: Tensor
    given: list[int]
    wanted: list[int]
    idle: bool = False
    refused: Exception | None = None


@dataclass(frozen=True)
class Arrival:
    """Answers on their way.

    Attributes:
        rows: [M, row_bytes], complete after `wait`.
        notices: of all ranks.
        works: what is waited for.
        kept: what is being sent, which must not go before.
        counts: of rows from each rank, where they lie apart, [P, most, row_bytes].
    """

    group: Any
    rows: Tensor
    notices: Tensor
    works: list[Any]
    kept: tuple[Tensor, ...]
    counts: list[int] | None = None

    def wait(self) -> Tensor:
        """The answers.

        Raises:
            ValueError: or another: what went wrong on some rank, the same on all.
            RankLost: a rank ended.
        """
        with watched(self.group):
            for work in self.works:
                work.wait()
        raise_first(self.notices.cpu())
        if self.counts is None:
            return self.rows
        return torch.cat([rows[:count] for rows, count in zip(self.rows, self.counts)])


class Exchange(ABC):
    """One rank's part in the fetches of a table.

    Args:
        plan: who owns what.
        group: of `torch.distributed`, for this table alone: its collectives are issued by one thread, in one order.
        row_bytes: of a stored row.

    Attributes:
        traffic: received so far.
    """

    def __init__(self, plan: ShardPlan, group: Any, row_bytes: int) -> None:
        self.plan = plan
        self.group = group
        self.rank = dist.get_rank(group)
        self.device = group_device(group)
        self.row_bytes = row_bytes
        self.traffic = Traffic()

    @abstractmethod
    def ask(self, route: Route, error: BaseException | None = None, idle: bool = False) -> Asked:
        """Say what this rank wants, and learn what the others want of it.

        Args:
            route: of its row numbers.
            error: that it has met already; its route is empty then.
            idle: it has nothing more to do itself, and says so; its route is empty, too.

        Raises:
            RankLost: a rank ended.
            Exception: of this rank alone, which is out of step with the others then.
        """

    @abstractmethod
    def room(self, counts: list[int]) -> Tensor:
        """Memory for so many rows from each rank: what fails for want of it before `ask`, the others can be told."""

    @abstractmethod
    def answer(
        self, asked: Asked, rows: Tensor, error: BaseException | None = None, room: Tensor | None = None
    ) -> Arrival:
        """Send the rows that this rank was asked for, uint8 [n, row_bytes]; or an error, and any rows.

        Args:
            room: for what this rank asked for; None makes it now.
        """

    def _count(self, ids: int = 0, rows: int = 0, control: int = 0, fetches: int = 0) -> None:
        others = self.plan.ranks - 1
        self.traffic += Traffic(fetches, ids * self.plan.id_bytes, rows * self.row_bytes, control * others)


class AllToAll(Exchange):
    """Every rank has its own tokens."""

    def ask(self, route: Route, error: BaseException | None = None, idle: bool = False) -> Asked:
        """Exchange counts, then row numbers."""
        ids = torch.from_numpy(route.ids).to(self.device)  # before the others have heard anything
        given, all_idle = self._exchange_counts(route.counts, idle)
        found = torch.empty(sum(given), dtype=ids.dtype, device=self.device)
        with watched(self.group):
            dist.all_to_all_single(found, ids, given, route.counts, group=self.group)
        self._count(ids=sum(given) - given[self.rank])
        return Asked(found, given, route.counts, all_idle)

    def _exchange_counts(self, wanted: list[int], idle: bool) -> tuple[list[int], bool]:
        """How many rows each rank wants of this one, and whether all of them are idle."""
        mine = torch.tensor([[count, idle] for count in wanted], device=self.device)  # int64 [P, 2]
        found = torch.empty_like(mine)
        with watched(self.group):
            dist.all_to_all_single(found, mine, group=self.group)
        self._count(control=COUNT_BYTES)
        given, idles = found.T.tolist()
        return given, all(idles)

    def room(self, counts: list[int]) -> Tensor:
        """One behind the other, uint8 [M, row_bytes]."""
        return torch.empty((sum(counts), self.row_bytes), dtype=torch.uint8, device=self.device)

    def answer(
        self, asked: Asked, rows: Tensor, error: BaseException | None = None, room: Tensor | None = None
    ) -> Arrival:
        """Exchange notices and rows."""
        said = notice(error).repeat(self.plan.ranks, 1).to(self.device)  # [P, NOTICE_BYTES]
        notices = torch.empty_like(said)
        found = self.room(asked.wanted) if room is None else room
        with watched(self.group):
            works = [
                dist.all_to_all_single(notices, said, group=self.group, async_op=True),
                dist.all_to_all_single(found, rows, asked.wanted, asked.given, group=self.group, async_op=True),
            ]
        self._count(rows=sum(asked.wanted) - asked.wanted[self.rank], control=NOTICE_BYTES, fetches=1)
        return Arrival(self.group, found, notices, works, (said, rows))


class AllGather(Exchange):
    """All ranks have the same tokens, so each knows what it has to bring; the rows travel once to everybody."""

    def ask(self, route: Route, error: BaseException | None = None, idle: bool = False) -> Asked:
        """Make sure that all want the same rows: what one rank brings for others would be wrong rows."""
        first = sum(route.counts[: self.rank])  # row numbers are sorted by owner
        mine = torch.from_numpy(route.ids[first : first + route.counts[self.rank]]).to(self.device)
        prints = torch.tensor([len(route.ids), zlib.crc32(route.ids.tobytes())], device="cpu").view(
            torch.uint8
        )  # two int64 as [16]
        said = gather(self.group, torch.cat([notice(error), prints]), self.device)
        self._count(control=said.shape[1])
        refused = first_error(said[:, :NOTICE_BYTES])
        others = [
            rank for rank in range(len(said)) if not torch.equal(said[rank, NOTICE_BYTES:], said[0, NOTICE_BYTES:])
        ]
        if refused is None and others:
            refused = ValueError(
                f"rank {others[0]} asks for other rows than rank 0: same_tokens=True is for ranks that run the same "
                "tokens; leave it out where each has its own"
            )
        return Asked(mine, route.counts, route.counts, refused=refused)

    def room(self, counts: list[int]) -> Tensor:
        """As many for each rank as the one with most brings, uint8 [P, most, row_bytes]."""
        return torch.empty((self.plan.ranks, max(counts), self.row_bytes), dtype=torch.uint8, device=self.device)

    def answer(
        self, asked: Asked, rows: Tensor, error: BaseException | None = None, room: Tensor | None = None
    ) -> Arrival:
        """Send everybody the rows of this rank, filled up to as many as the rank with most brings."""
        most = max(asked.wanted)
        mine = torch.zeros((most, self.row_bytes), dtype=torch.uint8, device=self.device)
        mine[: len(rows)] = rows
        found = self.room(asked.wanted) if room is None else room
        said = notice(error).to(self.device)
        notices = torch.empty((self.plan.ranks, NOTICE_BYTES), dtype=torch.uint8, device=self.device)
        with watched(self.group):
            works = [
                dist.all_gather(list(notices), said, group=self.group, async_op=True),
                dist.all_gather(list(found), mine, group=self.group, async_op=True),  # views: all arrive in one tensor
            ]
        self._count(rows=most * (self.plan.ranks - 1), control=NOTICE_BYTES, fetches=1)
        # Of equally many from each nothing is cut off, and no copy is made.
        even = most * self.plan.ranks == sum(asked.wanted)
        counts = None if even else asked.wanted
        return Arrival(self.group, found.flatten(0, 1) if even else found, notices, works, (said, mine), counts)
