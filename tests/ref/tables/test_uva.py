"""Rows read in place: the right bytes, from any row number, and what is refused, now or a little later.

Without a GPU the kernel runs in Triton's interpreter and the table serves a CPU; with one, pinned memory and it.

    python -m pytest tests/ref/tables/test_uva.py
"""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton", reason="placement uva needs Triton (pip install 'engram-offload[test]' on Linux)")

import engram_ref.rows as rows_room
from engram_ref import gpu
from engram_ref.rows import kernels
from engram_ref.rows.memory import HostMemory
from engram_ref.tables import uva
from engram_ref.tables.uva import UvaTable

DEVICE = torch.device("cpu" if gpu.INTERPRETED else "cuda:0")
CUDA = DEVICE.type == "cuda"
FORMATS = [(torch.float32, 4), (torch.bfloat16, 64), (torch.bfloat16, 80), (torch.float16, 3), (torch.uint8, 264)]


def values_of(rows: int, dtype: torch.dtype = torch.float32, width: int = 4) -> torch.Tensor:
    """Random bytes as values [rows, width]: NaN, -0.0 and all; page-locked for a GPU."""
    generator = torch.Generator().manual_seed(rows)
    raw = torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return (raw.pin_memory() if CUDA else raw).view(dtype)


def there(*rows: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


def equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Byte for byte."""
    return got.shape == expected.shape and torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))


def settle() -> None:
    """Let the device finish, so that what it found is known."""
    if CUDA:
        torch.cuda.synchronize()


@pytest.fixture
def values():
    return values_of(50)


@pytest.fixture
def table(values):
    with UvaTable(values, DEVICE) as table:
        yield table


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "width"), FORMATS, ids=str)
def test_rows_of_every_format(dtype, width):
    values = values_of(40, dtype, width)
    with UvaTable(values, DEVICE) as table:
        rows = [39, 0, 7, 7, 7, 38, 1]
        for integers in (torch.int32, torch.int64):
            got = table.start(there(*rows, dtype=integers)).wait()
            assert (got.dtype, got.device) == (dtype, DEVICE)
            assert equal(got, values[rows])
        assert not equal(got, values[[39, 0, 7, 7, 7, 38, 2]])


def test_no_rows_are_fetched_for_none(table, values):
    got = table.start(there()).wait()
    assert (got.shape, got.dtype) == ((0, 4), values.dtype)


def test_row_numbers_need_not_be_contiguous(table, values):
    rows = there(4, 49, 5, 48, 6, 47)[::2]
    assert equal(table.start(rows).wait(), values[[4, 5, 6]])


def test_rows_arrive_in_the_buffer_that_is_given(table, values):
    buffer = torch.zeros(5, 4, device=DEVICE)
    got = table.start(there(3, 2), out=buffer[1:3]).wait()
    assert got.data_ptr() == buffer[1:3].data_ptr()
    assert equal(buffer[1:3], values[[3, 2]])
    assert not buffer[[0, 3, 4]].any()


def test_rows_that_are_not_asked_for_are_not_read():
    values = torch.full((30, 4), torch.nan)
    values[[3, 29]] = torch.arange(8.0).view(2, 4)
    with UvaTable(values.pin_memory() if CUDA else values, DEVICE) as table:
        assert equal(table.start(there(29, 3, 29)).wait(), values[[29, 3, 29]])


def test_fetches_may_overlap(table, values):
    first, second = table.start(there(1, 2)), table.start(there(3))
    assert equal(second.wait(), values[[3]])
    assert equal(first.wait(), values[[1, 2]])


def test_memory_of_its_own_is_closed_with_the_table():
    memory = HostMemory(40 * 16, pinned=CUDA)
    memory.bytes.copy_(values_of(40).view(-1).view(torch.uint8))
    table = UvaTable(memory.bytes.view(torch.float32).view(40, 4), DEVICE, memory)
    assert table.bytes_held() == {"device": 0, "host": 640, "disk": 0}
    assert equal(table.start(there(39)).wait(), values_of(40)[[39]])
    table.close()
    assert memory.bytes.numel() == 0 and table.bytes_held()["host"] == 0
    with pytest.raises(ValueError, match="this table was closed"):
        table.start(there(1))
    table.close()


# --- row numbers that do not exist ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 50, 2**31, -(2**63), 2**63 - 1])
def test_a_row_that_does_not_exist_is_raised_once(bad, table, values):
    pending = table.start(there(5, bad, 6))
    settle()
    with pytest.raises(ValueError, match=rf"^row {bad} does not exist; the table has rows 0 \.\. 49 "):
        pending.wait()
    got = pending.wait()
    assert equal(got[[0, 2]], values[[5, 6]])
    assert (got[1].view(torch.uint8) == 0xFF).all()


def test_the_next_start_raises_what_nobody_waited_for(table, values):
    table.start(there(50, dtype=torch.int32))
    settle()
    with pytest.raises(ValueError, match="row 50 does not exist"):
        table.start(there(1))
    assert equal(table.start(there(1)).wait(), values[[1]])


def test_closing_raises_what_nobody_waited_for(values):
    table = UvaTable(values, DEVICE)
    table.start(there(-7))
    with pytest.raises(ValueError, match="row -7 does not exist"):
        table.close()
    table.close()


def test_an_empty_table_has_no_row_at_all():
    with UvaTable(values_of(0), DEVICE) as table:
        assert table.start(there()).wait().shape == (0, 4)
        with pytest.raises(ValueError, match="row 0 does not exist"):
            table.start(there(0))


# --- what is refused at once ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([[1]]), r"row numbers of shape \(1, 1\)"),
        (torch.tensor([1.0]), r"row numbers of shape \(1,\), torch.float32"),
        (torch.tensor([1], dtype=torch.int16), "give a vector of int32 or int64"),
        (torch.tensor([1], device="meta"), "row numbers on meta; this table looks them up on"),
    ],
    ids=["two dimensions", "float", "int16", "elsewhere"],
)
def test_what_is_no_vector_of_row_numbers_is_refused(rows, message, table):
    with pytest.raises(ValueError, match=message):
        table.start(rows if rows.is_meta else rows.to(DEVICE))


def across():
    """One row of four values that do not lie side by side; made where it is, since moving it would lay them so."""
    return torch.zeros(4, 2, device=DEVICE).T[:1]


@pytest.mark.parametrize("out", [torch.zeros(2, 4), torch.zeros(1, 5), torch.zeros(1, 4, dtype=torch.float64), across])
def test_a_buffer_that_does_not_fit_is_refused(out, table):
    with pytest.raises(ValueError, match=r"1 rows need a contiguous \[1, 4\], torch.float32"):
        table.start(there(1), out=out() if callable(out) else out.to(DEVICE))


def test_rows_that_do_not_lie_one_after_the_other_are_refused():
    with pytest.raises(ValueError, match="must lie one after the other"):
        UvaTable(torch.zeros(4, 6).T, DEVICE)


def test_a_cpu_is_refused_outside_the_interpreter(values, monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match="this machine cannot serve placement uva: needs a CUDA device and Triton, not cpu;"
    ):
        UvaTable(values.clone(), "cpu")


def test_a_machine_without_triton_is_refused(values, monkeypatch):
    monkeypatch.delattr(rows_room, "kernels")
    monkeypatch.delitem(sys.modules, "engram_ref.rows.kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"this machine cannot serve placement uva: .*: pip install triton, or use"):
        UvaTable(values, DEVICE)


def test_memory_that_is_not_page_locked_is_seen():
    assert not uva._is_page_locked(torch.zeros(5, 8, dtype=torch.uint8))
    assert uva._is_page_locked(values_of(5).view(torch.uint8)) == CUDA


def test_pieces_that_a_gpu_sees_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr(uva, "_host_addresses_serve", lambda: False)
    with pytest.raises(ValueError, match=r"page-locked in pieces of 1,073,741,824 B; use placement host"):
        uva.require_uva(torch.device("cuda"), 2**30 + 1)
    assert uva.require_uva(torch.device("cuda"), 2**30) is kernels
