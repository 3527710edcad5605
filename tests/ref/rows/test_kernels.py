"""The Triton kernels themselves: remainders, row widths, fp8 pairs, poisoned rows.

Without a GPU they run in Triton's interpreter, on the CPU; with one, on it. What the interpreter cannot show,
that they compile and which accesses they make, is in test_kernel_code.py.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton (pip install 'engram-offload[test]' on Linux)")

from engram_ref import gpu
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan, NgramHasher
from engram_ref.hashing import kernels as kernels_hashing
from engram_ref.rows import fp8, kernels
from engram_ref.rows.rows import Rows
from tests.ref.rows.fp8_pairs import assert_bits, pair_rows, random_rows, rows_of

# The interpreter multiplies with NumPy, which speaks of an overflow where fp8 rows have infinity for a value.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply")

DEVICE = torch.device("cpu" if gpu.INTERPRETED else "cuda", None if gpu.INTERPRETED else 0)
PRIMES = (2, 3, 9, 1009, 65_537, 646_403, 16_000_057, 2**31 - 1)
ROW_BYTES = (1, 6, 128, 160, 256, 264, 1032)


def plan_of(primes: tuple[int, ...], size: int, multipliers: tuple[int, ...], pad: int = 0) -> HashPlan:
    """A plan of one layer, number 4."""
    offsets = tuple(sum(primes[:i]) for i in range(len(primes)))
    heads = len(primes) // (len(multipliers) - 1)
    return HashPlan(size, pad, len(multipliers), heads, (LayerPlan(4, multipliers, primes, offsets),))


def hashed(plan: HashPlan, ids: np.ndarray) -> tuple[np.ndarray, int]:
    """What the kernel makes of compressed ids [B, T]: indices of the plan's first layer, and a bad id or 0."""
    ids_there = torch.as_tensor(ids, device=DEVICE)
    constants = kernels_hashing.pack_constants(list(plan.layers[:1]), DEVICE)
    met = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    before = torch.full((len(ids), plan.max_ngram - 1), DEAD, device=DEVICE)
    rows = kernels_hashing.hash_layers(plan, ids_there, before, constants, torch.int64, met)
    return rows[0].cpu().numpy(), int(met.sum())  # a negative one or another, never both


# --- the remainder --------------------------------------------------------------------------------


