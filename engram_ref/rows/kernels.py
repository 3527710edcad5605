"""The GPU kernels for rows, in Triton: read where they lie, from one table or all layers', fp8 decoded on the way.

They leave the CPU out: they neither synchronise nor bring a number back. So none can refuse a bad number
on the spot. It is never used for an address; it is stored where the caller looks for it later, and what stands
in its place is said below.

The value of an fp8 code and its scale (`engram_ref.rows.fp8`), in float32 without a rounding:

    x = the code's sign and its seven other bits where a float32 has its sign, the last four bits of its exponent and
        the first three of its fraction: the code's value * 2^-120, subnormal codes (subnormal here too) included
    y = x * 2^120                 the code's value: 0, or 2^-9 .. 480 with four significant bits at most; exact
    z = y * 2^(scale - 127)       still four bits, the last at 2^-136 or above, where float32's end at 2^-149: exact,
                                  or infinite from 2^128, where bfloat16 is too

What is left is to round z's bits to the upper half, ties to even, and to put NaN in its place, as 0xFFFF.

How host memory gets to a kernel: Triton's launcher takes any tensor, asks the driver for the device address of
its first byte (cuPointerGetAttribute, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, in backends/nvidia/driver.c) and
refuses only addresses that the driver does not know. Page-locked memory it knows, allocated or registered:
cudaHostRegister with flags 0 maps what it locks for every device. From the first byte the kernel counts on, so
memory that was registered in pieces must be mapped in one stretch: `engram_ref.tables.uva` makes sure of that.

    python -m pytest tests/ref/rows/test_kernels.py
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel are Triton's values, whatever Python is told)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_ref.config import SCALE_BLOCK
from engram_ref.gpu import on_device

ROWS_PER_PROGRAM = 2  # few, because a fetch for one token has few: each program waits for the bus by itself
SCALED_ROWS_PER_PROGRAM = 4  # two for each warp; a multiprocessor takes more warps than programs
_CODES_PER_LANE = 8  # its values are the 16 bytes that it can write at once; a warp reads 256 codes at once
_WIDE_ROW = 1 << 10  # bytes from which a row is more than one warp's work
_WIDEST = 16  # bytes of the widest access
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_BLOCK = tl.constexpr(SCALE_BLOCK)
_SIGN_AND_FIELDS = tl.constexpr(~0x780FFFFF)  # 0x87F00000: where a code's eight bits are put in a float32
_REBIAS = tl.constexpr(2.0**120)  # the exponents of float32 begin at -127, those of e4m3 at -7
_SMALLEST_SCALE = tl.constexpr(0x00400000)  # 2^-127 as a float32, the only scale that is subnormal


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


@triton.jit(do_not_specialize=["addresses", "rows", "out", "count"])
def _gather_layers(
    addresses, rows, out, count,
    WORDS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    row = tl.load(rows + layer * count + place, mask=asked, other=0).to(tl.int64)
    table = tl.load(addresses + layer).to(out.dtype)
    lane = tl.arange(0, LANES)
    here = asked[:, None] & (lane < WORDS)[None, :]
    words = tl.load(words_at(table, row, WORDS, lane, ALIGNED), mask=here)
    tl.store(words_at(out, layer * count + place, WORDS, lane, ALIGNED), words, mask=here)


@triton.jit
def words_at(start, row, WORDS: tl.constexpr, lane, ALIGNED: tl.constexpr):
    """Addresses of the words of some rows, [TILE, LANES], aligned as they are known to be."""
    return tl.multiple_of(start + row[:, None] * WORDS + lane[None, :], [1, ALIGNED])


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
    bits = decode(codes, scales, row, readable, CODE_STRIDE, SCALE_STRIDE, BLOCKS, LANES, ALIGNED)
    write_values(out, bits, place, asked, BLOCKS, LANES, OUT_ALIGNED)


@triton.jit(do_not_specialize=["addresses", "rows", "out", "count"])
def _gather_scaled_layers(
    addresses, rows, out, count,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr, ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    row = tl.load(rows + layer * count + place, mask=asked, other=0).to(tl.int64)
    codes = tl.load(addresses + layer).to(tl.pointer_type(tl.int8))
    scales = tl.load(addresses + tl.num_programs(1) + layer).to(tl.pointer_type(tl.uint8))
    bits = decode(codes, scales, row, asked, CODE_STRIDE, SCALE_STRIDE, BLOCKS, LANES, ALIGNED)
    write_values(out, bits, layer * count + place, asked, BLOCKS, LANES, OUT_ALIGNED)


@triton.jit(do_not_specialize=["codes", "scales", "out", "count"])
def _dequantise(
    codes, scales, out, count,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr, ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    bits = decode(codes, scales, place, asked, CODE_STRIDE, SCALE_STRIDE, BLOCKS, LANES, ALIGNED)
    write_values(out, bits, place, asked, BLOCKS, LANES, OUT_ALIGNED)


@triton.jit
def decode(
    codes, scales, row, readable,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The bits of the bfloat16 values of some fp8 rows, [TILE, 32 * LANES]; NaN of those that cannot be read."""
    code, scale = load_scaled(codes, scales, row, readable, CODE_STRIDE, SCALE_STRIDE, BLOCKS, LANES, ALIGNED)
    return bfloat16_bits(code, scale)


