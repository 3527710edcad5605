"""The twin of `engram_ref.rows.fp8`: stored bytes to the numbers that they stand for, and codes times scales.

    e4m3(0x7E)                          # 448.0, the largest code
    e8m0(120)                           # 2^-7
    row = numbers(stored)               # 264 bytes: 256 codes and 8 scales, as numbers
    values = dequantise(row)            # 256 values

A number is decoded before a run; in the run, a value is the product of a code and the scale that it shares with the
31 codes beside it, so a tracer sees both read. The product is exact in a float64; the reference rounds it once more,
into bfloat16, which changes nothing within bfloat16's range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SCALE_BLOCK = 32  # codes that share a scale
NAN_CODE = 0x7F  # without its sign: e4m3 has no infinity and one NaN
NAN_SCALE = 0xFF
_STORED_BLOCK = SCALE_BLOCK + 1


def e4m3(code: int) -> float:
    """The number of a code: a sign, four exponent bits, three fraction bits.

    Raises:
        ValueError: no byte, or NaN.
    """
    _check_byte("code", code)
    if code & 0x7F == NAN_CODE:
        raise ValueError(f"code {code:#04x} is NaN: fp8 rows hold numbers only")
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = code >> 3 & 0xF, code & 0x7
    if exponent == 0:  # subnormal: f / 8 * 2^-6
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)  # (1 + f / 8) * 2^(e - 7)


def e8m0(byte: int) -> float:
    """The number of a scale byte: a power of two.

    Raises:
        ValueError: no byte, or NaN.
    """
    _check_byte("scale", byte)
    if byte == NAN_SCALE:
        raise ValueError(f"scale {byte:#04x} is NaN: fp8 rows hold numbers only")
    return 2.0 ** (byte - 127)


def numbers(stored: Sequence[int]) -> list[float]:
    """A stored row, D codes and then D/32 scale bytes, as as many numbers.

    Raises:
        ValueError: a NaN among them, or a length that is not made of blocks of 32 codes and a scale.
    """
    width = _width(stored)
    return [*map(e4m3, stored[:width]), *map(e8m0, stored[width:])]


def dequantise(row: Sequence[Any]) -> list[Any]:
    """The D values of a row of D codes and then D/32 scales, as numbers: each code times its block's scale.

    Raises:
        ValueError: a length that is not made of blocks of 32 codes and a scale.
    """
    width = _width(row)
    return [row[i] * row[width + i // SCALE_BLOCK] for i in range(width)]


def _width(row: Sequence[Any]) -> int:
    blocks, left_over = divmod(len(row), _STORED_BLOCK)
    if left_over or not blocks:
        raise ValueError(f"a row of {len(row)}: each {SCALE_BLOCK} codes have one scale, give {_STORED_BLOCK} a block")
    return blocks * SCALE_BLOCK


def _check_byte(what: str, byte: int) -> None:
    if isinstance(byte, bool) or not isinstance(byte, int) or not 0 <= byte <= 0xFF:
        raise ValueError(f"{what} {byte!r}: give a byte, an integer in 0 .. 255")
