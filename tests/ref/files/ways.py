"""Tables in files by every way of reading: fixtures and functions for the tests of reads and of `FileTable`.

Ways that a machine lacks are taken by hiding the others.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from engram_ref.files import row_reader
from engram_ref.rows.rows import Rows
from engram_ref.tables.file import FileTable, StoredRows
from tests.ref.files.stored_cases import R, random_content, store

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


@functools.cache
def written(folder: Path, case: str, rows: int) -> StoredRows:
    """The rows of a case in files, written once a run for both folders of tests."""
    return store(Path(tempfile.mkdtemp(prefix="kept", dir=folder)), case, random_content(case, rows))


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """kept(case, rows): the rows of that case in files; they must not be changed."""
    return functools.partial(written, tmp_path_factory.getbasetemp())


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


@pytest.fixture
def found(make):
    """701 rows of 256 B in a file, from byte 4096 on."""
    return make("256 B").source


def cold(table: FileTable) -> FileTable:
    """The same table with nothing of it in memory, where that can be."""
    if hasattr(os, "posix_fadvise"):
        table.drop_cache()
    return table


def fetch(table: FileTable, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return table.start(rows, out).wait()