def dividends(prime: int) -> list[int]:
    """Multiples of a prime and their neighbours, small, random and the largest that there are."""
    rng = np.random.default_rng(prime)
    largest = INT64_MAX // prime
    quotients = {0, 1, 2, largest // 2, largest - 1, largest, *rng.integers(0, largest, 6).tolist()}
    values = {q * prime + d for q in quotients for d in (-1, 0, 1)} | {INT64_MAX, INT64_MAX - 1, 2**62, 2**32 - 1}
    return sorted(v for v in values if 0 <= v < INT64_MAX)  # an id is less than the size, at most 2^63 - 1


def test_every_remainder_is_exact():
    """With multipliers of one, the pad id 0 and a DEAD id before each, the hash of an id is the id."""
    plan = plan_of(PRIMES, INT64_MAX, (1, 1))
    values = [v for prime in PRIMES for v in dividends(prime)]
    ids = np.stack([np.full(len(values), DEAD), np.array(values)], axis=1).reshape(1, -1)
    got, bad = hashed(plan, ids)
    expected = [[v % p + offset for p, offset in zip(PRIMES, plan.layers[0].offsets)] for v in values]
    assert got[0, 1::2].tolist() == expected
    assert bad == 0


def test_a_remainder_without_the_correction_would_be_noticed():
    wrong = [v - (v * (2**64 // p) >> 64) * p for p in PRIMES for v in dividends(p)]
    assert wrong != [v % p for p in PRIMES for v in dividends(p)]


# --- the hash -------------------------------------------------------------------------------------

SMALL = plan_of((7, 11, 13, 17, 19, 23), 1000, (INT64_MAX // 999, 12_345_678_901, 987_654_321), pad=3)


def stream(shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 1000, shape)
    ids[rng.random(shape) < 0.2] = DEAD
    return ids


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_lengths_about_the_tile(length):
    ids = stream((2, length))
    got, bad = hashed(SMALL, ids)
    assert bad == 0
    assert (got == NgramHasher(SMALL, "numpy")(ids, 4)).all()


# --- reading rows in place ------------------------------------------------------------------------


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if gpu.INTERPRETED else tensor.pin_memory()


def table_of(rows: int, row_bytes: int) -> torch.Tensor:
    return pinned(
        torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    )


def gathered(table: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows, and a bad row number or 0."""
    out = torch.full((len(rows), table.shape[1]), 0x5A, dtype=torch.uint8, device=DEVICE)
    bad_row = pinned(torch.zeros(1, dtype=torch.int64))
    kernels.gather_rows(table, rows.to(DEVICE), out, bad_row)
    result = out.cpu()
    return result, int(bad_row)


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_of_every_width(row_bytes, dtype):
    table = table_of(50, row_bytes)
    rows = torch.tensor([49, 0, 7, 7, 31], dtype=dtype)
    got, bad = gathered(table, rows)
    assert bad == 0
    assert torch.equal(got, table[rows.long()])
    assert not torch.equal(got, table[(rows.long() + 1) % 50])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_counts_about_the_tile(count):
    table, rows = table_of(9, 160), torch.arange(count)
    guard = torch.full((count + 1, 160), 0x5A, dtype=torch.uint8, device=DEVICE)
    kernels.gather_rows(table, rows.to(DEVICE), guard[:count], pinned(torch.zeros(1, dtype=torch.int64)))
    assert torch.equal(guard[:count].cpu(), table[:count])
    assert (guard[count] == 0x5A).all()  # nothing is written behind the last row


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
def test_memory_that_is_not_aligned(shift):
    """A table and a result at odd addresses: words get narrower, rows stay the same."""
    table = table_of(1, 16 * 20 + shift)[0, shift:].view(20, 16)
    out = torch.zeros(3 * 16 + shift, dtype=torch.uint8, device=DEVICE)[shift:].view(3, 16)
    rows = torch.tensor([19, 0, 4], device=DEVICE)
    assert kernels._widest_word(table, out).itemsize == (
        shift or 8
    )  # a GPU faults on a word that lies across its own width
    kernels.gather_rows(table, rows, out, pinned(torch.zeros(1, dtype=torch.int64)))
    assert torch.equal(out.cpu(), table[rows.cpu()])


@pytest.mark.parametrize("bad", [-1, 10, -(2**63), INT64_MAX, 2**32])
def test_a_row_outside_the_table_is_not_read(bad):
    surroundings = table_of(30, 264)  # rows 10 .. 19 are the table; what lies around it must not come out
    table = surroundings[10:20]
    got, remembered = gathered(table, torch.tensor([3, bad, 9]))
    assert remembered == bad
    assert (got[1] == 0xFF).all()
    assert torch.equal(got[[0, 2]], table[[3, 9]])


def test_poisoned_rows_leave_the_others_alone():
    values = torch.randn(40, 33, generator=torch.Generator().manual_seed(3))
    values[::2] = torch.nan
    values[5, 3] = -0.0
    table, rows = pinned(values.view(torch.uint8)), torch.tensor([5, 1, 39, 5])
    got, bad = gathered(table, rows)
    assert bad == 0
    assert torch.equal(got, table[rows])
    assert not got.view(torch.float32).isnan().any()


# --- fp8 rows -------------------------------------------------------------------------------------


def located(raw: torch.Tensor, split: bool) -> Rows:
    """Packed bytes as rows of a table, where a kernel can read them."""
    rows = rows_of(raw, split)
    return Rows(rows.format, tuple(pinned(part) for part in rows.parts))


def decoded(table: Rows, numbers: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Values of some rows, and a bad row number or 0; nothing is written before or behind them."""
    width = table.format.width
    around = torch.full((len(numbers) + 2, width), 3.0, dtype=torch.bfloat16, device=DEVICE)
    bad_row = pinned(torch.zeros(1, dtype=torch.int64))
    kernels.gather_scaled(table.parts, numbers.to(DEVICE), around[1:-1], bad_row)
    result = around.cpu()
    assert (result[[0, -1]] == 3.0).all()
    return result[1:-1], int(bad_row)


def in_order(raw: torch.Tensor, width: int) -> torch.Tensor:
    """Values of all rows."""
    around = torch.full((len(raw) + 2, width), 3.0, dtype=torch.bfloat16, device=DEVICE)
    kernels.dequantise_rows(raw.to(DEVICE), width, around[1:-1])
    result = around.cpu()
    assert (result[[0, -1]] == 3.0).all()
    return result[1:-1]


@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_every_pair_gathered(split):
    raw, rows = pair_rows(), torch.arange(255, -1, -1)
    got, bad = decoded(located(raw, split), rows)
    assert bad == 0
    assert_bits(got, raw[rows])
    with pytest.raises(AssertionError):
        assert_bits(got, raw)


def test_every_pair_in_order():
    assert_bits(in_order(pair_rows(), 256), pair_rows())


def exact(raw: torch.Tensor) -> torch.Tensor:
    """Values as float32, in which no product is rounded."""
    codes, scales = rows_of(raw, split=True).parts
    return fp8.dequantise(codes.view(fp8.CODE_DTYPE), scales.view(fp8.SCALE_DTYPE), dtype=torch.float32)


def upper_half(values: torch.Tensor, added: int) -> torch.Tensor:
    """float32 to bfloat16, by so much added to its bits."""
    bits = (values.view(torch.int32) + added) >> 16
    return torch.where(values.isnan(), torch.nan, bits.short().view(torch.bfloat16))


WRONG = {
    "scales skipped": lambda raw: exact(torch.cat([raw[:, :256], torch.full_like(raw[:, 256:], 127)], dim=1)),
    "a scale for 64": lambda raw: exact(torch.cat([raw[:, :256], raw[:, 256::2].repeat_interleave(2, dim=1)], dim=1)),
    "a bias of 128": lambda raw: exact(raw) / 2,
    "truncated": lambda raw: upper_half(exact(raw), 0),
    "ties away from zero": lambda raw: upper_half(exact(raw), 0x8000),
    "subnormal values flushed": lambda raw: exact(raw).masked_fill(exact(raw).abs() < 2.0**-126, 0),
    "subnormal codes flushed": lambda raw: exact(raw).masked_fill((raw[:, :256] & 0x78) == 0, 0),
    "no infinity": lambda raw: exact(raw).clamp(-3.38953139e38, 3.38953139e38),
    "a NaN code is 480": lambda raw: exact(raw).nan_to_num(480.0),
    "a sign lost": lambda raw: exact(raw).where(exact(raw) != 0, 0.0),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_decoding_would_be_noticed(wrong):
    with pytest.raises(AssertionError):
        assert_bits(wrong(pair_rows()).to(torch.bfloat16), pair_rows())


@pytest.mark.parametrize("width", [32, 64, 96, 256, 1024])
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_fp8_rows_of_every_width(width, split):
    raw = random_rows(50, width)
    table = located(raw, split)
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([49, 0, 7, 7, 31, 48], dtype=dtype)  # repeats, the first and the last
        got, bad = decoded(table, rows)
        assert bad == 0
        assert_bits(got, raw[rows.long()])
        with pytest.raises(AssertionError):
            assert_bits(got, raw[(rows.long() + 1) % 50])
    assert_bits(in_order(raw, width), raw)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_counts_about_the_tile_of_fp8_rows(count):
    raw = random_rows(9, 64)
    got, bad = decoded(located(raw, split=False), torch.arange(count))
    assert bad == 0
    assert_bits(got, raw[:count])
    assert_bits(in_order(raw[:count], 64), raw[:count])


@pytest.mark.parametrize(("shift", "aligned"), [(0, 8), (1, 1), (2, 2), (4, 4), (8, 8), (264, 8)])
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_fp8_rows_that_are_not_aligned(shift, aligned, split):
    """Codes, scales and results at odd addresses: requests get narrower, values stay the same."""
    raw = random_rows(20, 256)

    def shifted(part: torch.Tensor) -> torch.Tensor:
        return pinned(torch.cat([torch.full((shift,), 0xFF, dtype=torch.uint8), part.flatten()]))[shift:].view_as(part)

    parts = tuple(shifted(part) for part in rows_of(raw, split).parts)
    out = torch.zeros(3 * 256 + shift, dtype=torch.bfloat16, device=DEVICE)[shift:].view(3, 256)
    shape = kernels._scaled_shape(parts, out)  # a GPU faults on what is wider than it is aligned
    assert (shape["ALIGNED"], shape["OUT_ALIGNED"]) == (aligned, min(2 * aligned, 16))
    rows = torch.tensor([19, 0, 4], device=DEVICE)
    kernels.gather_scaled(parts, rows, out, pinned(torch.zeros(1, dtype=torch.int64)))
    assert_bits(out, raw[rows.cpu()])


@pytest.mark.parametrize("bad", [-1, 10, -(2**63), INT64_MAX, 2**32])
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_an_fp8_row_outside_the_table_is_not_read(bad, split):
    surroundings = located(random_rows(30, 64), split)  # rows 10 .. 19 are the table
    table = Rows(surroundings.format, tuple(part[10:20] for part in surroundings.parts))
    got, remembered = decoded(table, torch.tensor([3, bad, 9]))
    assert remembered == bad
    assert (got[1].view(torch.uint8) == 0xFF).all()
    assert_bits(got[[0, 2]], table.packed().parts[0][[3, 9]])


@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_fp8_rows_beyond_four_gigabytes(split):
    count = 2**32 // 256 + 2
    widths = (256, 8) if split else (264,)
    parts = tuple(torch.empty(count, width, dtype=torch.uint8, device=DEVICE) for width in widths)
    ends = [0, count - 1, *(2**31 * k // width for k in (1, 2) for width in (256, 264))]
    rows = torch.tensor(sorted({row + d for row in ends for d in (-1, 0, 1) if 0 <= row + d < count}))
    raw = random_rows(len(rows), 256)
    for part, content in zip(parts, rows_of(raw, split).parts):
        part[rows.to(DEVICE)] = content.to(DEVICE)  # a CPU takes no memory for pages that nobody touches
    got, bad = decoded(Rows(rows_of(raw).format, parts), rows.int())
    assert bad == 0
    assert_bits(got, raw)


@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_poisoned_fp8_rows_leave_the_others_alone(split):
    raw = random_rows(40, 96)
    poisoned = raw.clone()
    poisoned[::2] = 0xFF
    table, rows = located(poisoned, split), torch.tensor([5, 1, 39, 5])
    got, bad = decoded(table, rows)
    assert bad == 0
    assert_bits(got, raw[rows])
    assert not got.isnan().any()
    assert decoded(table, torch.tensor([5, 38]))[0][1].isnan().all()


# --- where they run ------------------------------------------------------------------------------


def test_they_run_on_a_cpu_in_the_interpreter_only(monkeypatch):
    for interpreted in (True, False):
        monkeypatch.setattr(gpu, "INTERPRETED", interpreted)
        assert gpu.can_run_on(torch.device("cuda"))
        assert gpu.can_run_on(torch.device("cpu")) == interpreted
