"""Gate and convolution as one kernel, on a GPU: against float64, in a captured graph, and counted."""

import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.fusion import ShortConvHistory, make_fusion

pytestmark = pytest.mark.cuda
FORMS = {
    "demo": EngramConfig.preset("demo").replace(layer_ids=(1,), hidden=1280, hc_mult=2),
    "v41": EngramConfig.preset("v41-flash").replace(layer_ids=(1,), hidden=1280, hc_mult=2, compressed_size=None),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def three_of(form, dtype):
    """By one kernel, by torch's operations, and by those in float64."""
    exact = make_fusion(FORMS[form], "cuda", torch.float64, fused=False)
    for name, parameter in exact.named_parameters():
        if name.endswith(("gain", "q_weight", "k_weight")):
            parameter.add_(0.3 * torch.randn_like(parameter))
        parameter.copy_(parameter.to(dtype))
    layers = [make_fusion(FORMS[form], "cuda", dtype, fused=fused) for fused in (True, False)]
    for layer in layers:
        layer.load_state_dict(exact.state_dict())
    return *layers, exact


def inputs(form, shape, dtype):
    config = FORMS[form]
    e = torch.randn(*shape, config.embedding_width, device="cuda", dtype=dtype)
    return e, torch.randn(*shape, config.hc_mult, config.hidden, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_chunks_against_float64(form, dtype):
    """Twice as far as torch's operations at most, and half a step; as in tests/ref/fusion/test_fused.py."""
    torch.manual_seed(0)
    layers = three_of(form, dtype)
    pasts = [ShortConvHistory(layer, 3) if layer.reach else None for layer in layers]
    for length in (1, 2, 100, 1):
        e, hidden = inputs(form, (3, length), dtype)
        padding = torch.rand(3, length, device="cuda") < 0.2
        ours, plain, exact = (
            layer.add_to(hidden.to(layer.dtype), e.to(layer.dtype), past, padding=padding)
            for layer, past in zip(layers, pasts)
        )
        allowed = 2 * (plain - exact).abs().max() + 0.5 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_step_goes_on_where_the_last_one_ended(form):
    """Replays advance the history where it lies, and follow a weight that was changed in place."""
    layer = three_of(form, torch.bfloat16)[0]
    e, hidden = inputs(form, (4, 1), torch.bfloat16)
    pasts = [ShortConvHistory(layer, 4) if layer.reach else None for _ in range(2)]
    layer.add_to(hidden, e, ShortConvHistory(layer, 4) if layer.reach else None)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.add_to(hidden, e, pasts[0])
    if pasts[0] is not None:
        pasts[0].values.zero_()
    for step in range(12):
        for given, fresh in zip((e, hidden), inputs(form, (4, 1), torch.bfloat16)):
            given.copy_(fresh)
        if step == 6:
            gain = layer.key_gain if form == "demo" else layer.k_weight
            gain.mul_(-1)
        graph.replay()
        assert torch.equal(captured, layer.add_to(hidden, e, pasts[1]))


@pytest.mark.parametrize("form", FORMS)
def test_a_decode_step_is_three_launches_at_most(form):
    layers = three_of(form, torch.bfloat16)[:2]
    e, hidden = inputs(form, (1, 1), torch.bfloat16)
    counts = []
    for layer in layers:
        past = ShortConvHistory(layer, 1) if layer.reach else None
        layer.add_to(hidden, e, past)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer.add_to(hidden, e, past)
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    assert 2 <= counts[0] <= 3 and counts[1] >= 20, counts
