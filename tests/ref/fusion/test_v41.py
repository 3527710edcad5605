"""The gate of V4.1 against the plain formula: zeros, eps, the single rounding, gradients, and what is refused."""

import math

import pytest
import torch

from engram_ref.fusion import v41
from engram_ref.fusion.v41 import V41Fusion
from tests.ref.fusion.v41_cases import (
    ALL_DTYPES,
    HALF,
    make_case,
    make_config,
    make_dead,
    make_fusion_v41,
    make_inputs,
    plainly,
    seeded,
)

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
    fusion, e, hidden = make_case(batch, length, **SHAPES[shape])
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
    fusion, e, hidden = make_case(1, 3, dtype)
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
    fusion, e, hidden = make_case(3, 40, dtype)
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


# --- gradients ------------------------------------------------------------------------------------


def gradient_case():
    """A layer of a few weights, and inputs whose inner products are far from the bend at 0."""
    fusion, e, hidden = make_case(1, 4, hidden=3, hc_mult=2, row_width=2, row_dtype="float32")
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


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dead",
    [torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.uint8), torch.zeros(5, dtype=torch.bool), make_dead(5, 2)],
    ids=["float32", "uint8", "one sequence", "transposed"],
)
def test_a_mask_that_does_not_fit_is_refused(dead, either_path):
    config = make_config()
    with pytest.raises(ValueError, match=r"dead of shape .* on cpu: hidden needs booleans \[2, 5\] on cpu"):
        make_fusion_v41(config)(*make_inputs(config, 2, 5), dead)
