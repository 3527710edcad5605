"""Plain rows read in place: every format, and on which machines and from which memory.

Without a GPU the kernel runs in Triton's interpreter and the table serves a CPU; with one, pinned memory and it. What
becomes of row numbers and buffers is in test_in_place.py and, for every placement alike, test_placements.py.
"""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="placement uva needs Triton (pip install 'engram-offload[test]' on Linux)")

import engram_ref.rows as rows_room
from engram_ref import gpu
from engram_ref.rows import kernels
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


@pytest.fixture
def values():
    return values_of(50)


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


# --- what is refused ------------------------------------------------------------------------------


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
