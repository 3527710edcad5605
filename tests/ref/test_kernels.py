"""The Triton kernels themselves: remainders, strides, row widths, poisoned rows, and what compiles for a GPU.

Without a GPU they run in Triton's interpreter, on the CPU; with one, on it. What the interpreter cannot show,
that they compile and which accesses they make, is read off the code that Triton makes for GPUs that are not here.

    python -m pytest tests/ref/test_kernels.py
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

from engram_ref import kernels
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan, NgramHasher, TokenHistory

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cpu" if kernels.INTERPRETED else "cuda", None if kernels.INTERPRETED else 0)
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
    constants = kernels.pack_constants(list(plan.layers[:1]), DEVICE)
    bad_id = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    before_there = torch.as_tensor(before, device=DEVICE)
    rows = kernels.hash_layers(plan, ids_there, before_there, constants, torch.int64, bad_id)
    return rows[0].cpu().numpy(), int(bad_id)


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
    bad_id = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    before = torch.full((1, 2), DEAD, device=DEVICE).expand(len(ids), -1)
    constants = kernels.pack_constants(list(SMALL.layers), DEVICE)
    got = kernels.hash_layers(SMALL, ids, before, constants, torch.int32, bad_id)[0].cpu()
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
    return tensor if kernels.INTERPRETED else tensor.pin_memory()


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


# --- where they run, and what they compile to -----------------------------------------------------


def test_they_run_on_a_cpu_in_the_interpreter_only(monkeypatch):
    for interpreted in (True, False):
        monkeypatch.setattr(kernels, "INTERPRETED", interpreted)
        assert kernels.can_run_on(torch.device("cuda"))
        assert kernels.can_run_on(torch.device("cpu")) == interpreted


COMPILE = """
import json, re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engram_ref import kernels as k

def accesses(kernel, types, constants, aligned, capability):
    options = {"num_warps": constants.pop("num_warps", 4)}
    number = kernel.arg_names.index
    source = ASTSource(
        kernel,
        {**types, **dict.fromkeys(constants, "constexpr")},
        {(number(name),): value for name, value in constants.items()},
        {(number(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    return re.findall(r"(?:ld|st)\\.global\\S*|(?:div|rem)\\.[us]64", code)

found = {}
for width in (160, 256, 264):
    types = dict(table="*i64", rows="*i32", out="*i64", bad_row="*i64", count="i32", table_rows="i64")
    found[width] = accesses(k._gather, types, k._gather_shape(width // 8, width), ["table", "out"], 80)
types = dict(ids="*i64", ids_b="i32", ids_t="i32", before="*i64", before_b="i32", constants="*i64", rows="*i32",
             bad_id="*i64", length="i32", tiles="i32", tokens="i32", size="i32", pad="i32")
constants = dict(N=4, HEADS=8, COLUMNS=24, TILE=16, LANES=32)
found["hash"] = accesses(k._hash, types, constants, ["constants", "rows"], 90)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Memory accesses and divisions of the kernels as compiled for an A100 (gather) and an H100 (hash)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("width", ["160", "256"])
def test_rows_cross_the_bus_in_16_byte_words(width, compiled):
    assert "ld.global.v2.b64" in compiled[width] and "st.global.v2.b64" in compiled[width]


def test_rows_that_no_16_divides_cross_in_8_byte_words(compiled):
    assert "ld.global.b64" in compiled["264"] and "ld.global.b8" not in compiled["264"]


def test_no_kernel_divides_64_bit_numbers(compiled):
    assert "st.global.v4.b32" in compiled["hash"]  # indices leave together
    assert [op for ops in compiled.values() for op in ops if op.startswith(("div", "rem"))] == []
