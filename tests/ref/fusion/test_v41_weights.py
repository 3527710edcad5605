"""The weights of V4.1's gate: fp8 or decoded, the same bits; names and shapes as checkpoints have them."""

import pytest
import torch
from torch import nn

from engram_ref.config import EngramConfig
from engram_ref.fusion.v41 import V41Fusion
from tests.ref.fusion.v41_cases import RECORDED, make_config, make_fp8_pair, make_fusion_v41, make_inputs, seeded


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


def test_fp8_weights_of_another_geometry_are_refused():
    with pytest.raises(ValueError, match=r"\[400, 768\]: fp8 weights are made of blocks of 32 x 32; .* fp8=False"):
        V41Fusion(RECORDED, fp8=True)
