"""fp8 as DeepSeek-V4.1-Flash stores its rows and projections: e4m3 codes, and one e8m0 scale for each block of them.

    codes, scales = quantise(values)            # [N, D] -> [N, D] float8_e4m3fn, [N, D/32] float8_e8m0fnu
    values = dequantise(codes, scales)          # [N, D] bfloat16

A code has a sign, four exponent bits and three fraction bits; a scale is a power of two, 2^(byte - 127). A row of a
table has a scale for every 32 values; a projection has one for every 32 x 32 (`block_rows=32`). The product of a code
and a scale has four significant bits, so it is exact in bfloat16, which has eight, unless it leaves bfloat16's range;
then it is rounded once, to the nearest, and beyond the largest number to infinity. Every path that decodes rows gives
these bits.

    python -m pytest tests/ref/rows/test_fp8.py
"""

from __future__ import annotations

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.config import SCALE_BLOCK

CODE_DTYPE = torch.float8_e4m3fn
SCALE_DTYPE = torch.float8_e8m0fnu
NAN_CODE = 0x7F  # without its sign: e4m3 has no infinity and one NaN
NAN_SCALE = 0xFF
_BIAS = 127  # of a scale's exponent; the byte 255 is NaN, so exponents are -127 .. 127
_LARGEST_FRACTION, _LARGEST_EXPONENT = 0.875, 9  # of the largest code, 448


def dequantise(codes: Tensor, scales: Tensor, block_rows: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values of codes and scales.

    Args:
        codes: float8_e4m3fn [..., R, W].
        scales: float8_e8m0fnu [..., R / block_rows, W / 32].
        block_rows: rows that share a scale.
        dtype: of the values: bfloat16, float32 or float64.

    Returns:
        [..., R, W]; NaN where a code or a scale is.

    Raises:
        ValueError: other dtypes, or scales that do not fit the codes.
    """
    check_pair(codes, scales, block_rows)
    inner = torch.promote_types(dtype, torch.float32)  # in which the product is exact
    factors = scales.to(inner)
    if block_rows > 1:
        factors = factors.repeat_interleave(block_rows, dim=-2)
    blocks = codes.to(inner).unflatten(-1, (-1, SCALE_BLOCK))  # [..., R, W/32, 32]
    return (blocks * factors.unsqueeze(-1)).flatten(-2).to(dtype)


def quantise(values: Tensor, block_rows: int = 1) -> tuple[Tensor, Tensor]:
    """Codes and scales nearest to values: for each block the smallest scale with which no code is cut off.

    What `dequantise` gave comes back as it was: the values, not always the codes, as several pairs stand for one value.

    Args:
        values: [..., R, W], finite in float32, to which float64 is rounded first.
        block_rows: rows that share a scale.

    Returns:
        Codes float8_e4m3fn [..., R, W], scales float8_e8m0fnu [..., R / block_rows, W / 32]; the scale of a block of
        zeros is 1.

    Raises:
        ValueError: a shape that is not made of whole blocks, or values that are not finite.
    """
    if values.ndim < 2 or values.shape[-1] % SCALE_BLOCK or values.shape[-2] % block_rows:
        raise ValueError(f"values of shape {tuple(values.shape)}: not made of blocks of {block_rows} x {SCALE_BLOCK}")
    single = values.to(torch.float32)
    if not torch.isfinite(single).all():
        raise ValueError("values that are not finite in float32: fp8 rows hold numbers only")
    blocks = single.double().unflatten(-1, (-1, SCALE_BLOCK)).unflatten(-3, (-1, block_rows))  # [..., R/b, b, W/32, 32]
    fraction, exponent = torch.frexp(blocks.abs().amax(dim=(-3, -1), keepdim=True))  # [..., R/b, 1, W/32, 1]
    # The least shift with which the largest of a block is no more than the largest code.
    shift = exponent - _LARGEST_EXPONENT + (fraction > _LARGEST_FRACTION)
    shift = torch.where(fraction == 0, 0, shift).clamp(-_BIAS, _BIAS)
    codes = (blocks * torch.exp2(-shift.double())).float().to(CODE_DTYPE)
    scales = (shift + _BIAS).to(torch.uint8).view(SCALE_DTYPE)
    return codes.flatten(-2).flatten(-3, -2), scales[..., 0, :, 0]


def check_pair(codes: Tensor, scales: Tensor, block_rows: int = 1) -> None:
    """Refuse codes and scales that do not belong together: a wrong block size gives wrong values and no error.

    Raises:
        ValueError: other dtypes, or shapes that are not of whole blocks.
    """
    if codes.dtype != CODE_DTYPE or scales.dtype != SCALE_DTYPE:
        raise ValueError(f"codes of {codes.dtype} and scales of {scales.dtype}: give {CODE_DTYPE} and {SCALE_DTYPE}")
    *batch, rows, width = codes.shape if codes.ndim > 1 else (0, 0)
    if codes.ndim < 2 or tuple(scales.shape) != (*batch, rows // block_rows, width // SCALE_BLOCK):
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} with scales of shape {tuple(scales.shape)}: "
            f"there is one scale for every {block_rows} x {SCALE_BLOCK} codes"
        )
    if rows % block_rows or width % SCALE_BLOCK:
        raise ValueError(f"codes of shape {tuple(codes.shape)}: not made of blocks of {block_rows} x {SCALE_BLOCK}")


def has_nan(codes: Tensor, scales: Tensor) -> bool:
    """Whether some code or scale is NaN; both as uint8 of any shape."""
    return bool(((codes & NAN_CODE) == NAN_CODE).any() or (scales == NAN_SCALE).any())
