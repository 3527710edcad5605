"""The hot rows: which they are, that only misses reach the table behind, and what the report counts.

That a hot table gives the right bits is tested with all placements in test_placements.py.
"""

from collections import Counter

import pytest
import torch

from engram_ref.tables import RowFormat, Table, make_table
from engram_ref.tables import hot as module
from engram_ref.tables.base import Ready, check_rows
from engram_ref.tables.hot import HotReport, HotTable, most_frequent

CPU = torch.device("cpu")
R, D = 200, 4


class Behind(Table):
    """A table in memory that notes what it is asked for."""

    placement = "behind"
    waits = True

    def __init__(self, rows: int = R) -> None:
        super().__init__(rows, RowFormat(torch.float32, D), CPU, CPU)
        self.values = torch.randn(R, D, generator=torch.Generator().manual_seed(1))
        self.asked: list[list[int]] = []
        self.trims = self.closes = 0

    def start(self, rows, out=None):
        self.asked.append(check_rows(rows, self.rows).tolist())
        return Ready(self.values[rows.long()])

    def stored(self, rows):
        self.asked.append(check_rows(rows, self.rows).tolist())
        return self.values[rows.long()].view(torch.uint8)

    def _held(self):
        return {"host": self.values.nbytes}

    @property
    def bytes_copied(self):
        return 40

    def trim(self):
        self.trims += 1

    def close(self):
        self.closes += 1


class Failing:
    """A fetch that fails so many times."""

    def __init__(self, times):
        self.times, self.values = times, None

    def wait(self):
        self.times -= 1
        if self.times >= 0:
            raise OSError("the disk failed")
        return self.values


class Numbers:
    """In place of the delivery of slots: what it copied, and how often it was trimmed."""

    bytes_copied, trims = 3, 0

    def trim(self):
        self.trims += 1


