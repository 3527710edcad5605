"""All that follows the projection in one pass: the Triton kernels (interpreted) and the CPU's loops, against float64.

The oracle is the fusion itself in float64 by torch's operations. A pass may be twice as far from it as the same
operations in the same dtype are, and half a step of the dtype more: each rounds its result, and both sum in an order
of their own.
"""

import importlib
from unittest import mock

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from engram_ref.config import EngramConfig
from engram_ref.fusion import ShortConvHistory, base, make_fusion
from tests.ref.launches import Launches

WAYS = {
    "loops": ("numba", "engram_ref.fusion.fused", [torch.float32]),
    "kernel": ("triton", "engram_ref.fusion.kernels", [torch.bfloat16]),
}
CASES = [(way, dtype) for way, (_, _, dtypes) in WAYS.items() for dtype in dtypes]
USUAL = dict(  # looks back four steps
    layer_ids=(1,), max_ngram=2, heads=2, row_width=4, table_size_per_order=(50,), hidden=20, hc_mult=2, kernel_size=3
)
DEMO = {
    "usual": {},
    "one copy": dict(hc_mult=1, hidden=33),
    "one tap": dict(kernel_size=1),
    "no convolution": dict(kernel_size=0),
    "far apart": dict(kernel_size=2, max_ngram=4, table_size_per_order=(50, 50, 50), hc_mult=1),
}
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture(autouse=True)
def no_gradients():
    """Where they are on, a pass is not taken."""
    with torch.no_grad():
        yield


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def dtype(request, monkeypatch):
    """Of one of the ways, which every fusion of a `fused` that is not False takes meanwhile."""
    return take(request.param, monkeypatch)


def take(case, monkeypatch):
    way, dtype = case
    package, name, _ = WAYS[way]
    pytest.importorskip(package, reason=f"a pass by {way} needs {package}")
    module = importlib.import_module(name)
    if way == "kernel":
        if not module.can_run_on(torch.device("cpu")):
            pytest.skip("the kernels run on a CPU with TRITON_INTERPRET=1 only: tests/cuda has those that need none")
        importlib.import_module("tests.interpreter").repeat_nothing()
        monkeypatch.setattr(module, "STEPS_PER_PROGRAM", 1)  # a tile is as long as the convolution looks back
        monkeypatch.setattr(module, "LANES_OF_ONE_STEP", 16)
    monkeypatch.setattr(base, "_one_pass_on", lambda *_: module)
    return dtype


def three_of(config, dtype, seed=0):
    """One fusion three times: by one pass, by torch's operations, and by those in float64."""
    generator = torch.Generator().manual_seed(seed)
    exact = make_fusion(config, dtype=torch.float64, fused=False)
    exact.reset_parameters(generator)
    for name, parameter in exact.named_parameters():
        if name.endswith(("gain", "q_weight", "k_weight")):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        parameter.copy_(parameter.to(dtype))
    others = [make_fusion(config, dtype=dtype, fused=fused) for fused in (True, False)]
    for other in others:
        other.load_state_dict(exact.state_dict())
    return *others, exact


