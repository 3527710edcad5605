"""fp8 with block scales: every pair of code and scale against exact fractions, and quantisation against all codes."""

import bisect
from fractions import Fraction

import pytest
import torch

from engram_ref.rows import fp8
from tests.ref.rows.fp8_pairs import assert_bits, bits_of, pair_rows

BLOCK = 32


def exact_code(code: int) -> Fraction | None:
    """The value of an e4m3 code by its definition; None for NaN."""
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return None
    size = Fraction(8 + fraction, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(fraction, 8) / 64
    return -size if sign else size


def pair(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return codes.view(fp8.CODE_DTYPE), scales.view(fp8.SCALE_DTYPE)


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every code with every scale: codes [256, 256], scales [256, 8], one scale to a row."""
    every = torch.arange(256, dtype=torch.uint8)
    return every.repeat(256, 1), every.view(256, 1).repeat(1, 8)


def test_every_pair_is_the_nearest_bfloat16():
    raw = pair_rows()
    assert len(torch.unique(raw[:, :256].int() * 256 + raw[:, 256:].int().repeat_interleave(BLOCK, dim=1))) == 65_536
    assert_bits(fp8.dequantise(*pair(raw[:, :256], raw[:, 256:])), raw)


def test_the_bits_held_against_are_those_of_the_definition():
    """`fp8_pairs` counts in whole numbers; here are some of its pairs as fractions."""
    for code in range(256):
        exact = exact_code(code)
        for scale in (3, 127, 246):
            bits = torch.tensor(bits_of(code, scale)).short().view(torch.bfloat16)
            assert exact is None or Fraction(bits.item()) == exact * Fraction(2) ** (scale - 127)


def test_in_range_nothing_is_rounded():
    codes, scales = all_pairs()
    values, exact = (fp8.dequantise(*pair(codes, scales), dtype=d).double() for d in (torch.bfloat16, torch.float64))
    rounded = (values != exact) & ~exact.isnan()
    # Only products beyond bfloat16's largest number, or smaller than its subnormal steps.
    assert (exact[rounded].abs().log2().gt(127.99) | exact[rounded].abs().lt(2.0**-126)).all()
    assert rounded.any(1).nonzero().flatten().tolist() == [0, 1, 2, *range(247, 255)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_dtypes_agree(dtype):
    codes, scales = all_pairs()
    codes, scales = codes[3:247], scales[3:247]
    assert torch.equal(
        fp8.dequantise(*pair(codes, scales), dtype=dtype).nan_to_num(7).double(),
        fp8.dequantise(*pair(codes, scales)).nan_to_num(7).double(),
    )


def test_a_scale_belongs_to_32_columns_and_to_block_rows():
    codes = torch.full((64, 96), 0x38, dtype=torch.uint8)  # 1.0
    scales = torch.arange(100, 106, dtype=torch.uint8).view(2, 3)
    values = fp8.dequantise(*pair(codes, scales), block_rows=32).double()
    for r, c in ((0, 0), (31, 31), (31, 32), (32, 31), (63, 95)):
        assert values[r, c] == 2.0 ** (int(scales[r // 32, c // 32]) - 127)


@pytest.mark.parametrize(
    ("codes", "scales", "block_rows"),
    [
        ((4, 256), (4, 2), 1),
        ((4, 256), (3, 8), 1),
        ((64, 64), (2, 2), 1),
        ((48, 64), (1, 2), 32),
        ((4, 40), (4, 1), 1),
        ((32,), (1,), 1),
    ],
    ids=str,
)
def test_scales_of_another_block_are_refused(codes, scales, block_rows):
    given = pair(torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"{block_rows} x 32"):
        fp8.dequantise(*given, block_rows=block_rows)


@pytest.mark.parametrize(("codes", "scales"), [("uint8", "uint8"), ("uint8", "scale"), ("code", "uint8")])
def test_other_dtypes_are_refused(codes, scales):
    dtypes = {"uint8": torch.uint8, "code": fp8.CODE_DTYPE, "scale": fp8.SCALE_DTYPE}
    given = torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)
    fp8.check_pair(*pair(*given))  # a scale to a row
    with pytest.raises(ValueError, match=f"codes of {dtypes[codes]} and scales of {dtypes[scales]}: give "):
        fp8.dequantise(given[0].view(dtypes[codes]), given[1].view(dtypes[scales]))


# --- quantise ----------------------------------------------------------------------------------------------

NUMBERS = sorted({value for code in range(128) if (value := exact_code(code)) is not None})


def nearest_code(value: Fraction) -> list[Fraction]:
    """The representable sizes nearest to `value`: one, or two if it is half way."""
    at = bisect.bisect_left(NUMBERS, value)
    near = NUMBERS[max(0, at - 1) : at + 1]
    best = min(abs(number - value) for number in near)
    return [number for number in near if abs(number - value) == best]


def wide_values(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 64, generator=generator) * torch.logspace(-30, 30, 40)[:, None]


def test_codes_are_the_nearest_and_scales_the_smallest_that_hold_all():
    values = wide_values()
    codes, scales = fp8.quantise(values)
    for r in range(0, 40, 3):
        for block in range(2):
            shift = int(scales.view(torch.uint8)[r, block]) - 127
            part = [Fraction(x) / Fraction(2) ** shift for x in values[r, block * BLOCK : (block + 1) * BLOCK].tolist()]
            largest = max(map(abs, part))
            assert largest <= 448 and (largest * 2 > 448 or shift == -127)
            got = [Fraction(x) for x in codes[r, block * BLOCK : (block + 1) * BLOCK].float().tolist()]
            assert all(abs(g) in nearest_code(abs(x)) for g, x in zip(got, part))


def test_a_tie_goes_to_the_even_code():
    values = torch.zeros(1, BLOCK)
    values[0, :4] = torch.tensor([448.0, 17.0, 19.0, -17.0])  # between 16 and 18, and between 18 and 20
    codes, scales = fp8.quantise(values)
    assert scales.view(torch.uint8).tolist() == [[127]]
    assert codes[0, :4].tolist() == [448.0, 16.0, 20.0, -16.0]


@pytest.mark.parametrize("block_rows", [1, 2])
def test_what_was_dequantised_comes_back(block_rows):
    codes = torch.randint(0, 127, (80, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8) << 7
    scales = torch.arange(3, 243, 6, dtype=torch.uint8).view(-1, 1).repeat(2 // block_rows, 2)
    values = fp8.dequantise(*pair(codes, scales), block_rows=block_rows)
    again = fp8.dequantise(*fp8.quantise(values, block_rows), block_rows=block_rows)
    assert torch.equal(again.view(torch.int16), values.view(torch.int16))  # -0.0 as well


def test_a_batch_is_each_of_its_matrices():
    values = wide_values().view(5, 8, 64)
    codes, scales = fp8.quantise(values, block_rows=4)
    assert codes.shape == (5, 8, 64) and scales.shape == (5, 2, 2)
    for n, value in enumerate(values):
        alone = fp8.quantise(value, block_rows=4)
        assert torch.equal(codes[n].view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(scales[n].view(torch.uint8), alone[1].view(torch.uint8))
        assert torch.equal(fp8.dequantise(codes, scales, 4)[n], fp8.dequantise(*alone, block_rows=4))


def test_a_block_of_zeros_has_scale_one():
    codes, scales = fp8.quantise(torch.tensor([[0.0, -0.0] * 16]))
    assert scales.view(torch.uint8).tolist() == [[127]]
    assert codes.view(torch.uint8).tolist() == [[0x00, 0x80] * 16]


@pytest.mark.parametrize("shape", [(3, 33), (32,), (31, 32)], ids=str)
def test_values_that_are_no_blocks_are_refused(shape):
    with pytest.raises(ValueError, match="not made of blocks of 2 x 32"):
        fp8.quantise(torch.zeros(shape), block_rows=2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(wrong):
    values = torch.zeros(2, BLOCK)
    values[1, 3] = wrong
    with pytest.raises(ValueError, match="not finite"):
        fp8.quantise(values)
    with pytest.raises(ValueError, match="not finite in float32"):
        fp8.quantise(torch.full((2, BLOCK), 1e39, dtype=torch.float64))


@pytest.mark.parametrize(
    ("code", "scale", "found"), [(0x7F, 0, True), (0xFF, 0, True), (0x7E, 0xFF, True), (0xFE, 0xFE, False)]
)
def test_nan_is_found(code, scale, found):
    codes, scales = torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)
    codes[2, 31], scales[1, 0] = code, scale
    assert fp8.has_nan(codes, scales) is found
