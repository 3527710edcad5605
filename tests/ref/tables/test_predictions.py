"""What is read and what was predicted: counters by hand, pages by a loop over the rows, and what the disk delivers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows
from engram_ref.tables.base import counted
from engram_ref.tables.file import FileTable, Prediction, predict
from tests.ref.files.stored_cases import CASES, R, random_codes, random_rows, random_values
from tests.ref.files.ways import cold, fetch, linux

# --- counters -------------------------------------------------------------------------------------


def test_counters_of_a_case_counted_by_hand(make):
    table = make(random_values(RowFormat(torch.float32, 4)))  # 16 B a row, 256 rows a page
    rows = torch.tensor([3, 3, 1, 0, 256])
    fetch(table, rows)
    assert table.counters() == counted(rows=5, hits=0, disk=64)
    assert table.predict(rows) == Prediction(bytes_read=64, bytes_paged=2 * 4096, stretches=1)
    assert predict(rows, table.source, direct=True) == Prediction(2 * 4096, 2 * 4096, stretches=1)


def test_counters_of_two_parts_counted_by_hand(make):
    """Codes, 32 B a row, begin at byte 4096, scales, 1 B a row, behind them: at 26528, which is on page 6."""
    table = make(Rows.from_split(*random_codes(width=32)))
    assert [part.offset for part in table.source.parts] == [4096, 4096 + 32 * R]
    rows = torch.tensor([3, 3, 1, 0, 256])  # codes on pages 1 and 3
    fetch(table, rows)
    assert table.counters() == counted(rows=5, hits=0, disk=132)
    assert table.predict(rows) == Prediction(bytes_read=132, bytes_paged=3 * 4096, stretches=3)
    direct = 2 * 4096 + 26528 + R - 6 * 4096  # the file ends on page 6
    assert predict(rows, table.source, direct=True) == Prediction(direct, bytes_paged=3 * 4096, stretches=3)
    ends = torch.tensor([0, R - 1])  # the last codes lie on the page on which the scales begin
    assert table.predict(ends).bytes_paged == 2 * 4096 and table.predict(ends).stretches == 2


@pytest.mark.parametrize("case", CASES)
def test_counters_are_what_was_predicted(case, way, make):
    table = make(case, **way)
    asked = bytes_read = 0
    for count in (0, 1, 300):
        bytes_read += table.predict(random_rows(count)).bytes_read
        fetch(cold(table), random_rows(count))
        fetch(table, random_rows(count).int())
        bytes_read += table.predict(random_rows(count).int()).bytes_read
        asked += 2 * count
        assert table.counters() == counted(asked, 0, disk=bytes_read)
    assert bytes_read > 0


@pytest.mark.parametrize("case", CASES)
def test_predicted_pages_are_those_of_the_rows(case, make):
    table = make(case)
    for count in (0, 1, 50, 500):
        rows = random_rows(count)
        pages = {
            (part.path, byte // 4096)
            for part in table.source.parts
            for row in rows.tolist()
            for byte in _bytes_of(row, part.offset, part.row_bytes)
        }
        assert table.predict(rows).bytes_paged == 4096 * len(pages)
        assert table.predict(rows).stretches == len([page for path, page in pages if (path, page - 1) not in pages])


def _bytes_of(row: int, offset: int, row_bytes: int) -> tuple[int, ...]:
    """Some bytes of a row, from each page on which it lies."""
    begin, end = offset + row * row_bytes, offset + (row + 1) * row_bytes
    return (*range(begin, end, 1000), end - 1)


def test_a_prediction_refuses_what_the_table_refuses(make):
    with pytest.raises(ValueError, match="row 701 does not exist"):
        make("256 B").predict(torch.tensor([701]))


# --- the disk -------------------------------------------------------------------------------------


def device_bytes() -> int:
    """Bytes that this process has made the disk deliver."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def bytes_of(table: FileTable, rows: torch.Tensor, warm: bool = False, wanted: int = -1) -> int:
    """What a fetch makes the disk deliver: what is wanted or the least of three, for a library paged in counts, too."""
    seen = []
    while len(seen) < 3 and wanted not in seen:
        if not warm:
            cold(table)
        before = device_bytes()
        fetch(table, rows)
        seen.append(device_bytes() - before)
    return wanted if wanted in seen else min(seen)


@pytest.fixture
def on_disk(make):
    """A table in a file whose reads the kernel counts."""

    def make_one(case: str, **options: Any) -> FileTable:
        table = make(case, **options)
        cold(table)
        if table.cached_share() == 1.0 or not bytes_of(table, torch.tensor([5])):
            pytest.skip(f"{table.source.path.parent} is no disk: the kernel does not count what is read from it")
        return table

    return make_one


@linux
@pytest.mark.parametrize("case", CASES)
def test_a_cold_fetch_reads_the_predicted_pages_and_a_warm_one_nothing(case, way, on_disk):
    table = on_disk(case, **way)
    for count in (1, 40, 300):
        rows = random_rows(count)
        predicted = table.predict(rows).bytes_paged
        assert bytes_of(table, rows, wanted=predicted) == predicted
        warm = predicted if table.direct else 0
        assert bytes_of(table, rows, warm=True, wanted=warm) == warm


@linux
def test_reading_more_than_was_asked_for_is_noticed(on_disk):
    table, row = on_disk("256 B"), torch.tensor([5])
    os.posix_fadvise(*table._reader.require_open(), 0, 0, os.POSIX_FADV_NORMAL)
    assert bytes_of(table, row) > table.predict(row).bytes_paged
