"""Every path from stored fp8 rows to values on a CPU gives the bits of the definition, `fp8.dequantise`."""

import pytest
import torch

pytest.importorskip("numba", reason="the compiled decoding needs numba (pip install 'engram-offload[ref]')")

from engram_ref.rows import decoding as module
from engram_ref.rows import fp8
from engram_ref.rows import gather as gather_module
from engram_ref.rows.decoding import dequantise_rows, gather_values
from tests.ref.rows.fp8_pairs import assert_bits, pair_rows, random_rows, rows_of

CANARY = 0x5A5A


@pytest.fixture(params=["compiled", "two threads", "torch"])
def way(request, monkeypatch):
    """Every way that decoding can go, on rows few enough for a test."""
    if request.param == "two threads":
        monkeypatch.setattr(gather_module, "_THREAD_BYTES", 1000)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if request.param == "torch":
        monkeypatch.setattr(module, "_decode_rows", None)
    return request.param


def test_every_pair(way):
    assert_bits(dequantise_rows(pair_rows(), 256), pair_rows())


def test_every_pair_in_blocks_without_extremes(way):
    """Codes 0x08 .. 0x7E of both signs: with most scales these blocks never become floats."""
    raw = pair_rows()
    raw[:, :256] = (raw[:, :256] & 0x80) | (raw[:, :256] & 0x7F).clamp(8, 0x7E)
    assert_bits(dequantise_rows(raw, 256), raw)


@pytest.mark.parametrize("width", [32, 64, 96, 256])
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_gathered_rows(way, width, split, dtype):
    raw = random_rows(300, width)
    parts = rows_of(raw, split).parts
    for count in (0, 1, 31, 32, 33, 400):
        numbers = torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(count)).to(dtype)
        numbers[:2] = 299  # the last one, twice
        around = torch.full((count * width + 128,), CANARY, dtype=torch.int16)
        start = 64 + -around.data_ptr() % 64 // 2
        out = around[start : start + count * width].view(torch.bfloat16).view(count, width)
        gather_values(parts, numbers, out)
        assert_bits(out, raw[numbers.long()])
        assert (around[:start] == CANARY).all() and (around[start + count * width :] == CANARY).all()


def test_rows_that_are_not_asked_for_are_not_read(way):
    raw = random_rows(50, 64)
    poisoned = raw.clone()
    poisoned[::2] = 0xFF
    out = torch.empty(25, 64, dtype=torch.bfloat16)
    gather_values((poisoned,), torch.arange(1, 50, 2), out)
    assert_bits(out, raw[1::2])
    assert not out.isnan().any()


def test_an_unaligned_output(way):
    raw = random_rows(100, 64)
    out = torch.empty(100 * 64 + 1, dtype=torch.bfloat16)[1:].view(100, 64)
    assert dequantise_rows(raw, 64, out) is out
    assert_bits(out, raw)


@pytest.mark.parametrize("wrong", ["no scales", "scales of another block", "truncated"])
def test_a_wrong_candidate_is_caught(wrong):
    raw = random_rows(40, 256)
    raw[:, 256] = 1  # products that bfloat16 must round
    candidate = raw.clone()
    if wrong == "no scales":
        candidate[:, 256:] = 127
    if wrong == "scales of another block":
        candidate[:, 256:] = candidate[:, 256:].roll(1, dims=1)
    got = dequantise_rows(candidate, 256)
    if wrong == "truncated":
        codes, scales = raw[:, :256].view(fp8.CODE_DTYPE), raw[:, 256:].view(fp8.SCALE_DTYPE)
        exact = fp8.dequantise(codes, scales, dtype=torch.float32)
        got = (exact.view(torch.int32) >> 16).short().view(torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_bits(got, raw)


def test_flushing_subnormals_changes_no_normal_value():
    raw = random_rows(200, 256)
    raw[:, 256:] = raw[:, 256:].clamp(20, 240)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        assert_bits(dequantise_rows(raw, 256), raw)
    finally:
        torch.set_flush_denormal(False)