@triton.jit
def load_scaled(
    codes, scales, row, readable,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Codes of some fp8 rows, int8 [TILE, 32 * LANES], and their scales, uint8 [TILE, LANES]."""
    block = tl.arange(0, LANES)
    here = readable[:, None] & (block < BLOCKS)[None, :]  # [TILE, LANES]
    scale = tl.load(scales + row[:, None] * SCALE_STRIDE + block[None, :], mask=here, other=0)
    # Codes are addressed as a stretch of bytes. Had they a dimension for blocks, Triton would spread a warp over rows
    # before it spread it over a row's blocks, and four rows would cross the bus in pieces of 64 bytes.
    lane = tl.arange(0, LANES * _BLOCK)
    at = tl.multiple_of(codes + row[:, None] * CODE_STRIDE + lane[None, :], [1, ALIGNED])
    there = readable[:, None] & (lane < BLOCKS * _BLOCK)[None, :]
    return tl.load(at, mask=there, other=-1), scale  # -1 is NaN, which is written as 0xFFFF


@triton.jit
def bfloat16_bits(code, scale):
    """The bits of the values of codes, int8 [TILE, 32 * LANES], with their scales, uint8 [TILE, LANES]."""
    code = code.to(tl.int32).reshape(scale.shape[0], scale.shape[1], _BLOCK)
    scale = scale.to(tl.int32)
    power = tl.where(scale == 0, _SMALLEST_SCALE, scale << 23).to(tl.float32, bitcast=True)
    # Subnormal numbers are not flushed to zero by Triton's mul.f32: a test looks for `ftz` in what it compiles.
    small = ((code << 20) & _SIGN_AND_FIELDS).to(tl.float32, bitcast=True)
    bits = (small * _REBIAS * power[:, :, None]).to(tl.int32, bitcast=True)
    # In integers: the GPUs before Ampere have no instruction for it. It changes bfloat16's subnormals only.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # To the arithmetic above, the code of NaN is 480.
    is_nan = ((code & 0x7F) == 0x7F) | (scale == 0xFF)[:, :, None]
    return tl.where(is_nan, -1, rounded).to(tl.int16).reshape(scale.shape[0], scale.shape[1] * _BLOCK)


@triton.jit
def write_values(out, bits, place, asked, BLOCKS: tl.constexpr, LANES: tl.constexpr, OUT_ALIGNED: tl.constexpr):
    """Write bits [TILE, 32 * LANES] where the rows at some places of `out` lie."""
    lane = tl.arange(0, LANES * _BLOCK)
    at = tl.multiple_of(out + place[:, None] * (BLOCKS * _BLOCK) + lane[None, :], [1, OUT_ALIGNED])
    tl.store(at, bits, mask=asked[:, None] & (lane < BLOCKS * _BLOCK)[None, :])


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
    with on_device(out.device):
        _gather[(triton.cdiv(len(rows), ROWS_PER_PROGRAM),)](
            table.view(-1).view(word), rows, out.view(-1).view(word), bad_row, len(rows), len(table),
            **_gather_shape(words, table.shape[1]),
        )  # fmt: skip


def gather_scaled(parts: tuple[Tensor, ...], rows: Tensor, out: Tensor, bad_row: Tensor) -> None:
    """Decode fp8 rows into `out` on the current stream, each read where it lies.

    A row number outside the table is not read: its row of `out` is filled with bytes 0xFF, and it is stored in
    `bad_row`.

    Args:
        parts: fp8 rows, packed, or codes and scales, uint8 [R, w] each, in memory that the device of `out` can read:
            its own, or pinned host memory.
        rows: row numbers [N], int32 or int64, contiguous, on that device.
        out: bfloat16 [N, D], contiguous.
        bad_row: int64 [1], in memory that the device can write: its own, or pinned host memory.
    """
    if not out.numel():
        return
    codes, scales = _codes_and_scales(parts, out.shape[1])
    shape = _scaled_shape(parts, out)
    with on_device(out.device):
        _gather_scaled[(triton.cdiv(len(rows), shape["TILE"]),)](
            codes, scales, rows, out.view(torch.int16), bad_row, len(rows), len(parts[0]), **shape
        )


class LayerRows:
    """Tables of several layers, to be read by one launch, wherever each of them lies.

    Args:
        tables: the parts of each layer's rows, uint8 [R, w], all in one part or all in two, of one format, in memory
            that `device` reads at the addresses of its bytes: its own, or host memory that is mapped there.
        scaled: fp8 rows.
        width: values per row.
        device: where row numbers are and values are wanted.

    Attributes:
        addresses: of the first byte of each part of each layer's rows, int64 [parts, L], on `device`.
        scaled: as above.
    """

    def __init__(self, tables: Sequence[tuple[Tensor, ...]], scaled: bool, width: int, device: torch.device) -> None:
        self._tables = tables  # as long as they live, so do the addresses
        self.scaled = scaled
        starts = [[part.data_ptr() for part in parts] for parts in tables]
        if scaled and len(tables[0]) == 1:
            starts = [[codes, codes + width] for (codes,) in starts]
        self.addresses = torch.tensor(starts, dtype=torch.int64).T.contiguous().to(device)  # [parts, L]

    def gather(self, rows: Tensor, out: Tensor) -> None:
        """Values of some rows of every layer, on the current stream; nothing is checked.

        Args:
            rows: row numbers [L, N], int32 or int64, contiguous, all of them rows of the layer's table.
            out: [L, N, D] of the tables' dtype, contiguous.
        """
        count = rows.shape[1]
        if not out.numel():
            return
        kernel, target, shape = self.launch(out)
        with on_device(out.device):
            kernel[(triton.cdiv(count, shape["TILE"]), len(rows))](self.addresses, rows, target, count, **shape)

    def launch(self, out: Tensor) -> tuple[Any, Tensor, dict[str, int]]:
        """The kernel of the format, `out` as it sees it, and how its programs cut up rows."""
        parts = self._tables
        if self.scaled:
            shapes = [_scaled_shape(table, out[0]) for table in parts]
            return _gather_scaled_layers, out.view(torch.int16), min(shapes, key=lambda shape: shape["ALIGNED"])
        raw = out.view(-1).view(torch.uint8)
        word = min((_widest_word(table, raw) for (table,) in parts), key=lambda word: word.itemsize)
        width = parts[0][0].shape[1]
        aligned = min(_alignment(tensor, width, _WIDEST) for tensor in (raw, *(table for (table,) in parts)))
        return _gather_layers, raw.view(word), {**_gather_shape(width // word.itemsize, width), "ALIGNED": aligned}


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
    with on_device(out.device):
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
