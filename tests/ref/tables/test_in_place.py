"""fp8 rows that a kernel decodes where they lie, in host memory or a device's own: values, bad numbers, what is read.

Without a GPU the kernel runs in Triton's interpreter and both tables serve a CPU; with one, it runs there.
"""

import pytest
import torch

pytest.importorskip("triton", reason="reading in place needs Triton (pip install 'engram-offload[test]' on Linux)")

from engram_ref import gpu
from engram_ref.rows import decoding, kernels
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables import device
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.uva import UvaTable
from tests.ref.rows.fp8_pairs import assert_bits, pair_rows, random_rows, rows_of

# The interpreter multiplies with NumPy, which speaks of an overflow where fp8 rows have infinity for a value.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply")

DEVICE = torch.device("cpu" if gpu.INTERPRETED else "cuda:0")
CUDA = DEVICE.type == "cuda"
R, D = 50, 64


@pytest.fixture(params=["uva", "device"])
def make(request, monkeypatch):
    """A table whose rows a kernel reads in place, from their bytes."""
    if request.param == "uva":
        move, kind = (
            (lambda part: part.pin_memory() if CUDA else part),
            lambda rows: UvaTable(rows, DEVICE, checked=True),
        )
    else:
        move, kind = (lambda part: part.to(DEVICE)), lambda rows: DeviceTable(rows, checked=True)
        monkeypatch.setattr(device, "kernels_for", lambda where: kernels)  # on a CPU too
    return lambda rows: kind(Rows(rows.format, tuple(move(part) for part in rows.parts)))


@pytest.fixture(params=[False, True], ids=["packed", "split"])
def split(request):
    return request.param


@pytest.fixture
def raw():
    return random_rows(R, D)


@pytest.fixture
def table(make, raw, split):
    with make(rows_of(raw, split)) as table:
        yield table


