"""Other ways to read fp8 rows than the library's, in Triton: in other pieces, in another order, with hints to caches.

They differ in what a warp asks for at once, and in nothing else: the values are those of `engram_ref.rows.kernels`.

    python -m pytest tests/bench/reads
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel are Triton's values, whatever Python is told)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.reads.requests import LINE, WIDTH
from engram_ref.config import SCALE_BLOCK
from engram_ref.gpu import on_device
from engram_ref.rows.kernels import bfloat16_bits, write_values

_BLOCK = tl.constexpr(SCALE_BLOCK)
_LINE = tl.constexpr(LINE)
_CODES = tl.constexpr(WIDTH)
_SCALES = tl.constexpr(WIDTH // SCALE_BLOCK)  # bytes; one word
_WORD = tl.constexpr(8)  # bytes; rows begin at multiples of it
TILE, WARPS = 4, 2  # rows and warps of a program, as in the library


@triton.jit(do_not_specialize=["codes", "scales", "rows", "places", "out", "count"])
def _read(
    codes, scales, rows, places, out, count,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, TILE: tl.constexpr, CACHED: tl.constexpr,
    EVICTED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    row = tl.load(rows + place, mask=asked, other=0).to(tl.int64)
    if places is not None:
        place = tl.load(places + place, mask=asked, other=0)
    at = tl.multiple_of(scales + row * SCALE_STRIDE, _WORD).to(tl.pointer_type(tl.int64))
    word = tl.load(at, mask=asked, other=0, cache_modifier=CACHED, eviction_policy=EVICTED)  # a row's scales
    lane = tl.arange(0, _CODES)
    at = tl.multiple_of(codes + row[:, None] * CODE_STRIDE + lane[None, :], [1, _WORD])
    code = tl.load(at, mask=asked[:, None], other=-1, cache_modifier=CACHED, eviction_policy=EVICTED)
    write_values(out, _values(code, word), place, asked, _SCALES, _SCALES, 16)


@triton.jit
def _values(code, word):
    """Bits of the values of codes, int8 [TILE, 256], whose scales are the bytes of a word, [TILE]."""
    return bfloat16_bits(code, (word[:, None] >> (8 * tl.arange(0, _SCALES))[None, :]).to(tl.uint8))


@triton.jit(do_not_specialize=["codes", "scales", "rows", "out", "count"])
def _read_pieces(
    codes, scales, rows, out, count,
    CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    row = tl.load(rows + place, mask=asked, other=0).to(tl.int64)
    block = tl.arange(0, _SCALES)
    scale = tl.load(scales + row[:, None] * SCALE_STRIDE + block[None, :], mask=asked[:, None], other=0)
    lane = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]  # [8, 32]
    at = tl.multiple_of(codes + row[:, None, None] * CODE_STRIDE + lane[None, :, :], [1, 1, _WORD])
    bits = bfloat16_bits(tl.load(at, mask=asked[:, None, None], other=-1).reshape(TILE, _CODES), scale)
    at = tl.multiple_of(out + place[:, None, None] * _CODES + lane[None, :, :], [1, 1, 16])
    tl.store(at, bits.reshape(TILE, _SCALES, _BLOCK), mask=asked[:, None, None])


@triton.jit(do_not_specialize=["table", "rows", "out", "count", "end"])
def _read_lines(
    table, rows, out, count, end,
    STRIDE: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    asked = place < count
    row = tl.load(rows + place, mask=asked, other=0).to(tl.int64)
    lane = tl.arange(0, LANES)
    word = (row * STRIDE // _LINE * (_LINE // _WORD))[:, None] + lane[None, :]  # from the row's first line on
    here = asked[:, None] & (lane < WORDS)[None, :] & (word // 2 < end)  # by 16 bytes, as they are loaded
    words = tl.load(tl.multiple_of(table + word, [1, 16]), mask=here, other=0)  # [TILE, LANES]
    before = (row * STRIDE % _LINE // _WORD).to(tl.int32)  # words of the line that are not the row's

    wanted = before[:, None] + tl.arange(0, _CODES // _WORD)[None, :]
    code = tl.gather(words, wanted, 1)[:, :, None] >> (8 * tl.arange(0, _WORD))[None, None, :]
    code = code.to(tl.int8).reshape(TILE, _CODES)
    scales = tl.sum(tl.where(lane[None, :] == before[:, None] + _CODES // _WORD, words, 0), 1)
    write_values(out, _values(code, scales), place, asked, _SCALES, _SCALES, 16)


def read(
    codes: Tensor,
    scales: Tensor,
    rows: Tensor,
    out: Tensor,
    *,
    places: Tensor | None = None,
    tile: int = TILE,
    warps: int = WARPS,
    cached: str = "",
    evicted: str = "",
) -> None:
    """Decode fp8 rows into `out`, on the current stream; nothing is checked.

    Args:
        codes, scales: uint8 [R, 256] and [R, 8], in memory that the device of `out` can read; rows are a multiple of
            8 bytes apart, and the first one's address is one.
        rows: row numbers [N] on that device.
        out: bfloat16 [N, 256], contiguous.
        places: where in `out` the values of each row go, int64 [N]; None: in the order of `rows`.
        tile, warps: rows and warps of a program.
        cached, evicted: cache modifier and eviction policy of the loads, as Triton calls them.
    """
    with on_device(out.device):
        _read[(triton.cdiv(len(rows), tile),)](
            _bytes_from(codes).view(torch.int8), _bytes_from(scales), rows, places, out.view(torch.int16), len(rows),
            CODE_STRIDE=codes.stride(0), SCALE_STRIDE=scales.stride(0), TILE=tile, CACHED=cached, EVICTED=evicted,
            num_warps=warps,
        )  # fmt: skip


def read_pieces(codes: Tensor, scales: Tensor, rows: Tensor, out: Tensor) -> None:
    """The same with a warp asking for 64 bytes of four rows at once, as the library did until it asked for a row."""
    with on_device(out.device):
        _read_pieces[(triton.cdiv(len(rows), TILE),)](
            _bytes_from(codes).view(torch.int8), _bytes_from(scales), rows, out.view(torch.int16), len(rows),
            CODE_STRIDE=codes.stride(0), SCALE_STRIDE=scales.stride(0), TILE=TILE, num_warps=WARPS,
        )  # fmt: skip


def read_lines(codes: Tensor, rows: Tensor, out: Tensor) -> None:
    """The same by whole aligned lines of 128 bytes, from which a row's bytes are picked.

    Args:
        codes: as for `read`; a row's scales follow its codes, and the first row begins with a line.
        rows, out: as for `read`.
    """
    stride, row_bytes = codes.stride(0), WIDTH + WIDTH // SCALE_BLOCK
    words = lines_of(stride, row_bytes) * LINE // 8
    end = (len(codes) - 1) * stride + row_bytes  # of the table
    with on_device(out.device):
        _read_lines[(triton.cdiv(len(rows), TILE),)](
            _bytes_from(codes).view(torch.int64), rows, out.view(torch.int16), len(rows), triton.cdiv(end, 16),
            STRIDE=stride, TILE=TILE, WORDS=words, LANES=triton.next_power_of_2(words), num_warps=WARPS,
        )  # fmt: skip


def lines_of(stride: int, row_bytes: int) -> int:
    """The most lines that a row lies in, wherever it begins."""
    before = LINE - math.gcd(stride, LINE)  # the most bytes of its first line that are not its own
    return -(-(before + row_bytes) // LINE)


def _bytes_from(part: Tensor) -> Tensor:
    """A tensor that begins with the first row's first byte."""
    return part.as_strided((part.shape[1],), (1,))
