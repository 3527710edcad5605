"""Every placement gives the same bits; the factory, and what it refuses.

Tables are random bytes, so that NaN with any payload, -0.0 and denormals are among the values, and are compared
byte by byte with NumPy's indexing. Without a GPU the uva kernel runs in Triton's interpreter.

    python -m pytest tests/ref/tables/test_tables.py
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engram_ref import gpu
from engram_ref.attach import ExposedTime
from engram_ref.checkpoint import load_layer
from engram_ref.config import EngramConfig
from engram_ref.devices import as_device
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import HashPlan
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab
from engram_ref.layer import build_engram
from engram_ref.rows import nan_check
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables import PLACEMENTS, RowFormat, Table, make_table
from engram_ref.tables.base import check_rows
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.file import StoredRows, save_pieces, save_rows
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable
from engram_ref.tables.uva import UvaTable
from engram_ref.vocab import CompressedVocab
from tests.ref.rows.fp8_pairs import assert_bits, rows_of
from tests.ref.rows.fp8_pairs import random_rows as random_fp8_rows

# The interpreter multiplies with NumPy, which speaks of an overflow where fp8 rows have infinity for a value.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply")

ROOT = Path(__file__).parents[3]
R, D = 301, 12
CASES = {
    "device": {},
    "host": {},
    "uva": {},
    "file": {},
    "hot": {"hot": torch.arange(0, R, 3)},
    "hot, file behind": {"hot": torch.arange(R - 1, 0, -7), "behind": "file"},
    "hot, uva behind": {"hot": torch.tensor([5]), "behind": "uva"},
    "hot, device behind": {"hot": torch.arange(R), "behind": "device"},
    "sharded": {},  # by one rank; by several: test_sharded.py
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
every_case = pytest.mark.parametrize("case", CASES)


def random_values(dtype: torch.dtype = torch.float32, rows: int = R, width: int = D) -> torch.Tensor:
    """Random bytes, as values [rows, width]."""
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def random_rows(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(0, R, (count,), generator=torch.Generator().manual_seed(count)).to(dtype)


def device_for(case: str) -> str:
    """The CPU, but for in-place reads the GPU of a machine that has one."""
    if "uva" not in case:
        return "cpu"
    pytest.importorskip("triton", reason="placement uva needs Triton (pip install 'engram-offload[test]' on Linux)")

    return "cpu" if gpu.INTERPRETED else "cuda"


@contextlib.contextmanager
def ranks_for(case: str):
    """For a table of several processes, this one as the only member of a group."""
    if case != "sharded" or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def make(tmp_path):
    """make(case, values): the table of that case; all are closed at the end."""
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


def fetch(table: Table, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return table.start(rows.to(table.index_device), out).wait()


def assert_same_bits(got: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
    """`got` is values[rows], byte by byte."""
    assert got.dtype == values.dtype and got.shape == (len(rows), values.shape[1])
    expected = values.view(torch.uint8).numpy()[rows.numpy()]
    assert (got.contiguous().cpu().view(torch.uint8).numpy() == expected).all()


# --- fp8 rows ---------------------------------------------------------------------------------------------

FP8 = random_fp8_rows(R, 64)  # any code with any scale but NaN, packed


@every_case
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_fp8_rows_are_the_same_from_every_placement(case, split, make):
    table = make(case, rows_of(FP8, split))
    assert table.format.scaled and table.format.row_bytes == 66
    for count in (500, 1, 0):
        rows = random_rows(count)
        assert_bits(fetch(table, rows), FP8[rows])
        assert torch.equal(table.stored(rows), FP8[rows])
    out = torch.empty(4, 64, dtype=torch.bfloat16, device=table.device)
    assert fetch(table, torch.tensor([3, 0, R - 1, 3]), out).data_ptr() == out.data_ptr()
    assert_bits(out, FP8[[3, 0, R - 1, 3]])


@pytest.mark.parametrize("case", ["device", "host", "hot"])
@pytest.mark.parametrize("split", [False, True], ids=["from packed", "from split"])
@pytest.mark.parametrize("packed", [False, True], ids=["to split", "to packed"])
@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a file"])
def test_fp8_rows_are_laid_as_wanted(case, split, packed, stored, tmp_path):
    content = rows_of(FP8, split)
    if stored:
        save_rows(tmp_path / "t.safetensors", content)
        content = StoredRows.find(tmp_path / "t.safetensors")
    with make_table(case, content, packed=packed, **CASES[case]) as table:
        held = (table._behind if case == "hot" else table)._rows
        assert [part.shape[1] for part in held.parts] == ([66] if packed else [64, 2])
        assert_bits(fetch(table, random_rows(100)), FP8[random_rows(100)])


@pytest.mark.parametrize("case", [case for case in CASES if "file" not in case])  # files: test_file_table.py
def test_fp8_rows_that_were_not_asked_for_are_not_read(case, make):
    poisoned = FP8.clone()
    poisoned[1::2] = 0x7E  # the largest code with a scale of 1/2: no such row is among the others
    poisoned[CASES[case].get("hot", torch.tensor([0]))] = FP8[CASES[case].get("hot", torch.tensor([0]))]
    table, rows = make(case, rows_of(poisoned)), random_rows(300) // 2 * 2
    assert_bits(fetch(table, rows), FP8[rows])


@pytest.mark.parametrize("case", [case for case in CASES if "file" not in case])  # files: test_file_table.py
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
@pytest.mark.parametrize(("column", "byte"), [(5, 0x7F), (5, 0xFF), (65, 0xFF)], ids=["NaN", "-NaN", "scale"])
def test_fp8_rows_with_nan_are_refused_by_every_placement(case, split, column, byte, make):
    """As those of a file are, however they came into memory."""
    poisoned = FP8.clone()
    poisoned[R - 2, column] = byte
    with pytest.raises(ValueError, match=f"row {R - 2} has a code or a scale that is NaN: not fp8 rows"):
        make(case, rows_of(poisoned, split))


@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
@pytest.mark.parametrize(("column", "byte"), [(0, 0xFF), (63, 0x7F), (64, 0xFF)], ids=["-NaN", "NaN", "scale"])
@pytest.mark.parametrize("kind", [DeviceTable, HostTable, UvaTable])
def test_fp8_rows_with_nan_are_refused_by_a_table_that_is_made_of_them(kind, split, column, byte, tmp_path):
    if kind is UvaTable and device_for("uva") != "cpu":
        pytest.skip("needs page-locked memory: tests/cuda")
    options = {} if kind is DeviceTable else {"device": "cpu"}
    poisoned = FP8.clone()
    kind(rows_of(poisoned, split), **options).close()
    poisoned[[R - 2, R - 1], column] = byte
    told = f"row {R - 2} has a code or a scale that is NaN: not fp8 rows$"
    with pytest.raises(ValueError, match=told):
        kind(rows_of(poisoned, split), **options)
    with pytest.raises(ValueError, match=told):
        save_rows(tmp_path / "table.safetensors", rows_of(poisoned, split))
    assert list(tmp_path.iterdir()) == []


def test_the_row_with_nan_is_counted_through_all_pieces(tmp_path):
    poisoned = FP8.clone()
    poisoned[290, 65] = 0xFF
    pieces = (rows_of(poisoned[first : first + 100]) for first in range(0, R, 100))
    with pytest.raises(ValueError, match="row 290 has a code or a scale that is NaN"):
        save_pieces(tmp_path / "table.safetensors", R, rows_of(FP8).format, pieces)


@pytest.mark.parametrize("case", CASES)
def test_the_factory_looks_for_nan_once(case, make, monkeypatch):
    """At the rows that it is given, or at those that it reads from a file; never again at what it made of them."""
    looked = []
    real = nan_check.find_nan
    monkeypatch.setattr(nan_check, "find_nan", lambda raw, codes: looked.append(raw.nbytes) or real(raw, codes))
    make(case, rows_of(FP8))
    # The file is looked at when it is written; what is hot of it, when it is read.
    again = 66 * len(CASES[case]["hot"]) if case == "hot, file behind" else 0
    assert sum(looked) == FP8.nbytes + again


@every_case
def test_a_table_of_fp8_rows_holds_their_bytes_and_no_more(case, make):
    held = make(case, rows_of(FP8)).bytes_held()
    hot = len(CASES[case]["hot"]) * 66 + 4 * R if "hot" in CASES[case] else 0
    assert sum(held.values()) == R * 66 + hot


def test_a_file_is_not_laid_anew(tmp_path):
    save_rows(tmp_path / "t.safetensors", rows_of(FP8))
    with pytest.raises(ValueError, match="'file' leaves rows as they lie"):
        make_table("file", StoredRows.find(tmp_path / "t.safetensors"), packed=False)


# --- the same bits from everywhere ------------------------------------------------------------------------


def test_every_placement_is_tested():
    assert {case.split(",")[0] for case in CASES} == set(PLACEMENTS)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_from_every_placement(case, dtype, make):
    values = random_values(dtype)
    table, rows = make(case, values), random_rows(500)
    assert_same_bits(fetch(table, rows), values, rows)


ROWS = {
    "none": torch.empty(0, dtype=torch.int64),
    "one": torch.tensor([7]),
    "the largest": torch.tensor([R - 1]),
    "the largest, many times": torch.full((64,), R - 1),
    "one row, often": torch.tensor([5] * 30),
    "all": torch.arange(R),
    "all, backwards": torch.arange(R).flip(0),
    "int32": random_rows(200, torch.int32),
    "none, int32": torch.empty(0, dtype=torch.int32),
    "every second of": random_rows(400)[::2],
    "a column of": random_rows(400).view(100, 4)[:, 1],
    "every second of int32": random_rows(400, torch.int32)[::2],
}


@every_case
def test_all_kinds_of_row_numbers(case, make):
    values = random_values()
    table = make(case, values)
    for rows in ROWS.values():
        assert_same_bits(fetch(table, rows), values, rows)


WRONG = {
    "the next row": lambda values, rows: values[(rows + 1) % len(values)],
    "sorted": lambda values, rows: values[rows.sort().values],
    "NaN made plain": lambda values, rows: values[rows].nan_to_num(),
    "+0.0 for -0.0": lambda values, rows: values[rows] + 0.0,
    "one bit": lambda values, rows: flip_a_bit(values[rows]),
    "one row missing": lambda values, rows: values[rows][:-1],
    "another dtype": lambda values, rows: values[rows].double(),
}


def flip_a_bit(values: torch.Tensor) -> torch.Tensor:
    values.view(torch.uint8)[-1, 0] ^= 1
    return values


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_candidate_is_caught(wrong):
    values, rows = random_values(), random_rows(500)
    values[rows[0], 0] = -0.0
    assert_same_bits(values[rows], values, rows)
    with pytest.raises(AssertionError):
        assert_same_bits(WRONG[wrong](values, rows), values, rows)


@every_case
def test_no_row_leaks_that_was_not_asked_for(case, make):
    values = torch.full((R, D), float("nan"))
    rows = torch.tensor([1, 4, 30, 31, R - 2])  # hot and not hot
    values[rows] = torch.arange(5.0)[:, None]
    got = fetch(make(case, values), rows.repeat(3))
    assert got.cpu().tolist() == values[rows.repeat(3)].tolist()


@every_case
def test_a_buffer_of_the_callers_is_filled_again_and_again(case, make):
    values = random_values()
    table = make(case, values)
    out = torch.full((40, D), float("nan"), device=table.device)
    for seed in range(3):
        rows = (random_rows(40) + seed) % R
        got = fetch(table, rows, out)
        assert got.data_ptr() == out.data_ptr()
        assert_same_bits(out, values, rows)


@every_case
def test_a_fetch_is_not_changed_by_the_next_ones(case, make):
    values = random_values()
    table = make(case, values)
    asked = [(random_rows(50) + seed) % R for seed in range(4)]
    pending = [table.start(rows.to(table.index_device)) for rows in asked]
    for rows, fetched in zip(asked, pending):
        assert_same_bits(fetched.wait(), values, rows)


@every_case
def test_the_table_is_a_copy_and_survives_trimming(case, make):
    values = random_values()
    before, table = values.clone(), make(case, values)
    values.zero_()
    for _ in range(2):
        assert_same_bits(fetch(table, ROWS["all"]), before, ROWS["all"])
        table.trim()


# --- what a table refuses ---------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("row", [-1, R, 2**31 - 1, -(2**31)])
def test_a_row_that_does_not_exist_is_refused(case, row, make):
    values = random_values()
    table = make(case, values)
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([3, row, 4], dtype=dtype)
        with pytest.raises(ValueError) as caught:
            fetch(table, rows)
            fetch(table, rows)  # in-place reads on a GPU tell a little later
        assert str(caught.value).startswith(f"row {row} does not exist; the table has rows 0 .. {R - 1}")
        assert "\n" not in str(caught.value)
    assert_same_bits(fetch(table, ROWS["all"]), values, ROWS["all"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_ends_of_every_table_are_held_to_the_row(dtype):
    """Also where a table has more rows than an int32 can say: -2**31, read as unsigned, is one of its row numbers."""
    info = torch.iinfo(dtype)
    for count in (1, 300, 2**31 - 1, 2**31, 3_000_000_000, 2**33):
        for row in (info.min, info.min + 1, -1, 0, count - 1, count, info.max):
            if not info.min <= row <= info.max:
                continue
            rows = torch.tensor([0, row, 0], dtype=dtype)
            if 0 <= row < count:
                assert check_rows(rows, count).tolist() == [0, row, 0]
            else:
                with pytest.raises(
                    ValueError, match=rf"row {row} does not exist; the table has rows 0 \.\. {count - 1}$"
                ):
                    check_rows(rows, count)


@every_case
@pytest.mark.parametrize("rows", [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor(1), torch.tensor([True])])
def test_what_is_no_vector_of_row_numbers_is_refused(case, rows, make):
    with pytest.raises(ValueError, match="give a vector of int32 or int64"):
        fetch(make(case, random_values()), rows)


@every_case
def test_a_buffer_that_does_not_fit_is_refused(case, make):
    table = make(case, random_values())
    for out in (torch.empty(4, D), torch.empty(3, D + 1), torch.empty(3, D).double(), torch.empty(D, 3).T):
        with pytest.raises(ValueError, match="3 rows need a contiguous"):
            fetch(table, torch.tensor([1, 2, 3]), out.to(table.device))


@every_case
def test_a_closed_table_says_so(case, make):
    table = make(case, random_values())
    table.close()
    with pytest.raises(ValueError, match="closed"):
        fetch(table, torch.tensor([1]))
    table.close()


@every_case
@pytest.mark.parametrize("use", ["start", "stored"])
def test_closing_waits_for_a_fetch_of_another_thread(case, use, make, monkeypatch):
    values = random_values()
    table, rows = make(case, values), random_rows(50)
    inside, go_on, given_back, got = threading.Event(), threading.Event(), [], []
    require_open, give_back = type(table)._require_open, type(table)._give_back

    def stop_once(table):
        require_open(table)  # it was open, and is used from here on
        if not inside.is_set():
            inside.set()
            assert go_on.wait(30)

    def work():
        got.append(fetch(table, rows).cpu() if use == "start" else table.stored(rows).view(values.dtype))

    monkeypatch.setattr(type(table), "_require_open", stop_once)
    monkeypatch.setattr(type(table), "_give_back", lambda table: given_back.append(1) or give_back(table))
    fetching, closing = threading.Thread(target=work), threading.Thread(target=table.close)
    fetching.start()
    assert inside.wait(30)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive() and not given_back
    go_on.set()
    fetching.join(30), closing.join(30)
    assert given_back
    assert_same_bits(got[0], values, rows)


@every_case
def test_a_table_that_is_closed_from_within_a_fetch_says_so(case, make):
    table = make(case, random_values())
    with table._users.here(), pytest.raises(RuntimeError, match="this table is closed from within a call of its own"):
        table.close()
    assert_same_bits(fetch(table, random_rows(9)), random_values(), random_rows(9))


@pytest.mark.parametrize("case", [case for case in CASES if "uva" not in case])
def test_closing_in_the_middle_of_many_fetches(case, make):
    """Threads fetch all the time while one closes: each fetch has its rows, or says that the table is closed."""
    values = random_values()
    table, wrong, closed = make(case, values), [], []

    def serve(seed):
        rows = random_rows(30 + seed)
        while True:
            try:
                got = table.start(rows).wait()
            except ValueError as error:
                return closed.append(str(error))
            if not torch.equal(got.view(torch.uint8), values[rows].view(torch.uint8)):
                wrong.append(seed)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.03)
    table.close()
    for thread in threads:
        thread.join(30)
    assert not wrong and len(closed) == 3 and all("closed" in message for message in closed)


@pytest.mark.parametrize("case", ["device", "host", "uva", "hot"])
def test_closing_a_table_closes_its_memory(case, make, monkeypatch):
    closed, real = [], HostMemory.close
    monkeypatch.setattr(HostMemory, "close", lambda memory: closed.append(memory.nbytes) or real(memory))
    make(case, random_values()).close()
    assert closed == [R * D * 4]


TABLE_BYTES, MAP_BYTES = R * D * 4, R * 4  # a hot table also has one int32 per row
HELD = {
    "device": {"device": TABLE_BYTES, "host": 0, "disk": 0},
    "host": {"device": 0, "host": TABLE_BYTES, "disk": 0},
    "uva": {"device": 0, "host": TABLE_BYTES, "disk": 0},
    "file": {"device": 0, "host": 0, "disk": TABLE_BYTES},
    "hot": {"device": 101 * D * 4, "host": TABLE_BYTES + MAP_BYTES, "disk": 0},
    "hot, file behind": {"device": 43 * D * 4, "host": MAP_BYTES, "disk": TABLE_BYTES},
}


@pytest.mark.parametrize("case", HELD)
def test_the_bytes_of_the_table_are_told_by_place(case, make):
    assert make(case, random_values()).bytes_held() == HELD[case]


# --- rows that are trained --------------------------------------------------------------------------------


def test_gradients_reach_the_rows():
    weight = torch.nn.Parameter(torch.randn(R, D, generator=torch.Generator().manual_seed(0)))
    rows = random_rows(400, torch.int32)
    with DeviceTable(weight) as table:
        (fetch(table, rows) * 2).sum().backward()
        assert weight.grad is not None
        times = np.bincount(rows.numpy(), minlength=R)
        assert (weight.grad == 2.0 * torch.from_numpy(times)[:, None]).all()
        with pytest.raises(ValueError, match="does not exist"):
            fetch(table, torch.tensor([R]))
        with pytest.raises(ValueError, match="leave it out, or use"):
            fetch(table, rows, torch.empty(400, D))


def test_rows_are_used_as_they_are_now():
    weight = torch.nn.Parameter(torch.zeros(R, D))
    with DeviceTable(weight) as table, torch.no_grad():
        out = torch.empty(R, D)
        for step in range(3):
            weight += step
            assert not fetch(table, torch.arange(R), out).requires_grad
            assert_same_bits(out, weight.detach(), torch.arange(R))


@pytest.mark.parametrize("gathered", [True, False], ids=["compiled gather", "kernel"])
def test_rows_that_were_exchanged_for_others_are_followed(gathered, monkeypatch):
    """As an average of weights is swapped in, and out again; whether gradients are on or off."""
    if not gathered:
        monkeypatch.setattr("engram_ref.tables.device.kernels_for", lambda device: Kernels())
    weight = torch.nn.Parameter(random_values())
    own, average = weight.data, random_values().flip(0)
    numbers = torch.arange(R)
    with DeviceTable(weight) as table:
        for values in (average, own, own.roll(1)):
            weight.data = values
            assert_same_bits(fetch(table, numbers).detach(), values, numbers)
            with torch.no_grad():
                assert_same_bits(fetch(table, numbers), values, numbers)
            assert_same_bits(table.stored(numbers).view(values.dtype), values, numbers)
        for values, message in (
            (own[:-1].clone(), f"made of {R} rows on cpu, its weight has {R - 1} on cpu now: make a new DeviceTable"),
            (own.double(), "torch.float64: this table has"),
        ):
            weight.data = values
            with pytest.raises(ValueError, match=message), torch.no_grad():
                fetch(table, numbers)


@pytest.mark.parametrize(
    "take",
    [
        lambda weight: HostTable(weight, "cpu"),
        lambda weight: HotTable(DeviceTable(weight), torch.arange(5)),
        lambda weight: DeviceTable(Rows.of(weight)),
        lambda weight: make_table("device", weight),
        lambda weight: make_table("host", weight),
        lambda weight: make_table("hot", weight, hot=torch.arange(5)),
        lambda weight: make_table("uva", weight),
    ],
    ids=["HostTable", "HotTable", "Rows", "device", "host", "hot", "uva"],
)
def test_rows_that_would_not_learn_are_refused(take):
    weight = torch.nn.Parameter(random_values())
    with pytest.raises(ValueError, match=r"^rows that .*DeviceTable\(.*weight\.detach\(\)"):
        take(weight)


class Kernels:
    """In place of those that run on an accelerator."""

    @staticmethod
    def gather_rows(raw, numbers, out, bad_row):
        out.copy_(raw[numbers.long()])


# --- the factory ------------------------------------------------------------------------------------------


@every_case
def test_rows_in_a_file_go_to_every_place(case, tmp_path):
    values, rows = random_values(), random_rows(100)
    save_rows(tmp_path / "table.safetensors", values)
    stored = StoredRows.find(tmp_path / "table.safetensors")
    with ranks_for(case), make_table(case.split(",")[0], stored, device_for(case), **CASES[case]) as table:
        assert_same_bits(fetch(table, rows), values, rows)


def test_rows_with_gaps_are_copied_without():
    values = random_values(width=2 * D)[:, ::2]
    for placement in ("device", "host"):
        with make_table(placement, values) as table:
            assert_same_bits(fetch(table, ROWS["all"]), values.contiguous(), ROWS["all"])


REFUSED = {
    "an unknown placement": (("gpu",), {}, "no placement 'gpu': use one of device, host, uva, hot, file"),
    "a device without CUDA": (("host",), {"device": "cuda"}, "torch sees no CUDA device on this machine"),
    "another accelerator": (("host",), {"device": "mps"}, "device 'mps': use 'cpu' or 'cuda'"),
    "no device at all": (("host",), {"device": "gpu"}, "device 'gpu': use 'cpu' or 'cuda'"),
    "hot without rows": (("hot",), {}, "needs hot=row numbers"),
    "hot behind hot": (("hot",), {"hot": torch.tensor([1]), "behind": "hot"}, "another placement behind it"),
    "hot rows elsewhere": (("host",), {"hot": torch.tensor([1])}, "use placement 'hot', behind='host'"),
    "rows for file": (("file",), {}, "write them with save_rows first"),
    "an option": (("host",), {"threads": 3}, "placement 'host' has no option threads"),
    "no name": ((None,), {}, "no placement None: use one of"),
    "no device": (("host",), {"device": None}, "device None: use 'cpu' or 'cuda'"),
    "a number for a device": (("host",), {"device": 3}, "device 3: use 'cpu' or 'cuda'"),
    "packed or not": (("host",), {"packed": "yes"}, "packed='yes': use True, False or None"),
    "hot rows in a list": (("hot",), {"hot": [1, 2]}, "hot is a list: give a tensor of row numbers"),
    "scales of plain rows": (("host",), {"packed": True}, "packed=True: only fp8 rows have scales"),
    "behind nothing": (("hot",), {"hot": torch.tensor([1]), "behind": "nothing"}, "no placement 'nothing'"),
    "behind what is not hot": (("device",), {"behind": "file"}, "has no placement behind it: use placement 'hot'"),
}
NO_ROWS = {
    "a list": [[1.0, 2.0]],
    "an array": np.zeros((3, 4), np.float32),
    "nothing": None,
    "a path": "table.safetensors",
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.zeros(3, 4, device="meta"),
    "integers": torch.zeros(3, 4, dtype=torch.int32),
    "complex numbers": torch.zeros(3, 4, dtype=torch.complex64),
}


@pytest.mark.parametrize("placement", ["device", "host", "hot", "file"])
@pytest.mark.parametrize("rows", NO_ROWS.values(), ids=NO_ROWS)
def test_what_is_no_rows_is_refused(rows, placement):
    hot = {"hot": torch.tensor([1])} if placement == "hot" else {}
    with pytest.raises(ValueError, match=r"^rows is a [^\n]*: give a [^\n]*$"):
        make_table(placement, rows, **hot)


@pytest.mark.parametrize("placement", ["device", "host", "hot"])
@pytest.mark.parametrize("count", [3, 0])
def test_rows_of_no_value_are_refused(count, placement):
    """A table of no row is none to refuse: a rank may own none."""
    hot = {"hot": torch.tensor([1])} if placement == "hot" else {}
    with pytest.raises(ValueError, match=r"^rows of 0 values: a row has one at least$"):
        make_table(placement, torch.zeros(count, 0), **hot)


def test_an_option_that_a_file_table_has_not_is_refused(tmp_path):
    save_rows(tmp_path / "table.safetensors", Rows.of(random_values()))
    with pytest.raises(ValueError, match="placement 'file' has no option thread: it has threads and direct"):
        make_table("file", StoredRows.find(tmp_path / "table.safetensors"), thread=3)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = EngramConfig.preset("tiny").replace(layer_ids=(1,))
    plan = HashPlan.build(config, 97, 2)
    for ask in (
        lambda device: build_engram(config, plan.layer(1), device=device),
        lambda device: make_fusion(config, device),
        lambda device: load_layer("layer.safetensors", config, plan.layer(1), device=device),
        lambda device: DeviceHasher(plan, device),
        lambda device: DeviceHistory(plan, 1, device),
        lambda device: DeviceVocab(CompressedVocab.from_map([0]), device),
        lambda device: ExposedTime(device),
    ):
        with pytest.raises(ValueError, match=r"^device 'cuda': torch sees no CUDA device on this machine; use 'cpu'$"):
            ask("cuda")
        with pytest.raises(ValueError, match=r"^device 'gpu': use 'cpu' or 'cuda'$"):
            ask("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert as_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"^device 'cuda:2': torch sees 2 CUDA devices, from 0$"):
        as_device("cuda:2")


@pytest.mark.parametrize("case", REFUSED)
def test_the_factory_refuses(case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        make_table(*arguments, random_values(), **options)
    assert "\n" not in str(caught.value)


def test_a_table_of_one_dimension_is_refused():
    with pytest.raises(ValueError, match=r"rows of shape \(301,\): a table is \[rows, values per row\]"):
        make_table("host", torch.zeros(R))


@pytest.mark.parametrize("placement", ["device", "host", "uva"])
def test_a_table_that_does_not_fit_is_refused_with_both_numbers(placement):
    rows = torch.zeros(1, 64).expand(1 << 42, 64)  # one row in memory; a petabyte to copy
    with pytest.raises(
        ValueError, match=r"^1048576.00 GiB do not fit into host memory, of which \d+.\d\d GiB are free"
    ):
        make_table(placement, rows, device_for(placement))


def test_a_refused_hot_table_closes_the_one_behind(monkeypatch):
    closed = []
    monkeypatch.setattr(HostMemory, "close", lambda memory: closed.append(memory.nbytes))
    with pytest.raises(ValueError, match="row 301 does not exist"):
        make_table("hot", random_values(), hot=torch.tensor([R]))
    assert closed == [R * D * 4]


def test_the_format_follows_the_configuration():
    config = EngramConfig.preset("demo")
    assert RowFormat.of(config) == RowFormat(torch.bfloat16, 64)
    assert RowFormat.of(config).row_bytes == config.row_bytes()
    assert RowFormat.of(EngramConfig.preset("v41-flash")) == RowFormat(torch.bfloat16, 256, scaled=True)


WITHOUT_NUMBA_AND_TRITON = """
import sys
sys.modules.update(numba=None, triton=None)
import torch
from engram_ref.rows import gather
from engram_ref.tables import make_table
assert gather._copy_rows is None
values, rows = torch.randn(50, 8), torch.tensor([3, 49, 3], dtype=torch.int32)
for placement, options in (("device", {}), ("host", {}), ("hot", {"hot": torch.tensor([3])})):
    with make_table(placement, values, **options) as table:
        assert torch.equal(table.start(rows).wait(), values[rows])
try:
    make_table("uva", values)
except ValueError as error:
    print(error)
"""


def test_numba_and_triton_are_not_needed():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA_AND_TRITON], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("this machine cannot serve placement uva: needs a CUDA device and Triton")
    assert run.stdout.count("\n") == 1
