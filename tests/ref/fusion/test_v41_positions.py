"""Positions of V4.1's gate: dead ones come out as they went in, none touches another, and blocks change nothing."""

import pytest
import torch

from engram_ref.fusion import base
from tests.ref.fusion.v41_cases import (
    ALL_DTYPES,
    HALF,
    as_bytes,
    make_case,
    make_config,
    make_dead,
    make_fusion_v41,
    make_inputs,
    seeded,
)

# --- dead positions -------------------------------------------------------------------------------

SPECIAL = {  # -0.0, the infinities, a NaN with a payload, the smallest subnormal
    torch.bfloat16: (torch.int16, [-0x8000, 0x7F80, -0x80, 0x7FA5, 1]),
    torch.float16: (torch.int16, [-0x8000, 0x7C00, -0x400, 0x7E25, 1]),
    torch.float32: (torch.int32, [-(2**31), 0x7F800000, -0x800000, 0x7FC12345, 1]),
    torch.float64: (torch.int64, [-(2**63), 0x7FF << 52, -(1 << 52), (0x7FF8 << 48) + 12345, 1]),
}


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dead_positions_come_out_as_they_went_in(dtype, either_path):
    """Bit for bit, though their own rows and stream are NaN; and they change nothing elsewhere."""
    fusion, e, hidden = make_case(2, 20, dtype)
    dead = make_dead(2, 20)
    want = fusion(e, hidden, dead)
    integers, patterns = SPECIAL[dtype]
    e[dead] = float("nan")
    hidden.view(integers)[dead] = torch.tensor(patterns, dtype=integers).repeat(26)[:128].view(4, 32)
    after = fusion(e, hidden, dead)
    assert torch.equal(as_bytes(after[dead]), as_bytes(hidden[dead]))
    assert torch.equal(as_bytes(after[~dead]), as_bytes(want[~dead]))
    assert fusion(e, hidden)[dead].isnan().any()  # what passes them through is the mask


def test_the_gate_is_zero_where_dead():
    fusion, e, hidden = make_case(2, 20)
    dead = make_dead(2, 20)
    e[dead] = float("nan")
    gate = fusion.gate(fusion.project(e), hidden, dead)
    assert (gate[dead] == 0).all() and ((gate[~dead] > 0) & (gate[~dead] < 1)).all()


@pytest.mark.parametrize("value", [False, True])
def test_all_dead_and_none_dead(value, either_path):
    fusion, e, hidden = make_case(2, 20)
    want = hidden if value else fusion(e, hidden)
    assert torch.equal(fusion(e, hidden, torch.full((2, 20), value)), want)


def test_gradients_pass_through_dead_positions_even_where_they_are_nan():
    fusion, e, hidden = make_case(2, 20)
    dead = make_dead(2, 20)
    e[dead], hidden[dead] = float("nan"), float("nan")
    inputs = [hidden.requires_grad_(), e.requires_grad_()]
    of_hidden, of_e = torch.autograd.grad(fusion(e, hidden, dead).sum(), inputs)
    assert not of_e[dead].any() and (of_hidden[dead] == 1).all()


# --- positions, blocks, memory --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 12, 13, 40])
def test_blocks_give_one_shot(length, dtype, monkeypatch):
    """One by one, in odd blocks and all at once.

    A product of another number of rows may sum in another order, and torch's sigmoid of many values is not that of a
    few; both show in the last place of the gate's argument, where its slope reaches 125. In half precision the
    projection is rounded in between, and mostly to the same number.
    """
    fusion, e, hidden = make_case(3, length, dtype)
    dead = make_dead(3, length)
    close = dict(rtol=0, atol=(8 if dtype in HALF else 125) * torch.finfo(dtype).eps)
    with torch.no_grad():
        whole = fusion(e, hidden, dead)
        for blocks in ((1 << 10, 300), (1, 1), (13, 300), (7, 1 << 20)):
            monkeypatch.setattr(base, "CPU_BLOCKS", blocks)
            torch.testing.assert_close(fusion(e, hidden, dead), whole, **close)
        assert not torch.allclose(fusion(e.roll(1, 0), hidden), whole, **close)


def test_sequences_in_chunks_give_one_shot(either_path):
    fusion, e, hidden = make_case(2, 26)
    dead = make_dead(2, 26)
    spans = (slice(0, 1), slice(1, 3), slice(3, 20), slice(20, 26))
    parts = [fusion(e[:, x], hidden[:, x], dead[:, x]) for x in spans]
    torch.testing.assert_close(torch.cat(parts, dim=1), fusion(e, hidden, dead), rtol=0, atol=1e-12)


def test_positions_do_not_touch_each_other(either_path):
    """Permuted positions give the permuted stream; a NaN stays where it is."""
    fusion, e, hidden = make_case(2, 20)
    dead, order = make_dead(2, 20), torch.randperm(20, generator=seeded(4))
    permuted = fusion(e[:, order], hidden[:, order], dead[:, order])
    torch.testing.assert_close(permuted, fusion(e, hidden, dead)[:, order], rtol=0, atol=1e-12)
    e[1, 7] = float("nan")
    touched = fusion(e, hidden).isnan().any(dim=3).any(dim=2)
    assert touched.nonzero().tolist() == [[1, 7]]


def test_inputs_may_lie_in_memory_as_they_like(either_path):
    fusion, e, hidden = make_case(2, 20)
    dead = make_dead(2, 20)
    expanded = hidden[:, :, :1].expand_as(hidden)
    want = fusion(e, expanded.contiguous(), dead)
    strided_e = e.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided_dead = dead.T.contiguous().T
    assert not strided_e.is_contiguous() and not strided_dead.is_contiguous() and expanded.stride(2) == 0
    for stream in (expanded, expanded.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        torch.testing.assert_close(fusion(strided_e, stream, strided_dead), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_inputs_are_left_alone(dtype, either_path):
    config = make_config()
    inputs = (*make_inputs(config, 2, 20, dtype), make_dead(2, 20))
    kept = [x.clone() for x in inputs]
    stream = make_fusion_v41(config, dtype)(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept))
    assert stream.data_ptr() != inputs[1].data_ptr() and stream.is_contiguous()


@pytest.mark.parametrize("batch, length", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("fp8", [False, True])
def test_nothing_in_nothing_out(fp8, batch, length, either_path):
    config = make_config()
    fusion = make_fusion_v41(config, fp8=fp8)
    e, hidden = make_inputs(config, batch, length)
    for dead in (None, make_dead(batch, length)):
        assert fusion(e, hidden, dead).shape == hidden.shape
