"""Tables on a GPU: every placement gives the same bits there, and page-locking keeps its promises."""

import pytest
import torch

from engram_ref.rows.memory import HUGE_PAGE, HostMemory
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, save_rows

pytestmark = pytest.mark.cuda

R, D = 50_000, 64
HOT = torch.arange(0, R, 3)
CASES = {
    "device": {},
    "host": {},
    "uva": {},
    "file": {},
    "hot": {"hot": HOT},
    "hot, file behind": {"hot": HOT, "behind": "file"},
    "hot, uva behind": {"hot": HOT, "behind": "uva"},
}


@pytest.fixture(scope="module")
def values():
    """Random bytes as bfloat16: NaN, -0.0 and all."""
    raw = torch.randint(0, 256, (R, 2 * D), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return raw.view(torch.bfloat16)


@pytest.fixture(params=CASES)
def table(request, values, device, tmp_path):
    content = values
    if "file" in request.param:
        save_rows(tmp_path / "table.safetensors", values)
        content = StoredRows.find(tmp_path / "table.safetensors")
    with make_table(request.param.split(",")[0], content, device, **CASES[request.param]) as made:
        yield made


def same_bits(got, values, rows):
    assert got.is_cuda
    return torch.equal(got.cpu().view(torch.uint8), values[rows.long()].view(torch.uint8))


def random_rows(count, seed, dtype=torch.int64):
    return torch.randint(0, R, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_equal_bits_on_the_gpu(table, values, dtype):
    asked = [random_rows(count, seed, dtype) for seed, count in enumerate((0, 1, 48, 5000, 3, 100_000))]
    pending = [table.start(rows.to(table.index_device)) for rows in asked]
    for rows, fetch in zip(asked, pending):
        assert same_bits(fetch.wait(), values, rows)


def test_a_buffer_of_the_callers_is_filled_again_and_again(table, values, device):
    out = torch.empty(700, D, dtype=torch.bfloat16, device=device)
    for seed in range(5):
        rows = random_rows(700, seed)
        torch.cuda.synchronize()  # nobody reads `out` any more
        assert table.start(rows.to(table.index_device), out).wait().data_ptr() == out.data_ptr()
        assert same_bits(out, values, rows)


@pytest.mark.parametrize("placement", ["device", "host", "uva"])
def test_rows_that_are_on_the_gpu_already(placement, values, device):
    rows = random_rows(500, 0)
    with make_table(placement, values.to(device), device) as table:
        assert same_bits(table.start(rows.to(table.index_device)).wait(), values, rows)


def test_locked_memory_is_known_to_torch_and_can_be_locked_again():
    for _ in range(3):
        with HostMemory(3 * HUGE_PAGE) as memory:
            memory.pin(piece=HUGE_PAGE)
            assert memory.bytes.is_pinned()


def test_a_refused_lock_leaves_no_error_behind(device):
    memory = HostMemory(HUGE_PAGE, pinned=True)
    with pytest.raises(ValueError, match="CUDA refused to page-lock 2,097,152 B"):
        memory.pin()  # it is locked already
    assert torch.arange(5, device=device).sum().item() == 10
