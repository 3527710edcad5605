"""Synthetic tables: the bytes follow a formula that is written out again here, in plain Python."""

import warnings

import numpy as np
import pytest
import torch

from bench.setup import table_content
from bench.setup.table_content import expected_rows, expected_values, fill
from engram_ref.rows import fp8
from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MASK = (1 << 64) - 1
FP8 = RowFormat(torch.bfloat16, 256, scaled=True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 64 words, so that a small table has many."""
    monkeypatch.setattr(table_content, "_CHUNK", 64)


def plain(dtype=torch.bfloat16, row_bytes=40):
    """A format of whole words: five in a row."""
    return RowFormat(dtype, row_bytes // dtype.itemsize)


def fresh(rows, row_format, split=False):
    """Zeroed memory for a table."""
    widths = row_format.split_bytes if split else [row_format.row_bytes]
    return Rows(row_format, tuple(torch.zeros(rows, width, dtype=torch.uint8) for width in widths))


def table(rows=50, row_format=None, seed=0):
    made = fresh(rows, row_format or plain())
    fill(made, seed)
    return made.parts[0]


def mixed(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def word(position, dtype, seed, chunk=64):
    """One word of a table as little-endian bytes, from Python's integers alone."""

    def draw(n):
        return mixed((mixed(seed & MASK) + (n + 1) * 0x9E3779B97F4A7C15) & MASK)

    product = draw(position % chunk) * (draw(chunk + position // chunk) | 1) & MASK
    out = bytearray(product.to_bytes(8, "little"))
    if dtype == "fp8":  # the last of a row's 33 words has its scales
        scales = position % 33 == 32
        return bytes(byte & 0x07 | 0x78 if scales else byte & 0xBF | 0x20 for byte in out)
    for at in range(dtype.itemsize - 1, 8, dtype.itemsize):
        out[at] = out[at] & 0xBF | 0x38
    return bytes(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63])
def test_every_byte_follows_the_formula(dtype, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 64-bit products wrap; NumPy warns where it was not meant
        raw = table(row_format=plain(dtype), seed=seed)
        again = expected_rows(torch.arange(50), plain(dtype), seed)
    assert raw.numpy().tobytes() == b"".join(word(position, dtype, seed) for position in range(250))
    assert torch.equal(again, raw)


@pytest.mark.parametrize("seed", [0, -1])
def test_every_code_and_scale_follows_the_formula(seed):
    raw = table(20, FP8, seed)
    assert raw.numpy().tobytes() == b"".join(word(position, "fp8", seed) for position in range(20 * 33))
    assert torch.equal(expected_rows(torch.arange(20), FP8, seed), raw)


def test_codes_and_scales_apart_are_the_same_rows(monkeypatch):
    monkeypatch.setattr(table_content, "_PIECE", 3 * 264)  # made three rows at a time
    apart = fresh(20, FP8, split=True)
    fill(apart, 5, first_row=7)
    assert torch.equal(apart.packed().parts[0], expected_rows(torch.arange(7, 27), FP8, 5))


def test_fp8_values_are_those_of_the_definition():
    raw, numbers = table(20, FP8), torch.tensor([19, 0, 7, 7])
    values = expected_values(numbers, FP8, 0)
    assert values.dtype == torch.bfloat16 and values.shape == (4, 256)
    codes = raw[numbers, :256].view(fp8.CODE_DTYPE).double().view(4, 8, 32)
    scales = torch.exp2(raw[numbers, 256:].double() - 127)[..., None]
    assert torch.equal(values.double(), (codes * scales).view(4, 256))  # no product is rounded
    assert torch.equal(values, Rows.from_packed(raw).values()[numbers])
    wrong = torch.exp2(raw[numbers, 256:].double() - 126)[..., None]
    assert not torch.equal(values.double(), (codes * wrong).view(4, 256))


def test_plain_values_are_the_bytes():
    numbers = torch.tensor([3, 1])
    assert torch.equal(expected_values(numbers, plain(), 0), table()[numbers].view(torch.bfloat16))


def test_fp8_rows_are_ordinary_numbers_and_all_different():
    raw = table(3000, FP8)
    codes, scales = raw[:, :256], raw[:, 256:]
    assert not fp8.has_nan(codes, scales)
    assert ((codes & 0x7F) >= 0x08).all()  # not subnormal, not zero
    assert sorted(scales.unique().tolist()) == list(range(120, 128))
    assert len(codes.unique()) == 64  # both signs, four exponents, all fractions
    values = Rows.from_packed(raw).values()
    assert values.abs().max() < 2 and values.abs().min() >= 2.0**-10
    assert len(values.unique(dim=0)) == 3000
    assert 0.45 < (values > 0).float().mean() < 0.55


def test_a_torn_fp8_row_shows_when_it_is_decoded():
    """Scales of another row, or one block of its codes, change the values."""
    raw, numbers = table(200, FP8), torch.arange(200)
    want = expected_values(numbers, FP8, 0)
    for first, last in ((256, 264), (0, 32), (224, 256)):
        torn = raw.clone()
        torn[:, first:last] = raw.roll(1, 0)[:, first:last]
        assert not (FP8.decode(torn) == want).all(1).any()


@pytest.mark.parametrize("cut", [1, 13, 19])
@pytest.mark.parametrize("split", [False, True])
def test_fp8_tables_written_in_pieces_are_the_same(cut, split):
    made = fresh(20, FP8, split)
    for first, last in ((0, cut), (cut, 20)):
        fill(Rows(FP8, tuple(part[first:last] for part in made.parts)), 0, first_row=first)
    assert torch.equal(made.packed().parts[0], table(20, FP8))


def test_rows_are_recomputed_in_any_order_and_number():
    raw = table()
    rows = torch.tensor([49, 0, 7, 7, 23], dtype=torch.int32)
    assert torch.equal(expected_rows(rows, plain(), 0), raw[rows])
    for row_format in (plain(), FP8):
        assert expected_rows(torch.empty(0, dtype=torch.int64), row_format, 0).shape == (0, row_format.row_bytes)
    strided = torch.arange(49)[1::3]
    assert torch.equal(expected_rows(strided, plain(), 0), raw[strided])


def test_a_wrong_row_and_a_torn_row_show():
    raw = table(200)
    want = expected_rows(torch.arange(200), plain(), 0)
    torn = torch.cat([raw[:, :32], raw.roll(1, 0)[:, 32:]], 1)
    assert not (raw.roll(1, 0) == want).all(1).any()
    assert not (torn == want).all(1).any()
    assert len(raw.unique(dim=0)) == 200


def test_the_furthest_rows_of_a_large_table_have_their_formula():
    row = 10**11 // 5
    got = expected_rows(torch.tensor([row]), plain(torch.float16), 3)
    assert got.numpy().tobytes() == b"".join(word(row * 5 + at, torch.float16, 3) for at in range(5))
    row = 384_006_167  # the last one of the largest published table
    got = expected_rows(torch.tensor([row]), FP8, 3)
    assert got.numpy().tobytes() == b"".join(word(row * 33 + at, "fp8", 3) for at in range(33))


@pytest.mark.parametrize("cut", [1, 13, 49])
def test_a_table_written_in_pieces_is_the_same(cut):
    raw = torch.zeros(50, 40, dtype=torch.uint8)
    fill(Rows(plain(), (raw[:cut],)), 0)
    fill(Rows(plain(), (raw[cut:],)), 0, first_row=cut)
    assert torch.equal(raw, table())


def test_nothing_is_written_outside():
    raw = torch.zeros(50, 40, dtype=torch.uint8)
    fill(Rows(plain(), (raw[10:20],)), 0, first_row=10)
    fill(Rows(plain(), (raw[30:30],)), 0, first_row=30)
    assert not raw[:10].any()
    assert not raw[20:].any()
    assert torch.equal(raw[10:20], table()[10:20])


def test_seeds_give_tables_that_share_no_word():
    words = [table(seed=seed).numpy().view(np.uint64) for seed in (0, 1, 2)]
    assert len(np.unique(np.concatenate(words))) == 3 * 250


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_drawn_the_values_are_ordinary_numbers(dtype):
    keep, put = table_content._masks(plain(dtype))
    high = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)  # every sign, exponent and leading fraction
    for low in (0, (1 << 48) - 1):
        words = (high | np.uint64(low)) & keep | put
        values = torch.from_numpy(words.view(np.uint8)).view(dtype)
        assert values.isfinite().all()
        assert values.abs().max() < 2
        assert values.abs().min() >= torch.finfo(dtype).tiny


def test_tables_hold_both_signs_and_many_values():
    values = table(2000).view(torch.bfloat16).float()
    assert 0.45 < (values > 0).float().mean() < 0.55
    assert len(values.unique()) > 2000  # of the 4,096 that the masks leave


def test_other_memory_is_refused():
    rows = Rows(plain(), (torch.zeros(4, 40, dtype=torch.uint8, device="meta"),))
    with pytest.raises(ValueError, match="rows on meta: fill memory of the CPU"):
        fill(rows, 0)


@pytest.mark.parametrize(
    ("row_format", "parts"),
    [
        (RowFormat(torch.float32, 1), "4"),
        (RowFormat(torch.bfloat16, 6), "12"),
        (RowFormat(torch.bfloat16, 32, scaled=True), r"32 \+ 1"),
        (RowFormat(torch.bfloat16, 128, scaled=True), r"128 \+ 4"),
    ],
    ids=str,
)
def test_rows_that_are_not_whole_words_are_refused(row_format, parts):
    with pytest.raises(ValueError, match=f"rows of {parts} B: .*take a multiple"):
        expected_rows(torch.tensor([0]), row_format, 0)


def test_dtypes_without_a_mask_are_refused():
    with pytest.raises(ValueError, match=r"dtype=torch\.int8: known are torch\.float32"):
        fill(fresh(4, RowFormat(torch.int8, 16)), 0)
