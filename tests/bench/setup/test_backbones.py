"""Backbones: sizes as published, Engram before the second block, and a context that no step changes."""

import json
import os
import sys

import pytest
import torch

from bench.setup import backbones
from bench.setup.backbones import BACKBONES, BlockShape, build_backbone
from engram_ref.attach import attach
from engram_ref.config import EngramConfig
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.layer import Engram
from engram_ref.tables.device import DeviceTable

CPU = torch.device("cpu")
TINY = dict(
    model_type="qwen3",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture
def config(tmp_path):
    """Writes a config.json like TINY, and gives its path."""

    def write(**fields):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**TINY, **fields}))
        return str(path)

    return write


@pytest.fixture
def tiny(config):
    return build_backbone(config(), None, CPU, torch.float32, 0)


def ids(batch=2, tokens=5, seed=0):
    return torch.randint(0, 8, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "parameters"), [("qwen3-4b", 3.6e9), ("qwen3-8b", 6.95e9)])
def test_the_sizes_are_the_published_ones(name, parameters):
    """Qwen's model cards give the parameters outside the embedding, to two and three digits."""
    fields = backbones._checked(name, backbones._fields(name), None)
    model = backbones._empty_model(fields, torch.bfloat16)
    assert len(model.layers) == 36
    assert sum(p.numel() for p in model.layers.parameters()) == pytest.approx(parameters, rel=0.01)
    shape = BlockShape.of(model.config.to_dict())
    assert 36 * shape.parameters() == pytest.approx(parameters, rel=0.01)
    assert name in BACKBONES


def test_parameters_of_a_small_block_by_hand():
    shape = BlockShape(hidden=6, intermediate=10, heads=4, kv_heads=2, head_dim=3)
    # Q and O: 6*12 and 12*6; K and V: 6*6 each; gate, up and down: 3*6*10.
    assert shape.parameters() == 72 + 72 + 36 + 36 + 180


def test_each_parameter_is_a_product_and_a_sum_that_torch_counts(tiny):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        tiny.step(ids(1, 8), None)
    # Without attention, and angles of positions, which older transformers multiply as matrices, too.
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counted["aten.mm"] == 8 * 2 * tiny.blocks * tiny.shape.parameters()


@pytest.mark.parametrize("name", ["none", "tiny"])
def test_engram_is_attached_before_the_second_block(name, config):
    backbone = build_backbone("none" if name == "none" else config(), None, CPU, torch.float32, 64)
    sizes = EngramConfig.preset("tiny").replace(table_size_per_order=(300, 300), row_dtype="float32")
    plan = HashPlan.build(sizes, 8, 2)
    rows = torch.randn(plan.layer(1).rows, sizes.row_width)
    engram = Engram(make_fusion(sizes), DeviceTable(rows))
    first, second = backbone.model.layers[:2]
    seen = {}
    first.register_forward_hook(lambda m, args, out: seen.update(left=out[0] if isinstance(out, tuple) else out))
    reads = second if name == "none" else second.input_layernorm
    plain = backbone.step(ids(), None)
    with attach(backbone.model, {1: engram}, plan):
        reads.register_forward_pre_hook(lambda m, args: seen.update(read=args[0]))
        out = backbone.step(ids(), None)
    with torch.no_grad():
        assert torch.equal(seen["read"], engram(seen["left"], NgramHasher(plan)(ids().numpy(), 1)))
    assert out.shape == (2, 5, 64) and not out.requires_grad and not torch.allclose(out, plain)
    assert torch.equal(backbone.step(ids(), None), plain)


def stored(cache):
    """Keys and values of a cache of ours."""
    cells = (cell.cell_contents for cell in type(cache).update.__closure__)
    return next(content for content in cells if isinstance(content, list))


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_step_sees_the_same_context_as_transformers_own_cache(tiny, tokens):
    from transformers import DynamicCache

    cache, theirs = tiny.new_cache(2, 7, tokens), DynamicCache()
    for block, (keys, values) in enumerate(stored(cache)):
        theirs.update(keys[:, :, :7].clone(), values[:, :, :7].clone(), block)
    first, second = (step(tiny, cache, tokens, seed) for seed in (1, 2))
    # The same products over the same numbers, blocked otherwise at most: a few roundings of float32.
    assert torch.allclose(first, tiny.step(ids(2, tokens, 1), theirs), rtol=1e-5, atol=1e-5)
    assert torch.equal(first, step(tiny, cache, tokens, 1)) and cache.get_seq_length() == 7 + tokens
    grown = tiny.step(ids(2, tokens, 2), theirs)  # their cache has grown by the first step: the trap
    assert not torch.allclose(second, grown, rtol=1e-5, atol=1e-5)


def step(backbone, cache, tokens, seed):
    cache.rewind()
    return backbone.step(ids(2, tokens, seed), cache)


def test_the_context_is_random_and_read(tiny):
    cache = tiny.new_cache(2, 64)
    keys, values = stored(cache)[0]
    assert keys.shape == values.shape == (2, 2, 65, 16)
    assert not torch.equal(keys, values)
    assert 0.9 < float(keys.std()) < 1.1
    out = step(tiny, cache, 1, 0)
    values[:, :, 40] = float("nan")  # not the step's own position
    assert out.isfinite().all()
    assert step(tiny, cache, 1, 0).isnan().all()


def test_no_context_needs_no_cache(tiny):
    assert tiny.new_cache(2, 0) is None


