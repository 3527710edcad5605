"""The Triton kernels themselves: remainders, strides, row widths, fp8 pairs, poisoned rows, what compiles for a GPU.

Without a GPU they run in Triton's interpreter, on the CPU; with one, on it. What the interpreter cannot show,
that they compile and which accesses they make, is read off the code that Triton makes for GPUs that are not here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton (pip install 'engram-offload[test]' on Linux)")

from engram_ref import gpu
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan, NgramHasher, TokenHistory
from engram_ref.hashing import kernels as kernels_hashing
from engram_ref.rows import fp8, kernels
from engram_ref.rows.rows import Rows
from tests.ref.rows.fp8_pairs import BLOCK, assert_bits, pair_rows, random_rows, rows_of

# The interpreter multiplies with NumPy, which speaks of an overflow where fp8 rows have infinity for a value.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply")

ROOT = Path(__file__).parents[3]
DEVICE = torch.device("cpu" if gpu.INTERPRETED else "cuda", None if gpu.INTERPRETED else 0)
PRIMES = (2, 3, 9, 1009, 65_537, 646_403, 16_000_057, 2**31 - 1)
ROW_BYTES = (1, 6, 128, 160, 256, 264, 1032)


def plan_of(primes: tuple[int, ...], size: int, multipliers: tuple[int, ...], pad: int = 0) -> HashPlan:
    """A plan of one layer, number 4."""
    offsets = tuple(sum(primes[:i]) for i in range(len(primes)))
    heads = len(primes) // (len(multipliers) - 1)
    return HashPlan(size, pad, len(multipliers), heads, (LayerPlan(4, multipliers, primes, offsets),))


def hashed(plan: HashPlan, ids: np.ndarray, before: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """What the kernel makes of compressed ids [B, T]: indices of the plan's first layer, and a bad id or 0."""
    ids_there = torch.as_tensor(ids, device=DEVICE)
    if before is None:
        before = np.full((len(ids), plan.max_ngram - 1), DEAD)
    constants = kernels_hashing.pack_constants(list(plan.layers[:1]), DEVICE)
    met = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    before_there = torch.as_tensor(before, device=DEVICE)
    rows = kernels_hashing.hash_layers(plan, ids_there, before_there, constants, torch.int64, met)
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


def definition(ids: np.ndarray, history: TokenHistory | None = None) -> np.ndarray:
    return NgramHasher(SMALL, "numpy")(ids, 4, history=history)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_lengths_about_the_tile(length):
    ids = stream((2, length))
    got, bad = hashed(SMALL, ids)
    assert bad == 0
    assert (got == definition(ids)).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::3],
        lambda x: x[1:, 5:],
        lambda x: x[:1].expand(4, -1),
        lambda x: x.to(torch.int32),
    ],
    ids=["transposed", "every third", "a corner", "one row four times", "int32"],
)
def test_strides_and_dtypes_of_the_ids(view):
    ids = view(torch.tensor(stream((5, 20)), device=DEVICE))
    met = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    before = torch.full((1, 2), DEAD, device=DEVICE).expand(len(ids), -1)
    constants = kernels_hashing.pack_constants(list(SMALL.layers), DEVICE)
    got = kernels_hashing.hash_layers(SMALL, ids, before, constants, torch.int32, met)[0].cpu()
    assert got.dtype == torch.int32
    assert (got.numpy() == definition(ids.cpu().numpy())).all()


def test_a_history_reaches_into_the_first_tokens():
    whole, history = stream((3, 24)), TokenHistory(SMALL, 3)
    history.advance(whole[:, :7])
    got, _ = hashed(SMALL, whole[:, 7:], history.ids)
    assert (got == definition(whole)[:, 7:]).all()
    assert (hashed(SMALL, whole[:, 7:])[0] != got).any()


@pytest.mark.parametrize("bad", [-2, 1000, -(2**63), INT64_MAX])
@pytest.mark.parametrize("place", [(0, 0), (1, 16), (1, 18)], ids=str)
def test_a_bad_id_is_remembered_and_counts_as_dead(bad, place):
    ids = stream((2, 19))
    ids[place] = bad
    got, remembered = hashed(SMALL, ids)
    ids[place] = DEAD
    assert remembered == bad
    assert (got == definition(ids)).all()  # rows of the table, whatever the id was


def test_a_bad_id_in_a_history_is_remembered():
    before = np.array([[5, 1000]])
    got, remembered = hashed(SMALL, np.array([[1, 2]]), before)
    assert remembered == 1000
    assert got.min() >= 0 and got.max() < SMALL.layers[0].rows


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


