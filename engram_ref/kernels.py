"""The two GPU kernels, in Triton: all layers' hashes in one launch, and rows read in place from host memory.

Both leave the CPU out: they neither synchronise nor bring a number back. So neither can refuse a bad number
on the spot. It is never used for an address; it is stored where the caller looks for it later, and what stands
in its place is said below. This is the only module that imports Triton; Triton's interpreter (TRITON_INTERPRET=1
in the environment before the first import) runs the same code on a CPU, slowly, for tests.

The remainder of any 64-bit h by p >= 2, without a division, from M = floor(2^64 / p):

    q = floor(h * M / 2^64)       M is less than 1 below 2^64 / p and h less than 2^64, so the product is less
                                  than 1 below h / p: q is floor(h / p) or one less
    r = h - q * p                 therefore in 0 .. 2p - 1: at most one subtraction of p is left to do

How host memory gets to a kernel: Triton's launcher takes any tensor, asks the driver for the device address of
its first byte (cuPointerGetAttribute, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, in backends/nvidia/driver.c) and
refuses only addresses that the driver does not know. Page-locked memory it knows, allocated or registered:
cudaHostRegister with flags 0 maps what it locks for every device. From the first byte the kernel counts on, so
memory that was registered in pieces must be mapped in one stretch: `engram_ref.tables.uva` makes sure of that.

    python -m pytest tests/ref/test_kernels.py
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel are Triton's values, whatever Python is told)

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan

TOKENS_PER_PROGRAM = 16
ROWS_PER_PROGRAM = 2  # few, because a fetch for one token has few: each program waits for the bus by itself
_WIDE_ROW = 1 << 10  # bytes from which a row is more than one warp's work
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_DEAD = tl.constexpr(DEAD)


@triton.jit(
    do_not_specialize=["ids", "ids_b", "ids_t", "before", "before_b", "length", "tiles", "tokens", "size", "pad"]
)
def _hash(
    ids, ids_b, ids_t, before, before_b, constants, rows, bad_id, length, tiles, tokens, size, pad,
    N: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    t = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    inside = t < length
    lane = tl.arange(0, LANES)
    constants += layer * (N + 3 * COLUMNS)

    blocked = t < 0
    mix = tl.zeros([TILE], tl.uint64)
    mixes = tl.zeros([TILE, LANES], tl.uint64)  # of each column's order
    for s in tl.static_range(N):
        at = t - s
        now = tl.load(ids + sequence * ids_b + at * ids_t, mask=inside & (at >= 0), other=_DEAD).to(tl.int64)
        past = tl.load(before + sequence * before_b + at + N - 1, mask=inside & (at < 0), other=_DEAD)
        c = tl.where(at >= 0, now, past)
        bad = (c < _DEAD) | (c >= size)
        tl.store(bad_id + 0 * t, c, mask=bad)
        blocked = blocked | bad | (c == _DEAD)
        mix = mix ^ (tl.where(blocked, pad, c) * tl.load(constants + s)).to(tl.uint64, bitcast=True)
        mixes = tl.where((lane // HEADS == s - 1)[None, :], mix[:, None], mixes)

    here = lane < COLUMNS
    prime = tl.load(constants + N + lane, mask=here, other=1).to(tl.uint64, bitcast=True)
    offset = tl.load(constants + N + COLUMNS + lane, mask=here, other=0)
    reciprocal = tl.load(constants + N + 2 * COLUMNS + lane, mask=here, other=0).to(tl.uint64, bitcast=True)
    row = _remainder(mixes, prime[None, :], reciprocal[None, :]).to(tl.int64) + offset[None, :]
    place = (layer * tokens + sequence * length + t)[:, None] * COLUMNS + lane[None, :]
    tl.store(rows + place, row.to(rows.dtype.element_ty), mask=inside[:, None] & here[None, :])


@triton.jit
def _remainder(h, prime, reciprocal):
    r = h - tl.umulhi(h, reciprocal + tl.zeros_like(h)) * prime
    return tl.where(r >= prime, r - prime, r)


@triton.jit(do_not_specialize=["rows", "bad_row", "count", "table_rows"])
def _gather(
    table, rows, out, bad_row, count, table_rows,
    WORDS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    row = tl.load(rows + place, mask=asked, other=0).to(tl.int64)
    tl.store(bad_row + 0 * place, row, mask=asked & ((row < 0) | (row >= table_rows)))
    readable = asked & (row >= 0) & (row < table_rows)
    lane = tl.arange(0, LANES)
    here = (lane < WORDS)[None, :]
    words = tl.load(table + row[:, None] * WORDS + lane[None, :], mask=readable[:, None] & here, other=-1)
    tl.store(out + place[:, None] * WORDS + lane[None, :], words, mask=asked[:, None] & here)


INTERPRETED = not isinstance(_hash, triton.JITFunction)  # settled when Triton decorated the kernels


def can_run_on(device: torch.device) -> bool:
    """Whether the kernels run there: on CUDA, and anywhere in Triton's interpreter."""
    return device.type == "cuda" or INTERPRETED


