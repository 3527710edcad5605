"""The gate of V4.1: against a recorded layer and the plain formula, with fp8 weights, and where positions are dead.

The record has no inner product of 0 and no tiny mean square, and is not rounded: the sign of zero, eps and the single
rounding are held against the formula itself.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engram_ref.config import EngramConfig
from engram_ref.fusion import DemoFusion, ShortConvHistory, base, projection, v41
from engram_ref.fusion.factory import make_fusion
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.rows import fp8

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[2] / "golden" / "layer_v41.safetensors"
RECORDED = EngramConfig(
    layer_ids=(1,),
    max_ngram=4,
    heads=4,
    row_width=64,
    table_size_per_order=(50, 50, 50),
    hidden=80,
    kernel_size=0,
    row_dtype="float8_e4m3fn",
    form="v41",
)
GATE_TOLERANCE = 1e-12
# A value of the record is a sum of 768 products whose sizes add up to 6,022 at most. Each processor sums in an order of
# its own, and n roundings wander by some sqrt(n) of one; a weight that is off by 1e-6 is 16 times as far away.
OUTPUT_TOLERANCE = {
    dtype: math.sqrt(768) * 6022 * torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32)
}
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def make_config(**changes):
    usual = RECORDED.replace(heads=1, row_width=32, hidden=32)  # C*D = 96 and (G+1)*H = 160: whole blocks of 32
    return usual.replace(**changes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_fusion_v41(config, dtype=torch.float64, fp8=False, seed=0):
    """A fusion in which every weight matters, gains too."""
    fusion = V41Fusion(config, dtype=dtype, fp8=fp8)
    generator = seeded(seed)
    fusion.reset_parameters(generator)
    with torch.no_grad():
        for gain in (fusion.q_weight, fusion.k_weight):
            gain.add_(0.3 * torch.randn(gain.shape, generator=generator))
    return fusion


def make_inputs(config, batch, length, dtype=torch.float64, seed=1):
    generator = seeded(seed)
    e = torch.randn(batch, length, config.embedding_width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(batch, length, config.hc_mult, config.hidden, generator=generator, dtype=torch.float64)
    return e.to(dtype), hidden.to(dtype)


def make_dead(batch, length):
    return torch.rand(batch, length, generator=seeded(2)) < 0.3


def plainly(fusion, e, hidden, dead=None, inner=None):
    """The layer as its definition reads, in plain PyTorch; everything after the projection in `inner`."""
    inner = inner or fusion.inner_dtype
    packed = nn.functional.linear(e, fusion.wkv.rows(slice(0, fusion.wkv.shape[0]), e.dtype)).to(inner)
    *keys, value = packed.split(fusion.config.hidden, dim=-1)
    out = []
    for g, key in enumerate(keys):
        h, q, k = hidden[:, :, g].to(inner), fusion.q_weight[g].to(inner), fusion.k_weight[g].to(inner)
        rstd = torch.rsqrt(h.square().mean(-1) + 1e-20) * torch.rsqrt(key.square().mean(-1) + 1e-20)
        dot = (h * (q * k) * key).sum(-1) * rstd / math.sqrt(fusion.config.hidden)
        gate = torch.sigmoid(torch.copysign(dot.abs().clamp_min(1e-6).sqrt(), dot)).unsqueeze(-1)
        out.append((h + gate * value).to(hidden.dtype))
    stream = torch.stack(out, dim=2)
    return stream if dead is None else torch.where(dead[:, :, None, None], hidden, stream)


def as_bytes(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything is cut: 13 positions are projected, 2 fused (of the usual size), and 64 output rows multiplied."""
    monkeypatch.setattr(base, "CPU_BLOCKS", (13, 300))
    monkeypatch.setattr(projection, "CPU_BLOCK", 64 * 96)


# --- the record -----------------------------------------------------------------------------------


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


# --- the formula ----------------------------------------------------------------------------------

