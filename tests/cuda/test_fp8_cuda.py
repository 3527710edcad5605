"""fp8 rows on a GPU: every placement gives the same bits, packed and split, and nothing stops the CPU.

The kernel's own tests, tests/ref/rows/test_kernels.py and test_in_place.py, run on the GPU too where there is one.
"""

import pytest
import torch

from engram_ref.rows import fp8, kernels
from engram_ref.rows.decoding import dequantise_rows
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables import make_table, uva
from engram_ref.tables.file import StoredRows, save_rows
from engram_ref.tables.uva import UvaTable
from tests.cuda.test_kernels_cuda import boundary_rows, no_synchronisation
from tests.ref.rows.fp8_pairs import assert_bits, expected_bits, pair_rows, random_rows, rows_of

pytestmark = pytest.mark.cuda

R, D, PAIRS = 20_000, 256, 256
HOT = torch.arange(0, R, 3)
CASES = {
    "device": {},
    "host": {},
    "uva": {},
    "file": {},
    "hot": {"hot": HOT},
    "hot, file behind": {"hot": HOT, "behind": "file"},
    "hot, uva behind": {"hot": HOT, "behind": "uva"},
    "hot, device behind": {"hot": HOT, "behind": "device"},
}
DELAY = 20_000_000  # GPU clock cycles: about ten milliseconds


@pytest.fixture(scope="module")
def raw():
    """Packed rows: the first have every code with every scale except NaN, which a file refuses."""
    pairs = pair_rows()
    codes, scales = pairs[:, :D], pairs[:, D:]
    codes[(codes & 0x7F) == 0x7F] = 0
    scales[scales == 0xFF] = 127
    return torch.cat([pairs, random_rows(R - PAIRS, D)])


@pytest.fixture(scope="module")
def want(raw):
    """Bits of all values, int16 on the GPU: from integers, not from anything that is tested."""
    return expected_bits(raw).short().cuda()


@pytest.fixture(params=[False, True], ids=["packed", "split"])
def split(request):
    return request.param


@pytest.fixture(params=CASES)
def table(request, raw, split, device, tmp_path):
    content = rows_of(raw, split)
    if "file" in request.param:
        save_rows(tmp_path / "table.safetensors", content)
        content = StoredRows.find(tmp_path / "table.safetensors")
    with make_table(request.param.split(",")[0], content, device, **CASES[request.param]) as made:
        yield made


def same_bits(got, want, rows):
    assert got.is_cuda and got.dtype == torch.bfloat16
    return torch.equal(got.view(torch.int16), want[rows.to(got.device)])