def test_the_pairs_are_all_there_and_the_definition_agrees():
    raw = pair_rows()
    codes, scales = rows_of(raw, split=True).parts
    assert len(torch.unique(codes.int() * 256 + scales.int().repeat_interleave(BLOCK, dim=1))) == 65_536
    assert_bits(fp8.dequantise(codes.view(fp8.CODE_DTYPE), scales.view(fp8.SCALE_DTYPE)), raw)


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


# --- where they run, and what they compile to -----------------------------------------------------


def test_they_run_on_a_cpu_in_the_interpreter_only(monkeypatch):
    for interpreted in (True, False):
        monkeypatch.setattr(gpu, "INTERPRETED", interpreted)
        assert gpu.can_run_on(torch.device("cuda"))
        assert gpu.can_run_on(torch.device("cpu")) == interpreted


COMPILE = """
import json, pathlib, re, subprocess, tempfile, torch, triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engram_ref.fusion import kernels as f
from engram_ref.hashing import kernels as h
from engram_ref.rows import kernels as k

def accesses(kernel, types, constants, aligned, capability):
    options = {"num_warps": constants.pop("num_warps", 4)}
    number = kernel.arg_names.index
    source = ASTSource(
        kernel,
        {**types, **dict.fromkeys(constants, "constexpr")},
        {(number(name),): value for name, value in constants.items()},
        {(number(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    code = made["ptx"]
    found = re.findall(r"(?:ld|st)\\.(?:global|shared)\\S*|(?:div|rem)\\.[us]64|bar\\.sync|\\S*ftz\\S*", code)
    return found + spread(made["ttgir"]) + spilled(code, re.search(r"\\.target (\\w+)", code)[1])

def spread(text):
    # how the values of a tile are laid over a warp, where codes are loaded and values stored
    layouts = dict(re.findall(r"^(#blocked\\d*) = #ttg.blocked<{(sizePerThread = .*?), warpsPerCTA", text, re.M))
    of_rows = re.findall(r"tt\\.(load|store) .*tensor<[0-9x]+x(?:256|8x32)x!tt.ptr<i(?:8|16)>, (#blocked\\d*)>", text)
    return [f"{what} {layouts[name]}" for what, name in of_rows]

def spilled(code, target):
    # what the assembler says about registers that do not fit
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.ptx")
        file.write_text(code)
        ptxas = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
        command = [ptxas, "-v", "--gpu-name", target, "-o", file.with_suffix(".cubin"), file]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    amounts = re.findall(r"(\\d+) bytes (?:stack frame|spill stores|spill loads)", said)
    assert len(amounts) == 3, said
    return ["spill"] * any(map(int, amounts))

found = {}
for width in (160, 256, 264):
    types = dict(table="*i64", rows="*i32", out="*i64", bad_row="*i64", count="i32", table_rows="i64")
    found[width] = accesses(k._gather, types, k._gather_shape(width // 8, width), ["table", "out"], 80)
for width in (128, 160, 256, 264, 512, 1024):
    types = dict(addresses="*i64", rows="*i32", out="*i64", count="i32")
    shape = {**k._gather_shape(width // 8, width), "ALIGNED": 16 if width % 16 == 0 else 8}
    found[f"layers {width}"] = accesses(k._gather_layers, types, shape, [], 90)
for name, widths in dict(packed=[264], split=[256, 8]).items():
    out = torch.empty(4, 256, dtype=torch.bfloat16)
    shape = k._scaled_shape([torch.empty(4, width, dtype=torch.uint8) for width in widths], out)
    types = dict(codes="*i8", scales="*u8", rows="*i32", out="*i16", bad_row="*i64", count="i32", table_rows="i64")
    found[name] = accesses(k._gather_scaled, types, dict(shape), [], 70)
    types = dict(addresses="*i64", rows="*i32", out="*i16", count="i32")
    found[f"layers {name}"] = accesses(k._gather_scaled_layers, types, dict(shape), [], 90)
    if name == "packed":
        types = dict(codes="*i8", scales="*u8", out="*i16", count="i32")
        found["in order"] = accesses(k._dequantise, types, dict(shape), [], 90)
numbers = "ids_b ids_t mask_b mask_t before_b length tiles tokens known size pad segment_end stand_in past kept"
tensors = "ids vocab before constants compressed after met_tokens met_ids"
types = dict.fromkeys(numbers.split(), "i32") | dict.fromkeys(tensors.split(), "*i64") | {"rows": "*i32"}
for length in (1, 100):
    constants = dict(N=4, HEADS=8, COLUMNS=24, LAYERS=2, WINDOW=4, mask=None, **h._shape(4, 48, length))
    found[f"hash {length}"] = accesses(h._hash, types, constants, ["constants", "rows", "compressed"], 90)
from engram_ref.lookup import kernels as one
tensors = "ids vocab before constants addresses compressed after met_tokens met_ids"
numbers = "ids_b ids_t mask_b mask_t before_b length tokens known size pad stand_in past kept"
types = dict.fromkeys(numbers.split(), "i32") | dict.fromkeys(tensors.split(), "*i64")
types |= {"rows": "*i32", "done": "*i32"}
unused = dict.fromkeys("WORDS CODE_STRIDE SCALE_STRIDE BLOCKS OUT_ALIGNED".split(), 0)
packed = torch.empty(4, 264, dtype=torch.uint8)
shapes = {256: {**k._gather_shape(32, 256), "ALIGNED": 16}, 264: k._scaled_shape([packed], out)}
for width, shape in shapes.items():
    constants = dict(N=4, SPAN=4, HEADS=8, COLUMNS=24, WINDOW=4, mask=None, SCALED=width == 264, **{**unused, **shape})
    found[f"look up {width}"] = accesses(
        one._look_up, types | {"out": "*i16" if width == 264 else "*i64"}, constants, ["constants", "rows"], 90
    )
from bench.reads import kernels as r
from bench.reads.methods import METHODS
types = dict(codes="*i8", scales="*u8", rows="*i64", out="*i16", count="i32")
shape = dict(CODE_STRIDE=264, SCALE_STRIDE=264, TILE=r.TILE, num_warps=r.WARPS)
hints = dict(CACHED="", EVICTED="")
for name in ("few", "many", "past_l1", "evict_first"):
    changed = {"num_warps" if key == "warps" else key.upper(): value for key, value in METHODS[name].options.items()}
    found[f"read {name}"] = accesses(r._read, types, {**shape, **hints, "places": None, **changed}, [], 90)
found["read sorted"] = accesses(r._read, types | {"places": "*i64"}, {**shape, **hints}, [], 90)
found["read pieces"] = accesses(r._read_pieces, types, {**shape}, [], 90)
words = r.lines_of(264, 264) * 16
types = dict(table="*i64", rows="*i64", out="*i16", count="i32", end="i32")
shape = dict(STRIDE=264, TILE=r.TILE, WORDS=words, LANES=triton.next_power_of_2(words), num_warps=r.WARPS)
found["read lines"] = accesses(r._read_lines, types, shape, [], 90)
weights = "key_gain query_gain conv_gain taps".split()
strides = "packed_b packed_t hidden_b hidden_t hidden_g out_b out_t".split()
types = dict.fromkeys(["packed", "hidden", "out", *weights], "*bf16") | {"past": "*fp32"}
types |= dict.fromkeys([*strides, "padding_b", "padding_t", "length", "tiles"], "i32")
constants = dict(COPIES=1, HIDDEN=2560, TAPS=4, DILATION=3, REACH=9, ALONE=True, ADDS=True, padding=None)
aligned = ["packed", "hidden", "out", "past", *weights, *strides]
found["fusion demo"] = accesses(f._demo, types, {**constants, **f._demo_shape(2560, 9, 1)}, aligned, 90)
types = dict.fromkeys("packed hidden out q_weight k_weight".split(), "*bf16") | {"dead": "*u8"}
types |= dict.fromkeys("hidden_n hidden_g dead_n".split(), "i32")
constants = dict(COPIES=4, HIDDEN=4096, LANES=4096, num_warps=f._warps(4096))
found["fusion v41"] = accesses(
    f._v41, types, constants, "packed hidden hidden_n hidden_g out q_weight k_weight".split(), 90
)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Memory accesses, barriers, divisions, flushing operations and spills of the kernels, as compiled for a V100
    (gather of fp8 rows), an A100 (gather of plain ones) and an H100 (decoding in order, hash, gather of all layers,
    the other ways to read of `bench`, gate and convolution)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "width", ["160", "256", "look up 256", *(f"layers {width}" for width in (160, 256, 512, 1024))]
)
def test_rows_cross_the_bus_in_16_byte_words(width, compiled):
    assert "ld.global.v2.b64" in compiled[width] and "st.global.v2.b64" in compiled[width]


def test_rows_that_no_16_divides_cross_in_8_byte_words(compiled):
    for gather in ("264", "layers 264", "layers 128"):  # of 128 B, a program's two rows are 8 bytes for each thread
        assert "ld.global.b64" in compiled[gather] and "ld.global.b8" not in compiled[gather]


@pytest.mark.parametrize("way", ["packed", "split", "in order", "layers packed", "layers split", "look up 264"])
def test_fp8_rows_are_read_8_bytes_and_written_16_bytes_a_lane(way, compiled):
    assert "ld.global.v2.b32" in compiled[way] and "st.global.v4.b32" in compiled[way]
    shared = [op for op in compiled[way] if "shared" in op]  # the lane that reads a code writes its value
    assert shared == (["st.shared.b32", "ld.shared.b32"] if way == "look up 264" else [])  # the count's answer


@pytest.mark.parametrize(
    ("way", "load", "hint"),
    [
        *((way, "v2.b32", "") for way in ("few", "many", "sorted", "pieces")),
        ("lines", "v2.b64", ""),
        ("past_l1", "v2.b32", "cg."),
        ("evict_first", "v2.b32", "L1::evict_first.L2::cache_hint."),
    ],
)
def test_ways_to_read_that_are_timed_beside_the_library_ask_for_what_they_say(way, load, hint, compiled):
    """A hint that Triton dropped would make a way another one."""
    found = compiled[f"read {way}"]
    assert f"ld.global.{hint}{load}" in found and "st.global.v4.b32" in found
    assert hint or not any(other in op for op in found for other in (".cg", "evict"))


@pytest.mark.parametrize("form", ["demo", "v41"])
def test_the_stream_is_read_and_written_16_bytes_at_once(form, compiled):
    assert "ld.global.v4.b32" in compiled[f"fusion {form}"]
    assert any(op.startswith(("st.global.v4.b32", "st.global.v2.b32")) for op in compiled[f"fusion {form}"])


@pytest.mark.parametrize("way", ["packed", "split", "in order", "layers packed", "layers split", "look up 264"])
def test_a_warp_asks_for_the_codes_of_one_row_at_once(way, compiled):
    """In pieces of 64 bytes, of four rows, each piece is a request, or two: 9.75 lines of 128 B a row, not 3.94."""
    laid = "sizePerThread = [1, 8], threadsPerWarp = [1, 32]"
    assert [op for op in compiled[way] if "threadsPerWarp" in op] == [f"load {laid}", f"store {laid}"]


def units_touched(stride: int, unit: int) -> set[int]:
    """How many aligned stretches of `unit` bytes a row of 256 codes and 8 scales lies in, over all rows of a table."""
    return {((row * stride) % unit + 264 - 1) // unit + 1 for row in range(unit)}


@pytest.mark.parametrize("stride", [272, 288])
def test_padding_rows_of_264_bytes_would_save_nothing(stride):
    """A row is nine sectors of 32 B and three lines of 128 B wherever it begins, 8 bytes aligned or 16 or 32.

    Its codes are one load of a warp either way: 32 lanes of 8 bytes, or 16 of 16. So rows are read as they are, and a
    padded table would take 3 or 9 % more memory for it. What other strides and parts cost: `bench/reads`.
    """
    assert units_touched(264, 32) == units_touched(stride, 32) == {9}
    assert units_touched(264, 128) == units_touched(stride, 128) == {3}


def test_no_kernel_flushes_subnormal_numbers(compiled):
    """But for roots in the fusion, of no less than 1e-20."""
    flushing = {name: {op for op in ops if "ftz" in op} for name, ops in compiled.items()}
    roots = {name: flushing.pop(name) for name in ("fusion demo", "fusion v41")}
    assert not any(flushing.values())
    assert all("sqrt.approx.ftz.f32" in op for ops in roots.values() for op in ops), roots


def test_no_kernel_needs_more_registers_than_there_are(compiled):
    assert [name for name, ops in compiled.items() if "spill" in ops] == []


@pytest.mark.parametrize("length", [1, 100])
def test_the_history_is_overwritten_after_all_threads_have_read_it(length, compiled):
    """A barrier stands before the last store, and nothing is read behind it."""
    ops = compiled[f"hash {length}"]
    behind = ops[ops.index("bar.sync") + 1 :]
    assert behind and all(op.startswith("st.global") for op in behind)


def test_a_lookup_waits_three_times_for_memory(compiled):
    """For ids, for their compressed ids, for rows: behind the first store only the second and the third are asked for.

    No load moves before a store: one that waits for nothing and stands behind one is another round trip in every step.
    While rows are on their way the history is advanced: what is read of it stands behind the barrier, as rows do not.
    """
    ops = compiled["look up 264"]
    stored, barrier = (next(i for i, op in enumerate(ops) if op.startswith(of)) for of in ("st.global", "bar.sync"))
    asked = [op for op in ops[stored:barrier] if op.startswith("ld.global")]
    assert sorted(asked) == ["ld.global.b64", *["ld.global.b8"] * 2, *["ld.global.v2.b32"] * 2]
    assert "st.global.v4.b32" not in ops[:barrier]


def test_no_kernel_divides_64_bit_numbers(compiled):
    assert "st.global.v4.b32" in compiled["hash 100"]  # indices leave together
    assert [op for ops in compiled.values() for op in ops if op.startswith(("div", "rem"))] == []