SHAPES = {
    "usual": dict(),
    "one copy": dict(hc_mult=1),
    "odd sizes": dict(hidden=7, hc_mult=3, heads=3, row_width=5, row_dtype="float32"),
    "pairs only": dict(max_ngram=2, table_size_per_order=(50,)),
}


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 3), (3, 31)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_formula(shape, batch, length, either_path):
    config = make_config(**SHAPES[shape])
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, batch, length)
    dead = make_dead(batch, length)
    # Sums of order 1 in another order differ by some 1e-15, and the gate's slope reaches 125.
    for mask in (None, dead):
        torch.testing.assert_close(fusion(e, hidden, mask), plainly(fusion, e, hidden, mask), rtol=0, atol=1e-12)


def tiny(fusion, e, hidden, size):
    """The same layer with keys and stream of about `size`."""
    with torch.no_grad():
        fusion.wkv.weight.mul_(size)
    return e, hidden * size


@pytest.mark.parametrize("eps", [1e-20, 0.0, 1e-19, torch.finfo(torch.float64).eps])
def test_eps_is_1e_20(eps, monkeypatch):
    """Mean squares of 1e-20 and below: every other eps is far off."""
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = tiny(fusion, *make_inputs(config, 2, 20), 1e-10)
    monkeypatch.setattr(v41, "V41_NORM_EPS", eps)
    error = (fusion.gate(fusion.project(e), hidden) - gates_of(fusion, e, hidden)).abs().max()
    assert (error < 1e-12) == (eps == 1e-20)


def gates_of(fusion, e, hidden):
    """The gates of `plainly`: what it adds, divided by the value."""
    added = plainly(fusion, e, hidden) - hidden
    value = fusion.project(e)[..., -fusion.config.hidden :].unsqueeze(2)
    largest = value.abs().argmax(dim=-1, keepdim=True).expand(*added.shape[:-1], 1)
    return (added.gather(-1, largest) / value.expand_as(added).gather(-1, largest))[..., 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eps_holds_in_float32_too(dtype):
    config = make_config()
    fusion = make_fusion_v41(config, dtype)
    e, hidden = tiny(fusion, *make_inputs(config, 2, 20, dtype), 1e-10)
    want = make_fusion_v41(config)
    want.load_state_dict(fusion.state_dict())
    gate = fusion.gate(fusion.project(e), hidden)
    exact = want.gate(want.project(e.double()), hidden.double())
    # 100 roundings of dot products of order 0.1 and smaller, whose gate has a slope of up to 125 beside 0.
    assert (gate - exact).abs().max() < 125 * 100 * torch.finfo(dtype).eps * 0.1


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_an_inner_product_of_zero_opens_the_gate_by_its_sign(dtype):
    """sigmoid(+-sqrt(1e-6)); with sign(0) = 0 it would be a half."""
    config = make_config()
    fusion = make_fusion_v41(config, dtype)
    e, hidden = make_inputs(config, 1, 3, dtype)
    hidden[0, 1] = 0
    gate = fusion.gate(fusion.project(e), hidden)
    above = torch.sigmoid(torch.tensor(1e-3, dtype=torch.float64))
    assert (gate[0, 1].double() - above).abs().max() < 2 * torch.finfo(gate.dtype).eps
    assert (gate[0, 1] != 0.5).all()


def test_the_signed_root_copies_the_sign_of_zero():
    dot = torch.tensor([0.0, -0.0, 4.0, -9.0, 1e-9, -1e-9, 1e-6, math.inf, -math.inf], dtype=torch.float64)
    root = torch.tensor([1e-3, -1e-3, 2.0, -3.0, 1e-3, -1e-3, 1e-3, math.inf, -math.inf], dtype=torch.float64)
    torch.testing.assert_close(v41._signed_sqrt(dot), root, rtol=1e-15, atol=0)
    assert v41._signed_sqrt(torch.tensor([math.nan])).isnan().all()


def test_zero_rows_and_a_zero_stream_stay_zero(either_path):
    config = make_config()
    fusion = make_fusion_v41(config, torch.float32)
    e, hidden = torch.zeros(1, 4, 96), torch.zeros(1, 4, 4, 32)
    assert torch.equal(fusion(e, hidden), hidden)


# --- precision ------------------------------------------------------------------------------------


def rounded_once(fusion, e, hidden, dtype):
    """From the projection as it is: everything else in float64, then one rounding."""
    exact = V41Fusion(fusion.config, dtype=torch.float64)
    exact.load_state_dict(fusion.state_dict())
    gate = exact.gate(fusion.project(e).double(), hidden.double()).unsqueeze(-1)
    value = fusion.project(e).double()[..., -fusion.config.hidden :].unsqueeze(2)
    return (hidden.double() + gate * value).to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_sum_is_rounded_once(dtype, monkeypatch, either_path):
    """A float32 error may push one in a thousand over the edge; rounding twice changes a tenth of all values."""
    config = make_config()
    fusion = make_fusion_v41(config, dtype)
    e, hidden = make_inputs(config, 3, 40, dtype)
    want = rounded_once(fusion, e, hidden, dtype)
    assert (fusion(e, hidden) != want).double().mean() < 1e-3
    right = v41._add_gated
    monkeypatch.setattr(v41, "_add_gated", lambda h, gate, value: h + right(torch.zeros_like(h), gate, value).to(dtype))
    assert (fusion(e, hidden) != want).double().mean() > 0.1


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [dict(), dict(heads=8, hidden=1024)], ids=["hidden 32", "hidden 1024"])
def test_half_precision_is_at_most_twice_as_far_from_float64_as_the_plain_way(dtype, shape):
    """Against plain PyTorch throughout in half precision, and against plain PyTorch with a float32 gate."""
    config = make_config(**shape)
    half = make_fusion_v41(config, dtype)
    exact = V41Fusion(config, dtype=torch.float64)
    exact.load_state_dict(half.state_dict())
    e, hidden = make_inputs(config, 2, 30, dtype)
    with torch.no_grad():
        want = exact(e.double(), hidden.double())
        ours = (half(e, hidden) - want).abs()
        for inner in (dtype, torch.float32):
            theirs = (plainly(half, e, hidden, inner=inner) - want).abs()
            assert 0 < ours.max() <= 2 * theirs.max() and ours.mean() <= 1.001 * theirs.mean()


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