@pytest.mark.parametrize(("batch", "tokens"), [(2, 2), (1, 1), (3, 1)])
def test_a_step_that_the_cache_was_not_made_for_is_refused(tiny, batch, tokens):
    cache = tiny.new_cache(2, 7)
    with pytest.raises(ValueError, match=rf"a step of {batch} x {tokens} tokens; this cache was made for 2 x 1"):
        tiny.step(ids(batch, tokens), cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_36_blocks_stay_finite_in_half_precision(config, dtype):
    # Weights as wide as for 4,096 inputs, the widest model here: each product grows as much as there.
    wide = config(num_hidden_layers=36, initializer_range=0.02 * (4096 / 64) ** 0.5)
    backbone = build_backbone(wide, None, CPU, dtype, 0)
    assert {p.dtype for p in backbone.model.parameters()} == {dtype}
    assert backbone.model.rotary_emb.inv_freq.dtype == torch.float32
    largest = []
    for block in backbone.model.layers:
        block.register_forward_hook(lambda m, args, out: largest.append(float(torch.as_tensor(out).abs().max())))
    out = backbone.step(ids(), None)
    assert out.isfinite().all()
    assert len(largest) == 36
    assert 1 < max(largest) < 1000
    assert torch.get_default_dtype() == torch.float32


def test_weights_are_seeded_and_counted(config):
    one, two = (build_backbone(config(), 2, CPU, torch.bfloat16, 0) for _ in range(2))
    for (name, a), (_, b) in zip(one.model.named_parameters(), two.model.named_parameters()):
        assert torch.equal(a, b)
        assert a.ndim == 2 or (a == 1).all(), name
        assert a.ndim == 1 or 0.015 < float(a.float().std()) < 0.025, name
    attention = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 16
    assert one.parameters_bytes == 2 * 2 * (attention + 3 * 64 * 96 + 2 * 64)
    assert (one.hidden, one.blocks) == (64, 2)


def test_positions_are_rotated_by_the_usual_frequencies(tiny):
    turns = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)  # radians a position, the default of a config without theta
    assert torch.allclose(tiny.model.rotary_emb.inv_freq, turns, rtol=1e-6)  # float32 powers


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_dense_decoders_run(config, kind):
    backbone = build_backbone(config(model_type=kind, head_dim=16), 2, CPU, torch.float32, 0)
    out = backbone.step(ids(2, 1), backbone.new_cache(2, 5))
    assert out.isfinite().all()
    biases = [p for name, p in backbone.model.named_parameters() if name.endswith("bias")]
    assert all(not bias.any() for bias in biases)
    assert bool(biases) == (kind == "qwen2")


def test_no_backbone_needs_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it would fail
    backbone = build_backbone("none", None, CPU, torch.float32, 48)
    cache = backbone.new_cache(2, 100)
    assert step(backbone, cache, 3, 0).shape == (2, 3, 48) and cache.get_seq_length() == 103
    assert torch.equal(step(backbone, cache, 3, 0), backbone.step(ids(2, 3), None)) and cache.get_seq_length() == 103
    assert (backbone.hidden, backbone.blocks, backbone.parameters_bytes) == (48, 0, 0)
    with pytest.raises(ValueError, match="pip install transformers"):
        build_backbone("qwen3-4b", 2, CPU, torch.float32, 48)


@pytest.mark.parametrize("blocks", [-1, 0, 1, 4])
def test_without_a_second_block_or_beyond_the_last_it_is_refused(config, blocks):
    with pytest.raises(ValueError, match=rf"{blocks} blocks of .*: take 2 \.\. 3"):
        build_backbone(config(), blocks, CPU, torch.float32, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral'; dense decoders only"),
        ({"hidden_size": "64"}, "hidden_size='64': must be an integer"),
        ({"num_key_value_heads": None}, "num_key_value_heads=None: must be an integer"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding attention is not supported"),
    ],
    ids=["mixture", "text", "missing", "window", "layer types"],
)
def test_models_that_would_be_counted_wrongly_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config(**fields), None, CPU, torch.float32, 0)


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 10**5, None], ids=["cut", "list", "empty", "deep", "60 GB"])
def test_what_is_not_a_config_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text or "")
    if text is None:
        os.truncate(path, 60 << 30)
    with pytest.raises(ValueError, match=r"config\.json is not a config\.json"):
        build_backbone(str(path), None, CPU, torch.float32, 0)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no backbone 'qwen3-5b': use one of none, qwen3-4b, qwen3-8b, tiny, or the"):
        build_backbone("qwen3-5b", None, CPU, torch.float32, 0)


def test_what_memory_cannot_hold_is_refused_before_it_is_taken(monkeypatch, tiny):
    monkeypatch.setattr("engram_ref.rows.memory.free_host_bytes", lambda: 3 << 30)
    with pytest.raises(ValueError, match=r"6\.77 GiB do not fit .* 3\.00 GiB are free"):
        build_backbone("qwen3-4b", None, CPU, torch.bfloat16, 0)
    with pytest.raises(ValueError, match=r"GiB do not fit"):
        tiny.new_cache(64, 1 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_one_operation_each_and_compute_what_transformers_computes(dtype):
    """Against the class that the model had; bfloat16 is rounded once by ours, and before the gain by theirs."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    model = build_backbone("tiny", 2, torch.device("cpu"), dtype, 0).model
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert len(norms) == 2 * 4 + 1 and {type(norm) for norm in norms} == {torch.nn.RMSNorm}
    for norm in norms:
        width = norm.weight.shape[0]
        theirs = Qwen3RMSNorm(width, model.config.rms_norm_eps).to(dtype)
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        torch.testing.assert_close(norm(x), theirs(x), rtol=2 * torch.finfo(dtype).eps, atol=0)
