"""Gate and short convolution: against the demo's recorded layer, against plain PyTorch, and in chunks."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench.rivals.demo_layer import DemoWay, transposed_conv
from engram_ref.config import EngramConfig
from engram_ref.fusion import DemoFusion, ShortConvHistory, base, causal_conv
from engram_ref.fusion import demo as fusion_module
from engram_ref.fusion import make_fusion as fusion_of
from tests.ref.fusion.v41_cases import ALL_DTYPES, make_inputs, seeded

GOLDEN = Path(__file__).parents[2] / "golden" / "layer_demo.safetensors"
RECORDED = EngramConfig(
    layer_ids=(0, 3), max_ngram=3, heads=2, row_width=32, table_size_per_order=(3027, 2003), hidden=64, seed=7
)
CASES = ["A.case0", "A.case1", "A.case2"]
# Sums of order 1 in another order differ by some 1e-15, and the gate's slope reaches 125 where its argument is small.
TOLERANCE = 1e-12
LIMIT = {torch.float32: 5e-6, torch.float64: TOLERANCE}  # the record's float32 is within 1.2e-6 of its own float64
SHAPES = {
    "plain stream": dict(hc_mult=1),
    "no convolution": dict(kernel_size=0),
    "one tap": dict(kernel_size=1),
    "two taps far apart": dict(kernel_size=2, max_ngram=4, table_size_per_order=(50, 50, 50)),
    "odd sizes": dict(hidden=7, hc_mult=3, heads=3, row_width=5, kernel_size=3),
    "usual": dict(),
}


def make_config(**changes):
    usual = EngramConfig(
        layer_ids=(1,), max_ngram=3, heads=2, row_width=4, table_size_per_order=(50, 50), hidden=16, hc_mult=4
    )
    return usual.replace(**changes)


def make_fusion(config, dtype=torch.float64, seed=0):
    """A fusion in which every weight matters, gains too."""
    fusion = DemoFusion(config, dtype=dtype)
    generator = seeded(seed)
    fusion.reset_parameters(generator)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            if name.endswith("gain"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return fusion


def make_case(batch, length, dtype=torch.float64, **changes):
    """A fusion of a changed configuration, and inputs for it."""
    fusion = make_fusion(make_config(**changes), dtype)
    return fusion, *make_inputs(fusion.config, batch, length, dtype)


def demo_way_of(fusion):
    plain = DemoWay(fusion.config, dtype=fusion.dtype)
    plain.load_state_dict(fusion.state_dict())
    return plain


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every sequence is cut: 13 positions are projected, and 40 values fused, at once."""
    monkeypatch.setattr(base, "CPU_BLOCKS", (13, 40))
    monkeypatch.setattr(fusion_module, "CPU_CONV_VALUES", 1)


# --- the record -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN)


def recorded_fusion(recorded, dtype):
    fusion = DemoFusion(RECORDED, dtype=dtype)
    weights = {name.removeprefix("A.weights."): tensor for name, tensor in recorded.items() if "weights" in name}
    fusion.load_state_dict({name: tensor for name, tensor in weights.items() if "embedding" not in name})
    return fusion


def distance_to_record(recorded, fusion, case):
    e = recorded[f"{case}.embeddings"].to(fusion.dtype)
    hidden = recorded[f"{case}.hidden_states"].to(fusion.dtype)
    update = fusion(e, hidden)
    assert update.dtype == fusion.dtype
    return (update - recorded[f"{case}.output_f64"]).abs().max().item()


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_recorded_layer(recorded, case, dtype, either_path):
    assert distance_to_record(recorded, recorded_fusion(recorded, dtype), case) < LIMIT[dtype]


@pytest.mark.parametrize("name", [name for name, _ in DemoFusion(RECORDED, device="meta").named_parameters()])
def test_a_wrong_layer_fails_the_record(recorded, name):
    fusion = recorded_fusion(recorded, torch.float64)
    with torch.no_grad():
        fusion.get_parameter(name).view(-1)[-1] *= 1 + 1e-6
    assert distance_to_record(recorded, fusion, "A.case2") > LIMIT[torch.float64]