# --- fp8 weights ----------------------------------------------------------------------------------


def make_fp8_pair(dtype, config=None):
    """The same layer with its projection in fp8 and decoded."""
    packed = make_fusion_v41(config or make_config(), dtype, fp8=True)
    plain = V41Fusion(packed.config, dtype=dtype)
    plain.load_state_dict(packed.state_dict())
    return packed, plain


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_fp8_weights_give_the_bits_of_decoded_ones(dtype, either_path):
    packed, plain = make_fp8_pair(dtype)
    e, hidden = make_inputs(packed.config, 3, 31, dtype)
    dead = make_dead(3, 31)
    assert torch.equal(as_bytes(packed(e, hidden, dead)), as_bytes(plain(e, hidden, dead)))


def test_names_shapes_and_dtypes_are_the_checkpoints():
    packed, plain = make_fp8_pair(torch.bfloat16)
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.state_dict().items()}
    gains = dict.fromkeys(("q_weight", "k_weight"), ((4, 32), torch.bfloat16))
    assert described == {
        "wkv.weight": ((160, 96), torch.float8_e4m3fn),
        "wkv.scale": ((5, 3), torch.float8_e8m0fnu),
        **gains,
    }
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in plain.state_dict().items()}
    assert described == {"wkv.weight": ((160, 96), torch.bfloat16), **gains}


def test_the_published_geometry_has_the_checkpoints_shapes():
    state = V41Fusion(EngramConfig.preset("v41-flash"), "meta", torch.bfloat16, fp8=True).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "wkv.weight": (25600, 6144),
        "wkv.scale": (800, 192),
        "q_weight": (4, 5120),
        "k_weight": (4, 5120),
    }


