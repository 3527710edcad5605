"""Projections with plain and with fp8 weights: the same bits, the checkpoint's names, and what is refused at load."""

import copy

import pytest
import torch
from torch import nn

from engram_ref.fusion import projection
from engram_ref.fusion.projection import Fp8Projection, PlainProjection
from engram_ref.rows import fp8
from tests.ref.fusion.v41_cases import ALL_DTYPES, as_bytes, seeded

INPUTS, OUTPUTS = 96, 160


def make_pair(seed=0):
    """Codes and scales of weights whose blocks differ in size by far more than a code can."""
    sizes = torch.exp2(torch.randint(-20, 20, (OUTPUTS // 32, 1, INPUTS // 32, 1), generator=seeded(seed)).double())
    values = torch.randn(OUTPUTS, INPUTS, generator=seeded(seed), dtype=torch.float64)
    values = (values.view(OUTPUTS // 32, 32, INPUTS // 32, 32) * sizes).view(OUTPUTS, INPUTS)
    codes, scales = fp8.quantise(values, block_rows=32)
    return {"weight": codes, "scale": scales}


def exact(pair):
    """The weights in float64, element by element."""
    factors = pair["scale"].double().repeat_interleave(32, 0).repeat_interleave(32, 1)
    return pair["weight"].double() * factors


def make_both(dtype, pair=None):
    """An fp8 projection, and a plain one whose weights were decoded by another way than its own."""
    pair = pair or make_pair()
    packed, plain = Fp8Projection(INPUTS, OUTPUTS), PlainProjection(INPUTS, OUTPUTS, dtype=dtype)
    packed.load_state_dict(pair)
    plain.load_state_dict({"weight": exact(pair).to(dtype)})
    return packed, plain


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 37, 130])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_fp8_weights_give_the_bits_of_plain_ones(dtype, count, small_blocks):
    packed, plain = make_both(dtype)
    e = torch.randn(count, INPUTS, generator=seeded(1)).to(dtype)
    y = packed(e)
    assert y.shape == (count, OUTPUTS) and y.dtype == dtype
    assert torch.equal(as_bytes(y), as_bytes(plain(e)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocks_give_the_whole_product(dtype, small_blocks):
    """Up to the order of 96 sums; an output row in the wrong place is far off."""
    packed, _ = make_both(dtype)
    e = torch.randn(3, 5, INPUTS, generator=seeded(1), dtype=dtype)
    want = e.double() @ exact(make_pair()).T
    # Per output the products add up to at most this.
    most = e.double().abs() @ exact(make_pair()).T.abs()
    assert ((packed(e) - want).abs() <= INPUTS * torch.finfo(dtype).eps * most).all()
    assert ((packed(e).roll(32, dims=-1) - want).abs() > INPUTS * torch.finfo(dtype).eps * most).any()


def test_blocks_cover_every_output_row_once(small_blocks):
    spans = PlainProjection(INPUTS, OUTPUTS).blocks(torch.device("cpu"))
    assert [(span.start, span.stop) for span in spans] == [(0, 64), (64, 128), (128, 160)]


def test_a_wide_row_is_a_block_of_its_own(monkeypatch):
    monkeypatch.setattr(projection, "CPU_BLOCK", 1)
    assert len(Fp8Projection(INPUTS, OUTPUTS).blocks(torch.device("cpu"))) == OUTPUTS // 32
    assert PlainProjection(5, 7)(torch.ones(2, 5)).shape == (2, 7)


def test_fp8_weights_take_half_the_memory():
    packed = Fp8Projection(INPUTS, OUTPUTS)
    held = sum(tensor.nbytes for tensor in packed.state_dict().values())
    assert held == sum(buffer.nbytes for buffer in packed.buffers()) == OUTPUTS * INPUTS * (1 + 1 / 1024)
    assert not list(packed.parameters())


def test_gradients_pass_through_fp8_weights(small_blocks):
    packed, plain = make_both(torch.float64)
    e = torch.randn(4, INPUTS, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(packed(e).square().sum(), e)
    (want,) = torch.autograd.grad(plain(e).square().sum(), e)
    assert torch.equal(ours, want) and want.any()


# --- where and as what they are kept --------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float32), lambda m: m.bfloat16(), lambda m: copy.deepcopy(m)])
def test_converting_a_module_leaves_codes_and_scales_alone(move):
    packed, _ = make_both(torch.float64)
    moved = move(packed)
    state, pair = moved.state_dict(), make_pair()
    assert list(state) == ["weight", "scale"]
    assert state["weight"].dtype == fp8.CODE_DTYPE and state["scale"].dtype == fp8.SCALE_DTYPE
    assert all(torch.equal(as_bytes(state[name]), as_bytes(pair[name])) for name in pair)


def test_a_meta_module_can_be_given_memory():
    packed = Fp8Projection(INPUTS, OUTPUTS, device="meta").to_empty(device="cpu")
    packed.load_state_dict(make_pair())
    e = torch.randn(2, INPUTS, generator=seeded(1))
    assert torch.equal(packed(e), make_both(torch.float32)[0](e))


def test_weights_can_be_adopted_without_a_copy():
    pair = make_pair()
    packed = Fp8Projection(INPUTS, OUTPUTS, device="meta")
    packed.load_state_dict(pair, assign=True)
    assert packed.weight.data_ptr() == pair["weight"].data_ptr()
    assert packed.scale.data_ptr() == pair["scale"].data_ptr()


@pytest.mark.parametrize("kind", [PlainProjection, Fp8Projection])
def test_new_weights_are_uniform_and_follow_the_generator(kind):
    module = kind(INPUTS, OUTPUTS)

    def drawn(seed):
        module.reset_parameters(seeded(seed))
        return torch.cat([module.rows(span, torch.float32) for span in module.blocks(torch.device("cpu"))]).clone()

    weights, bound = drawn(0), INPUTS**-0.5
    # 15,360 draws: the largest is near the bound, the mean within 5 standard errors; fp8 rounds by up to 1/16.
    assert 0.98 * bound < weights.abs().max() <= bound * (1 + 1 / 16)
    assert abs(weights.double().mean()) < 5 * bound / (3 * weights.numel()) ** 0.5
    assert torch.equal(weights, drawn(0)) and not torch.equal(weights, drawn(1))


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_plain_module_decodes_an_fp8_state_dict(dtype, small_blocks):
    plain = nn.ModuleDict({"wkv": PlainProjection(INPUTS, OUTPUTS, dtype=dtype)})
    pair = make_pair()
    plain.load_state_dict({f"wkv.{name}": tensor for name, tensor in pair.items()})
    assert torch.equal(plain["wkv"].weight, exact(pair).to(dtype))
    if dtype == torch.bfloat16:
        assert torch.equal(plain["wkv"].weight.double(), exact(pair))


def test_plain_weights_round_trip():
    plain = PlainProjection(INPUTS, OUTPUTS)
    again = PlainProjection(INPUTS, OUTPUTS)
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again.weight, plain.weight)


def damaged(name, spoil):
    pair = make_pair()
    pair[name] = spoil(pair[name])
    return pair


def with_byte(tensor, byte):
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[-1] = byte
    return changed


BAD = {
    "no scales": ({"weight": make_pair()["weight"]}, r"wkv\.scale is missing: give both"),
    "blocks of 128": (
        damaged("scale", lambda s: s[:1, :1]),
        r"scales of shape \(1, 1\): there is one scale for every 32 x 32 codes",
    ),
    "a scale per row": (
        damaged("scale", lambda s: s.repeat_interleave(32, 0)),
        r"scales of shape \(160, 3\): there is one scale for every 32 x 32 codes",
    ),
    "scales as numbers": (damaged("scale", lambda s: s.float()), r"scales of torch\.float32"),
    "a NaN code": (damaged("weight", lambda w: with_byte(w, 0x7F)), "holds a NaN"),
    "a negative NaN code": (damaged("weight", lambda w: with_byte(w, 0xFF)), "holds a NaN"),
    "a NaN scale": (damaged("scale", lambda s: with_byte(s, 0xFF)), "holds a NaN"),
    "another matrix": (
        {"weight": make_pair()["weight"][:128], "scale": make_pair()["scale"][:4]},
        r"wkv\.weight.*(shape.*\(128, 96\), needs \(160, 96\)|size mismatch|\[128, 96\])",
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", [PlainProjection, Fp8Projection])
def test_bad_fp8_weights_are_refused_and_change_nothing(kind, case, strict):
    pair, message = BAD[case]
    module = nn.ModuleDict({"wkv": kind(INPUTS, OUTPUTS)})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict({f"wkv.{name}": tensor for name, tensor in pair.items()}, strict=strict)
    assert all(torch.equal(as_bytes(tensor), as_bytes(before[name])) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_an_fp8_module_refuses_plain_weights(strict):
    with pytest.raises(RuntimeError, match=r"weight is torch\.bfloat16; .* or make the layer with fp8=False"):
        Fp8Projection(INPUTS, OUTPUTS).load_state_dict({"weight": torch.zeros(OUTPUTS, INPUTS).bfloat16()}, strict)
    with pytest.raises(RuntimeError, match="weight is missing"):
        Fp8Projection(INPUTS, OUTPUTS).load_state_dict({"scale": make_pair()["scale"]}, strict)


@pytest.mark.parametrize("kind", [PlainProjection, Fp8Projection])
def test_missing_and_unexpected_names_are_told(kind):
    module = nn.ModuleDict({"wkv": kind(INPUTS, OUTPUTS)})
    with pytest.raises(RuntimeError) as refused:
        module.load_state_dict({"wkv.bias": torch.zeros(3)})
    assert 'Missing key(s) in state_dict: "wkv.weight"' in str(refused.value)
    assert 'Unexpected key(s) in state_dict: "wkv.bias"' in str(refused.value)
    found = module.load_state_dict({"wkv.bias": torch.zeros(3)}, strict=False)
    assert found.missing_keys == list(module.state_dict()) and found.unexpected_keys == ["wkv.bias"]


def test_a_scale_beside_plain_weights_is_unexpected():
    plain = PlainProjection(INPUTS, OUTPUTS)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "scale"'):
        plain.load_state_dict({"weight": torch.zeros(OUTPUTS, INPUTS), "scale": make_pair()["scale"]})


@pytest.mark.parametrize(("inputs", "outputs"), [(80, 160), (96, 400), (16, 16)])
def test_a_matrix_that_is_not_made_of_blocks_is_refused(inputs, outputs):
    with pytest.raises(ValueError, match=rf"\[{outputs}, {inputs}\]: fp8 weights are made of blocks of 32 x 32"):
        Fp8Projection(inputs, outputs)