# --- plain PyTorch --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 3), (3, 31)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_plain_way(shape, batch, length, either_path):
    fusion, e, hidden = make_case(batch, length, **SHAPES[shape])
    update = fusion(e, hidden)
    assert update.shape == hidden.shape
    torch.testing.assert_close(update, demo_way_of(fusion)(e, hidden), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_small_values_are_normalised_as_the_framework_does(dtype):
    """Where mean squares are of the order of eps, another eps shows."""
    config = make_config()
    fusion = make_fusion(config, dtype)
    with torch.no_grad():
        fusion.projection_weight.mul_(torch.finfo(dtype).eps ** 0.5)
        fusion.projection_bias.zero_()
    e, hidden = make_inputs(config, 2, 20, dtype)
    hidden = hidden * torch.finfo(dtype).eps ** 0.5
    packed = fusion.project(e).unflatten(-1, (5, 16))
    gate = fusion_module._gate_and_scale(packed, hidden, fusion.gains().gate, *fusion.norm_eps)[0]
    want = torch.stack([demo_way_of(fusion)._gate(g, e, hidden[:, :, g]) for g in range(4)], dim=2)
    torch.testing.assert_close(gate[..., 0], want, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [64, 1024])
def test_half_precision_is_at_most_twice_as_far_from_float64_as_the_plain_way(dtype, hidden_size):
    config = make_config(hidden=hidden_size, row_width=32)
    half = make_fusion(config, dtype)
    e, hidden = make_inputs(config, 2, 30, dtype)
    exact = DemoFusion(config, dtype=torch.float64)
    exact.load_state_dict(half.state_dict())
    with torch.no_grad():
        update, plain = half(e, hidden), demo_way_of(half)(e, hidden)
        want = exact(e.double(), hidden.double())
    ours, theirs = ((x - want).abs() for x in (update, plain))
    assert update.dtype == dtype and 0 < ours.max() <= 2 * theirs.max() and ours.mean() <= theirs.mean()


def check_gradients():
    config = make_config(hidden=3, hc_mult=2, heads=1, row_width=2)
    fusion = make_fusion(config)
    inputs = [x.requires_grad_() for x in make_inputs(config, 1, 11)]
    names = [name for name, _ in fusion.named_parameters()]
    history = ShortConvHistory(fusion, 1)
    fusion(*make_inputs(config, 1, 5, seed=2), history)

    def update(e, hidden, *parameters):
        weights = dict(zip(names, parameters))
        return torch.func.functional_call(fusion, weights, (e, hidden, history.copy()))

    return torch.autograd.gradcheck(update, (*inputs, *fusion.parameters()), raise_exception=False)


def test_gradients_of_inputs_and_weights():
    assert check_gradients()


def test_a_wrong_gradient_fails_the_check(monkeypatch):
    monkeypatch.setattr(fusion_module, "causal_conv", lambda x, *rest: causal_conv(x.detach(), *rest))
    assert not check_gradients()


def gradients(module, e, hidden):
    """By the demo's name: the gradient of every weight, in float64."""
    module(e, hidden).double().square().sum().backward()
    if isinstance(module, DemoWay):
        return {name: parameter.grad.double() for name, parameter in module.named_parameters()}
    packed = DemoFusion(module.config, dtype=torch.float64)
    with torch.no_grad():
        for target, parameter in zip(packed.parameters(), module.parameters()):
            target.copy_(parameter.grad)
    return packed.state_dict()


def inputs_near_the_keys(fusion, batch, length):
    """Inputs whose gates are far from the sharp bend at 0, where one position would outweigh all others."""
    e, hidden = make_inputs(fusion.config, batch, length)
    exact = DemoFusion(fusion.config, dtype=torch.float64)
    exact.load_state_dict(fusion.state_dict())
    keys = exact.project(e).unflatten(-1, (-1, fusion.config.hidden))[:, :, :-1].detach()
    return e.to(fusion.dtype), (hidden + 2 * keys / keys.std()).to(fusion.dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_gradients_are_at_most_twice_as_far_from_float64_as_the_plain_ways(dtype):
    fusion = make_fusion(make_config(hidden=32), dtype)
    e, hidden = inputs_near_the_keys(fusion, 2, 20)
    plain, exact = demo_way_of(fusion), demo_way_of(fusion).double()
    want = gradients(exact, e.double(), hidden.double())
    ours, theirs = gradients(fusion, e, hidden), gradients(plain, e, hidden)
    assert ours.keys() == want.keys()
    # Where both ways are as near as their results can be written, luck decides.
    rounding = max(TOLERANCE, torch.finfo(dtype).eps)
    for name, right in want.items():
        error = (ours[name] - right).norm()
        assert error <= 2 * (theirs[name] - right).norm() + rounding * right.norm(), name


# --- time, batch, memory --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_poisoned_future_does_not_reach_the_past(shape, either_path):
    fusion, e, hidden = make_case(2, 30, **SHAPES[shape])
    whole = fusion(e, hidden)
    e[:, 17:], hidden[:, 17:] = float("nan"), float("nan")
    poisoned = fusion(e, hidden)
    assert poisoned[:, 17:].isnan().all()
    torch.testing.assert_close(poisoned[:, :17], whole[:, :17], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("position", [0, 11, 29])
def test_the_convolution_reaches_as_far_as_its_taps(position, either_path):
    """A changed row changes the positions p, p + 3, p + 6 and p + 9, and no other."""
    fusion, e, hidden = make_case(1, 30)
    before = fusion(e, hidden)
    e[:, position] += 1
    changed = (fusion(e, hidden) - before).abs().amax(dim=(0, 2, 3)) > 1e-9
    assert changed.nonzero().view(-1).tolist() == [p for p in range(position, position + 10, 3) if p < 30]


def test_sequences_do_not_touch_each_other(either_path):
    fusion, e, hidden = make_case(5, 20)
    order = [3, 0, 4, 1, 2]
    permuted = fusion(e[order], hidden[order])
    torch.testing.assert_close(permuted, fusion(e, hidden)[order], rtol=0, atol=TOLERANCE)
    e[2] = float("nan")
    assert fusion(e, hidden).isnan().any(dim=3).any(dim=2).any(dim=1).tolist() == [False, False, True, False, False]


def test_inputs_may_lie_in_memory_as_they_like(either_path):
    fusion, e, hidden = make_case(2, 20)
    want = fusion(e, hidden[:, :, :1].contiguous().expand_as(hidden).contiguous())
    strided_e = e.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expanded = hidden[:, :, :1].expand_as(hidden)  # one copy shown four times, as the demo does
    assert not strided_e.is_contiguous() and expanded.stride(2) == 0
    update = fusion(strided_e, expanded)
    assert update.is_contiguous()
    torch.testing.assert_close(update, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_inputs_are_left_alone(dtype, either_path):
    config = make_config()
    inputs = make_inputs(config, 2, 20, dtype)
    kept = [x.clone() for x in inputs]
    make_fusion(config, dtype)(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept))


@pytest.mark.parametrize("batch, length", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("shape", ["usual", "no convolution"])
def test_nothing_in_nothing_out(shape, batch, length, either_path):
    fusion, e, hidden = make_case(batch, length, **SHAPES[shape])
    history = ShortConvHistory(fusion, batch)
    assert fusion(e, hidden, history).shape == hidden.shape
    assert history.values.shape[1] == fusion.reach


# --- chunks ---------------------------------------------------------------------------------------

CUTS = {
    "one shot": [],
    "one step at a time": list(range(1, 26)),
    "prefill, then decode": [20, *range(21, 26)],
    "odd chunks": [1, 3, 4, 4, 9, 21],
}


def run_chunked(fusion, e, hidden, cuts, history):
    spans = itertools.pairwise([0, *cuts, e.shape[1]])
    return torch.cat([fusion(e[:, a:b], hidden[:, a:b], history) for a, b in spans], dim=1)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_give_one_shot(shape, cuts, either_path):
    fusion, e, hidden = make_case(3, 26, **SHAPES[shape])
    chunked = run_chunked(fusion, e, hidden, CUTS[cuts], ShortConvHistory(fusion, 3))
    torch.testing.assert_close(chunked, fusion(e, hidden), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_give_one_shot_in_low_precision(dtype, either_path):
    """To one rounding of the matrix product, which may sum in another order for another number of rows.

    The gate multiplies it by up to 125; in half precision the gate is float32, and only the result is rounded.
    """
    fusion, e, hidden = make_case(3, 26, dtype)
    chunked = run_chunked(fusion, e, hidden, CUTS["odd chunks"], ShortConvHistory(fusion, 3))
    roundings = 125 if dtype == torch.float32 else 8
    torch.testing.assert_close(chunked, fusion(e, hidden), rtol=0, atol=roundings * torch.finfo(dtype).eps)


def test_without_history_a_chunk_starts_anew():
    fusion, e, hidden = make_case(1, 20)
    forgetful = torch.cat([fusion(e[:, :10], hidden[:, :10]), fusion(e[:, 10:], hidden[:, 10:])], dim=1)
    assert (forgetful - fusion(e, hidden))[:, 10:].abs().max() > 1e-3


def test_a_copied_history_is_a_state_to_return_to(either_path):
    fusion, e, hidden = make_case(2, 30)
    history = ShortConvHistory(fusion, 2)
    fusion(e[:, :10], hidden[:, :10], history)
    kept = history.copy()
    rejected = fusion(e[:, 20:], hidden[:, 20:], history)
    again = fusion(e[:, 20:], hidden[:, 20:], kept)
    assert torch.equal(rejected, again) and torch.equal(history.values, kept.values)


def test_a_history_can_be_continued_with_and_without_autograd(small_blocks):
    fusion, e, hidden = make_case(2, 40)
    want = fusion(e, hidden)
    history = ShortConvHistory(fusion, 2)
    first = fusion(e[:, :10], hidden[:, :10], history)
    with torch.no_grad():
        second = fusion(e[:, 10:20], hidden[:, 10:20], history)
    with torch.inference_mode():
        third = fusion(e[:, 20:30], hidden[:, 20:30], history)
    last = fusion(e[:, 30:], hidden[:, 30:], history)
    torch.testing.assert_close(torch.cat([first, second, third, last], dim=1), want, rtol=0, atol=TOLERANCE)
    last.sum().backward()
    assert not history.values.requires_grad


# --- the convolution alone ------------------------------------------------------------------------


def conv1d(x, weight, dilation):
    """The framework's convolution with the same taps."""
    taps, channels = len(weight), weight[0].numel()
    conv = nn.Conv1d(
        channels, channels, taps, groups=channels, bias=False, padding=(taps - 1) * dilation, dilation=dilation
    ).to(x.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(taps, channels).T.unsqueeze(1))
        return transposed_conv(conv, x.flatten(2)).view(x.shape)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 10, 33])
@pytest.mark.parametrize("taps, dilation", [(1, 3), (2, 1), (4, 3), (3, 5)])
def test_convolution_equals_the_frameworks(length, taps, dilation, either_path):
    x = torch.randn(2, length, 3, 5, generator=seeded(), dtype=torch.float64)
    weight = torch.randn(taps, 3, 5, generator=seeded(1), dtype=torch.float64)
    y = causal_conv(x, weight, dilation)
    torch.testing.assert_close(y, conv1d(x, weight, dilation), rtol=0, atol=TOLERANCE)
    if taps > 1 and length > dilation:  # a wrong one fails
        wrong = causal_conv(x, weight.flip(0), dilation)
        assert (wrong - y).abs().max() > 1e-3


@pytest.mark.parametrize("before", [0, 1, 3, 8, 9, 20])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 9, 12])
def test_convolution_continues_whatever_past_there_is(before, length, either_path):
    whole = torch.randn(2, before + length, 3, 5, generator=seeded())
    weight = torch.randn(4, 3, 5, generator=seeded(1))
    y = causal_conv(whole[:, before:], weight, 3, past=whole[:, :before])
    assert torch.equal(y, causal_conv(whole, weight, 3)[:, before:])


# --- weights under the demo's names ---------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_state_dict_has_the_demos_names(shape):
    fusion = make_fusion(make_config(**SHAPES[shape]))
    plain = DemoWay(fusion.config, dtype=torch.float64)
    ours, theirs = fusion.state_dict(), plain.state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    fusion.load_state_dict(theirs)
    assert all(torch.equal(fusion.state_dict()[name], tensor) for name, tensor in theirs.items())
    assert all(x.is_contiguous() and not x.requires_grad for x in ours.values())


def test_a_state_dict_shares_memory_with_the_weights():
    """As torch's own do: averaging or editing it in place reaches the module."""
    fusion = make_fusion(make_config())
    fusion.state_dict()["value_proj.bias"].fill_(3.0)
    assert (fusion.projection_bias[-16:] == 3.0).all() and (fusion.projection_bias[:-16] != 3.0).all()


def test_loading_says_what_is_missing_and_what_is_too_much():
    model = nn.ModuleDict({"engram": make_fusion(make_config())})
    weights = model.state_dict()
    tap = weights.pop("engram.short_conv.conv.weight")
    weights["engram.short_conv.bias"] = tap
    with pytest.raises(RuntimeError) as refused:
        model.load_state_dict(weights)
    assert 'Missing key(s) in state_dict: "engram.short_conv.conv.weight"' in str(refused.value)
    assert 'Unexpected key(s) in state_dict: "engram.short_conv.bias"' in str(refused.value)
    found = model.load_state_dict(weights, strict=False)
    assert found.missing_keys == ["engram.short_conv.conv.weight"]


def test_loading_refuses_another_shape_and_leaves_it_alone():
    fusion = make_fusion(make_config())
    weights = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    kept = weights["norm1.2.weight"]
    weights["norm1.2.weight"] = kept[:1]  # would broadcast
    with pytest.raises(RuntimeError, match=r"norm1\.2\.weight has shape \(1,\), needs \(16,\)"):
        fusion.load_state_dict(weights)
    assert torch.equal(fusion.state_dict()["norm1.2.weight"], kept)


def test_weights_that_would_have_to_be_unpacked_are_refused():
    fusion = make_fusion(make_config())
    with pytest.raises(RuntimeError, match="packed"):
        fusion.load_state_dict(fusion.state_dict(), assign=True)


def test_new_weights_are_those_of_torchs_modules():
    config = make_config(hidden=200, row_width=25)
    fusion = DemoFusion(config)
    plain = DemoWay(config).state_dict()
    for name, tensor in fusion.state_dict().items():
        if name.startswith("norm") or ".norms." in name:
            assert (tensor == 1).all()
        else:  # uniform, and so the largest of 200 or more values is near the bound
            assert tensor.abs().max().item() == pytest.approx(plain[name].abs().max().item(), rel=0.1), name
            assert abs(tensor.mean().item()) < 0.2 * tensor.abs().max().item()


# --- in two halves --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_halves_give_the_whole(shape, either_path):
    fusion, e, hidden = make_case(2, 26, **SHAPES[shape])
    packed = fusion.project(e)
    assert packed.shape == (2, 26, (fusion.config.hc_mult + 1) * fusion.config.hidden)
    torch.testing.assert_close(fusion.combine(packed, hidden), fusion(e, hidden), rtol=0, atol=TOLERANCE)
    history = ShortConvHistory(fusion, 2)
    parts = [fusion.combine(packed[:, x], hidden[:, x], history) for x in (slice(0, 7), slice(7, 26))]
    torch.testing.assert_close(torch.cat(parts, dim=1), fusion(e, hidden), rtol=0, atol=TOLERANCE)


# --- what is refused ------------------------------------------------------------------------------


FORMS = {"demo": {}, "v41": dict(form="v41", kernel_size=0)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("e", "hidden", "message"),
    [
        ((2, 5, 16), (2, 5, 16), r"hidden of shape \(2, 5, 16\); this layer needs \[B, T, 4, 16\]"),
        ((2, 5, 16), (2, 5, 1, 16), r"this layer needs \[B, T, 4, 16\]"),
        ((2, 5, 16), (2, 5, 4, 15), r"this layer needs \[B, T, 4, 16\]"),
        ((2, 5, 15), (2, 5, 4, 16), r"e of shape \(2, 5, 15\); .* needs \[2, 5, 16\]"),
        ((2, 1, 16), (2, 5, 4, 16), r"needs \[2, 5, 16\]"),
        ((1, 5, 16), (2, 5, 4, 16), r"needs \[2, 5, 16\]"),
        ((10, 16), (2, 5, 4, 16), r"needs \[2, 5, 16\]"),
    ],
)
def test_wrong_shapes_are_refused(e, hidden, message, form, either_path):
    with pytest.raises(ValueError, match=message):
        fusion_of(make_config(**FORMS[form]))(torch.zeros(e), torch.zeros(hidden))


def test_keys_and_values_of_another_width_are_refused(either_path):
    _, hidden = make_inputs(make_config(), 2, 5)
    with pytest.raises(ValueError, match=r"packed of shape \(2, 5, 64\); .* needs \[2, 5, 80\]"):
        make_fusion(make_config()).combine(torch.zeros(2, 5, 64, dtype=torch.float64), hidden)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", [0, 1])
def test_another_dtype_is_refused(which, form):
    config = make_config(**FORMS[form])
    inputs = list(make_inputs(config, 1, 2))
    inputs[which] = inputs[which].float()
    name = ("e", "hidden")[which]
    with pytest.raises(ValueError, match=rf"{name} is torch.float32 on cpu; this layer is torch.float64 on cpu"):
        fusion_of(config, dtype=torch.float64)(*inputs)


@pytest.mark.parametrize("batch, dtype", [(3, torch.float64), (1, torch.float64), (2, torch.float32)])
def test_another_batchs_history_is_refused(batch, dtype):
    config = make_config()
    history = ShortConvHistory(make_fusion(config, dtype), batch)
    with pytest.raises(ValueError, match=r"make one with ShortConvHistory\(fusion, batch_size\)"):
        make_fusion(config)(*make_inputs(config, 2, 4), history)
    assert not history.values.any()