def test_layers_load_by_prefix_and_say_what_is_missing():
    model = nn.ModuleDict({"engram": make_fusion_v41(make_config(), torch.bfloat16)})
    packed, _ = make_fp8_pair(torch.bfloat16)
    weights = {f"engram.{name}": tensor for name, tensor in packed.state_dict().items()}
    model.load_state_dict(weights)
    e, hidden = make_inputs(packed.config, 1, 3, torch.bfloat16)
    assert torch.equal(model["engram"](e, hidden), packed(e, hidden))
    weights["engram.v_weight"] = weights.pop("engram.k_weight")
    with pytest.raises(RuntimeError) as refused:
        model.load_state_dict(weights)
    assert 'Missing key(s) in state_dict: "engram.k_weight"' in str(refused.value)
    assert 'Unexpected key(s) in state_dict: "engram.v_weight"' in str(refused.value)
    assert model.load_state_dict(weights, strict=False).missing_keys == ["engram.k_weight"]
    weights["engram.q_weight"] = weights["engram.q_weight"][:1]  # would broadcast
    with pytest.raises(RuntimeError, match=r"size mismatch for engram\.q_weight"):
        model.load_state_dict(weights, strict=False)


def test_a_new_layer_is_as_torch_begins():
    fusion = V41Fusion(make_config())
    assert (fusion.q_weight == 1).all() and (fusion.k_weight == 1).all()
    assert 0.98 * 96**-0.5 < fusion.wkv.weight.abs().max() <= 96**-0.5
    fusion.q_weight.data.zero_()
    fusion.reset_parameters(seeded())
    assert (fusion.q_weight == 1).all()


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
    config = make_config()
    fusion = make_fusion_v41(config, dtype)
    e, hidden = make_inputs(config, 2, 20, dtype)
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
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 20)
    dead = make_dead(2, 20)
    e[dead] = float("nan")
    gate = fusion.gate(fusion.project(e), hidden, dead)
    assert (gate[dead] == 0).all() and ((gate[~dead] > 0) & (gate[~dead] < 1)).all()


@pytest.mark.parametrize("value", [False, True])
def test_all_dead_and_none_dead(value, either_path):
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 20)
    want = hidden if value else fusion(e, hidden)
    assert torch.equal(fusion(e, hidden, torch.full((2, 20), value)), want)


def test_gradients_stop_at_dead_positions_even_where_they_are_nan():
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 20)
    dead = make_dead(2, 20)
    finite = gradients(fusion, e, hidden, dead)
    e[dead], hidden[dead] = float("nan"), float("nan")
    poisoned = gradients(fusion, e, hidden, dead)
    assert all(torch.equal(ours, want) and want.any() for ours, want in zip(poisoned, finite))
    of_e, of_hidden = poisoned[:2]
    assert not of_e[dead].any() and (of_hidden[dead] == 1).all()


def gradients(fusion, e, hidden, dead):
    """Of the sum of the stream: by e, hidden and every weight."""
    inputs = [e.clone().requires_grad_(), hidden.clone().requires_grad_()]
    return torch.autograd.grad(fusion(*inputs, dead).sum(), [*inputs, *fusion.parameters()])


# --- positions, blocks, memory --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 12, 13, 40])
def test_blocks_give_one_shot(length, dtype, monkeypatch):
    """One by one, in odd blocks and all at once.

    A product of another number of rows may sum in another order, and torch's sigmoid of many values is not that of a
    few; both show in the last place of the gate's argument, where its slope reaches 125. In half precision the
    projection is rounded in between, and mostly to the same number.
    """
    config = make_config()
    fusion = make_fusion_v41(config, dtype)
    e, hidden = make_inputs(config, 3, length, dtype)
    dead = make_dead(3, length)
    close = dict(rtol=0, atol=(8 if dtype in HALF else 125) * torch.finfo(dtype).eps)
    with torch.no_grad():
        whole = fusion(e, hidden, dead)
        for blocks in ((1 << 10, 300), (1, 1), (13, 300), (7, 1 << 20)):
            monkeypatch.setattr(base, "CPU_BLOCKS", blocks)
            torch.testing.assert_close(fusion(e, hidden, dead), whole, **close)
        assert not torch.allclose(fusion(e.roll(1, 0), hidden), whole, **close)


