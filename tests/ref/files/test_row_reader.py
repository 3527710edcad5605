"""Reads of rows: their threads and descriptors, errors of the disk, and systems that refuse or return less."""

import errno
import gc
import importlib.util
import os
import threading
from pathlib import Path

import pytest
import torch

from engram_ref.files import read_plan, row_reader
from engram_ref.tables.file import FileTable, StoredRows
from tests.ref.files.stored_cases import FORMATS, R, assert_same_bits, random_content, random_values, store
from tests.ref.files.ways import CPU, cold, fetch, linux

# --- threads and descriptors ----------------------------------------------------------------------


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


# --- reads ----------------------------------------------------------------------------------------


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


def test_long_runs_of_rows_have_the_same_bits(way, make, monkeypatch):
    monkeypatch.setattr(read_plan, "_LONGEST", 30_000)
    values = random_values(FORMATS["264 B"])
    assert_same_bits(fetch(cold(make(values, **way)), torch.arange(R)), values, torch.arange(R))


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
    assert not any(table.counters().values())
    monkeypatch.undo()
    assert_same_bits(fetch(table, rows), content.values(), rows)


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


def test_the_compiled_loop_is_there_with_numba():
    assert (row_reader._fused is not None) == (
        importlib.util.find_spec("numba") is not None and row_reader._CAN_ASK_AHEAD
    )


# --- direct reads where they cannot be ------------------------------------------------------------


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
