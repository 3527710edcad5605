"""Rows in a file: the same bits by every way of reading, what is refused, and reads that are what was predicted.

Tables are random bytes (`stored_cases`) and are compared byte by byte with NumPy's indexing. Ways of reading that a
machine lacks are taken by hiding the others.

    python -m pytest tests/ref/tables/test_file.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_ref.files import direct_reads, pagecache, read_plan, row_reader
from engram_ref.files.conventions import BLOCK
from engram_ref.files.read_plan import plan_reads
from engram_ref.files.writing import make_header
from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows
from engram_ref.tables import file, make_table
from engram_ref.tables.file import FileTable, Prediction, StoredRows, Traffic, predict
from tests.ref.files.stored_cases import (
    CASES,
    FORMATS,
    FP8,
    R,
    assert_same_bits,
    random_codes,
    random_content,
    random_rows,
    random_values,
    store,
    write_tensors,
)

CPU = torch.device("cpu")
WAYS = ["compiled", "plain", "several threads", "plain, several threads", "never at once", "waiting threads"]
WAYS += ["direct", "direct, threads"]
linux = pytest.mark.skipif(
    not (hasattr(os, "posix_fadvise") and Path("/proc/self/io").exists()),
    reason="the page cache can be watched and emptied on Linux only",
)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way to read; returns the options of a table that goes it. Few reads make threads and waits happen."""
    monkeypatch.setattr(row_reader, "AHEAD", 5)
    if request.param == "direct":
        monkeypatch.setattr(row_reader, "AT_ONCE", 20)
        return {"direct": True}
    if request.param == "direct, threads":
        monkeypatch.setattr(row_reader, "_WAITING", (3, 1))
        return {"direct": True, "threads": 3}
    if request.param == "waiting threads":
        monkeypatch.setattr(row_reader, "_CAN_ASK_AHEAD", False)
        return {"threads": 3}
    if not row_reader._CAN_ASK_AHEAD:
        pytest.skip("this system cannot be asked to read ahead")
    if "plain" in request.param:
        monkeypatch.setattr(row_reader, "_fused", None)
        monkeypatch.setattr(row_reader, "_ask_fused", None)
    elif row_reader._fused is None:
        pytest.skip("the compiled loop needs numba (pip install 'engram-offload[ref]')")
    if "several" in request.param:
        monkeypatch.setattr(row_reader, "_ASKING", (3, 1))
    if request.param == "never at once":
        monkeypatch.setattr(row_reader, "_can_read_now", lambda fd: False)
    return {}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """kept(case, rows): the rows of that case in files, written once; they must not be changed."""

    @functools.cache
    def keep(case: str, rows: int) -> StoredRows:
        return store(tmp_path_factory.mktemp("kept"), case, random_content(case, rows))

    return keep


@pytest.fixture
def make(kept, tmp_path):
    """make(case, **options): a table of that case; make(content, case, **options): in files of its own, as the case
    lays them. All are closed at the end."""
    tables: list[FileTable] = []

    def make_one(content: str | torch.Tensor | Rows, case: str = "", rows: int = R, **options: Any) -> FileTable:
        if isinstance(content, str):
            found = kept(content, rows)
        else:
            folder = tmp_path / str(len(tables))
            folder.mkdir()
            found = store(folder, case, content)
        tables.append(FileTable(found, CPU, **options))
        return tables[-1]

    yield make_one
    for table in tables:
        table.close()


def cold(table: FileTable) -> FileTable:
    """The same table with nothing of it in memory, where that can be."""
    if hasattr(os, "posix_fadvise"):
        table.drop_cache()
    return table


