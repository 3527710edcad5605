"""The layer of Qwen3.8-Flash-Next against transformers' own class: one shot, chunks, padding, checkpoint names.

The class computes its norms in float32 whatever it is given. It is compared as it is, within what that rounds, and with
these norms in float64, within what another order of sums changes.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_ref.config import EngramConfig
from engram_ref.fusion import QwenFusion, ShortConvHistory, make_fusion
from tests.ref.fusion.qwen_oracle import new_cache, qwen4, text_config

FLOAT64 = 1e-11  # sums of order 1 in another order differ by 1e-15; the gate's slope and small eps enlarge that
FLOAT32 = 2e-5  # three norms in float32, 1e-7 each, through the same slope


def config_of(given) -> EngramConfig:
    columns = (given.ngram_size - 1) * given.heads_per_ngram
    return EngramConfig(
        layer_ids=(0,), max_ngram=given.ngram_size, heads=given.heads_per_ngram,
        row_width=given.ple_embed_dim // columns, table_size_per_order=(1009,) * (given.ngram_size - 1),
        hidden=given.hidden_size, hc_mult=given.hc_count, kernel_size=given.ple_conv_kernel_size, pad_id=7,
        form="qwen", norm_eps=given.rms_norm_eps,
    )  # fmt: skip


def exact_norm(norm, x):
    """The class's norm, which it computes as float32, in the dtype that it is given."""
    return norm._norm(x) * (1.0 + norm.weight)


class Layers:
    """The class's layer with random weights, rows put where its table was, and ours with the same weights."""

    def __init__(self, monkeypatch=None, seed=0, **changes):
        self.given = text_config(**changes)
        self.config = config_of(self.given)
        generator = torch.Generator().manual_seed(seed)
        self.oracle = qwen4.Qwen4ExpTextPLELayer(self.given, 0, 0).double()
        with torch.no_grad():
            for name, parameter in self.oracle.named_parameters():
                if "ngram_embedding" not in name:
                    scale = 0.4 if "norm" in name or "conv" in name else self.given.ple_embed_dim**-0.5
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        state = self.oracle.state_dict()
        self.fusion = QwenFusion(self.config, dtype=torch.float64)
        self.fusion.load_state_dict({k: v for k, v in state.items() if not k.startswith("ple_embedding")})
        if monkeypatch is not None:
            monkeypatch.setattr(qwen4.Qwen4ExpTextRMSNorm, "forward", exact_norm)

    def inputs(self, batch, length, seed=1):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 1000, (batch, length), generator=generator)
        copies, hidden = self.config.hc_mult, self.config.hidden
        return ids, torch.randn(batch, length, copies, hidden, generator=generator, dtype=torch.float64)

    def rows(self, ids, cache=None):
        """What the class looks up, [B, T, C*D]; without a cache nothing is moved on."""
        return self.oracle.ple_embedding(ids, cache)

    def expected(self, ids, hidden, cache=None, mask=None):
        return self.oracle(hidden.flatten(-2), ids, cache, conv_mask=mask).view_as(hidden)


SHAPES = {
    "usual": {},
    "eps that shows": {"rms_norm_eps": 0.1},
    "two taps, 4-grams": {"ple_conv_kernel_size": 2, "ngram_size": 4, "ple_embed_dim": 48, "heads_per_ngram": 2},
    "one tap": {"ple_conv_kernel_size": 1},
    "two copies, narrow": {"hc_count": 2, "hidden_size": 20},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("autograd", [True, False], ids=["with autograd", "in blocks"])
def test_one_shot(shape, autograd, monkeypatch):
    layers = Layers(monkeypatch, **SHAPES[shape])
    ids, hidden = layers.inputs(2, 23)
    with torch.set_grad_enabled(autograd):
        expected = layers.expected(ids, hidden)
        found = layers.fusion(layers.rows(ids), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)
    assert expected.abs().max() > 0.1
    worse = QwenFusion(layers.config.replace(norm_eps=layers.config.norm_eps * 2), dtype=torch.float64)
    worse.load_state_dict(layers.fusion.state_dict())
    assert (worse(layers.rows(ids), hidden) - expected).abs().max() > 10 * FLOAT64


@torch.no_grad()
def test_the_class_as_it_is():
    layers = Layers()
    ids, hidden = layers.inputs(2, 23)
    torch.testing.assert_close(
        layers.fusion(layers.rows(ids), hidden), layers.expected(ids, hidden), rtol=0, atol=FLOAT32
    )


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 22), max_size=8))
def test_chunks_through_the_cache_of_the_class(cuts):
    with pytest.MonkeyPatch.context() as patch:
        layers = Layers(patch)
        ids, hidden = layers.inputs(2, 23)
        whole = layers.expected(ids, hidden)
        cache, context, history = new_cache(), new_cache(), ShortConvHistory(layers.fusion, 2)
        bounds = [0, *sorted(cuts), 23]
        for start, stop in itertools.pairwise(bounds):
            part = slice(start, stop)
            expected = layers.expected(ids[:, part], hidden[:, part], cache)
            found = layers.fusion(layers.rows(ids[:, part], context), hidden[:, part], history)
            torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)
            torch.testing.assert_close(found, whole[:, part], rtol=0, atol=FLOAT64)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding(side, monkeypatch):
    layers = Layers(monkeypatch)
    ids, hidden = layers.inputs(2, 23)
    mask = torch.ones(2, 23, dtype=torch.int64)
    mask[1, {"left": slice(0, 9), "right": slice(15, 23), "holes": slice(4, 20, 3)}[side]] = 0
    ids = torch.where(mask.bool(), ids, 7)  # as the model does before
    expected = layers.expected(ids, hidden, mask=mask)
    found = layers.fusion(layers.rows(ids), hidden, padding=~mask.bool())
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)


def test_weights_go_back_to_the_class():
    layers = Layers()
    state = layers.fusion.state_dict()
    missing, unexpected = layers.oracle.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("ple_embedding") for name in missing)
    for name, tensor in layers.fusion.state_dict().items():
        assert torch.equal(tensor, layers.oracle.state_dict()[name])
    assert "projection_bias" not in dict(layers.fusion.named_parameters())


def test_the_factory_knows_the_form():
    config = Layers().config
    assert type(make_fusion(config)) is QwenFusion
    assert make_fusion(config).reset_parameters(torch.Generator().manual_seed(0)) is None
    assert not make_fusion(config).key_gain.any()
    with pytest.raises(ValueError, match="fp8=True: form qwen has no fp8 weights"):
        make_fusion(config, fp8=True)
    with pytest.raises(ValueError, match="a configuration of form 'demo'; QwenFusion is the form 'qwen'"):
        QwenFusion(EngramConfig.preset("tiny"))