def test_sequences_in_chunks_give_one_shot(either_path):
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 26)
    dead = make_dead(2, 26)
    spans = (slice(0, 1), slice(1, 3), slice(3, 20), slice(20, 26))
    parts = [fusion(e[:, x], hidden[:, x], dead[:, x]) for x in spans]
    torch.testing.assert_close(torch.cat(parts, dim=1), fusion(e, hidden, dead), rtol=0, atol=1e-12)


def test_positions_do_not_touch_each_other(either_path):
    """Permuted positions give the permuted stream; a NaN stays where it is."""
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 20)
    dead, order = make_dead(2, 20), torch.randperm(20, generator=seeded(4))
    permuted = fusion(e[:, order], hidden[:, order], dead[:, order])
    torch.testing.assert_close(permuted, fusion(e, hidden, dead)[:, order], rtol=0, atol=1e-12)
    e[1, 7] = float("nan")
    touched = fusion(e, hidden).isnan().any(dim=3).any(dim=2)
    assert touched.nonzero().tolist() == [[1, 7]]


def test_inputs_may_lie_in_memory_as_they_like(either_path):
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 20)
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


# --- gradients ------------------------------------------------------------------------------------


def gradient_case():
    """A layer of a few weights, and inputs whose inner products are far from the bend at 0."""
    config = make_config(hidden=3, hc_mult=2, row_width=2, row_dtype="float32")
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 1, 4)
    keys = fusion.project(e).unflatten(-1, (3, 3))[:, :, :2].detach()
    return fusion, e.requires_grad_(), (0.2 * hidden + keys).requires_grad_()


def test_gradients_of_inputs_and_weights():
    fusion, e, hidden = gradient_case()
    names = [name for name, _ in fusion.named_parameters()]
    dead = torch.tensor([[False, False, True, False]])

    def stream(e, hidden, *parameters):
        return torch.func.functional_call(fusion, dict(zip(names, parameters)), (e, hidden, dead))

    assert torch.autograd.gradcheck(stream, (e, hidden, *fusion.parameters()))


def test_gradients_are_those_of_the_formula():
    fusion, e, hidden = gradient_case()
    inputs = [e, hidden, *fusion.parameters()]
    weight = torch.randn(hidden.shape, generator=seeded(5), dtype=torch.float64)

    def of(stream):
        return torch.autograd.grad((stream * weight).sum(), inputs)

    ours, want = of(fusion(e, hidden)), of(plainly(fusion, e, hidden))
    for x, y in zip(ours, want):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    fusion.q_weight.data[0, 0] *= 1.001
    assert not torch.allclose(of(fusion(e, hidden))[0], want[0], rtol=1e-10, atol=1e-12)


def test_gradients_with_fp8_weights_are_those_of_decoded_ones():
    packed, plain = make_fp8_pair(torch.float64)
    e, hidden = (x.requires_grad_() for x in make_inputs(packed.config, 1, 5))
    gradients = [
        torch.autograd.grad(f(e, hidden).square().sum(), [e, hidden, f.q_weight, f.k_weight]) for f in (packed, plain)
    ]
    assert all(torch.equal(x, y) and x.any() for x, y in zip(*gradients))
    assert [name for name, _ in packed.named_parameters()] == ["q_weight", "k_weight"]


# --- one call for both forms ----------------------------------------------------------------------


