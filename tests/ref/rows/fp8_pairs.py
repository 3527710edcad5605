"""What every path that decodes fp8 rows is held against: the bits of all 65,536 pairs of code and scale, in integers.

raw = pair_rows()                           # uint8 [256, 264]: every pair once
assert_bits(candidate(raw), raw)            # all bits; NaN for NaN
"""

import functools

import torch

from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows

BLOCK = 32
NAN = -1  # in place of bits


def bits_of(code: int, scale: int) -> int:
    """Bits of the nearest bfloat16, ties to even: only whole numbers, in units of 2^-136, the least that a pair has."""
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F or scale == 0xFF:
        return NAN
    units = (8 * (exponent > 0) + fraction) << (max(exponent, 1) - 1 + scale)
    dropped = max(units.bit_length() - 8, 3)  # eight bits are kept; the least step of bfloat16 is 2^-133
    kept, rest, half = units >> dropped, units & ((1 << dropped) - 1), 1 << (dropped - 1)
    kept += rest > half or (rest == half and kept % 2)
    return sign << 15 | min(kept + (dropped - 3 << 7), 0x7F80)


@functools.cache
def all_bits() -> torch.Tensor:
    """Bits by scale and code, int32 [256, 256]."""
    return torch.tensor([[bits_of(code, scale) for code in range(256)] for scale in range(256)], dtype=torch.int32)


def pair_rows() -> torch.Tensor:
    """Every pair once, uint8 [256, 264]: each row has all codes, and the scales of its eight blocks differ."""
    number = torch.arange(256)
    scales = (number[:, None] + 37 * torch.arange(8)) % 256
    return torch.cat([number.expand(256, 256), scales], dim=1).to(torch.uint8)


def random_rows(rows: int, width: int) -> torch.Tensor:
    """Packed rows without NaN, uint8 [rows, width + width / 32]: any code with any scale."""
    generator = torch.Generator().manual_seed(rows + width)
    codes = torch.randint(0, 127, (rows, width), generator=generator)
    codes += 128 * torch.randint(0, 2, codes.shape, generator=generator)
    scales = torch.randint(0, 255, (rows, width // BLOCK), generator=generator)
    return torch.cat([codes, scales], dim=1).to(torch.uint8)


def rows_of(raw: torch.Tensor, split: bool = False) -> Rows:
    """Packed bytes as rows of a table, NaN and all."""
    width = raw.shape[1] // (BLOCK + 1) * BLOCK
    rows = Rows(RowFormat(torch.bfloat16, width, scaled=True), (raw,))
    return rows.split() if split else rows


def expected_bits(raw: torch.Tensor) -> torch.Tensor:
    """Bits of packed rows [N, width + width / 32], int32 [N, width]."""
    codes, scales = (part.long() for part in rows_of(raw.cpu().contiguous(), split=True).parts)
    return all_bits()[scales.repeat_interleave(BLOCK, dim=1), codes]


def assert_bits(got: torch.Tensor, raw: torch.Tensor) -> None:
    """The values of packed rows, to the bit; which bits NaN has is left open."""
    expected = expected_bits(raw)
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    got = got.cpu()
    assert torch.equal(got.isnan(), expected == NAN)
    found = torch.where(got.isnan(), NAN, got.view(torch.int16).int() & 0xFFFF)
    assert torch.equal(found, expected)