def pack_constants(layers: list[LayerPlan], device: torch.device) -> Tensor:
    """What `hash_layers` needs of these layers: multipliers, primes, offsets, reciprocals. [L, N + 3 C] int64"""
    return torch.tensor(
        [[*x.multipliers, *x.primes, *x.offsets, *(_signed(2**64 // p) for p in x.primes)] for x in layers],
        dtype=torch.int64,
        device=device,
    )


def _signed(word: int) -> int:
    """The signed integer with the bits of an unsigned 64-bit one: torch has no other."""
    return word - 2**64 if word > INT64_MAX else word


def hash_layers(
    plan: HashPlan, ids: Tensor, before: Tensor, constants: Tensor, row_dtype: torch.dtype, bad_id: Tensor
) -> Tensor:
    """Row indices of several layers of a plan, in one launch. [L, B, T, C]

    A bad id counts as DEAD, so that every index is one of the layer's rows whatever is in `ids`.

    Args:
        plan: of these layers.
        ids: compressed ids [B, T], int32 or int64, with any strides.
        before: the N - 1 ids before them, int64 [B, N - 1], DEAD where there are none; its rows are contiguous.
        constants: of the layers, from `pack_constants`.
        row_dtype: of the indices, int32 or int64.
        bad_id: int64 [1], takes one of the ids outside -1 .. compressed_size - 1, if there is one.
    """
    batch, length = ids.shape
    columns = len(plan.layers[0].primes)
    rows = torch.empty((len(constants), batch, length, columns), dtype=row_dtype, device=ids.device)  # [L, B, T, C]
    tiles = triton.cdiv(length, TOKENS_PER_PROGRAM)
    with _on(ids.device):
        _hash[(batch * tiles, len(constants))](
            ids, *ids.stride(), before, before.stride(0), constants, rows, bad_id,
            length, tiles, batch * length, plan.compressed_size, plan.pad_compressed,
            N=plan.max_ngram, HEADS=plan.heads, COLUMNS=columns,
            TILE=TOKENS_PER_PROGRAM, LANES=triton.next_power_of_2(columns),
        )  # fmt: skip
    return rows


def gather_rows(table: Tensor, rows: Tensor, out: Tensor, bad_row: Tensor) -> None:
    """Copy rows into `out` on the current stream, each read where it lies.

    A row number outside the table is not read: its row of `out` is filled with bytes 0xFF, and it is stored in
    `bad_row`.

    Args:
        table: uint8 [R, W], contiguous, in memory that the device of `out` can read: its own, or pinned host memory.
        rows: row numbers [N], int32 or int64, contiguous, on that device.
        out: uint8 [N, W], contiguous.
        bad_row: int64 [1], in memory that the device can write: its own, or pinned host memory.
    """
    if not out.numel():
        return
    word = _widest_word(table, out)
    words = table.shape[1] // word.itemsize
    with _on(out.device):
        _gather[(triton.cdiv(len(rows), ROWS_PER_PROGRAM),)](
            table.view(-1).view(word), rows, out.view(-1).view(word), bad_row, len(rows), len(table),
            **_gather_shape(words, table.shape[1]),
        )  # fmt: skip


def _widest_word(table: Tensor, out: Tensor) -> torch.dtype:
    """What both are read and written as: a word that no row begins in the middle of, in its tensor or in memory."""
    divisible = table.shape[1]
    for tensor in (table, out):
        divisible |= tensor.data_ptr() | int(tensor.storage_offset())
    return _WORDS[min(8, divisible & -divisible)]  # two of the widest make one 16-byte access by themselves


def _gather_shape(words: int, width: int) -> dict[str, int]:
    """How a program cuts up rows of so many words and bytes."""
    warps = 1 if width < _WIDE_ROW else 4
    return {"WORDS": words, "TILE": ROWS_PER_PROGRAM, "LANES": triton.next_power_of_2(words), "num_warps": warps}


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
