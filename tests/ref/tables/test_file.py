"""Rows in a file: the same bits by every way of reading, and what is refused.

Tables are random bytes (`tests/ref/files/stored_cases.py`) and are compared byte by byte with NumPy's indexing. The
ways of reading are those of `tests/ref/files/ways.py`.
"""

import contextlib
import dataclasses
import gc
import time

import pytest
import torch

from engram_ref.files import direct_reads, row_reader
from engram_ref.files.conventions import BLOCK
from engram_ref.files.writing import make_header
from engram_ref.rows.rows import Rows
from engram_ref.tables import file
from engram_ref.tables.base import counted
from engram_ref.tables.file import FileTable, StoredRows, predict
from tests.ref.files.stored_cases import (
    CASES,
    FORMATS,
    FP8,
    R,
    assert_same_bits,
    random_content,
    random_rows,
    random_values,
    write_tensors,
)
from tests.ref.files.ways import CPU, cold, fetch

# --- the same bits by every way -------------------------------------------------------------------


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
    values, table, asked, bytes_read = random_content(case).values(), make(case, **way), 0, 0
    for rows in (random_rows(file.ASKED_ROWS), random_rows(500), *ROWS.values()):
        pending = cold(table).ask(rows)
        if 0 < len(rows) <= table.inline_rows:
            assert table.counters() == counted(asked, 0, disk=bytes_read)
        assert_same_bits(pending.wait(), values, rows)
        assert pending.wait().data_ptr() == pending.wait().data_ptr()
        asked += len(rows)
        bytes_read += predict(rows, table.source, table.direct).bytes_read
        assert table.counters() == counted(asked, 0, disk=bytes_read)
        out = torch.empty(len(rows), table.format.width, dtype=table.format.dtype)
        assert table.ask(rows, out).wait().data_ptr() == out.data_ptr()
        assert_same_bits(out, values, rows)
        asked += len(rows)
        bytes_read += predict(rows, table.source, table.direct).bytes_read


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


# --- NaN ------------------------------------------------------------------------------------------


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
    before = table.counters()
    for rows in (torch.tensor([600]), torch.tensor([600, 3, 700, 600])):
        for use in (fetch, FileTable.stored):
            with pytest.raises(ValueError, match=r"row 600 has a code or a scale that is NaN: not fp8 rows$"):
                use(table, rows)
    assert table.counters() == before


# --- what is refused ------------------------------------------------------------------------------


def test_a_closed_table_says_so(make):
    table = make("256 B")
    table.close()
    table.close()
    for use in (lambda: fetch(table, torch.tensor([0])), table.drop_cache, table.cached_share):
        with pytest.raises(ValueError, match="was closed: make a new one"):
            use()


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads, found):
    with pytest.raises(ValueError, match=f"threads={threads}: one at least must read"):
        FileTable(found, CPU, threads=threads)
