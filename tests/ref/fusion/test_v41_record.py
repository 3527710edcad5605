"""The gate of V4.1 against a recorded layer; what is a little wrong fails the record.

The record has no inner product of 0 and no tiny mean square, and is not rounded: those are held against the formula
itself, in test_v41.py.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engram_ref.fusion import v41
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.rows import fp8
from tests.ref.fusion.v41_cases import RECORDED, plainly

GOLDEN = Path(__file__).parents[2] / "golden" / "layer_v41.safetensors"
GATE_TOLERANCE = 1e-12
# A value of the record is a sum of 768 products whose sizes add up to 6,022 at most. Each processor sums in an order of
# its own, and n roundings wander by some sqrt(n) of one; a weight that is off by 1e-6 is 16 times as far away.
OUTPUT_TOLERANCE = {
    dtype: math.sqrt(768) * 6022 * torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32)
}


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN)


def recorded_fusion(recorded, dtype):
    fusion = V41Fusion(RECORDED, dtype=dtype)
    names = {"wkv.weight": "wkv_weight", "q_weight": "q_weight", "k_weight": "k_weight"}
    fusion.load_state_dict({ours: recorded[theirs] for ours, theirs in names.items()})
    return fusion


def recorded_inputs(recorded, dtype):
    """e, hidden and dead of the record's nine positions, as a batch of one."""
    dead = recorded["dead"].bool()
    return recorded["embeddings_f64"].to(dtype)[None], recorded["hidden"].to(dtype)[None], dead[None]


def distance_to_record(recorded, fusion, dead="recorded"):
    """Largest differences of gate and stream."""
    e, hidden, of_record = recorded_inputs(recorded, fusion.dtype)
    dead = of_record if isinstance(dead, str) else dead
    gate = fusion.gate(fusion.project(e), hidden, dead)
    stream = fusion(e, hidden, dead)
    assert stream.dtype == fusion.dtype and gate.dtype == fusion.inner_dtype
    return tuple(
        (ours[0] - recorded[name]).abs().max().item() for ours, name in ((gate, "gate_f64"), (stream, "output_f64"))
    )


def test_recorded_rows_are_decoded_exactly(recorded):
    codes = recorded["row_codes_e4m3"].view(fp8.CODE_DTYPE)
    scales = recorded["row_scales_e8m0"].view(fp8.SCALE_DTYPE)
    values = fp8.dequantise(codes, scales)
    assert values.dtype == torch.bfloat16 and torch.equal(values.double(), recorded["row_values_f64"])
    assert torch.equal(values[recorded["rows"]].flatten(1).double(), recorded["embeddings_f64"])
    off_by_one = (recorded["row_scales_e8m0"] + 1).view(fp8.SCALE_DTYPE)
    assert not torch.equal(fp8.dequantise(codes, off_by_one).double(), recorded["row_values_f64"])


@pytest.mark.parametrize("dtype", OUTPUT_TOLERANCE, ids=str)
def test_the_recorded_layer(recorded, dtype, either_path):
    gate, stream = distance_to_record(recorded, recorded_fusion(recorded, dtype))
    # float32 sums to 1 part in 1e6 of a dot product of order 1, and the gate's slope is at most 1/8 / 0.14 here.
    assert gate < (GATE_TOLERANCE if dtype == torch.float64 else 1e-6)
    assert stream < OUTPUT_TOLERANCE[dtype]


def swap_value_to_the_front(fusion, monkeypatch):
    fusion.wkv.weight.copy_(fusion.wkv.weight.roll(RECORDED.hidden, dims=0))


def round_the_gated_value(fusion, monkeypatch):
    right = v41._add_gated
    monkeypatch.setattr(
        v41, "_add_gated", lambda h, gate, value: h + right(torch.zeros_like(h), gate, value).to(torch.bfloat16)
    )


MUTATIONS = {
    "another eps": lambda fusion, monkeypatch: monkeypatch.setattr(v41, "V41_NORM_EPS", 1e-6),
    "no q gain": lambda fusion, monkeypatch: fusion.q_weight.fill_(1),
    "no k gain": lambda fusion, monkeypatch: fusion.k_weight.fill_(1),
    "the value first": swap_value_to_the_front,
    "two roundings": round_the_gated_value,
    "no root": lambda fusion, monkeypatch: monkeypatch.setattr(v41, "_signed_sqrt", lambda dot: dot),
    "no sign": lambda fusion, monkeypatch: monkeypatch.setattr(v41, "_signed_sqrt", lambda dot: dot.abs().sqrt()),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_layer_fails_the_record(recorded, mutation, monkeypatch):
    fusion = recorded_fusion(recorded, torch.float64)
    with torch.no_grad():
        MUTATIONS[mutation](fusion, monkeypatch)
        _, stream = distance_to_record(recorded, fusion)
    assert stream > OUTPUT_TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["wkv.weight", "q_weight", "k_weight"])
def test_a_weight_that_is_a_little_off_fails_the_record(recorded, name):
    fusion = recorded_fusion(recorded, torch.float64)
    with torch.no_grad():
        fusion.get_parameter(name).view(-1)[-1] *= 1 + 1e-6
        assert distance_to_record(recorded, fusion)[1] > OUTPUT_TOLERANCE[torch.float64]


def test_a_gate_that_is_not_masked_fails_the_record(recorded):
    gate, stream = distance_to_record(recorded, recorded_fusion(recorded, torch.float64), dead=None)
    assert gate > GATE_TOLERANCE and stream > OUTPUT_TOLERANCE[torch.float64]


def test_bfloat16_on_the_record_is_at_most_twice_as_far_as_the_plain_way(recorded):
    fusion = recorded_fusion(recorded, torch.bfloat16)
    exact = V41Fusion(RECORDED, dtype=torch.float64)
    exact.load_state_dict(fusion.state_dict())
    e, hidden, dead = recorded_inputs(recorded, torch.bfloat16)
    with torch.no_grad():
        want = exact(e.double(), hidden.double(), dead)
        error = (fusion(e, hidden, dead) - want).abs()
        plain = (plainly(fusion, e, hidden, dead, inner=torch.bfloat16) - want).abs()
    assert 0 < error.max() <= 2 * plain.max() and error.mean() <= plain.mean()