def zipf_rows(count: int, seed: int = 0) -> torch.Tensor:
    """Row numbers of which a few are frequent."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (R * uniform**4).long() * 7 % R


# --- which rows are hot -----------------------------------------------------------------------------------


def ranked(stream: torch.Tensor, table_rows: int) -> list[int]:
    """All rows of a table, the most frequent first, of equal ones the lower first: the definition."""
    times = Counter(stream.reshape(-1).tolist())
    return sorted(range(table_rows), key=lambda row: (-times[row], row))


STREAMS = {
    "skewed": zipf_rows(5000),
    "skewed, int32": zipf_rows(5000).int(),
    "batches [B, T, C]": zipf_rows(600).view(5, 8, 15),
    "a transposed batch": zipf_rows(600).view(20, 30).T,
    "all as frequent": torch.arange(R).flip(0).repeat(3),
    "one row": torch.tensor([R - 1]),
    "nothing": torch.empty(0, dtype=torch.int64),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_the_most_frequent_rows_come_first(stream):
    expected = ranked(STREAMS[stream], R)
    for count in (1, 2, 37, R):
        got = most_frequent(STREAMS[stream], count, R)
        assert got.dtype == torch.int64 and got.tolist() == expected[:count]


def test_a_wrong_ranking_is_caught():
    stream = STREAMS["skewed"]
    rows, times = stream.unique(return_counts=True)
    by_number, by_rarity = rows, rows[times.argsort(stable=True)]
    ties_reversed = rows.flip(0)[times.flip(0).argsort(descending=True, stable=True)]
    for wrong in (by_number, by_rarity, ties_reversed):
        assert wrong[:37].tolist() != ranked(stream, R)[:37]


@pytest.mark.parametrize("count", [0, -1, R + 1])
def test_a_count_that_the_table_does_not_have_is_refused(count):
    with pytest.raises(ValueError, match=f"count={count}: a table of {R} rows has 1 .. {R} most frequent ones"):
        most_frequent(STREAMS["skewed"], count, R)


def test_a_sample_of_another_table_is_refused():
    with pytest.raises(ValueError, match="row 200 does not exist"):
        most_frequent(torch.tensor([3, R]), 1, R)
    with pytest.raises(ValueError, match="give a vector of int32 or int64"):
        most_frequent(torch.tensor([3.0]), 1, R)


# --- hits and misses --------------------------------------------------------------------------------------


def test_only_misses_reach_the_table_behind():
    behind = Behind()
    table = HotTable(behind, torch.tensor([7, 150, 3]))
    assert behind.asked == [[7, 150, 3]]  # read once, when the table is made
    rows = torch.tensor([3, 4, 7, 4, 150, R - 1])
    assert torch.equal(table.start(rows).wait(), behind.values[rows])
    assert torch.equal(table.start(torch.tensor([7, 3, 3])).wait(), behind.values[[7, 3, 3]])
    assert behind.asked[1:] == [[4, 4, R - 1], []]


def test_rows_stay_as_they_are_while_somebody_else_waits_for_them(monkeypatch):
    behind = Behind()
    table = HotTable(behind, torch.tensor([7, 150, 3]))
    numbers, out, seen = torch.tensor([3, 4, 7, R - 1]), torch.empty(4, D), []
    monkeypatch.setattr(Ready, "wait", lambda ready: seen.append(out.clone()) or ready.values)
    pending = table.start(numbers, out)
    rows = pending.wait()
    assert rows.data_ptr() == out.data_ptr() and torch.equal(rows, behind.values[numbers])
    seen.clear()
    assert pending.wait().data_ptr() == out.data_ptr()
    assert seen and all(torch.equal(then, rows) for then in seen)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_rows_of_every_type_pass_hits_and_misses(dtype):
    values = torch.arange(1.0, 49.0).view(12, 4).to(dtype)
    numbers = torch.tensor([3, 11, 3, 0, 7])
    with make_table("hot", values, hot=torch.tensor([3, 7])) as table:
        got = table.start(numbers).wait()
    unit = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[dtype.itemsize]
    assert got.dtype == dtype and torch.equal(got.view(unit), values[numbers].view(unit))


def test_a_fetch_that_failed_once_can_be_waited_for_again():
    behind = Behind()
    table, failing = HotTable(behind, torch.tensor([7])), Failing(2)
    behind.start = lambda rows: failing
    pending = table.start(torch.tensor([7, 8]))
    failing.values = behind.values[[8]]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk failed"):
            pending.wait()
    assert torch.equal(pending.wait(), behind.values[[7, 8]])


def test_a_wrong_slot_would_be_seen():
    behind = Behind()
    table = HotTable(behind, torch.tensor([7, 150, 3]))
    table._slots[7], table._slots[150] = 1, 0
    rows = torch.tensor([3, 7, 150])
    assert not torch.equal(table.start(rows).wait(), behind.values[rows])


def test_hot_rows_are_read_a_bounded_number_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_READ_BYTES", 10 * D * 4)
    behind, hot = Behind(), torch.arange(R - 1, R - 35, -1, dtype=torch.int32)
    table = HotTable(behind, hot)
    assert [len(asked) for asked in behind.asked] == [10, 10, 10, 4]
    assert behind.trims == 1
    assert torch.equal(table.start(hot).wait(), behind.values[hot.long()])
    assert behind.asked[-1] == []


def test_hot_rows_are_read_16_mib_at_a_time_and_longer_ones_alone(monkeypatch):
    behind, wide = Behind(), RowFormat(torch.float32, 1 << 18)  # 1 MiB a row
    behind.format, asked = wide, []
    monkeypatch.setattr(behind, "stored", lambda rows: asked.append(len(rows)) or torch.zeros(1).view(torch.uint8)[:1])
    HotTable(behind, torch.arange(35))
    assert asked == [16, 16, 3]
    monkeypatch.setattr(module, "_READ_BYTES", 1)
    HotTable(behind, torch.arange(3))
    assert asked[3:] == [1, 1, 1]


@pytest.mark.parametrize(
    ("hot", "message"),
    [
        (torch.empty(0, dtype=torch.int64), "no hot rows: give at least one"),
        (torch.tensor([4, 5, 4, 4]), "hot row 4 is given 3 times: give each once"),
        (torch.tensor([R]), "row 200 does not exist"),
        (torch.tensor([-1]), "row -1 does not exist"),
        (torch.tensor([1.0]), "give a vector of int32 or int64"),
    ],
)
def test_hot_rows_that_make_no_sense_are_refused(hot, message):
    with pytest.raises(ValueError, match=message):
        HotTable(Behind(), hot)


def test_a_map_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"131072\.00 GiB do not fit into host memory"):
        HotTable(Behind(rows=1 << 45), torch.tensor([1]))


def test_room_is_asked_for_the_map_and_for_the_hot_rows(monkeypatch):
    """The map has four bytes for every row of the table."""
    asked = []
    monkeypatch.setattr(module, "require_bytes", lambda nbytes, device: asked.append((nbytes, device)))
    table = HotTable(Behind(), torch.tensor([7, 150, 3]))
    assert asked == [(R * 4, CPU), (3 * D * 4, CPU)]
    assert table.bytes_held() == {"device": 3 * D * 4, "host": R * 4 + R * D * 4, "disk": 0}
    table.close()
    assert table.bytes_held()["device"] == 0  # nobody holds the hot rows any more


def test_row_numbers_on_another_device_are_refused():
    table = HotTable(Behind(), torch.tensor([7]))
    with pytest.raises(ValueError, match="row numbers on meta; this table looks them up on cpu: move them there"):
        table.start(torch.empty(3, dtype=torch.int64, device="meta"))


# --- the report -------------------------------------------------------------------------------------------


def test_nothing_was_asked_for_yet():
    assert HotTable(Behind(), torch.tensor([7, 150])).report() == HotReport(0, 0, 0.0, 0.0, 0.0)


def test_the_report_counts_what_was_asked_for():
    hot = most_frequent(zipf_rows(500, seed=9), 20, R)
    table, seen = HotTable(Behind(), hot), []
    for seed in range(6):
        rows = zipf_rows(10 * seed, seed).to(torch.int32 if seed % 2 else torch.int64)
        table.start(rows).wait()
        seen += rows.tolist()
    hits = sum(row in set(hot.tolist()) for row in seen)
    used = set(seen)
    assert table.report() == HotReport(
        lookups=len(seen),
        hits=hits,
        hit_rate=hits / len(seen),
        used_share=len(used) / R,
        hot_used_share=len(used & set(hot.tolist())) / len(hot),
    )
    assert 0 < hits < len(seen) and len(used) < R


def test_a_refused_fetch_is_not_counted():
    table = HotTable(Behind(), torch.tensor([7, 150]))
    for bad in (torch.tensor([7, R]), torch.tensor([7.0])):
        with pytest.raises(ValueError):
            table.start(bad)
    with pytest.raises(ValueError, match="2 rows need a contiguous"):
        table.start(torch.tensor([7, 8]), torch.empty(3, D))
    assert table.report() == HotReport(0, 0, 0.0, 0.0, 0.0)


def test_a_report_does_not_change_afterwards():
    table = HotTable(Behind(), torch.tensor([7]))
    report = table.report()
    table.start(torch.tensor([7])).wait()
    assert report.lookups == 0 and table.report().lookups == 1


# --- the table behind -------------------------------------------------------------------------------------


def test_the_table_behind_is_trimmed_and_closed_with_it():
    behind = Behind()
    with HotTable(behind, torch.tensor([7])) as table:
        assert table.waits
        delivery, numbers = table._numbers, Numbers()
        table._numbers = numbers
        assert table.bytes_copied == 3 + 40
        table.trim()
        assert (behind.trims, numbers.trims, behind.closes) == (2, 1, 0)
        assert (table.stored(torch.tensor([8])).view(torch.float32) == behind.values[8]).all()
        table._numbers = delivery
        table.start(torch.tensor([7, 8]))
        table._numbers = numbers
    assert (behind.closes, numbers.trims) == (1, 2)
    assert table.report().hits == 1
    for ask in (table.start, table.stored):
        with pytest.raises(ValueError, match="closed"):
            ask(torch.tensor([7]))