def there(*rows: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


def settle() -> None:
    """Let the device finish, so that what it found is known."""
    if CUDA:
        torch.cuda.synchronize()


# --- values ---------------------------------------------------------------------------------------


def test_every_pair_of_code_and_scale(make, split):
    with make(rows_of(pair_rows(), split)) as table:
        assert_bits(table.start(torch.arange(256, device=DEVICE)).wait(), pair_rows())


def test_rows_come_in_the_order_asked_for(table, raw):
    rows = [49, 0, 7, 7, 7, 48, 1]
    for dtype in (torch.int32, torch.int64):
        got = table.start(there(*rows, dtype=dtype)).wait()
        assert got.device == DEVICE
        assert_bits(got, raw[rows])
    with pytest.raises(AssertionError):
        assert_bits(got, raw[[49, 0, 7, 7, 7, 48, 2]])
    assert_bits(table.start(there(4, 49, 5, 48, 6, 47)[::2]).wait(), raw[[4, 5, 6]])


def test_one_row_and_none(table, raw):
    assert_bits(table.start(there()).wait(), raw[:0])
    assert_bits(table.start(there(49)).wait(), raw[49:])


def test_values_arrive_in_the_buffer_that_is_given(table, raw):
    buffer = torch.zeros(5, D, dtype=torch.bfloat16, device=DEVICE)
    got = table.start(there(3, 2), out=buffer[1:3]).wait()
    assert got.data_ptr() == buffer[1:3].data_ptr()
    assert_bits(buffer[1:3], raw[[3, 2]])
    assert not buffer[[0, 3, 4]].any()
    with pytest.raises(ValueError, match=r"1 rows need a contiguous \[1, 64\], torch.bfloat16"):
        table.start(there(1), out=buffer)


def test_stored_rows_are_the_bytes(table, raw):
    assert torch.equal(table.stored(torch.tensor([49, 0])), raw[[49, 0]])


def test_codes_and_scales_in_one_memory(raw):
    """Both parts of split rows, one behind the other."""
    memory = HostMemory(raw.numel(), pinned=CUDA)
    parts = [
        memory.bytes[first : first + part.numel()].view_as(part).copy_(part)
        for first, part in zip((0, R * D), rows_of(raw, split=True).parts)
    ]
    table = UvaTable(Rows(rows_of(raw).format, tuple(parts)), DEVICE, memory)
    assert table.bytes_held() == {"device": 0, "host": R * 66, "disk": 0}
    assert_bits(table.start(there(49, 0)).wait(), raw[[49, 0]])
    table.close()
    assert memory.bytes.numel() == 0 and table.bytes_held()["host"] == 0
    with pytest.raises(ValueError, match="this table was closed"):
        table.start(there(1))


# --- row numbers that do not exist ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 50, 2**31, -(2**63), 2**63 - 1])
def test_a_row_that_does_not_exist_is_raised_once(bad, table, raw):
    pending = table.start(there(5, bad, 6))
    settle()
    with pytest.raises(ValueError, match=rf"^row {bad} does not exist; the table has rows 0 \.\. 49 "):
        pending.wait()
    got = pending.wait()
    assert_bits(got[[0, 2]], raw[[5, 6]])
    assert (got[1].view(torch.uint8) == 0xFF).all()


def test_the_next_start_raises_what_nobody_waited_for(table, raw):
    table.start(there(50, dtype=torch.int32))
    settle()
    with pytest.raises(ValueError, match="row 50 does not exist"):
        table.start(there(1))
    assert_bits(table.start(there(1)).wait(), raw[1:2])


def test_closing_raises_what_nobody_waited_for(make, raw):
    table = make(rows_of(raw))
    table.start(there(-7))
    with pytest.raises(ValueError, match="row -7 does not exist"):
        table.close()
    with pytest.raises(ValueError, match="this table was closed"):
        table.start(there(1))
    table.close()


def test_an_empty_table_has_no_row_at_all(make, split):
    with make(rows_of(random_rows(0, D), split)) as table:
        assert table.start(there()).wait().shape == (0, D)
        with pytest.raises(ValueError, match="row 0 does not exist"):
            table.start(there(0))


def test_what_is_no_vector_of_row_numbers_is_refused(table):
    with pytest.raises(ValueError, match=r"row numbers of shape \(1, 1\)"):
        table.start(there(1).view(1, 1))


# --- who decodes ----------------------------------------------------------------------------------


def test_decoding_in_order_uses_the_kernel_where_there_is_one(raw, monkeypatch):
    used = []

    def counting(*arguments):
        used.append(arguments)
        kernels.dequantise_rows(*arguments)

    class Counted:
        dequantise_rows = staticmethod(counting)

    monkeypatch.setattr(decoding, "kernels_for", lambda where: Counted)
    assert_bits(rows_of(raw).format.decode(raw.to(DEVICE)), raw)
    assert len(used) == 1


def test_kernels_are_for_cuda_with_triton(monkeypatch):
    assert decoding.kernels_for(torch.device("cpu")) is None
    assert decoding.kernels_for(torch.device("cuda")) is kernels
    monkeypatch.setattr(decoding, "_TRITON", False)
    assert decoding.kernels_for(torch.device("cuda")) is None


def test_without_triton_a_device_decodes_in_several_steps(raw, split, monkeypatch):
    monkeypatch.setattr(device, "kernels_for", lambda where: None)
    monkeypatch.setattr(decoding, "kernels_for", lambda where: None)
    rows = rows_of(raw, split)
    with DeviceTable(Rows(rows.format, tuple(part.to(DEVICE) for part in rows.parts))) as table:
        monkeypatch.setattr(table, "_delivery", None)  # a CPU's
        out = torch.empty(3, D, dtype=torch.bfloat16, device=DEVICE)
        for given in (None, out):
            assert_bits(table.start(there(49, 0, 49), given).wait(), raw[[49, 0, 49]])
        assert_bits(out, raw[[49, 0, 49]])
