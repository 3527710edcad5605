"""Rows in a file: the same bits by every way of reading, what is refused, and reads that are what was predicted.

Tables are random bytes, so that NaN with any payload, -0.0 and denormals are among the values, and are compared byte
by byte with NumPy's indexing. Ways of reading that a machine lacks are taken by hiding the others.

    python -m pytest tests/ref/test_file_table.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import importlib.util
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from engram_ref.tables import pagecache, read_plan, reading, stored
from engram_ref.tables.base import RowFormat
from engram_ref.tables.file import FileTable, Prediction, StoredRows, Traffic, predict, save_pieces, save_rows
from engram_ref.tables.read_plan import BLOCK, plan_reads

CPU = torch.device("cpu")
R = 701
FORMATS = {  # row bytes that divide a page, straddle two, three, and every odd size
    "2 B": RowFormat(torch.float16, 1),
    "10 B": RowFormat(torch.bfloat16, 5),
    "256 B": RowFormat(torch.float32, 64),
    "264 B": RowFormat(torch.float64, 33),
    "4096 B": RowFormat(torch.float32, 1024),
    "8200 B": RowFormat(torch.float64, 1025),
}
WAYS = ["compiled", "plain", "several threads", "plain, several threads", "never at once", "waiting threads", "direct"]
linux = pytest.mark.skipif(
    not (hasattr(os, "posix_fadvise") and Path("/proc/self/io").exists()),
    reason="the page cache can be watched and emptied on Linux only",
)


def random_values(row_format: RowFormat, rows: int = R) -> torch.Tensor:
    """Random bytes, as values [rows, D]."""
    generator = torch.Generator().manual_seed(row_format.width)
    shape = (rows, row_format.row_bytes)
    return row_format.decode(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))


def random_rows(count: int, rows: int = R) -> torch.Tensor:
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(count))


def assert_same_bits(got: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
    """`got` is values[rows], byte by byte."""
    assert got.dtype == values.dtype and got.shape == (len(rows), values.shape[1])
    assert (got.view(torch.uint8).numpy() == values.view(torch.uint8).numpy()[rows.numpy()]).all()


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way to read; returns the options of a table that goes it. Few reads make threads and waits happen."""
    monkeypatch.setattr(reading, "AHEAD", 5)
    if request.param == "direct":
        monkeypatch.setattr(reading, "_WAITING", (3, 1))
        return {"direct": True}
    if request.param == "waiting threads":
        monkeypatch.setattr(reading, "_CAN_ASK_AHEAD", False)
        return {"threads": 3}
    if not reading._CAN_ASK_AHEAD:
        pytest.skip("this system cannot be asked to read ahead")
    if "plain" in request.param:
        monkeypatch.setattr(reading, "_fused", None)
    elif reading._fused is None:
        pytest.skip("the compiled loop needs numba (pip install 'engram-offload[ref]')")
    if "several" in request.param:
        monkeypatch.setattr(reading, "_ASKING", (3, 1))
    if request.param == "never at once":
        monkeypatch.setattr(reading, "_can_read_now", lambda fd: False)
    return {}


@pytest.fixture
def make(tmp_path):
    """make(values, **options): a table of them in a file; all are closed at the end."""
    tables: list[FileTable] = []

    def make_one(values: torch.Tensor, **options: Any) -> FileTable:
        path = tmp_path / f"{len(tables)}.safetensors"
        save_rows(path, values)
        tables.append(FileTable(StoredRows.find(path), CPU, **options))
        return tables[-1]

    yield make_one
    for table in tables:
        table.close()


