"""The twin decodes fp8 as torch does: every code, every scale, and whole stored rows, to the bit."""

import math
import struct

import pytest
import torch

from engram_ref.rows import fp8 as ref
from engram_ref.rows.format import RowFormat
from engram_toy import fp8 as toy

BYTES = torch.arange(256, dtype=torch.uint8)


def bits(value: float) -> bytes:
    """Of a float64: tells -0.0 from 0.0."""
    return struct.pack("<d", value)


@pytest.mark.parametrize(
    ("decode", "dtype", "refused"), [(toy.e4m3, ref.CODE_DTYPE, [0x7F, 0xFF]), (toy.e8m0, ref.SCALE_DTYPE, [0xFF])]
)
def test_every_byte(decode, dtype, refused):
    expected = BYTES.view(dtype).double().tolist()
    assert [byte for byte in range(256) if math.isnan(expected[byte])] == refused
    for byte in range(256):
        if byte in refused:
            with pytest.raises(ValueError, match=f"{byte:#04x} is NaN"):
                decode(byte)
        else:
            assert bits(decode(byte)) == bits(expected[byte])


def test_the_comparison_tells_zeros_apart():
    assert toy.e4m3(0x80) == toy.e4m3(0x00) and bits(toy.e4m3(0x80)) != bits(toy.e4m3(0x00))


def stored_rows(rows: int, width: int) -> torch.Tensor:
    """Random stored rows of any codes and scales but NaN, uint8 [rows, width + width / 32]."""
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 254, (rows, width), generator=generator, dtype=torch.uint8)
    codes = codes // 2 + codes % 2 * 128
    scales = torch.randint(0, 255, (rows, width // 32), generator=generator, dtype=torch.uint8)
    return torch.cat([codes, scales], dim=1)


@pytest.mark.parametrize("width", [32, 64, 256])
def test_stored_rows(width):
    raw = stored_rows(300, width)
    got = torch.tensor([toy.dequantise(toy.numbers(row)) for row in raw.tolist()], dtype=torch.float64)
    codes, scales = raw[:, :width].view(ref.CODE_DTYPE), raw[:, width:].view(ref.SCALE_DTYPE)
    exact = ref.dequantise(codes, scales, dtype=torch.float64)
    assert torch.equal(got.view(torch.int64), exact.view(torch.int64))
    # The reference rounds once more, which shows only outside bfloat16's range.
    rounded = RowFormat(torch.bfloat16, width, scaled=True).decode(raw)
    assert torch.equal(got.bfloat16().view(torch.int16), rounded.view(torch.int16))
    normal = got.abs().lt(3e38) & (got.abs().ge(2.0**-126) | (got == 0))
    assert torch.equal(got[normal], rounded[normal].double()) and 0.9 < normal.double().mean() < 1


def test_a_scale_of_another_block_is_caught():
    raw = stored_rows(300, 64)
    swapped = torch.cat([raw[:, :64], raw[:, 64:].flip(1)], dim=1)
    assert toy.dequantise(toy.numbers(raw[0].tolist())) != toy.dequantise(toy.numbers(swapped[0].tolist()))


@pytest.mark.parametrize("decode", [toy.e4m3, toy.e8m0])
@pytest.mark.parametrize("bad", [-1, 256, 1.0, True, "A", None], ids=str)
def test_what_is_no_byte_is_refused(decode, bad):
    with pytest.raises(ValueError, match="give a byte"):
        decode(bad)


@pytest.mark.parametrize("length", [0, 1, 32, 34, 65])
def test_a_row_that_is_not_made_of_blocks_is_refused(length):
    for use in (toy.numbers, toy.dequantise):
        with pytest.raises(ValueError, match=f"a row of {length}: each 32 codes have one scale"):
            use([0] * length)


def test_same_constants():
    assert (toy.SCALE_BLOCK, toy.NAN_CODE, toy.NAN_SCALE) == (ref.SCALE_BLOCK, ref.NAN_CODE, ref.NAN_SCALE)