def inputs(config, shape, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(*shape, config.embedding_width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(*shape, config.hc_mult, config.hidden, generator=generator, dtype=torch.float64)
    return e.to(dtype), hidden.to(dtype)


def assert_as_close(ours, plain, exact):
    """Ours is at most twice as far from the exact as the plain one, and half a step of its largest value."""
    assert ours.dtype == plain.dtype and ours.shape == exact.shape
    error, allowed = (ours - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * allowed + 0.5 * EPS[ours.dtype] * exact.abs().max(), (error, allowed)


def config_of(form="demo", **changes):
    if form == "demo":
        return EngramConfig(**USUAL).replace(**changes)
    return EngramConfig(**USUAL | dict(form="v41", kernel_size=0)).replace(**changes)


# --- the demo's form ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "lengths"), [("usual", (1, 1)), *((shape, (2, 9)) for shape in DEMO)], ids=lambda x: str(x)
)
def test_the_demos_layer_and_its_history(dtype, shape, lengths):
    """Chunks after chunks, some of them padding, with and without the stream."""
    config = config_of(**DEMO[shape])
    layers = three_of(config, dtype)
    pasts = [ShortConvHistory(layer, 2) for layer in layers]
    for length in lengths:
        e, hidden = inputs(config, (2, length), dtype, seed=length)
        padding = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.3
        assert_as_close(*(x.add_to(h, r, p, padding=padding) for x, h, r, p in zip(
            layers, (hidden, hidden, hidden.double()), (e, e, e.double()), pasts)))  # fmt: skip
        if layers[0].reach:
            for ours, exact in zip(pasts[:2], (pasts[2], pasts[2])):
                assert (ours.values - exact.values).abs().max() <= 30 * max(EPS[torch.float32], EPS[dtype])
    assert_as_close(*(x(r, h, p) for x, h, r, p in zip(
        layers, (hidden, hidden, hidden.double()), (e, e, e.double()), pasts)))  # fmt: skip


def test_without_a_history_and_in_blocks(dtype, monkeypatch):
    config = config_of()
    layers = three_of(config, dtype)
    e, hidden = inputs(config, (2, 9), dtype)
    want = layers[2](e.double(), hidden.double())
    assert_as_close(layers[0](e, hidden), layers[1](e, hidden), want)
    monkeypatch.setattr(base, "CPU_BLOCKS", (5, 40))
    assert_as_close(layers[0](e, hidden), layers[1](e, hidden), want)
    assert_as_close(layers[0].combine(layers[0].project(e), hidden), layers[1](e, hidden), want)


@pytest.mark.parametrize("form", ["demo", "v41"])
def test_a_stream_of_any_strides(dtype, form):
    config = config_of(form, hc_mult=1)
    ours, plain, exact = three_of(config, dtype)
    e, hidden = inputs(config, (4, 3), dtype)
    for view in (hidden.transpose(0, 1).contiguous().transpose(0, 1), hidden[:, :1].expand(-1, 3, -1, -1),
                 hidden.mT.contiguous().mT):  # fmt: skip
        assert_as_close(ours.add_to(view, e), plain.add_to(view, e), exact.add_to(view.double(), e.double()))


@pytest.mark.parametrize("length", [1, 9])
def test_nothing_of_padding_reaches_another_position(dtype, length):
    """Not even a NaN, in these steps or in those that follow."""
    config = config_of()
    ours = three_of(config, dtype)[0]
    e, hidden = inputs(config, (1, length), dtype)
    padding = torch.zeros(1, length, dtype=torch.bool)
    padding[0, ::4] = True
    results = []
    for filling in (0.0, float("nan")):
        past = ShortConvHistory(ours, 1)
        rows, stream = (x.masked_fill(padding.view(1, length, *[1] * (x.ndim - 2)), filling) for x in (e, hidden))
        first = ours.add_to(stream, rows, past, padding=padding)[~padding]
        results.append(
            torch.cat([first, ours(*inputs(config, (1, 3), dtype, seed=7), past)[0], past.values[0].to(dtype)])
        )
    assert results[0].isfinite().all() and torch.equal(*results)


def test_a_poisoned_future_does_not_reach_the_past(dtype):
    config = config_of()
    ours = three_of(config, dtype)[0]
    e, hidden = inputs(config, (1, 9), dtype)
    whole = ours(e, hidden)
    e[:, 6:], hidden[:, 6:] = float("nan"), float("nan")
    poisoned = ours(e, hidden)
    assert poisoned[:, 6:].isnan().all() and torch.equal(poisoned[:, :6], whole[:, :6])


@pytest.mark.parametrize("name", ["key_gain", "query_gain", "conv_gain", "conv_weight"])
def test_a_wrong_weight_would_be_noticed(dtype, name):
    config = config_of()
    layers = three_of(config, dtype)
    layers[0].get_parameter(name).neg_()
    e, hidden = inputs(config, (1, 5), dtype)
    with pytest.raises(AssertionError):
        assert_as_close(layers[0](e, hidden), layers[1](e, hidden), layers[2](e.double(), hidden.double()))


def test_a_changed_weight_is_used_at_once(dtype):
    """There is no copy of gains that could outlive them."""
    config = config_of()
    ours, plain, exact = three_of(config, dtype)
    e, hidden = inputs(config, (1, 5), dtype)
    ours(e, hidden)
    for layer in (ours, plain, exact):
        layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    assert_as_close(ours(e, hidden), plain(e, hidden), exact(e.double(), hidden.double()))


# --- the form v41 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 9])
def test_the_form_v41(dtype, length):
    config = config_of("v41")
    ours, plain, exact = three_of(config, dtype)
    e, hidden = inputs(config, (2, length), dtype)
    dead = torch.rand(2, length, generator=torch.Generator().manual_seed(4)) < 0.4
    dead[0, 0], dead[1, 0] = True, False
    hidden[dead], e[dead] = float("nan"), float("nan")
    hidden[0, 0, 0, :3] = torch.tensor([-0.0, float("inf"), 1.0], dtype=dtype)
    found = ours.add_to(hidden, e, dead=dead)
    assert torch.equal(found[dead].view(torch.uint8), hidden[dead].view(torch.uint8))  # bit for bit
    rest = [x.add_to(h, r, dead=dead)[~dead] for x, h, r in ((plain, hidden, e), (exact, hidden.double(), e.double()))]
    assert_as_close(found[~dead], *rest)


@pytest.mark.parametrize("form", ["demo", "v41"])
def test_a_score_of_nothing_opens_the_gate_as_the_form_says(dtype, form):
    """The demo's is half open; v41's a little more or less, by the sign of the zero."""
    config = config_of(form, hc_mult=1, kernel_size=0)
    layers = three_of(config, dtype)
    e, hidden = inputs(config, (1, 2), dtype)
    hidden.zero_()
    if form == "v41":
        hidden[0, 1] = -0.0
        for layer in layers:  # keys of one sign, so that no sum of +0 and -0 decides
            layer.q_weight.fill_(1), layer.k_weight.fill_(1), layer.wkv.weight.abs_()
        e = e.abs()
    assert_as_close(*(x.add_to(h, r) for x, h, r in zip(
        layers, (hidden, hidden, hidden.double()), (e, e, e.double()))))  # fmt: skip


# --- which way is taken, and what it costs --------------------------------------------------------


def launches_of(layer, config, monkeypatch, with_kernel):
    """Of one decode step in bfloat16, with its history: the kernel's launches are counted by hand."""
    e, hidden = inputs(config, (1, 1), torch.bfloat16)
    past = ShortConvHistory(layer, 1) if layer.reach else None
    launched = []
    if with_kernel:
        kernels = importlib.import_module("engram_ref.fusion.kernels")
        name = "_demo" if config.form == "demo" else "_v41"

        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: launched.append(grid)

        monkeypatch.setattr(kernels, name, Kernel())
    with Launches() as counted:
        layer.add_to(hidden, e, past)
    return len(launched) + len(counted.names)


@pytest.mark.parametrize(("form", "before"), [("demo", 47), ("v41", 30)])
def test_a_decode_step_is_two_launches(form, before, monkeypatch):
    """The projection and the kernel; torch's operations were dozens."""
    take(("kernel", torch.bfloat16), monkeypatch)
    taps = dict(kernel_size=4) if form == "demo" else {}
    config = config_of(form, hc_mult=1, **taps)
    ours, plain, _ = three_of(config, torch.bfloat16)
    assert launches_of(plain, config, monkeypatch, with_kernel=False) == before
    assert launches_of(ours, config, monkeypatch, with_kernel=True) == 2


def test_fused_true_is_refused_where_nothing_can():
    layer = make_fusion(config_of(), dtype=torch.float64, fused=True)
    e, hidden = inputs(config_of(), (1, 2), torch.float64)
    with pytest.raises(ValueError, match=r"fused=True for torch.float64 on cpu, form demo: .*use fused=None"):
        layer(e, hidden)


def test_gradients_and_a_request_keep_it_away(monkeypatch):
    monkeypatch.setattr(base, "_one_pass_on", mock.Mock(side_effect=AssertionError("one pass was taken")))
    config = config_of()
    e, hidden = inputs(config, (1, 2), torch.float32)
    make_fusion(config, dtype=torch.float32, fused=False)(e, hidden)
    with torch.enable_grad():
        assert make_fusion(config, dtype=torch.float32)(e, hidden).requires_grad
    with pytest.raises(AssertionError, match="was taken"):
        make_fusion(config, dtype=torch.float32)(e, hidden)


@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("fused", [None, False])
def test_derivatives_that_go_forwards_need_no_gradients(form, fused):
    layer = make_fusion(config_of(form), dtype=torch.float32, fused=fused)
    e, hidden = inputs(config_of(form), (2, 5), torch.float32)

    def tangent():
        past = ShortConvHistory(layer, 2) if layer.reach else None
        with forward_ad.dual_level():
            for _ in range(2):
                stream = layer.add_to(forward_ad.make_dual(hidden, hidden.flip(1)), e, past)
            return forward_ad.unpack_dual(stream).tangent

    with torch.enable_grad():
        want = tangent()
    assert torch.equal(tangent(), want) and not torch.equal(want, hidden.flip(1))


def test_the_loops_exponential():
    """Against float64, of every size that does not overflow: within two of float32's steps."""
    pytest.importorskip("numba", reason="the loops need numba")
    exp = importlib.import_module("engram_ref.fusion.fused")._exp
    x = np.concatenate([np.linspace(-87, 88, 40_001), np.linspace(-1, 1, 10_001)]).astype(np.float32)
    found, want = np.array([exp(value) for value in x]), np.exp(x.astype(np.float64))
    assert (abs(found - want) <= 2 * EPS[torch.float32] * want).all()
    assert np.isnan(exp(np.float32("nan"))) and exp(np.float32(-1e30)) < 1e-38 and exp(np.float32(1e30)) > 1e38
