"""Both twins compute the same layer: plain Python, one position at a time, and the reference, in float64.

From compressed ids to the stream after the layer: each hashes by itself, reads the rows of one table, gates and
convolves. Shapes are the edges of the configuration: one copy or four, with and without a convolution, orders up to 2,
3 and 4.
"""

import json

import numpy as np
import pytest
import torch

import engram_toy.hashing as toy_hashing
from engram_ref.config import V41_NORM_EPS, EngramConfig
from engram_ref.fusion import DemoFusion, ShortConvHistory, base
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.layer import Engram
from engram_ref.tables.device import DeviceTable
from engram_toy.fusion import demo as toy
from engram_toy.fusion import v41 as toy_v41
from engram_toy.fusion.demo import EngramWeights, engram

SIZE = 60  # of the compressed vocabulary
# Sums of order 1 in another order differ by some 1e-15; the gate's slope reaches 125 where its argument is small, and
# random layers may come closer to the bend than the recorded one.
TOLERANCE = 1e-9


def make_config(max_ngram=3, **changes):
    sizes = (30,) * (max_ngram - 1)
    return EngramConfig(
        layer_ids=(2,), max_ngram=max_ngram, heads=2, row_width=3, table_size_per_order=sizes, hidden=8
    ).replace(**changes)


def test_the_twins_have_the_same_constants():
    """The toy imports no torch, and so has its own: the layers would differ where no tolerance shows it."""
    assert (toy.GATE_FLOOR, toy.CONV_NORM_EPS) == (base.GATE_FLOOR, base.CONV_NORM_EPS)
    assert torch.finfo(torch.float64).eps == toy.NORM_EPS and toy_v41.NORM_EPS == V41_NORM_EPS


def random_layer(config, plan, seed):
    """A layer with weights of order 1, gains among them."""
    generator = torch.Generator().manual_seed(seed)
    fusion = DemoFusion(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    values = torch.randn(plan.layer(2).rows, config.row_width, generator=generator, dtype=torch.float64)
    return fusion, values


def weights_of(fusion):
    """The same weights as the nested lists of the twin."""
    state, copies = fusion.state_dict(), range(fusion.config.hc_mult)

    def stacked(name):
        return [state[name.format(g)].tolist() for g in copies if name.format(g) in state]

    taps = state.get("short_conv.conv.weight", torch.empty(0))
    return EngramWeights(
        key_projs_weight=stacked("key_projs.{}.weight"),
        key_projs_bias=stacked("key_projs.{}.bias"),
        value_proj_weight=state["value_proj.weight"].tolist(),
        value_proj_bias=state["value_proj.bias"].tolist(),
        norm1=stacked("norm1.{}.weight"),
        norm2=stacked("norm2.{}.weight"),
        short_conv_norms=stacked("short_conv.norms.{}.weight"),
        short_conv_conv=taps.view(len(copies), -1, fusion.config.kernel_size).tolist() if taps.numel() else [],
    )


def run_twin(plan, ids, hidden, values, weights, dilation):
    """The stream after the layer; the twin's own result is what is added to it."""
    hasher = toy_hashing.NgramHasher(json.loads(plan.to_json()))
    table = values.tolist()
    updates = [
        engram(stream.tolist(), [[table[row] for row in rows] for rows in hasher(sequence, 2)], weights, dilation)
        for sequence, stream in zip(ids.tolist(), hidden)
    ]
    return hidden.numpy() + np.array(updates)


def run_both(config, batch, length, seed):
    """The stream after the layer of the twin and of the reference, and what the twin computed its own from."""
    plan = HashPlan.build(config, SIZE, 2)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SIZE, (batch, length))
    hidden = torch.from_numpy(rng.normal(size=(batch, length, config.hc_mult, config.hidden)))
    fusion, values = random_layer(config, plan, seed)
    reference = Engram(fusion, DeviceTable(values))
    with torch.no_grad():
        stream = reference(hidden, NgramHasher(plan)(ids, 2))
    inputs = (plan, ids, hidden, values, weights_of(fusion), config.max_ngram)
    return run_twin(*inputs), stream.numpy(), inputs


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 15)])
@pytest.mark.parametrize("kernel_size", [0, 1, 4])
@pytest.mark.parametrize("hc_mult", [1, 4])
@pytest.mark.parametrize("max_ngram", [2, 3, 4])
def test_twins_agree(max_ngram, hc_mult, kernel_size, batch, length):
    config = make_config(max_ngram, hc_mult=hc_mult, kernel_size=kernel_size)
    for seed in range(3):
        twin, reference, _ = run_both(config, batch, length, seed)
        assert twin.shape == reference.shape == (batch, length, hc_mult, 8)
        assert np.abs(twin - reference).max() < TOLERANCE


@pytest.mark.parametrize("part", EngramWeights._fields)
def test_a_wrong_twin_is_caught(part):
    """One weight a millionth off, in one twin."""
    _, reference, (plan, ids, hidden, values, weights, dilation) = run_both(make_config(), 1, 12, seed=0)
    damaged = np.array(getattr(weights, part))
    damaged[..., -1] *= 1 + 1e-6
    wrong = weights._replace(**{part: damaged.tolist()})
    assert np.abs(run_twin(plan, ids, hidden, values, wrong, dilation) - reference).max() > TOLERANCE


def test_another_dilation_is_caught():
    _, reference, inputs = run_both(make_config(), 1, 12, seed=0)
    assert np.abs(run_twin(*inputs[:-1], dilation=2) - reference).max() > TOLERANCE


def test_the_reference_in_steps_is_the_twin_in_one_shot():
    config = make_config()
    plan = HashPlan.build(config, SIZE, 2)
    twin, _, (_, ids, hidden, values, _, _) = run_both(config, 2, 15, seed=1)
    fusion, _ = random_layer(config, plan, 1)
    reference, past = Engram(fusion, DeviceTable(values)), ShortConvHistory(fusion, 2)
    rows = NgramHasher(plan)(ids, 2)
    with torch.no_grad():
        steps = [reference(hidden[:, t : t + 1], rows[:, t : t + 1], past) for t in range(15)]
    assert np.abs(torch.cat(steps, dim=1).numpy() - twin).max() < TOLERANCE
