"""The gather of rows on the CPU: the same bytes for every width, every number of rows, and with or without numba."""

import threading

import pytest
import torch

pytest.importorskip("numba", reason="the compiled gather needs numba (pip install 'engram-offload[ref]')")

from engram_ref.rows import gather as module
from engram_ref.rows.gather import are_below, gather, gather_parts

WIDTHS = [1, 3, 8, 16, 48, 64, 128, 160, 256, 264, 1000]
COUNTS = [0, 1, 2, 63, 64, 65, 1000]  # around the number of rows that are asked for ahead
CANARY = 0xA5
R = 700


def random_table(row_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(row_bytes)
    return torch.randint(0, 256, (R, row_bytes), dtype=torch.uint8, generator=generator)


def random_rows(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    rows = torch.randint(0, R, (count,), generator=torch.Generator().manual_seed(count))
    rows[:2] = R - 1  # the last one, twice
    return rows.to(dtype)


def gathered(table: torch.Tensor, rows: torch.Tensor, shift: int = 0, gap: int = 0) -> torch.Tensor:
    """Gather into memory that begins `shift` bytes after a multiple of 64, with gaps; the bytes around must stay."""
    width = table.shape[1]
    nbytes = len(rows) * (width + gap)
    around = torch.full((nbytes + 256,), CANARY, dtype=torch.uint8)
    start = 64 + -around.data_ptr() % 64 + shift
    wide = around[start : start + nbytes].view(len(rows), width + gap)
    gather(table, rows, wide[:, :width])
    assert (around[:start] == CANARY).all() and (around[start + nbytes :] == CANARY).all()
    assert (wide[:, width:] == CANARY).all()
    return wide[:, :width]


def assert_gathered(got: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> None:
    assert (got.numpy() == table.numpy()[rows.numpy()]).all()


@pytest.fixture(params=["compiled", "two threads", "index_select"])
def way(request, monkeypatch):
    """Every way that `gather` can go, on rows few enough for a test."""
    if request.param == "two threads":
        monkeypatch.setattr(module, "_THREAD_BYTES", 1000)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if request.param == "index_select":
        monkeypatch.setattr(module, "_copy_rows", None)
    return request.param


@pytest.mark.parametrize("row_bytes", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_bytes_are_right(way, row_bytes, dtype):
    table = random_table(row_bytes)
    for count in COUNTS:
        rows = random_rows(count, dtype)
        for shift, gap in ((0, 0), (32, 0), (7, 0), (0, 8)):
            assert_gathered(gathered(table, rows, shift, gap), table, rows)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_row_numbers_are_below_a_limit_or_not(compiled, dtype, monkeypatch):
    """Up to the ends of the type: read as unsigned, no negative number is a large one that is allowed."""
    if not compiled:
        monkeypatch.setattr(module, "_are_below", None)
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    for numbers, limit, wanted in (
        ([], 1, True), ([0], 1, True), ([1], 1, False), ([0, 5, 3], 6, True), ([0, 5, 3], 5, False), ([5, 0], 5, False),
        ([-1], most, False), ([least], most + 1, False), ([-1], 2**63, False), ([most], most + 1, True),
        ([most], most, False), ([0, -1], 2**40, False),
        (list(range(1000)), 1000, True), (list(range(1000)), 999, False),
    ):  # fmt: skip
        assert are_below(torch.tensor(numbers, dtype=dtype), limit) is wanted, (numbers[:3], limit)


@pytest.mark.slow  # dynamo takes seconds to import
def test_row_numbers_are_looked_at_in_a_compiled_model_too(monkeypatch):
    """torch traces NumPy where it is used, and does not have all of it."""
    monkeypatch.setattr(module, "_are_below", None)
    look = torch.compile(are_below, backend="eager")
    assert [look(torch.tensor(numbers), 4) for numbers in ([0, 3], [4, 0], [-1, 2])] == [True, False, False]


def test_a_wrong_candidate_is_caught():
    table, rows = random_table(16), random_rows(65)
    wrong = gathered(table, rows)
    wrong[-1, -1] ^= 1
    for candidate in (wrong, gathered(table, rows.flip(0)), gathered(table, (rows + 1) % R)):
        with pytest.raises(AssertionError):
            assert_gathered(candidate, table, rows)


@pytest.mark.parametrize("widths", [(256, 8), (32, 1), (64, 128, 3)], ids=str)
def test_parts_come_side_by_side(way, widths):
    parts = [random_table(width) for width in widths]
    for count in (0, 1, 65):
        rows = random_rows(count)
        out = torch.empty((count, sum(widths)), dtype=torch.uint8)
        gather_parts(parts, rows, out)
        assert_gathered(out, torch.cat(parts, dim=1), rows)


def record_shares(monkeypatch) -> list[tuple[str, int, int]]:
    """Which thread copied which rows."""
    shares, real = [], module._copy_rows

    def recording(*arguments):
        shares.append((threading.current_thread().name, *arguments[3:5]))
        real(*arguments)

    monkeypatch.setattr(module, "_copy_rows", recording)
    return shares


def test_a_few_rows_are_copied_by_the_calling_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    shares = record_shares(monkeypatch)
    gathered(random_table(256), random_rows(48))
    assert shares == [(threading.current_thread().name, 0, 48)]


def test_many_rows_are_shared_without_gap_or_overlap(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(module, "_THREAD_BYTES", 1000)
    shares = record_shares(monkeypatch)
    gathered(random_table(16), random_rows(1000))
    bounds = sorted(share[1:] for share in shares)
    assert bounds == [(0, 333), (333, 666), (666, 1000)]
    assert threading.current_thread().name not in {share[0] for share in shares}


def test_a_failure_in_a_thread_is_not_lost(monkeypatch):
    def failing(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(module, "_copy_rows", failing)
    monkeypatch.setattr(module, "_THREAD_BYTES", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(MemoryError):
        gathered(random_table(16), random_rows(1000))


def test_memory_that_does_not_match_is_not_written():
    table, rows = random_table(16), random_rows(4)
    wide = torch.full((4, 32), CANARY, dtype=torch.uint8)
    for out in (wide[:3, :16].clone(), wide[:, :15].clone(), wide[:, ::2], wide[:, :16].int()):
        with pytest.raises(AssertionError):
            gather(table, rows, out)
        assert (out == CANARY).all()
