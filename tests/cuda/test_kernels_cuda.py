"""Hashing and reading in place on a GPU: the definition's indices and the table's bytes, without a synchronisation.

The kernels' own tests, tests/ref/rows/test_kernels.py and test_uva.py, run on the GPU too where there is one; here is
what only a GPU has: registered memory in several pieces, streams that race, and a CPU that must not be stopped.
"""

from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import DEAD, HashPlan, NgramHasher, TokenHistory
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab
from engram_ref.rows.memory import PIN_PIECE, HostMemory
from engram_ref.tables import make_table, uva
from engram_ref.tables.uva import UvaTable

pytestmark = pytest.mark.cuda

SHAPES = [(1, 1), (64, 1), (2, 333)]
DELAY = 20_000_000  # GPU clock cycles: about ten milliseconds


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@contextmanager
def no_synchronisation():
    """An error for every torch operation that stops the CPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random_ids(size: int, shape: tuple[int, int], dead: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, size, shape)
    ids[rng.random(shape) < dead] = DEAD
    return ids


# --- hashing --------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def fused(request):
    return request.param


def test_the_kernel_is_the_default(plans, device):
    assert DeviceHasher(plans["demo"], device).fused


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices_of_every_preset(preset, shape, plans, fused, device):
    plan = plans[preset]
    ids, past = random_ids(plan.compressed_size, shape), random_ids(plan.compressed_size, (shape[0], 5))
    hasher, host, history = DeviceHasher(plan, device, fused), TokenHistory(plan, shape[0]), None
    for _ in range(2):  # without a history, then with one
        got = hasher(torch.tensor(ids, device=device), history)
        for layer in plan.layers:
            expected = NgramHasher(plan, "numpy")(ids, layer.layer_id, history=host)
            rows = got[layer.layer_id].cpu().numpy()
            assert rows.dtype == expected.dtype
            assert (rows == expected).all()
        host.advance(past)
        history = DeviceHistory(plan, shape[0], device)
        history.advance(torch.tensor(past, device=device, dtype=torch.int32))
    hasher.check()


def test_a_whole_stream_of_ids(plans, fused, device):
    plan = plans["v41-flash"]
    ids = random_ids(plan.compressed_size, (4, 8192))
    got = DeviceHasher(plan, device, fused)(torch.tensor(ids, device=device))
    for layer in plan.layers:
        assert (got[layer.layer_id].cpu().numpy() == NgramHasher(plan)(ids, layer.layer_id)).all()


def test_ids_with_strides(plans, fused, device):
    plan = plans["demo"]
    ids = random_ids(plan.compressed_size, (30, 20))
    view = torch.tensor(ids, device=device, dtype=torch.int32).T[3:, ::3]
    got = DeviceHasher(plan, device, fused)(view)
    assert (got[1].cpu().numpy() == NgramHasher(plan, "numpy")(ids.T[3:, ::3], 1)).all()


def test_hashing_does_not_stop_the_cpu(plans, fused, device):
    plan = plans["demo"]
    hasher, history = DeviceHasher(plan, device, fused), DeviceHistory(plan, 2, device)
    ids = torch.tensor(random_ids(plan.compressed_size, (2, 9)), device=device)
    expected = hasher(ids)[15].clone()
    with no_synchronisation():
        rows = hasher(ids, history)
        history.advance(ids)
    assert torch.equal(rows[15], expected)


@pytest.mark.parametrize("bad", [-2, 99_092, 2**63 - 1])
def test_a_bad_id_is_raised_by_the_check_and_hurts_nobody(bad, plans, fused, device):
    plan = plans["v41-flash"]
    ids = random_ids(plan.compressed_size, (2, 40))
    ids[1, 20] = bad
    hasher = DeviceHasher(plan, device, fused)
    got = hasher(torch.tensor(ids, device=device))[14].cpu().numpy()
    ids[1, 20] = DEAD
    assert (got == NgramHasher(plan, "numpy")(ids, 14)).all()
    with pytest.raises(ValueError, match=rf"compressed ids contain {bad}; the vocabulary has -1 \.\. 99091"):
        hasher.check()
    hasher.check()


def test_ids_on_the_cpu_are_refused(plans, fused, device):
    with pytest.raises(ValueError, match="compressed ids on cpu; they are wanted on cuda:0"):
        DeviceHasher(plans["demo"], device, fused)(torch.zeros((1, 1), dtype=torch.int64))


def test_token_ids_are_compressed_on_the_device(vocab_v4, device):
    ids = np.arange(len(vocab_v4.ids)).reshape(2, -1)
    dead = random_ids(2, ids.shape, 0.2) == DEAD
    vocab = DeviceVocab(vocab_v4, device)
    on_device, mask = torch.tensor(ids, device=device), torch.tensor(dead, device=device)
    with no_synchronisation():
        got, masked = vocab(on_device), vocab(on_device, mask)
    assert (got.cpu().numpy() == vocab_v4(ids)).all()
    assert (masked.cpu().numpy() == vocab_v4(ids, dead)).all()
    on_device[1, 7] = len(vocab_v4.ids)
    assert vocab(on_device)[1, 7] == DEAD
    with pytest.raises(ValueError, match=f"token ids contain {len(vocab_v4.ids)};"):
        vocab.check()


# --- rows read in place ---------------------------------------------------------------------------


def filled(nbytes: int, piece: int) -> HostMemory:
    """Random bytes, page-locked so many at a time."""
    host = HostMemory(nbytes)
    host.pin(piece)
    assert host.locked_pieces == -(-nbytes // piece) > 1
    # By way of pageable memory: one copy to or from a GPU may not span two registered pieces.
    host.bytes.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda").cpu())
    return host


def boundary_rows(rows: int, row_bytes: int, piece: int) -> torch.Tensor:
    """Row numbers about every place where one registered piece ends: some rows lie across it."""
    ends = torch.arange(0, rows * row_bytes + piece, piece) // row_bytes
    return (ends[:, None] + torch.arange(-2, 3)).flatten().clamp(0, rows - 1)


def assert_rows_at_boundaries(row_bytes: int, nbytes: int, piece: int, device: torch.device) -> None:
    rows = nbytes // row_bytes
    host = filled(rows * row_bytes, piece)
    values = host.bytes.view(rows, row_bytes)
    wanted = torch.cat([boundary_rows(rows, row_bytes, piece), torch.randint(0, rows, (5000,))])
    expected = values[wanted]
    with UvaTable(values, device, host) as table:
        for dtype in (torch.int32, torch.int64):
            got = table.start(wanted.to(device, dtype)).wait()
            assert torch.equal(got.cpu(), expected)
        assert not torch.equal(table.start((wanted ^ 1).clamp(0, rows - 1).to(device)).wait().cpu(), expected)


@pytest.mark.parametrize("row_bytes", [128, 160, 256, 264])
def test_memory_registered_in_many_pieces(row_bytes, device, monkeypatch):
    piece = 4 << 20
    monkeypatch.setattr(uva, "PIN_PIECE", piece)
    assert_rows_at_boundaries(row_bytes, 9 * piece + 1000, piece, device)


def test_memory_registered_in_two_pieces_of_full_size(device):
    assert_rows_at_boundaries(264, PIN_PIECE + (64 << 20), PIN_PIECE, device)


@pytest.fixture
def values():
    return torch.randn(5000, 80, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.fixture
def table(values, device):
    with make_table("uva", values, device) as table:
        yield table


@pytest.mark.parametrize("count", [0, 1, 2, 3, 48, 12_288])
def test_rows_for_few_tokens_and_for_many(count, table, values, device):
    rows = torch.randint(0, 5000, (count,), generator=torch.Generator().manual_seed(count))
    got = table.start(rows.to(device)).wait()
    assert torch.equal(got.cpu().view(torch.uint8), values[rows].view(torch.uint8))


def test_a_row_number_depends_on_what_the_current_stream_is_doing(table, values, device):
    """The rows are made late; the same without waiting for them shows that the test would tell."""
    late = torch.arange(1, 401, device=device)

    def fetch() -> torch.Tensor:
        rows = torch.zeros(400, dtype=torch.int64, device=device)
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY)
        rows.copy_(late)
        return table.start(rows).wait().cpu()

    assert torch.equal(fetch(), values[1:401])
    table._stream.wait_stream = lambda stream: None
    assert torch.equal(fetch(), values[:1].expand(400, -1))


def test_fetching_does_not_stop_the_cpu(table, values, device):
    rows = torch.tensor([4999, 0, 17], device=device)
    table.start(rows).wait()
    out = torch.empty(3, 80, dtype=torch.bfloat16, device=device)
    with no_synchronisation():
        first = table.start(rows).wait()
        second = table.start(rows, out=out).wait()
    assert second.data_ptr() == out.data_ptr()
    assert torch.equal(first.cpu(), values[[4999, 0, 17]])
    assert torch.equal(out, first)


def test_poisoned_rows_are_not_read(device):
    values = torch.full((2000, 64), torch.nan, dtype=torch.bfloat16)
    values[::3] = 1.0
    with make_table("uva", values, device) as table:
        got = table.start(torch.arange(0, 2000, 3, device=device)).wait()
        assert (got == 1.0).all()
        assert table.start(torch.tensor([3, 4], device=device)).wait()[1].isnan().all()


@pytest.mark.parametrize("bad", [-1, 5000, 2**40, -(2**63)])
def test_a_row_that_does_not_exist_is_raised_and_hurts_nobody(bad, table, values, device):
    pending = table.start(torch.tensor([1, bad, 2], device=device))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=rf"row {bad} does not exist; the table has rows 0 \.\. 4999"):
        pending.wait()
    got = pending.wait()
    assert torch.equal(got[[0, 2]].cpu(), values[[1, 2]])
    assert (got[1].view(torch.uint8) == 0xFF).all()
    assert torch.equal(table.start(torch.tensor([3], device=device)).wait().cpu(), values[[3]])


def test_closing_raises_a_row_that_nobody_heard_of(values, device):
    table = make_table("uva", values, device)
    torch.cuda._sleep(DELAY)
    table.start(torch.tensor([5000], device=device))
    with pytest.raises(ValueError, match="row 5000 does not exist"):
        table.close()


def test_memory_that_is_not_page_locked_is_refused(values, device):
    with pytest.raises(ValueError, match="reads page-locked memory, this is not"):
        UvaTable(values, device)


def test_row_numbers_on_the_cpu_are_refused(table):
    with pytest.raises(ValueError, match="row numbers on cpu; this table looks them up on cuda"):
        table.start(torch.tensor([1]))


def test_ten_thousand_fetches_between_two_streams(table, values, device, stress_steps):
    """One stream makes row numbers, another uses the rows two steps later; memory is recycled all the while."""
    resident = values.to(device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    producer, consumer = torch.cuda.Stream(device), torch.cuda.Stream(device)
    sizes = np.random.default_rng(2).integers(1, 300, stress_steps)
    flight: deque = deque()
    torch.cuda.synchronize()

    def use() -> None:
        rows, pending = flight.popleft()
        with torch.cuda.stream(consumer):
            got = pending.wait()
            rows.record_stream(consumer)
            if len(rows) % 7 == 0:
                torch.cuda._sleep(DELAY // 200)  # the other stream runs ahead
            wrong.add_((got.view(torch.uint8) != resident[rows].view(torch.uint8)).any())

    for size in sizes:
        with torch.cuda.stream(producer):
            rows = torch.randint(0, 5000, (int(size),), device=device)
            flight.append((rows, table.start(rows)))
        if len(flight) > 2:
            use()
    while flight:
        use()
    torch.cuda.synchronize()
    assert int(wrong) == 0


def test_hashes_go_straight_into_a_table(device):
    """Token ids to rows without the CPU: what prefetching in place does at every step."""
    config = EngramConfig.preset("tiny").replace(row_width=64)
    plan = HashPlan.build(config, 5000, 2)
    values = torch.randn(plan.layer(1).rows, 64, generator=torch.Generator().manual_seed(3))
    ids = random_ids(5000, (4, 50))
    hasher, on_device = DeviceHasher(plan, device), torch.tensor(ids, device=device)
    with make_table("uva", values, device) as table:
        table.start(hasher(on_device)[1].flatten()).wait()
        with no_synchronisation():
            got = table.start(hasher(on_device)[1].flatten()).wait()
        assert torch.equal(got.cpu(), values[torch.from_numpy(NgramHasher(plan)(ids, 1)).flatten().long()])
    hasher.check()