def test_both_forms_add_to_the_stream():
    config = make_config()
    fusion = make_fusion_v41(config)
    e, hidden = make_inputs(config, 2, 5)
    dead = make_dead(2, 5)
    assert torch.equal(fusion.add_to(hidden, e, dead=dead), fusion(e, hidden, dead))
    demo = DemoFusion(config.replace(form="demo", kernel_size=4), dtype=torch.float64)
    history, past = ShortConvHistory(demo, 2), ShortConvHistory(demo, 2)
    assert torch.equal(demo.add_to(hidden, e, history), hidden + demo(e, hidden, past))
    assert torch.equal(history.values, past.values) and past.values.any()


def test_each_form_refuses_what_it_does_not_know():
    config = make_config()
    demo = DemoFusion(config.replace(form="demo"), dtype=torch.float64)
    e, hidden = make_inputs(config, 2, 5)
    with pytest.raises(ValueError, match="the demo's form knows none; leave dead out, or use form v41"):
        demo.add_to(hidden, e, dead=make_dead(2, 5))
    with pytest.raises(ValueError, match="no convolution to carry on; leave history out"):
        make_fusion_v41(config).add_to(hidden, e, ShortConvHistory(demo, 2))


def test_the_configuration_picks_the_form():
    config = make_config()
    for fp8_weights in (False, True):
        fusion = make_fusion(config, "cpu", torch.bfloat16, fp8_weights)
        assert isinstance(fusion, V41Fusion) and fusion.dtype == torch.bfloat16
        assert ("wkv.scale" in fusion.state_dict()) == fp8_weights
    assert isinstance(make_fusion(config.replace(form="demo")), DemoFusion)
    with pytest.raises(ValueError, match="fp8=True: form demo has no fp8 weights"):
        make_fusion(config.replace(form="demo"), fp8=True)
    for kind, form in ((V41Fusion, "demo"), (DemoFusion, "v41")):
        with pytest.raises(ValueError, match=f"a configuration of form '{form}'; .* let make_fusion pick the class"):
            kind(config.replace(form=form))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("e", "hidden", "message"),
    [
        ((2, 5, 96), (2, 5, 32), r"hidden of shape \(2, 5, 32\); this layer needs \[B, T, 4, 32\]"),
        ((2, 5, 96), (2, 5, 4, 31), r"this layer needs \[B, T, 4, 32\]"),
        ((2, 5, 95), (2, 5, 4, 32), r"e of shape \(2, 5, 95\); .* needs \[2, 5, 96\]"),
        ((2, 1, 96), (2, 5, 4, 32), r"needs \[2, 5, 96\]"),
        ((10, 96), (2, 5, 4, 32), r"needs \[2, 5, 96\]"),
    ],
)
def test_wrong_shapes_are_refused(e, hidden, message, either_path):
    with pytest.raises(ValueError, match=message):
        make_fusion_v41(make_config())(torch.zeros(e, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fp8", [False, True])
def test_another_dtype_is_refused(which, fp8):
    config = make_config()
    inputs = list(make_inputs(config, 1, 2))
    inputs[which] = inputs[which].float()
    name = ("e", "hidden")[which]
    with pytest.raises(ValueError, match=rf"{name} is torch.float32 on cpu; this layer is torch.float64 on cpu"):
        make_fusion_v41(config, fp8=fp8)(*inputs)


@pytest.mark.parametrize(
    "dead",
    [torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.uint8), torch.zeros(5, dtype=torch.bool), make_dead(5, 2)],
    ids=["float32", "uint8", "one sequence", "transposed"],
)
def test_a_mask_that_does_not_fit_is_refused(dead, either_path):
    config = make_config()
    with pytest.raises(ValueError, match=r"dead of shape .* on cpu: hidden needs booleans \[2, 5\] on cpu"):
        make_fusion_v41(config)(*make_inputs(config, 2, 5), dead)


def test_fp8_weights_of_another_geometry_are_refused():
    with pytest.raises(ValueError, match=r"\[400, 768\]: fp8 weights are made of blocks of 32 x 32; .* fp8=False"):
        V41Fusion(RECORDED, fp8=True)
