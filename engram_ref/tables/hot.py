"""The most frequent rows on the device, in front of any other table: what misses them goes to the table behind.

Tokens follow Zipf's law and so do the rows they hash to: a few hold most of the lookups. Which rows are hot is
decided once, from a sample of the traffic, and nothing is ever evicted, so a fetch is one look into an array with
an entry for every row of the table: its slot among the hot rows, or that it has none. Hits are copied from the hot
rows on the device, misses arrive from the table behind, and both are put together when they are waited for.

    rows = most_frequent(sample, count=100_000, table_rows=len(weights))
    with make_table("hot", weights, device="cuda", hot=rows) as table:
        values = table.start(rows).wait()
        print(table.report())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import require_bytes
from engram_ref.rows.rows import Rows
from engram_ref.tables.base import Pending, Ready, Table, check_out, check_rows, check_shape
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.staging import Arriving, Delivery, Once

_READ_BYTES = 16 << 20  # of hot rows, fetched at a time when the table is made
_NEW, _SEEN = -1, -2  # in place of a slot: a row behind that nobody has asked for yet, one that was asked for
_NUMBER = RowFormat(torch.int32, 1)


@dataclass(frozen=True)
class HotReport:
    """What the hot rows were good for, since the table was made; all shares are 0 before the first lookup.

    Attributes:
        lookups: rows asked for, repeats counted.
        hits: those that were hot.
        hit_rate: hits / lookups.
        used_share: rows of the whole table that were ever asked for.
        hot_used_share: hot rows that were ever asked for.
    """

    lookups: int
    hits: int
    hit_rate: float
    used_share: float
    hot_used_share: float


class HotTable(Table):
    """A table some of whose rows are on the device.

    Where the table behind wants row numbers on the device, hits and misses are told apart there, and the CPU waits for
    the numbers. Hot rows are kept as they are stored: fp8 rows as fp8.

    Args:
        behind: all rows; it is closed with this table.
        hot: numbers of the rows to keep on the device, each once; they are read from `behind` now.

    Raises:
        ValueError: no hot row, one twice or one that does not exist, rows that do not fit, or rows that are trained.
    """

    placement = "hot"

    def __init__(self, behind: Table, hot: Tensor) -> None:
        super().__init__(behind.rows, behind.format, behind.device, behind.index_device)
        self.waits = behind.waits
        self._behind = behind
        try:
            hot, kept = self._make_room(hot)
        except Exception as error:  # others who share the table behind have begun to read
            behind.excuse(error)
            raise
        self._hot: DeviceTable | None = DeviceTable(self._read(hot, kept), checked=True)  # by the table behind
        # One place for every slot; what is not hot marks the last two, which indexing by -1 and -2 means.
        self._hot_seen = torch.zeros(len(hot) + 2, dtype=torch.bool, device=self.index_device)
        self._lookups = self._hits = 0
        self._numbers = Delivery(self.device, _NUMBER)

    def _make_room(self, hot: Tensor) -> tuple[Tensor, Tensor]:
        """The hot rows' numbers, checked and noted in the map, and memory for their bytes."""
        if self._behind.trained:
            raise ValueError(
                "rows that are trained, behind copies of some, which would not learn: use the table behind alone, or "
                "DeviceTable(weight.detach())"
            )
        hot = check_hot(hot, self.rows).to(self.index_device)
        require_bytes(self.rows * _NUMBER.row_bytes, self.index_device)
        require_bytes(len(hot) * self.format.row_bytes, self.device)
        self._slots = torch.full((self.rows,), _NEW, dtype=torch.int32, device=self.index_device)  # [R]
        self._slots[hot] = torch.arange(len(hot), dtype=torch.int32, device=self.index_device)
        return hot, torch.empty((len(hot), self.format.row_bytes), dtype=torch.uint8, device=self.device)

    def _read(self, hot: Tensor, kept: Tensor) -> Rows:
        """The hot rows as they are stored, a bounded number at a time."""
        step = max(1, _READ_BYTES // self.format.row_bytes)
        for first in range(0, len(hot), step):
            part = slice(first, first + step)
            kept[part] = self._behind.stored(hot[part].cpu())
        self._behind.trim()
        return Rows(self.format, (kept,))

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Tell hits from misses, and start the fetch of the misses."""
        return self._begin(rows, out, self._behind.start)

    def ask(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Tell hits from misses, and ask for the misses."""
        return self._begin(rows, out, self._behind.ask)

    def bring(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Tell hits from misses, and bring the misses."""
        return self._begin(rows, out, self._behind.bring, beside=False)

    @property
    def inline_rows(self) -> int:
        """As of the table behind."""
        return self._behind.inline_rows

    def _begin(
        self, rows: Tensor, out: Tensor | None, behind: Callable[[Tensor], Pending], beside: bool = True
    ) -> Pending:
        with self._users.here():
            self._require_open()
            try:
                check_shape(rows, self.index_device)
                check_rows(rows.cpu(), self.rows)
                if out is not None:
                    check_out(out, len(rows), self.format, self.device)
                slots, missed, misses = self._tell_apart(rows)
                numbers = self._send(slots, missed, beside)
            except Exception as error:  # whatever it is: others who share the table behind would wait
                self._behind.excuse(error)
                raise
            with self._users.alone:
                self._lookups += len(rows)
                self._hits += len(rows) - len(misses)
            assert self._hot is not None
            return Once(_Mixed(self._hot, len(misses), numbers, behind(misses), out))

    def excuse(self, error: BaseException) -> None:
        """Tell those who share the table behind."""
        self._behind.excuse(error)

    def _tell_apart(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of all rows, int32 [N], 0 for those that miss; and the places and numbers of these, [M]. All are noted.

        The places are int64.
        """
        if self.index_device.type == "cpu":
            return self._tell_apart_here(rows.numpy())
        slots = self._slots.index_select(0, rows)
        missed = (slots < 0).nonzero().view(-1)  # [M]: the CPU waits for M
        misses = rows.index_select(0, missed)
        self._hot_seen[slots] = True
        self._slots[misses] = _SEEN
        return slots.clamp_(min=0), missed, misses

    def _tell_apart_here(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        # In NumPy: passes over a few numbers, each of which takes torch several times as long to begin. Over many torch
        # wakes threads, for which it would wait for good in a forked process, that has none.
        table, seen = self._slots.numpy(), self._hot_seen.numpy()
        slots = table[rows]  # [N]
        missed = np.flatnonzero(slots < 0)
        misses = rows[missed]
        seen[slots] = True
        table[misses] = _SEEN
        return torch.from_numpy(np.maximum(slots, 0, out=slots)), torch.from_numpy(missed), torch.from_numpy(misses)

    def _send(self, slots: Tensor, missed: Tensor, beside: bool) -> Pending:
        """Bring both to the device, one after the other, as they are used there: int32 [2 M + N, 1]."""
        if self.index_device.type != "cpu":
            numbers = torch.cat([missed.view(torch.int32), slots])[:, None]
            return Arriving(numbers, torch.cuda.current_stream(self.device).record_event())
        numbers = torch.from_numpy(np.concatenate([missed.numpy().view(np.int32), slots.numpy()]))[:, None]
        if self.device.type == "cpu":
            return Ready(numbers)
        return self._numbers.send(len(numbers), lambda raw: raw.copy_(numbers.view(torch.uint8)), beside=beside)

    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored, uint8 [N, row_bytes], in host memory: those behind."""
        with self._users.here():
            self._require_open()
            return self._behind.stored(rows)

    def count(self, rows: int) -> None:
        """Whoever notes what he read by `stored` has read it behind."""
        self._behind.count(rows)

    def counters(self) -> dict[str, int]:
        """As for every table; what was read behind it when the hot rows were chosen is among the bytes."""
        behind = self._behind.counters()
        return {
            **behind,
            "rows": self._lookups,
            "row_hits": behind["row_hits"] + self._hits,  # misses are hits, too, where all rows are on the device
            "bytes_device": behind["bytes_device"] + self._hits * self.format.row_bytes,
        }

    def report(self) -> HotReport:
        """Hits and use so far."""
        hot_used = int(self._hot_seen[:-2].sum())
        used = int((self._slots == _SEEN).sum()) + hot_used
        return HotReport(
            self._lookups,
            self._hits,
            self._hits / max(1, self._lookups),
            used / self.rows,
            hot_used / self.hot_rows,
        )

    def _held(self) -> dict[str, int]:
        held = self._behind.bytes_held()
        if self._hot is not None:
            held["device"] += self._hot.bytes_held()["device"]
            held["host" if self.index_device.type == "cpu" else "device"] += self._slots.nbytes
        return held

    @property
    def behind(self) -> Table:
        """The table of all rows, which misses are asked of."""
        return self._behind

    @property
    def hot_rows(self) -> int:
        """How many rows are on the device."""
        return len(self._hot_seen) - 2

    @property
    def bytes_copied(self) -> int:
        """Bytes that copies have brought to an accelerator: misses, and the numbers that say where they go."""
        return self._behind.bytes_copied + self._numbers.bytes_copied

    def trim(self) -> None:
        """Give back staging memory, that of the table behind too."""
        self._numbers.trim()
        self._behind.trim()

    def _give_back(self) -> None:
        self._numbers.trim()
        self._hot = None
        self._behind.close()


@dataclass(frozen=True)
class _Mixed:
    """A fetch of which a part is on the device already; waited for once, as it writes rows of no meaning first."""

    hot: DeviceTable
    missed: int  # M
    numbers: Pending  # places of the misses, int64 [M], and slots of all rows, int32 [N]; as int32 [2 M + N, 1]
    misses: Pending  # [M, D]
    out: Tensor | None

    def wait(self) -> Tensor:
        """The rows, [N, D]."""
        numbers = self.numbers.wait().view(-1)
        missed, slots = numbers[: 2 * self.missed], numbers[2 * self.missed :]
        values = self.hot.start(slots, self.out).wait()  # [N, D]; for a miss some hot row, to be written over
        misses = self.misses.wait()
        if values.device.type == "cpu":  # in NumPy, as in `_tell_apart_here`, by what torch.compile knows of it
            into, rows = (part.view(torch.uint8).numpy() for part in (values, misses))
            into[missed.numpy().view(np.int64)] = rows
            return values
        # torch copies no rows of float8 by number, but bytes it does
        unit = torch.uint8 if values.element_size() == 1 else values.dtype
        values.view(unit).index_copy_(0, missed.view(torch.int64), misses.view(unit))
        return values


def check_hot(hot: Tensor, rows: int) -> Tensor:
    """The numbers of hot rows of a table of so many, int64 on the CPU; refused if none, unknown or given twice."""
    hot = check_rows(hot.cpu(), rows).long()
    if not len(hot):
        raise ValueError("no hot rows: give at least one, or use the table behind alone")
    numbers, times = hot.unique(return_counts=True)
    if len(numbers) < len(hot):
        raise ValueError(f"hot row {int(numbers[times.argmax()])} is given {int(times.max())} times: give each once")
    return hot


def most_frequent(rows_stream: Tensor, count: int, table_rows: int) -> Tensor:
    """The `count` rows that a sample of the traffic asks for most; of equally frequent ones the lower number.

    Args:
        rows_stream: row numbers of any shape, int32 or int64, on the CPU.
        count: how many to name. A sample with fewer different rows is followed by the lowest of all the others.
        table_rows: how many rows the table has.

    Returns:
        Row numbers [count], int64, the most frequent first.

    Raises:
        ValueError: a row outside the table, or `count` outside 1 .. table_rows.
    """
    if not 1 <= count <= table_rows:
        raise ValueError(f"count={count}: a table of {table_rows} rows has 1 .. {table_rows} most frequent ones")
    stream = check_rows(rows_stream.reshape(-1), table_rows).long()
    rows, times = stream.unique(return_counts=True)  # rows in ascending order, which a stable sort keeps
    ranked = rows[times.argsort(descending=True, stable=True)][:count]
    if len(ranked) == count:
        return ranked
    lowest = torch.arange(count, device="cpu")
    unseen = lowest[~torch.isin(lowest, ranked)]
    return torch.cat([ranked, unseen[: count - len(ranked)]])
