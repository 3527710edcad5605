"""The GPU kernels, in Triton: all layers' hashes in one launch, rows read where they lie, fp8 rows decoded on the way.

They leave the CPU out: they neither synchronise nor bring a number back. So none can refuse a bad number
on the spot. It is never used for an address; it is stored where the caller looks for it later, and what stands
in its place is said below. This is the only module that imports Triton; Triton's interpreter (TRITON_INTERPRET=1
in the environment before the first import) runs the same code on a CPU, slowly, for tests.

The remainder of any 64-bit h by p >= 2, without a division, from M = floor(2^64 / p):

    q = floor(h * M / 2^64)       M is less than 1 below 2^64 / p and h less than 2^64, so the product is less
                                  than 1 below h / p: q is floor(h / p) or one less
    r = h - q * p                 therefore in 0 .. 2p - 1: at most one subtraction of p is left to do

The value of an fp8 code and its scale (`engram_ref.fp8`), in float32 without a rounding:

    x = the code's sign and its seven other bits where a float32 has its sign, the last four bits of its exponent and
        the first three of its fraction: the code's value * 2^-120, subnormal codes (subnormal here too) included
    y = x * 2^120                 the code's value: 0, or 2^-9 .. 480 with four significant bits at most; exact
    z = y * 2^(scale - 127)       still four bits, the last at 2^-136 or above, where float32's end at 2^-149: exact,
                                  or infinite from 2^128, where bfloat16 is too

What is left is to round z's bits to the upper half, ties to even: in integers, as the GPUs before Ampere have no
instruction for it; it changes bfloat16's subnormals only. The code that stands for NaN is 480 to this arithmetic, so
NaN is put in its place, as 0xFFFF. Subnormal numbers must not be flushed to zero: Triton's mul.f32 does not, and a
test looks for `ftz` in what it compiles.

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
from typing import TYPE_CHECKING

import engram_ref.needs_torch  # noqa: F401

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_ref.config import SCALE_BLOCK
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan

if TYPE_CHECKING:
    from engram_ref.tables.rows import Rows

TOKENS_PER_PROGRAM = 16
ROWS_PER_PROGRAM = 2  # few, because a fetch for one token has few: each program waits for the bus by itself
SCALED_ROWS_PER_PROGRAM = 4  # two for each warp; a multiprocessor takes more warps than programs
_CODES_PER_LANE = 8  # its values are the 16 bytes that it can write at once; a warp reads 256 codes at once
_WIDE_ROW = 1 << 10  # bytes from which a row is more than one warp's work
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_DEAD = tl.constexpr(DEAD)
_BLOCK = tl.constexpr(SCALE_BLOCK)
_SIGN_AND_FIELDS = tl.constexpr(~0x780FFFFF)  # 0x87F00000: where a code's eight bits are put in a float32
_REBIAS = tl.constexpr(2.0**120)  # the exponents of float32 begin at -127, those of e4m3 at -7
_SMALLEST_SCALE = tl.constexpr(0x00400000)  # 2^-127 as a float32, the only scale that is subnormal


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
    row, readable = _row_numbers(rows, place, asked, table_rows, bad_row)
    lane = tl.arange(0, LANES)
    here = (lane < WORDS)[None, :]
    words = tl.load(table + row[:, None] * WORDS + lane[None, :], mask=readable[:, None] & here, other=-1)
    tl.store(out + place[:, None] * WORDS + lane[None, :], words, mask=asked[:, None] & here)


@triton.jit
def _row_numbers(rows, place, asked, table_rows, bad_row):
    row = tl.load(rows + place, mask=asked, other=0).to(tl.int64)
    tl.store(bad_row + 0 * place, row, mask=asked & ((row < 0) | (row >= table_rows)))
    return row, asked & (row >= 0) & (row < table_rows)


@triton.jit(do_not_specialize=["codes", "scales", "rows", "out", "bad_row", "count", "table_rows"])
def _gather_scaled(
    codes, scales, rows, out, bad_row, count, table_rows,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr, ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    row, readable = _row_numbers(rows, place, asked, table_rows, bad_row)
    bits = _decode(codes, scales, row, readable, CODE_STRIDE, SCALE_STRIDE, BLOCKS, LANES, ALIGNED)
    _write(out, bits, place, asked, BLOCKS, LANES, OUT_ALIGNED)


@triton.jit(do_not_specialize=["codes", "scales", "out", "count"])
def _dequantise(
    codes, scales, out, count,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr, ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    bits = _decode(codes, scales, place, asked, CODE_STRIDE, SCALE_STRIDE, BLOCKS, LANES, ALIGNED)
    _write(out, bits, place, asked, BLOCKS, LANES, OUT_ALIGNED)


@triton.jit
def _decode(
    codes, scales, row, readable,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, LANES)
    here = readable[:, None] & (block < BLOCKS)[None, :]  # [TILE, LANES]
    scale = tl.load(scales + row[:, None] * SCALE_STRIDE + block[None, :], mask=here, other=0).to(tl.int32)
    lane = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]  # [LANES, 32]
    at = tl.multiple_of(codes + row[:, None, None] * CODE_STRIDE + lane[None, :, :], [1, 1, ALIGNED])
    code = tl.load(at, mask=here[:, :, None], other=-1).to(tl.int32)  # NaN, which is written as 0xFFFF
    return _bfloat16_bits(code, scale)


@triton.jit
def _bfloat16_bits(code, scale):
    power = tl.where(scale == 0, _SMALLEST_SCALE, scale << 23).to(tl.float32, bitcast=True)
    small = ((code << 20) & _SIGN_AND_FIELDS).to(tl.float32, bitcast=True)
    bits = (small * _REBIAS * power[:, :, None]).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = ((code & 0x7F) == 0x7F) | (scale == 0xFF)[:, :, None]
    return tl.where(is_nan, -1, rounded).to(tl.int16)


@triton.jit
def _write(out, bits, place, asked, BLOCKS: tl.constexpr, LANES: tl.constexpr, OUT_ALIGNED: tl.constexpr):
    block = tl.arange(0, LANES)
    lane = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]  # [LANES, 32]
    at = tl.multiple_of(out + place[:, None, None] * (BLOCKS * _BLOCK) + lane[None, :, :], [1, 1, OUT_ALIGNED])
    tl.store(at, bits, mask=(asked[:, None] & (block < BLOCKS)[None, :])[:, :, None])


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


def gather_scaled(table: Rows, rows: Tensor, out: Tensor, bad_row: Tensor) -> None:
    """Decode fp8 rows into `out` on the current stream, each read where it lies.

    A row number outside the table is not read: its row of `out` is filled with bytes 0xFF, and it is stored in
    `bad_row`.

    Args:
        table: fp8 rows, packed or split, in memory that the device of `out` can read: its own, or pinned host memory.
        rows: row numbers [N], int32 or int64, contiguous, on that device.
        out: bfloat16 [N, D], contiguous.
        bad_row: int64 [1], in memory that the device can write: its own, or pinned host memory.
    """
    if not out.numel():
        return
    codes, scales = _codes_and_scales(table.parts, out.shape[1])
    shape = _scaled_shape(table.parts, out)
    with _on(out.device):
        _gather_scaled[(triton.cdiv(len(rows), shape["TILE"]),)](
            codes, scales, rows, out.view(torch.int16), bad_row, len(rows), len(table), **shape
        )


def dequantise_rows(raw: Tensor, width: int, out: Tensor) -> None:
    """Decode packed fp8 rows, all in order, on the current stream.

    Args:
        raw: uint8 [N, width + width / 32], contiguous, codes before scales, on the device of `out`.
        width: values per row.
        out: bfloat16 [N, width], contiguous.
    """
    if not out.numel():
        return
    codes, scales = _codes_and_scales((raw,), width)
    shape = _scaled_shape((raw,), out)
    with _on(out.device):
        _dequantise[(triton.cdiv(len(out), shape["TILE"]),)](codes, scales, out.view(torch.int16), len(out), **shape)


def _codes_and_scales(parts: tuple[Tensor, ...], width: int) -> tuple[Tensor, Tensor]:
    """Tensors that begin with the first row's codes, int8, and with its scales, uint8."""
    scales = parts[1] if len(parts) > 1 else parts[0].view(-1)[width:]
    return parts[0].view(torch.int8), scales


def _scaled_shape(parts: tuple[Tensor, ...], out: Tensor) -> dict[str, int]:
    """How a program cuts up fp8 rows, and what their addresses are multiples of."""
    width = out.shape[1]
    blocks = width // SCALE_BLOCK
    return {
        "CODE_STRIDE": parts[0].shape[1],
        "SCALE_STRIDE": parts[-1].shape[1],
        "BLOCKS": blocks,
        "LANES": triton.next_power_of_2(blocks),
        "TILE": SCALED_ROWS_PER_PROGRAM,
        "ALIGNED": _alignment(parts[0], parts[0].shape[1], _CODES_PER_LANE),
        "OUT_ALIGNED": _alignment(out, 2 * width, 2 * _CODES_PER_LANE),
        "num_warps": 2 if width < _WIDE_ROW else 4,
    }


def _alignment(tensor: Tensor, row_bytes: int, most: int) -> int:
    """The largest power of two, `most` at most, that divides the address of every row."""
    divisible = tensor.data_ptr() | row_bytes
    return min(most, divisible & -divisible)


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
