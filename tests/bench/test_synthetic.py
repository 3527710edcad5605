"""Synthetic tables: the bytes follow a formula that is written out again here, in plain Python."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from bench.harness import synthetic
from bench.harness.synthetic import expected_rows, fill

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 64 words, so that a small table has many."""
    monkeypatch.setattr(synthetic, "_CHUNK", 64)


def table(rows=50, row_bytes=40, dtype=torch.bfloat16, seed=0):
    raw = torch.zeros(rows, row_bytes, dtype=torch.uint8)
    fill(raw, dtype, seed)
    return raw


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
    for at in range(dtype.itemsize - 1, 8, dtype.itemsize):
        out[at] = out[at] & 0xBF | 0x38
    return bytes(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63])
def test_every_byte_follows_the_formula(dtype, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 64-bit products wrap; NumPy warns where it was not meant
        raw = table(dtype=dtype, seed=seed)
        again = expected_rows(torch.arange(50), 40, dtype, seed)
    assert raw.numpy().tobytes() == b"".join(word(position, dtype, seed) for position in range(250))
    assert torch.equal(again, raw)


def test_rows_are_recomputed_in_any_order_and_number():
    raw = table()
    rows = torch.tensor([49, 0, 7, 7, 23], dtype=torch.int32)
    assert torch.equal(expected_rows(rows, 40, torch.bfloat16, 0), raw[rows])
    assert expected_rows(torch.empty(0, dtype=torch.int64), 40, torch.bfloat16, 0).shape == (0, 40)
    strided = torch.arange(49)[1::3]
    assert torch.equal(expected_rows(strided, 40, torch.bfloat16, 0), raw[strided])


def test_a_wrong_row_and_a_torn_row_show():
    raw = table(200)
    want = expected_rows(torch.arange(200), 40, torch.bfloat16, 0)
    torn = torch.cat([raw[:, :32], raw.roll(1, 0)[:, 32:]], 1)
    assert not (raw.roll(1, 0) == want).all(1).any()
    assert not (torn == want).all(1).any()
    assert len(raw.unique(dim=0)) == 200


def test_the_furthest_rows_of_a_large_table_have_their_formula():
    row = 10**11 // 5
    got = expected_rows(torch.tensor([row]), 40, torch.float16, 3)
    assert got.numpy().tobytes() == b"".join(word(row * 5 + at, torch.float16, 3) for at in range(5))


@pytest.mark.parametrize("cut", [1, 13, 49])
def test_a_table_written_in_pieces_is_the_same(cut):
    raw = torch.zeros(50, 40, dtype=torch.uint8)
    fill(raw[:cut], torch.bfloat16, 0)
    fill(raw[cut:], torch.bfloat16, 0, first_row=cut)
    assert torch.equal(raw, table())


def test_nothing_is_written_outside():
    raw = torch.zeros(50, 40, dtype=torch.uint8)
    fill(raw[10:20], torch.bfloat16, 0, first_row=10)
    fill(raw[30:30], torch.bfloat16, 0, first_row=30)
    assert not raw[:10].any()
    assert not raw[20:].any()
    assert torch.equal(raw[10:20], table()[10:20])


def test_seeds_give_tables_that_share_no_word():
    words = [table(seed=seed).numpy().view(np.uint64) for seed in (0, 1, 2)]
    assert len(np.unique(np.concatenate(words))) == 3 * 250


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_drawn_the_values_are_ordinary_numbers(dtype):
    keep, put = synthetic._masks(dtype)
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


@pytest.mark.parametrize(
    "raw",
    [
        torch.zeros(4, 16),
        torch.zeros(64, dtype=torch.uint8),
        torch.zeros(4, 32, dtype=torch.uint8)[:, :16],
        torch.zeros(4, 16, dtype=torch.uint8, device="meta"),
    ],
    ids=["dtype", "shape", "strides", "device"],
)
def test_other_memory_is_refused(raw):
    with pytest.raises(ValueError, match="give contiguous uint8"):
        fill(raw, torch.float32, 0)


@pytest.mark.parametrize("row_bytes", [0, 4, 12])
def test_rows_that_are_not_whole_words_are_refused(row_bytes):
    with pytest.raises(ValueError, match=f"row_bytes={row_bytes}.*take a multiple"):
        expected_rows(torch.tensor([0]), row_bytes, torch.float32, 0)


def test_dtypes_without_a_mask_are_refused():
    with pytest.raises(ValueError, match=r"dtype=torch\.int8: known are torch\.float32"):
        fill(torch.zeros(4, 16, dtype=torch.uint8), torch.int8, 0)
