"""Which reads bring which rows, against a loop over the rows: every boundary, every cut, every run."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from engram_ref.files import read_plan
from engram_ref.files.conventions import BLOCK, round_up
from engram_ref.files.read_plan import plan_reads
from tests.ref.files.stored_cases import R


def part(row_bytes, offset=0, rows=10**6, tail=0):
    """What a plan asks of a stored part, `tail` bytes of the file behind it."""
    return SimpleNamespace(row_bytes=row_bytes, first=0, offset=offset, file_bytes=offset + rows * row_bytes + tail)


def by_hand(unique, part, direct, longest):
    """The same plan, one row after the other: [offset, end, rows]."""
    spans = []
    for row in unique:
        low = part.offset + row * part.row_bytes
        high = low + part.row_bytes
        if direct:
            low, high = low // BLOCK * BLOCK, (high + BLOCK - 1) // BLOCK * BLOCK
        spans.append((low, high))
    most = max(1, longest - max(high - low for low, high in spans))
    reads, origin, behind, taken = [], 0, None, 0
    for low, high in spans:
        if behind is None or low > behind:  # a hole: a new run of rows that touch
            origin, taken, new = low, 0, True
        else:
            new, taken = (low - origin) // most != taken, (low - origin) // most
        if new:
            reads.append([low, high, 0])
        reads[-1][1] = high
        reads[-1][2] += 1
        behind = high
    return [[low, min(high, part.file_bytes), rows] for low, high, rows in reads]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("row_bytes", [1, 33, 256, 264, 4096, 8200])
def test_the_plan_is_that_of_a_loop(row_bytes, direct, monkeypatch):
    for seed, longest in itertools.product(range(15), (1, 5000, 12_289, 30_000)):
        draw = np.random.default_rng(seed)
        rows = int(draw.integers(1, 250))
        unique = np.flatnonzero(draw.random(rows) < draw.choice([0.05, 0.5, 0.95, 1])).astype(draw.choice(["i4", "i8"]))
        if not len(unique):
            continue
        stored = part(row_bytes, int(draw.integers(0, 10_000)), rows, int(draw.integers(0, 5000)))
        monkeypatch.setattr(read_plan, "_LONGEST", longest)
        reads = plan_reads(unique, stored, direct)
        found = zip(reads.offsets.tolist(), (reads.offsets + reads.lengths).tolist(), np.diff(reads.first).tolist())
        assert list(map(list, found)) == by_hand(unique.tolist(), stored, direct, longest), (seed, longest)
        assert reads.starts.tolist() == [stored.offset + row * row_bytes for row in unique.tolist()]
        assert int(reads.first[0]) == 0 and len(reads) == len(reads.offsets)


def test_a_read_has_at_most_128_kib_and_direct_reads_are_made_of_blocks_of_4_kib():
    """The figures of every committed measurement; without being asked for, reads are not direct."""
    reads = plan_reads(np.arange(2000), part(256))
    assert reads.lengths.tolist() == [511 * 256] * 3 + [467 * 256]  # a read ends before the row that could pass 128 KiB
    assert plan_reads(np.array([20]), part(256)).offsets.tolist() == [5120]
    direct = plan_reads(np.array([20]), part(256), direct=True)
    assert (direct.offsets.tolist(), direct.lengths.tolist()) == ([4096], [4096])


def test_rows_beyond_32_bits():
    reads = plan_reads(np.array([2**31 - 1], dtype=np.int32), part(264, offset=80, rows=2**31))
    assert reads.offsets.tolist() == [80 + 264 * (2**31 - 1)]


def test_no_rows_need_no_read():
    assert len(plan_reads(np.array([], dtype=np.int64), part(256))) == 0


def test_numbers_and_arrays_round_up():
    assert [round_up(n) for n in (0, 1, 4095, 4096, 4097)] == [0, 4096, 4096, 4096, 8192]
    assert round_up(np.array([1, 8192, 8193])).tolist() == [4096, 8192, 12_288]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 20])
def test_runs_of_reads_are_even_and_one_after_the_other(parts):
    """`first` goes on counting rows of the whole fetch: a run says which of them it brings."""
    whole = plan_reads(np.arange(0, 26, 2), part(100))  # 13 reads
    runs = whole.split(parts)
    assert len(runs) == parts and {len(run) for run in runs} <= {13 // parts, -(-13 // parts)}
    for name in ("offsets", "lengths"):
        assert np.concatenate([getattr(run, name) for run in runs]).tolist() == getattr(whole, name).tolist()
    assert all(len(run.first) == len(run) + 1 and run.starts is whole.starts for run in runs)
    assert [0, *(n for run in runs for n in run.first[1:].tolist())] == whole.first.tolist()
    assert [run.first[0] for run in runs[1:]] == [run.first[-1] for run in runs[:-1]]


# --- of rows in files -----------------------------------------------------------------------------


def test_rows_that_touch_are_read_together(found):
    reads = plan_reads(np.array([0, 1, 2, 10, 12, 13]), found.parts[0])
    assert (reads.offsets - BLOCK).tolist() == [0, 10 * 256, 12 * 256]
    assert reads.lengths.tolist() == [768, 256, 512]
    assert reads.first.tolist() == [0, 3, 4, 6]


def test_blocks_that_touch_are_read_together(found):
    part = found.parts[0]
    reads = plan_reads(np.array([0, 15, 16, 48, 700]), part, direct=True)  # 16 rows lie in a block
    assert reads.offsets.tolist() == [BLOCK, 4 * BLOCK, 44 * BLOCK]
    assert reads.lengths.tolist() == [2 * BLOCK, BLOCK, part.file_bytes - 44 * BLOCK]  # the file ends in a block
    assert reads.first.tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("case", ["10 B", "256 B", "264 B", "4096 B", "8200 B"])
def test_no_read_is_long_and_none_is_short(case, direct, make, monkeypatch):
    monkeypatch.setattr(read_plan, "_LONGEST", 30_000)
    part = make(case).source.parts[0]
    reads = plan_reads(np.arange(R), part, direct)
    assert reads.lengths.max() <= 30_000
    span = 30_000 - (-(-part.row_bytes // BLOCK) + 1) * BLOCK  # a read ends with a row, or the blocks of one
    assert len(reads) <= -(-(part.nbytes + 2 * BLOCK) // span)
    assert (reads.offsets <= reads.starts[reads.first[:-1]]).all()


def test_rows_longer_than_a_read_are_read_one_by_one(make, monkeypatch):
    monkeypatch.setattr(read_plan, "_LONGEST", 5_000)
    reads = plan_reads(np.arange(R), make("8200 B").source.parts[0])
    assert reads.lengths.tolist() == [8200] * R