def file_bytes(header: dict, body: int = 64) -> bytes:
    """A safetensors file by hand: any header, and a body of zeros."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def cold(table: FileTable) -> FileTable:
    """The same table with nothing of it in memory, where that can be."""
    if hasattr(os, "posix_fadvise"):
        table.drop_cache()
    return table


def fetch(table: FileTable, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return table.start(rows, out).wait()


# --- the same bits by every way ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", FORMATS)
def test_equal_bits_by_every_way_cold_and_warm(size, way, make):
    values = random_values(FORMATS[size])
    table, rows = make(values, **way), random_rows(500)
    assert_same_bits(fetch(cold(table), rows), values, rows)
    assert_same_bits(fetch(table, rows), values, rows)


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


def test_all_kinds_of_row_numbers(way, make):
    values = random_values(FORMATS["264 B"])
    table = make(values, **way)
    for rows in ROWS.values():
        assert_same_bits(fetch(cold(table), rows), values, rows)


@pytest.mark.parametrize("size", FORMATS)
def test_a_table_of_one_row(size, way, make):
    values = random_values(FORMATS[size], rows=1)
    table = make(values, **way)
    for rows in (torch.tensor([0]), torch.zeros(9, dtype=torch.int64)):
        assert_same_bits(fetch(cold(table), rows), values, rows)


def test_rows_that_begin_anywhere_in_the_file(way, tmp_path):
    values = random_values(FORMATS["256 B"])
    bounds = [14, 14 + R * 256]
    header = {
        "before": {"dtype": "U8", "shape": [14], "data_offsets": [0, 14]},
        "weight": {"dtype": "F32", "shape": [R, 64], "data_offsets": bounds},
    }
    content = file_bytes(header, body=14) + values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(content)
    found = StoredRows.find(tmp_path / "odd.safetensors")
    assert found.offset == len(content) - R * 256 and found.offset % 2 == 1
    rows = torch.cat([random_rows(300), torch.tensor([0, R - 1])])
    with contextlib.closing(FileTable(found, CPU, **way)) as table:
        assert_same_bits(fetch(cold(table), rows), values, rows)
    assert_same_bits(found.read(), values, torch.arange(R))


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
    found = make(values).stored
    rows = random_rows(100, R - 2)
    beside = dataclasses.replace(found, offset=found.offset + shift)
    with contextlib.closing(FileTable(beside, CPU, **way)) as table:
        got = fetch(table, rows)
    with pytest.raises(AssertionError):
        assert_same_bits(got, values, rows)


# --- which reads ------------------------------------------------------------------------------------------


@pytest.fixture
def found(make):
    """701 rows of 256 B in a file, from byte 4096 on."""
    return make(random_values(FORMATS["256 B"])).stored


def test_rows_that_touch_are_read_together(found):
    reads = plan_reads(np.array([0, 1, 2, 10, 12, 13]), found)
    assert (reads.offsets - BLOCK).tolist() == [0, 10 * 256, 12 * 256]
    assert reads.lengths.tolist() == [768, 256, 512]
    assert reads.first.tolist() == [0, 3, 4, 6]


def test_blocks_that_touch_are_read_together(found):
    reads = plan_reads(np.array([0, 15, 16, 48, 700]), found, direct=True)  # 16 rows lie in a block
    assert reads.offsets.tolist() == [BLOCK, 4 * BLOCK, 44 * BLOCK]
    assert reads.lengths.tolist() == [2 * BLOCK, BLOCK, found.file_bytes - 44 * BLOCK]  # the file ends in a block
    assert reads.first.tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize("direct", [False, True])
def test_no_read_is_long(found, direct, monkeypatch):
    monkeypatch.setattr(read_plan, "_LONGEST", 10_000)
    reads = plan_reads(np.arange(R), found, direct)
    assert reads.lengths.max() <= 10_000
    assert len(reads) == (-(-R * 256 // (39 * 256)) if not direct else R)
    assert (reads.offsets <= reads.starts[reads.first[:-1]]).all()


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
    assert predict(rows, table.stored, direct=True) == Prediction(direct, bytes_paged=2 * 4096, stretches=1)


@pytest.mark.parametrize("size", FORMATS)
def test_counters_are_what_was_predicted(size, way, make):
    table = make(random_values(FORMATS[size]), **way)
    expected = Traffic()
    for count in (0, 1, 300, 301):
        expected += table.predict(random_rows(count)).traffic
        fetch(cold(table), random_rows(count))
        fetch(table, random_rows(count).int())
        expected += table.predict(random_rows(count).int()).traffic
        assert table.report() == expected
    assert expected.fetches == 8 and expected.bytes_read > 0


@pytest.mark.parametrize("size", FORMATS)
def test_predicted_pages_are_those_of_the_rows(size, make):
    table = make(random_values(FORMATS[size]))
    row_bytes, offset = table.format.row_bytes, table.stored.offset
    for count in (0, 1, 50, 500):
        rows = random_rows(count)
        pages = {byte // 4096 for row in rows.tolist() for byte in _bytes_of(row, offset, row_bytes)}
        assert table.predict(rows).bytes_paged == 4096 * len(pages)
        assert table.predict(rows).stretches == len([page for page in pages if page - 1 not in pages])


def _bytes_of(row: int, offset: int, row_bytes: int) -> range:
    return range(offset + row * row_bytes, offset + (row + 1) * row_bytes)


def test_a_prediction_refuses_what_the_table_refuses(make):
    with pytest.raises(ValueError, match="row 701 does not exist"):
        make(random_values(FORMATS["256 B"])).predict(torch.tensor([701]))


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

    def make_one(row_format: RowFormat, **options: Any) -> FileTable:
        table = make(random_values(row_format), **options)
        cold(table)
        if table.cached_share() == 1.0 or not bytes_of(table, torch.tensor([5])):
            pytest.skip(f"{table.stored.path.parent} is no disk: the kernel does not count what is read from it")
        return table

    return make_one


@linux
@pytest.mark.parametrize("size", FORMATS)
def test_a_cold_fetch_reads_the_predicted_pages_and_a_warm_one_nothing(size, way, on_disk):
    table = on_disk(FORMATS[size], **way)
    for count in (1, 40, 300):
        rows = random_rows(count)
        predicted = table.predict(rows).bytes_paged
        assert bytes_of(table, rows) == predicted
        assert bytes_of(table, rows, warm=True) == (predicted if table.direct else 0)


@linux
def test_reading_more_than_was_asked_for_is_noticed(on_disk):
    table, row = on_disk(FORMATS["256 B"]), torch.tensor([5])
    os.posix_fadvise(table._reader.require_open(), 0, 0, os.POSIX_FADV_NORMAL)
    assert bytes_of(table, row) > table.predict(row).bytes_paged


@linux
def test_the_share_in_memory_is_counted(make):
    table = make(random_values(FORMATS["4096 B"]))
    pages = R + 1  # and the header's
    cold(table)
    assert table.cached_share() == 0.0
    fetch(table, torch.tensor([5, 77, 5]))
    assert table.cached_share() == 2 / pages
    table.stored.read()
    assert table.cached_share() == R / pages


@linux
def test_the_share_of_a_large_file_is_counted_in_pieces(make, monkeypatch):
    monkeypatch.setattr(pagecache, "_WINDOW", 1 << 16)
    table = cold(make(random_values(FORMATS["4096 B"])))
    fetch(table, torch.arange(100, 300))
    assert table.cached_share() == 200 / (R + 1)


@linux
def test_direct_reads_leave_nothing_in_memory(make):
    table = cold(make(random_values(FORMATS["256 B"]), direct=True))
    fetch(table, random_rows(200))
    assert table.cached_share() == 0.0


def test_a_system_without_the_call_says_that_it_cannot_empty_the_page_cache(make, monkeypatch):
    table = make(random_values(FORMATS["256 B"]))
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with pytest.raises(ValueError, match="cannot drop a file's pages"):
        table.drop_cache()


# --- threads and descriptors ------------------------------------------------------------------------------


def reading_threads() -> int:
    return sum(thread.name.startswith("rows") for thread in threading.enumerate())


def test_threads_begin_with_the_first_fetch_that_needs_them_and_end_with_the_table(make, monkeypatch):
    monkeypatch.setattr(reading, "_ASKING", (3, 20))
    table = make(random_values(FORMATS["256 B"]))
    fetch(table, torch.arange(0, 40, 2))
    assert reading_threads() == 0
    fetch(table, torch.arange(0, 400, 2))
    assert 1 <= reading_threads() <= 3
    table.close()
    assert reading_threads() == 0


def test_a_closed_table_says_so(make):
    table = make(random_values(FORMATS["256 B"]))
    table.close()
    table.close()
    for use in (lambda: fetch(table, torch.tensor([0])), table.drop_cache, table.cached_share):
        with pytest.raises(ValueError, match="was closed: make a new one"):
            use()


@linux
@pytest.mark.parametrize("direct", [False, True])
def test_a_file_is_closed_with_its_table_or_when_nobody_has_it_any_more(direct, found):
    def descriptors() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(found.path) for fd in os.listdir("/proc/self/fd"))

    before = descriptors()
    table = FileTable(found, CPU, direct=direct)
    assert descriptors() == before + 1
    table.close()
    assert descriptors() == before
    table = FileTable(found, CPU, direct=direct)
    del table
    gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("way", ["plain", "plain, several threads", "waiting threads", "direct"], indirect=True)
def test_what_the_disk_says_is_raised_by_the_fetch(way, make, monkeypatch):
    values = random_values(FORMATS["256 B"])
    table, rows, preadv = make(values, **way), torch.arange(0, R, 20), os.preadv

    def fail_once(fd, buffers, offset, *flags):
        if offset // BLOCK == 21:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", fail_once)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        fetch(table, rows)
    assert table.report() == Traffic()
    monkeypatch.undo()
    assert_same_bits(fetch(table, rows), values, rows)


def test_bytes_held_are_on_disk(make):
    assert make(random_values(FORMATS["256 B"])).bytes_held() == {"device": 0, "host": 0, "disk": R * 256}


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


# --- files that are not tables, or not any more -----------------------------------------------------------

GOOD = {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}


def changed(**fields: object) -> dict:
    return {"w": {**GOOD["w"], **fields}}


FOREIGN = {
    "an empty file": b"",
    "random bytes": np.random.default_rng(0).bytes(5000),
    "JSON": json.dumps(GOOD).encode(),
    "a pickle": pickle.dumps({"weight": [1.0] * 100}),
    "only a header": file_bytes(GOOD, body=0),
    "truncated": file_bytes(GOOD, body=63),
    "longer than its header says": file_bytes(GOOD, body=65),
    "half a header": file_bytes(GOOD)[:40],
    "more rows than bytes": file_bytes(changed(shape=[5, 4])),
    "fewer rows than bytes": file_bytes(changed(shape=[3, 4])),
    "a negative shape": file_bytes(changed(shape=[-4, -4])),
    "offsets beyond the file": file_bytes(changed(data_offsets=[64, 128])),
    "offsets backwards": file_bytes(changed(data_offsets=[64, 0])),
    "a dtype that does not exist": file_bytes(changed(dtype="F33")),
}


def test_the_pattern_of_the_foreign_files_is_a_table(tmp_path):
    (tmp_path / "good").write_bytes(file_bytes(GOOD))
    assert StoredRows.find(tmp_path / "good").rows == 4


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_whole_table_is_refused(kind, tmp_path):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError, match=r"foreign.safetensors is not a whole safetensors file: .*$") as caught:
        StoredRows.find(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        StoredRows.find(tmp_path / "nowhere.safetensors")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is not a regular file"):
            StoredRows.find(path)


TENSORS = {
    "table": torch.zeros(3, 4),
    "bytes": torch.zeros(3, 4, dtype=torch.uint8),
    "flat": torch.zeros(12),
    "cube": torch.zeros(3, 2, 2),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "weight": "has no tensor 'weight': it has table, bytes, flat, cube, empty",
        "bytes": "tensor 'bytes' is U8: rows are one of F64, F32, F16, BF16",
        "flat": r"tensor 'flat' has shape \(12,\): a table is \[rows, width\]",
        "cube": r"tensor 'cube' has shape \(3, 2, 2\)",
        "empty": r"tensor 'empty' has shape \(0, 4\): a table is .* one row at least",
        None: "has 3 tensors with two dimensions: give the name of one",
    }.items(),
)
def test_a_tensor_that_is_no_table_is_refused(name, message, tmp_path):
    (tmp_path / "many").write_bytes(safetensors.torch.save(TENSORS))
    order = list(json.loads((tmp_path / "many").read_bytes()[8:].split(b"}}")[0] + b"}}"))
    message = message.replace("table, bytes, flat, cube, empty", ", ".join(order))
    with pytest.raises(ValueError, match=message):
        StoredRows.find(tmp_path / "many", name)


def test_the_only_matrix_of_a_file_needs_no_name(tmp_path):
    values = random_values(FORMATS["10 B"])
    tensors = {"scale": torch.ones(3), "rows": values, "cube": TENSORS["cube"]}
    safetensors.torch.save_file(tensors, tmp_path / "some", metadata={"made": "by a test"})
    found = StoredRows.find(tmp_path / "some")
    assert (found.name, found.rows, found.format, found.nbytes) == ("rows", R, FORMATS["10 B"], R * 10)
    assert_same_bits(found.read(), values, torch.arange(R))


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 300 * 256)


def overwrite(path: Path) -> None:
    path.write_bytes(b"other")


CHANGES = [grow, truncate, overwrite]


@pytest.mark.parametrize("change", [*CHANGES, lambda path: os.utime(path, ns=(1, 1))])
def test_a_file_that_was_changed_after_it_was_validated_is_not_opened(change, found):
    change(found.path)
    for use in (found.read, lambda: FileTable(found, CPU), lambda: FileTable(found, CPU, direct=True)):
        with pytest.raises(ValueError, match="was changed after it was validated"):
            use()


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_its_size_while_it_is_open_is_refused(change, way, make):
    table = make(random_values(FORMATS["256 B"]), **way)
    fetch(table, torch.tensor([0]))
    change(table.stored.path)
    with pytest.raises(ValueError, match=f"bytes now and had {table.stored.file_bytes} when it was opened"):
        fetch(table, torch.tensor([0]))


def test_a_file_that_is_truncated_during_a_fetch_is_refused(way, make, monkeypatch):
    table = make(random_values(FORMATS["256 B"]), **way)
    monkeypatch.setattr(table._reader, "_require_same_size", lambda: truncate(table.stored.path))
    with pytest.raises(ValueError, match=r"^the file ends at byte \d+, where it had rows when it was opened"):
        fetch(table, torch.arange(0, R, 7))


def test_a_file_that_is_truncated_while_all_of_it_is_read_is_refused(found, monkeypatch):
    descriptor = stored._open_same

    def open_and_truncate(path, *more):
        fd = descriptor(path, *more)
        truncate(path)
        return fd

    monkeypatch.setattr(stored, "_open_same", open_and_truncate)
    with pytest.raises(ValueError, match="the file ends at byte"):
        found.read()


def test_rows_that_do_not_exist_are_refused(way, make):
    table = make(random_values(FORMATS["256 B"]), **way)
    for row in (R, -1, 2**62):
        with pytest.raises(ValueError, match=f"row {row} does not exist; the table has rows 0 .. 700"):
            table.start(torch.tensor([0, row]))
    assert table.report() == Traffic()


def test_a_buffer_that_does_not_fit_is_refused(make):
    table = make(random_values(FORMATS["256 B"]))
    with pytest.raises(ValueError, match="3 rows need a contiguous"):
        table.start(torch.arange(3), torch.empty(4, 64))


# --- reading all, and writing -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", FORMATS)
def test_what_is_saved_is_read_by_us_and_by_safetensors(size, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_PIECE", 4099)  # many pieces, and none ends with a row
    values = random_values(FORMATS[size])
    save_rows(tmp_path / "t", values, 'a "name" with ünusual characters')
    found = StoredRows.find(tmp_path / "t")
    assert found.offset % BLOCK == 0 and found.format == FORMATS[size]
    assert_same_bits(found.read(), values, torch.arange(R))
    assert_same_bits(safetensors.torch.load_file(tmp_path / "t")[found.name], values, torch.arange(R))


def test_values_that_do_not_lie_in_order_are_saved_in_order(tmp_path):
    values = random_values(FORMATS["256 B"]).t()[::3].requires_grad_()
    save_rows(tmp_path / "t", values)
    assert_same_bits(StoredRows.find(tmp_path / "t").read(), values.detach().contiguous(), torch.arange(22))


def test_memory_of_another_shape_is_refused(found):
    right = torch.empty(R, 256, dtype=torch.uint8)
    found.read_into(right)
    for wrong in (right[1:], right.view(2 * R, 128), right.view(torch.int8)):
        with pytest.raises(ValueError, match=r"need \[701, 256\], uint8, on the CPU"):
            found.read_into(wrong)
    with pytest.raises(ValueError, match="must be contiguous"):
        found.read_into(torch.empty(256, R, dtype=torch.uint8).t())


def test_a_table_larger_than_memory_is_not_read(found):
    with pytest.raises(ValueError, match="do not fit into host memory"):
        dataclasses.replace(found, rows=2**50).read()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3), r"shape \(3,\): a table is \[rows, width\]"),
        (torch.zeros(0, 3), "a table of 0 rows of 3 values"),
        (torch.zeros(3, 0), "a table of 3 rows of 0 values"),
        (torch.zeros(3, 3, dtype=torch.int32), "rows of torch.int32: a table's are one of"),
    ],
)
def test_values_that_are_no_table_are_not_saved(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_rows(tmp_path / "t", values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "__metadata__"])
def test_a_name_that_safetensors_has_taken_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a tensor needs another name"):
        save_rows(tmp_path / "t", torch.zeros(2, 2), name)


def test_pieces_make_one_table(tmp_path):
    values = random_values(FORMATS["10 B"])
    save_pieces(tmp_path / "t", R, FORMATS["10 B"], (values[i : i + 100] for i in range(0, R, 100)))
    assert_same_bits(StoredRows.find(tmp_path / "t").read(), values, torch.arange(R))


@pytest.fixture
def folder(tmp_path):
    """A folder with an older table in it; a failed save must leave it as it is."""
    folder = tmp_path / "folder"
    folder.mkdir()
    save_rows(folder / "t", torch.ones(2, 2))
    before = (folder / "t").read_bytes()
    yield folder
    assert [path.name for path in folder.iterdir()] == ["t"]
    assert (folder / "t").read_bytes() == before


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([torch.zeros(3, 5)], "the pieces have 3 rows together: 4 were announced"),
        ([torch.zeros(3, 5), torch.zeros(2, 5)], "the pieces have 5 rows together: 4 were announced"),
        ([torch.zeros(3, 5), torch.zeros(1, 6)], r"rows of shape \(1, 6\)"),
        ([torch.zeros(4, 5, dtype=torch.float64)], "float64"),
    ],
)
def test_pieces_that_are_not_the_table_leave_nothing_behind(pieces, message, folder):
    with pytest.raises(ValueError, match=message):
        save_pieces(folder / "t", 4, RowFormat(torch.float32, 5), pieces)


def test_a_save_that_is_interrupted_leaves_nothing_behind(folder):
    def pieces():
        yield torch.zeros(2, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pieces(folder / "t", 4, RowFormat(torch.float32, 5), pieces())


def test_a_disk_that_is_full_while_writing_leaves_nothing_behind(folder):
    resource = pytest.importorskip("resource", reason="limits of file size are Unix's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 27\] File too large: '.*/t'$"):
            save_rows(folder / "t", torch.zeros(1 << 10, 1 << 10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_leaves_nothing_behind(call, folder, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), refuse)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/t'$"):
        save_rows(folder / "t", torch.zeros(3, 3))


def test_the_compiled_loop_is_there_with_numba():
    assert (reading._fused is not None) == (importlib.util.find_spec("numba") is not None and reading._CAN_ASK_AHEAD)