def fetch(table: FileTable, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return table.start(rows, out).wait()


# --- the same bits by every way ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equal_bits_by_every_way_cold_and_warm(case, way, make):
    content = random_content(case)
    table, rows = make(case, **way), random_rows(500)
    assert_same_bits(fetch(cold(table), rows), content.values(), rows)
    assert_same_bits(fetch(table, rows), content.values(), rows)


ROWS = {
    "none": torch.empty(0, dtype=torch.int64),
    "none, int32": torch.empty(0, dtype=torch.int32),
    "one": torch.tensor([7]),
    "the largest": torch.tensor([R - 1]),
    "the largest, many times": torch.full((64,), R - 1),
    "all": torch.arange(R),
    "all, backwards": torch.arange(R).flip(0),
    "all, twice": torch.arange(2 * R) % R,
    "int32": random_rows(200).int(),
    "every second of": random_rows(400)[::2],
    "a column of int32": random_rows(400).int().view(100, 4)[:, 1],
}


@pytest.mark.parametrize("case", ["264 B", *FP8])
def test_all_kinds_of_row_numbers(case, way, make):
    content = random_content(case)
    table = make(case, **way)
    for rows in ROWS.values():
        assert_same_bits(fetch(cold(table), rows), content.values(), rows)


@pytest.mark.parametrize("case", ["264 B", *FP8])
def test_rows_that_are_asked_for_now_and_taken_later(case, way, make):
    """Few of them are only asked for, many are fetched as ever; either way all is counted as predicted."""
    values, table, asked = random_content(case).values(), make(case, **way), Traffic()
    for rows in (random_rows(file.ASKED_ROWS), random_rows(500), *ROWS.values()):
        pending = cold(table).ask(rows)
        if 0 < len(rows) <= table.inline_rows:
            assert table.report() == asked
        assert_same_bits(pending.wait(), values, rows)
        assert pending.wait().data_ptr() == pending.wait().data_ptr()
        asked += predict(rows, table.source, table.direct).traffic
        assert table.report() == asked
        out = torch.empty(len(rows), table.format.width, dtype=table.format.dtype)
        assert table.ask(rows, out).wait().data_ptr() == out.data_ptr()
        assert_same_bits(out, values, rows)
        asked += predict(rows, table.source, table.direct).traffic


@pytest.mark.parametrize("direct", [False, True])
def test_asking_waits_for_no_row(direct, make, monkeypatch):
    table = make("split", direct=direct)
    if not table.inline_rows:
        pytest.skip("this system cannot be asked to read ahead")

    def never(*arguments):
        raise AssertionError("somebody waits")

    with monkeypatch.context() as patch:
        patch.setattr(row_reader.RowReader, "_read", never)
        patch.setattr(direct_reads._Queue, "take", never)
        pending = table.ask(random_rows(60))
    assert_same_bits(pending.wait(), random_content("split").values(), random_rows(60))


def test_what_is_wrong_is_said_by_asking_or_by_waiting(way, make):
    table = make(random_content("split"), "split", **way)
    with pytest.raises(ValueError, match="row 701 does not exist"):
        table.ask(torch.tensor([0, R]))
    with pytest.raises(ValueError, match="2 rows need a contiguous"):
        table.ask(torch.tensor([0, 1]), torch.empty(3, table.format.width))
    if not table.inline_rows:
        return
    changed, closed = table.ask(torch.tensor([0, 1])), table.ask(torch.tensor([0, 1]))
    path = table.source.path
    time.sleep(0.02)  # until the clock that dates files has ticked
    path.write_bytes(bytes(path.stat().st_size))
    for _ in range(2):
        with pytest.raises(ValueError, match="was changed after it was validated"):
            changed.wait()
    table.close()
    with pytest.raises(ValueError, match="was closed: make a new one"):
        closed.wait()


def test_nobody_need_wait_for_what_was_asked_for(way, make):
    table = make("split", **way)
    for _ in range(5):
        table.ask(random_rows(60))
    gc.collect()
    assert_same_bits(table.ask(random_rows(60)).wait(), random_content("split").values(), random_rows(60))


@pytest.mark.parametrize("case", CASES)
def test_a_table_of_one_row(case, way, make):
    content = random_content(case, rows=1)
    table = make(case, rows=1, **way)
    for rows in (torch.tensor([0]), torch.zeros(9, dtype=torch.int64)):
        assert_same_bits(fetch(cold(table), rows), content.values(), rows)


def test_rows_that_begin_anywhere_in_the_file(way, tmp_path):
    values = random_values(FORMATS["256 B"])
    write_tensors(tmp_path / "odd", {"before": torch.zeros(13, dtype=torch.uint8), "weight": values})
    found = StoredRows.find(tmp_path / "odd", "weight")
    assert found.parts[0].offset == BLOCK + 13
    rows = torch.cat([random_rows(300), torch.tensor([0, R - 1])])
    with contextlib.closing(FileTable(found, CPU, **way)) as table:
        assert_same_bits(fetch(cold(table), rows), values, rows)


def test_a_file_of_the_published_size_is_read_beyond_32_bits(way, tmp_path):
    """Layer 1 of DeepSeek-V4.1-Flash, 94 GiB, nearly all of it holes that take no room on the disk."""
    rows = 384_006_168
    tensors = {"weight": (torch.float8_e4m3fn, (rows, 256)), "scale": (torch.float8_e8m0fnu, (rows, 8))}
    header = make_header(tensors, on_page="weight")
    codes, scales = (part.numpy() for part in random_content("split").parts)
    with open(tmp_path / "large", "wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * 264)
        for width, part, at in ((256, codes, len(header)), (8, scales, len(header) + rows * 256)):
            file.seek(at + (rows - 4) * width)
            file.write(part[:4].data)
    wanted = torch.tensor([0, rows - 1, 2**31 // 8, rows - 4])
    with contextlib.closing(FileTable(StoredRows.find(tmp_path / "large", sparse=True), CPU, **way)) as table:
        got = fetch(table, wanted)
    (tmp_path / "large").unlink()
    assert (got[[0, 2]] == 0).all()
    assert_same_bits(got[[1, 3]], random_content("split").values(), torch.tensor([3, 0]))


@pytest.mark.parametrize("case", FP8)
def test_stored_rows_are_the_bytes_of_all_parts(case, way, make):
    content, rows = random_content(case), random_rows(60)
    got = make(case, **way).stored(rows)
    assert torch.equal(got, content.packed().parts[0][rows])


@pytest.mark.parametrize("case", FP8)
def test_the_factory_leaves_rows_where_they_are(case, kept):
    content, rows = random_content(case), random_rows(60)
    with make_table("file", kept(case, R)) as table:
        assert table.format == content.format
        assert_same_bits(fetch(table, rows), content.values(), rows)


def test_rows_that_are_not_asked_for_do_not_leak(way, make):
    values = torch.full((R, 33), torch.nan, dtype=torch.float64)
    wanted = torch.arange(3, R, 5)
    values[wanted] = wanted[:, None].double()
    out = torch.full((len(wanted), 33), torch.nan, dtype=torch.float64)
    assert fetch(cold(make(values, **way)), wanted, out) is out
    assert (out == wanted[:, None]).all()


@pytest.mark.parametrize("shift", [1, 264, -1])
def test_reading_beside_the_rows_is_noticed(shift, make, way):
    values = random_values(FORMATS["264 B"])
    rows = random_rows(100, R - 2)
    with contextlib.closing(FileTable(moved(make("264 B").source, 0, shift), CPU, **way)) as table:
        got = fetch(table, rows)
    with pytest.raises(AssertionError):
        assert_same_bits(got, values, rows)


@pytest.mark.parametrize(("part", "shift"), [(0, 1), (0, 256), (1, 1), (1, 8)])
def test_reading_beside_codes_or_scales_is_noticed(part, shift, make, way):
    content, rows = random_content("split"), random_rows(100, R - 2)
    with contextlib.closing(FileTable(moved(make("split").source, part, shift), CPU, **way)) as table:
        got = fetch(table, rows)
    with pytest.raises(AssertionError):
        assert_same_bits(got, content.values(), rows)


def moved(found: StoredRows, index: int, shift: int) -> StoredRows:
    """The rows as they would be if one part began elsewhere."""
    parts = list(found.parts)
    parts[index] = dataclasses.replace(parts[index], offset=parts[index].offset + shift)
    return dataclasses.replace(found, parts=tuple(parts))


# --- NaN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FP8)
@pytest.mark.parametrize(("column", "byte"), [(0, 0x7F), (263, 0xFF)])
def test_a_row_with_nan_is_refused_when_it_is_fetched(case, column, byte, way, make, monkeypatch):
    raw = random_content("packed").parts[0].clone()
    raw[[500, 600], column] = byte
    poisoned = Rows(random_content("packed").format, (raw,))
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "refuse_nan", lambda rows, before: None)  # a file that others wrote
        table = make(poisoned if case == "packed" else poisoned.split(), case, **way)
    others = torch.tensor([3, 499, 501, 499, 700])
    assert_same_bits(fetch(table, others), poisoned.values(), others)
    before = table.report()
    for rows in (torch.tensor([600]), torch.tensor([600, 3, 700, 600])):
        for use in (fetch, FileTable.stored):
            with pytest.raises(ValueError, match=r"row 600 has a code or a scale that is NaN: not fp8 rows$"):
                use(table, rows)
    assert table.report() == before


def test_nan_in_plain_rows_is_a_value(make):
    values = torch.full((5, 4), torch.nan)
    assert_same_bits(fetch(make(values), torch.arange(5)), values, torch.arange(5))


# --- which reads ------------------------------------------------------------------------------------------


@pytest.fixture
def found(make):
    """701 rows of 256 B in a file, from byte 4096 on."""
    return make("256 B").source


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


def test_long_runs_of_rows_have_the_same_bits(way, make, monkeypatch):
    monkeypatch.setattr(read_plan, "_LONGEST", 30_000)
    values = random_values(FORMATS["264 B"])
    assert_same_bits(fetch(cold(make(values, **way)), torch.arange(R)), values, torch.arange(R))


# --- what was read, and what was predicted ----------------------------------------------------------------


def test_counters_of_a_case_counted_by_hand(make):
    table = make(random_values(RowFormat(torch.float32, 4)))  # 16 B a row, 256 rows a page
    rows = torch.tensor([3, 3, 1, 0, 256])
    fetch(table, rows)
    traffic = Traffic(1, rows_requested=5, rows_unique=4, bytes_requested=80, bytes_unique=64, bytes_read=64)
    assert table.report() == traffic
    assert table.predict(rows) == Prediction(traffic, bytes_paged=2 * 4096, stretches=1)
    assert table.predict(rows).bytes_read == 64
    direct = dataclasses.replace(traffic, bytes_read=2 * 4096)
    assert predict(rows, table.source, direct=True) == Prediction(direct, bytes_paged=2 * 4096, stretches=1)


def test_counters_of_two_parts_counted_by_hand(make):
    """Codes, 32 B a row, begin at byte 4096, scales, 1 B a row, behind them: at 26528, which is on page 6."""
    table = make(Rows.from_split(*random_codes(width=32)))
    assert [part.offset for part in table.source.parts] == [4096, 4096 + 32 * R]
    rows = torch.tensor([3, 3, 1, 0, 256])  # codes on pages 1 and 3
    fetch(table, rows)
    traffic = Traffic(1, rows_requested=5, rows_unique=4, bytes_requested=165, bytes_unique=132, bytes_read=132)
    assert table.report() == traffic
    assert table.predict(rows) == Prediction(traffic, bytes_paged=3 * 4096, stretches=3)
    direct = dataclasses.replace(traffic, bytes_read=2 * 4096 + 26528 + R - 6 * 4096)  # the file ends on page 6
    assert predict(rows, table.source, direct=True) == Prediction(direct, bytes_paged=3 * 4096, stretches=3)
    ends = torch.tensor([0, R - 1])  # the last codes lie on the page on which the scales begin
    assert table.predict(ends).bytes_paged == 2 * 4096 and table.predict(ends).stretches == 2


@pytest.mark.parametrize("case", CASES)
def test_counters_are_what_was_predicted(case, way, make):
    table = make(case, **way)
    expected = Traffic()
    for count in (0, 1, 300):
        expected += table.predict(random_rows(count)).traffic
        fetch(cold(table), random_rows(count))
        fetch(table, random_rows(count).int())
        expected += table.predict(random_rows(count).int()).traffic
        assert table.report() == expected
    assert expected.fetches == 6 and expected.bytes_read > 0


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


def device_bytes() -> int:
    """Bytes that this process has made the disk deliver."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def bytes_of(table: FileTable, rows: torch.Tensor, warm: bool = False) -> int:
    """What a fetch makes the disk deliver: the least of three, because a library that is paged in counts, too."""
    seen = []
    for _ in range(3):
        if not warm:
            cold(table)
        before = device_bytes()
        fetch(table, rows)
        seen.append(device_bytes() - before)
    return min(seen)


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
        assert bytes_of(table, rows) == predicted
        assert bytes_of(table, rows, warm=True) == (predicted if table.direct else 0)


@linux
def test_reading_more_than_was_asked_for_is_noticed(on_disk):
    table, row = on_disk("256 B"), torch.tensor([5])
    os.posix_fadvise(*table._reader.require_open(), 0, 0, os.POSIX_FADV_NORMAL)
    assert bytes_of(table, row) > table.predict(row).bytes_paged


@linux
def test_the_share_in_memory_is_counted(make):
    table = make("4096 B")
    pages = R + 1  # and the header's
    cold(table)
    assert table.cached_share() == 0.0
    fetch(table, torch.tensor([5, 77, 5]))
    assert table.cached_share() == 2 / pages
    table.source.read()
    assert table.cached_share() == R / pages


@linux
def test_the_share_in_memory_is_that_of_all_files(make):
    table = make("two files")
    table.source.read()
    assert table.cached_share() == 1.0
    cold(table)
    assert table.cached_share() == 0.0
    fetch(table, torch.tensor([5, 10, 5]))
    pages = [-(-part.file_bytes // 4096) for part in table.source.parts]
    assert table.cached_share() == 2 / sum(pages)


@linux
def test_the_share_of_a_large_file_is_counted_in_pieces(make, monkeypatch):
    monkeypatch.setattr(pagecache, "_WINDOW", 1 << 16)
    table = cold(make("4096 B"))
    fetch(table, torch.arange(100, 300))
    assert table.cached_share() == 200 / (R + 1)


@linux
def test_direct_reads_leave_nothing_in_memory(make):
    table = cold(make("256 B", direct=True))
    fetch(table, random_rows(200))
    assert table.cached_share() == 0.0


def test_a_system_without_the_call_says_that_it_cannot_empty_the_page_cache(make, monkeypatch):
    table = make("256 B")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with pytest.raises(ValueError, match="cannot drop a file's pages"):
        table.drop_cache()


# --- threads and descriptors ------------------------------------------------------------------------------


def reading_threads() -> int:
    return sum(thread.name.startswith("rows") for thread in threading.enumerate())


def test_threads_begin_with_the_first_fetch_that_needs_them_and_end_with_the_table(make, monkeypatch):
    monkeypatch.setattr(row_reader, "_ASKING", (3, 20))
    table = make("256 B")
    fetch(table, torch.arange(0, 40, 2))
    assert reading_threads() == 0
    fetch(table, torch.arange(0, 400, 2))
    assert 1 <= reading_threads() <= 3
    table.close()
    assert reading_threads() == 0


def test_threads_end_with_a_table_that_nobody_has_any_more(kept, monkeypatch):
    monkeypatch.setattr(row_reader, "_ASKING", (3, 20))
    table = FileTable(kept("256 B", R), CPU)
    fetch(table, torch.arange(0, 400, 2))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("rows")]
    assert threads
    del table
    gc.collect()
    for thread in threads:
        thread.join(20)
    assert reading_threads() == 0


def test_a_closed_table_says_so(make):
    table = make("256 B")
    table.close()
    table.close()
    for use in (lambda: fetch(table, torch.tensor([0])), table.drop_cache, table.cached_share):
        with pytest.raises(ValueError, match="was closed: make a new one"):
            use()


def open_files(found: StoredRows) -> list[str]:
    """Names of the descriptors that this process has of a table's files."""
    names = {part.path.name for part in found.parts}
    paths = [Path(os.path.realpath(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd")]
    return sorted(path.name for path in paths if path.parent == found.path.parent and path.name in names)


@linux
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("case", ["256 B", "two files"])
def test_files_are_closed_with_their_table_or_when_nobody_has_it_any_more(case, direct, kept):
    found = kept(case, R)
    table = FileTable(found, CPU, direct=direct)
    assert open_files(found) == sorted({part.path.name for part in found.parts})
    table.close()
    assert open_files(found) == []
    table = FileTable(found, CPU, direct=direct)
    del table
    gc.collect()
    assert open_files(found) == []


@linux
def test_the_first_file_is_closed_if_the_second_cannot_be_opened(tmp_path):
    found = store(tmp_path, "two files", random_content("two files"))
    found.parts[1].path.unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors"):
        FileTable(found, CPU)
    assert open_files(found) == []


def test_the_disk_is_asked_for_both_parts_before_either_is_waited_for(make, monkeypatch):
    if not row_reader._CAN_ASK_AHEAD:
        pytest.skip("this system cannot be asked to read ahead")
    monkeypatch.setattr(row_reader, "_fused", None)
    monkeypatch.setattr(row_reader, "_can_read_now", lambda fd: False)
    table = make("two files")
    calls: list[tuple[str, int]] = []
    advise, preadv = os.posix_fadvise, os.preadv
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *more: calls.append(("ask", fd)) or advise(fd, *more))
    monkeypatch.setattr(os, "preadv", lambda fd, *more: calls.append(("wait", fd)) or preadv(fd, *more))
    fetch(table, torch.tensor([5, 10, 15]))
    codes, scales = table._reader.require_open()
    asked = [("ask", codes)] * 3 + [("ask", scales)] * 3
    assert calls == asked + [("wait", codes)] * 3 + [("wait", scales)] * 3


@pytest.mark.parametrize(
    "way", ["plain", "plain, several threads", "waiting threads", "direct, threads"], indirect=True
)
@pytest.mark.parametrize("part", [0, 1])
def test_what_the_disk_says_is_raised_by_the_fetch(part, way, make, monkeypatch):
    content = random_content("split")
    table, rows, preadv = make("split", **way), torch.arange(0, R, 20), os.preadv
    bad = table.source.parts[part].offset + table.source.parts[part].row_bytes * 340

    def fail_once(fd, buffers, offset, *flags):
        if offset <= bad < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", fail_once)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        fetch(table, rows)
    assert table.report() == Traffic()
    monkeypatch.undo()
    assert_same_bits(fetch(table, rows), content.values(), rows)


def test_bytes_held_are_on_disk(make):
    assert make("256 B").bytes_held() == {"device": 0, "host": 0, "disk": R * 256}
    assert make("split").bytes_held() == {"device": 0, "host": 0, "disk": R * 264}


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads, found):
    with pytest.raises(ValueError, match=f"threads={threads}: one at least must read"):
        FileTable(found, CPU, threads=threads)


# --- direct reads where they cannot be --------------------------------------------------------------------


@linux
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_system_that_refuses_direct_reads_is_named(call, found, monkeypatch):
    real = getattr(os, call)
    refused_flag = os.O_DIRECT if call == "open" else 0

    def refuse(what, argument, *more):
        if call == "open" and not argument & refused_flag:
            return real(what, argument, *more)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(ValueError, match="cannot be read past the page cache: use direct=False"):
        FileTable(found, CPU, direct=True)


def test_a_system_without_direct_reads_is_refused(found, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    with pytest.raises(ValueError, match="cannot be read past the page cache: use direct=False"):
        FileTable(found, CPU, direct=True)


# --- files that are not what they were ------------------------------------------------------------------------


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(b"other")


CHANGES = [grow, truncate, overwrite]


def become_a_pipe(path):
    path.unlink()
    os.mkfifo(path)  # whose opening waits for a writer


@pytest.mark.parametrize("change", [*CHANGES, become_a_pipe, lambda path: os.utime(path, ns=(1, 1))])
@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_was_changed_after_it_was_validated_is_not_opened(part, change, tmp_path):
    found = store(tmp_path, "two files", random_content("two files"))
    change(found.parts[part].path)
    for use in (found.read, lambda: FileTable(found, CPU), lambda: FileTable(found, CPU, direct=True)):
        with pytest.raises(ValueError, match=f"{part + 1}.safetensors was changed after it was validated"):
            use()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_changes_its_size_while_it_is_open_is_refused(part, change, way, make):
    table = make(random_content("two files"), "two files", **way)
    fetch(table, torch.tensor([0]))
    changed = table.source.parts[part]
    change(changed.path)
    with pytest.raises(ValueError, match=f"bytes now and had {changed.file_bytes} when it was opened"):
        fetch(table, torch.tensor([0]))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("late", [False, True], ids=["before a fetch", "during a fetch"])
def test_a_file_that_is_overwritten_in_place_is_noticed(part, late, way, make, monkeypatch):
    """By its time: the size is the same."""
    table = make(random_content("two files"), "two files", **way)
    fetch(table, torch.tensor([0]))

    def overwrite_in_place():
        path = table.source.parts[part].path
        time.sleep(0.02)  # until the clock that dates files has ticked
        path.write_bytes(bytes(path.stat().st_size))

    if late:
        monkeypatch.setattr(table._reader, "_require_same_size", overwrite_in_place)
    else:
        overwrite_in_place()
    with pytest.raises(ValueError, match=f"{part + 1}.safetensors was changed after it was validated"):
        fetch(table, torch.arange(0, R, 7))


@linux
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["preadv", "posix_fadvise"])
def test_a_refused_hint_is_done_without(call, code, way, make, monkeypatch):
    real = getattr(os, call)

    def refuse(fd, *more):
        if call == "preadv" and len(more) == 2:
            return real(fd, *more)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    content, rows = random_content("split"), torch.arange(0, R, 3)
    assert_same_bits(fetch(make("split", **way), rows), content.values(), rows)


@pytest.mark.parametrize("most", [4096, 5000, 512, 1000])
def test_reads_that_return_less_are_continued(most, way, make, monkeypatch):
    """As network file systems do, and signals."""
    table, rows, preadv = make("split", **way), torch.arange(0, R, 3), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, offset, *flags: read_less(preadv, fd, to[0], offset, most))
    assert_same_bits(fetch(table, rows), random_content("split").values(), rows)


def read_less(preadv, fd, target, offset, most):
    """A read of at most so many bytes, from anywhere, also of a file that is read directly."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return preadv(file.fileno(), [target[:most]], offset)


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_is_truncated_during_a_fetch_is_refused(part, way, make, monkeypatch):
    table = make(random_content("two files"), "two files", **way)
    monkeypatch.setattr(table._reader, "_require_same_size", lambda: truncate(table.source.parts[part].path))
    with pytest.raises(ValueError, match=r"^the file ends at byte \d+, where it had rows when it was opened"):
        fetch(table, torch.arange(0, R, 7))


def test_rows_that_do_not_exist_are_refused(way, make):
    table = make("256 B", **way)
    for row in (R, -1, 2**62):
        with pytest.raises(ValueError, match=f"row {row} does not exist; the table has rows 0 .. 700"):
            table.start(torch.tensor([0, row]))
    assert table.report() == Traffic()


def test_a_buffer_that_does_not_fit_is_refused(make):
    table = make("256 B")
    with pytest.raises(ValueError, match="3 rows need a contiguous"):
        table.start(torch.arange(3), torch.empty(4, 64))


def test_the_compiled_loop_is_there_with_numba():
    assert (row_reader._fused is not None) == (
        importlib.util.find_spec("numba") is not None and row_reader._CAN_ASK_AHEAD
    )
