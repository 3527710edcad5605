"""Fixtures of tables: of every placement, and in files by every way to read them (`tests/ref/files/ways.py`)."""

import contextlib
import sys

import pytest
import torch

from engram_ref.tables import Table, make_table
from engram_ref.tables.file import StoredRows, save_rows
from tests.ref.files.ways import found, kept, make, way  # noqa: F401 - fixtures
from tests.ref.tables.placements import CASES, device_for, ranks_for


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter takes a millisecond for a program, whatever it does; on a GPU nothing is changed."""
    kernels, gpu = (sys.modules.get(f"engram_ref.{name}") for name in ("rows.kernels", "gpu"))  # few tests need Triton
    if kernels and gpu and gpu.INTERPRETED:
        monkeypatch.setattr(kernels, "ROWS_PER_PROGRAM", 64)
        monkeypatch.setattr(kernels, "SCALED_ROWS_PER_PROGRAM", 64)


@pytest.fixture
def placed(tmp_path):
    """placed(case, values): the table of that case; all are closed at the end."""
    with contextlib.ExitStack() as tables:

        def make_one(case: str, values: torch.Tensor, **options: object) -> Table:
            content: torch.Tensor | StoredRows = values
            if "file" in case:
                save_rows(tmp_path / "table.safetensors", values)
                content = StoredRows.find(tmp_path / "table.safetensors")
            placement = case.split(",")[0]
            tables.enter_context(ranks_for(case))
            return tables.enter_context(make_table(placement, content, device_for(case), **CASES[case], **options))

        yield make_one