def some_rows(count, seed, dtype=torch.int64):
    return torch.randint(0, R, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- every placement ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_equal_bits_on_the_gpu(table, want, dtype):
    counts = (0, 1, 48, 5000, 3, 60_000)
    asked = [torch.arange(PAIRS, dtype=dtype), *(some_rows(count, seed, dtype) for seed, count in enumerate(counts))]
    pending = [table.start(rows.to(table.index_device)) for rows in asked]
    for rows, fetch in zip(asked, pending):
        assert same_bits(fetch.wait(), want, rows)
    assert not same_bits(table.start(asked[0].to(table.index_device)).wait(), want, (asked[0] + 1) % R)


def test_a_buffer_of_the_callers_is_filled_again_and_again(table, want, device):
    out = torch.empty(700, D, dtype=torch.bfloat16, device=device)
    for seed in range(5):
        rows = some_rows(700, seed)
        torch.cuda.synchronize()  # nobody reads `out` any more
        assert table.start(rows.to(table.index_device), out).wait().data_ptr() == out.data_ptr()
        assert same_bits(out, want, rows)


@pytest.mark.parametrize("placement", ["device", "host", "uva"])
@pytest.mark.parametrize("packed", [True, False], ids=["to packed", "to split"])
def test_rows_are_laid_anew_on_the_way(placement, packed, raw, want, split, device):
    rows = some_rows(500, 0)
    with make_table(placement, rows_of(raw, split), device, packed=packed) as table:
        assert same_bits(table.start(rows.to(table.index_device)).wait(), want, rows)


@pytest.mark.parametrize("placement", ["device", "host", "uva"])
def test_other_rows_are_not_read(placement, raw, want, split, device):
    poisoned = raw.clone()
    poisoned[1::2] = 0x7E  # the largest code with a scale of 1/2
    rows = torch.arange(0, R, 2)
    with make_table(placement, rows_of(poisoned, split), device) as table:
        assert same_bits(table.start(rows.to(table.index_device)).wait(), want, rows)
        assert (table.start(torch.tensor([2, 3]).to(table.index_device)).wait()[1] == 224).all()


def test_rows_cross_the_bus_as_they_are_stored(raw, split, device):
    with make_table("host", rows_of(raw, split), device) as table:
        table.start(some_rows(1000, 0)).wait()
        assert table.bytes_copied == 1000 * 264


# --- who decodes ----------------------------------------------------------------------------------


def test_torch_decodes_every_pair_on_the_gpu():
    codes, scales = (part.cuda() for part in rows_of(pair_rows(), split=True).parts)
    assert_bits(fp8.dequantise(codes.view(fp8.CODE_DTYPE), scales.view(fp8.SCALE_DTYPE)), pair_rows())


def test_the_kernel_decodes_every_pair_on_the_gpu(monkeypatch):
    used = []
    real = kernels.dequantise_rows
    monkeypatch.setattr(kernels, "dequantise_rows", lambda *arguments: used.append(1) or real(*arguments))
    assert_bits(dequantise_rows(pair_rows().cuda(), D), pair_rows())
    assert used == [1]


@pytest.mark.parametrize("width", [32, 96, 1024])
def test_other_widths(width, split, device):
    raw = random_rows(3000, width)
    numbers = torch.randint(0, 3000, (4000,), generator=torch.Generator().manual_seed(width))
    for placement in ("device", "uva", "host"):
        with make_table(placement, rows_of(raw, split), device) as table:
            assert_bits(table.start(numbers.to(table.index_device)).wait(), raw[numbers])


# --- memory ---------------------------------------------------------------------------------------


def test_memory_registered_in_many_pieces(split, device, monkeypatch):
    piece = 4 << 20
    monkeypatch.setattr(uva, "PIN_PIECE", piece)
    rows = (3 * piece + 1000) // 264
    raw = random_rows(rows, D)
    host = HostMemory(raw.numel())
    host.pin(piece)
    assert host.locked_pieces == 4
    parts, first, numbers = [], 0, []
    for part in rows_of(raw, split).parts:
        parts.append(host.bytes[first : first + part.numel()].view_as(part).copy_(part))
        ends = (torch.arange(0, host.nbytes + piece, piece) - first) // part.shape[1]
        numbers.append((ends[:, None] + torch.arange(-2, 3)).flatten().clamp(0, rows - 1))
        first += part.numel()
    numbers = torch.cat([*numbers, boundary_rows(rows, 264, piece)])
    with UvaTable(Rows(rows_of(raw).format, tuple(parts)), device, host) as table:
        assert_bits(table.start(numbers.to(device)).wait(), raw[numbers])


@pytest.mark.parametrize("locked", [(), (0,), (1,)], ids=["none", "codes only", "scales only"])
def test_every_part_must_be_page_locked(locked, raw, device):
    rows = rows_of(raw, split=True)
    parts = tuple(part.pin_memory() if at in locked else part for at, part in enumerate(rows.parts))
    with pytest.raises(ValueError, match="reads page-locked memory, this is not"):
        UvaTable(Rows(rows.format, parts), device)


# --- streams and the CPU --------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["device", "uva"])
def test_fetching_does_not_stop_the_cpu(placement, raw, want, split, device):
    rows = some_rows(300, 0)
    with make_table(placement, rows_of(raw, split), device) as table:
        on_device = rows.to(device)
        table.start(on_device).wait()
        out = torch.empty(300, D, dtype=torch.bfloat16, device=device)
        with no_synchronisation():
            first = table.start(on_device).wait()
            table.start(on_device, out=out).wait()
        assert same_bits(first, want, rows) and same_bits(out, want, rows)


@pytest.mark.parametrize("placement", ["device", "uva"])
def test_a_bad_row_is_raised_when_it_is_known(placement, raw, want, device):
    """Not before: the GPU is kept busy, so a wait that does not stop the CPU cannot know yet."""
    with make_table(placement, rows_of(raw), device) as table:
        rows = torch.tensor([1, R, 2], device=device)
        table.start(rows[:1]).wait()
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY)
        pending = table.start(rows)
        got = pending.wait()
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=rf"row {R} does not exist; the table has rows 0 \.\. {R - 1}"):
            pending.wait()
        assert same_bits(got[[0, 2]], want, torch.tensor([1, 2]))
        assert (got[1].view(torch.uint8) == 0xFF).all()
        assert same_bits(table.start(rows[:1]).wait(), want, torch.tensor([1]))


@pytest.mark.parametrize("placement", ["device", "uva"])
def test_closing_raises_a_row_that_nobody_heard_of(placement, raw, device):
    table = make_table(placement, rows_of(raw), device)
    torch.cuda._sleep(DELAY)
    table.start(torch.tensor([-1], device=device))
    with pytest.raises(ValueError, match="row -1 does not exist"):
        table.close()


def test_a_device_table_reads_on_the_current_stream(raw, want, device):
    """Row numbers that are made late on a stream of the caller's are waited for there, and nowhere else."""
    late = some_rows(400, 1).to(device)
    with make_table("device", rows_of(raw), device) as table:
        stream = torch.cuda.Stream(device)
        rows = torch.zeros(400, dtype=torch.int64, device=device)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(DELAY)
            rows.copy_(late)
            got = table.start(rows).wait()
        stream.synchronize()
        assert same_bits(got, want, late)
