"""Both twins compute Qwen3.8-Flash-Next's layer, the reference in float64, and the twin's is the class's own.

From token ids to the update: each hashes by itself, reads the rows of one table, gates and convolves.
"""

import json

import numpy as np
import pytest
import torch

import engram_toy.hashing as toy_hashing
from engram_ref.config import EngramConfig
from engram_ref.fusion import QwenFusion
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.layer import Engram
from engram_ref.tables.device import DeviceTable
from engram_toy.fusion.qwen import QwenWeights, engram_qwen

EOS = 3
TOLERANCE = 1e-9  # as for the demo's layer (`test_layer.py`)
SHAPES = {
    "usual": {},
    "one copy": {"hc_mult": 1},
    "bigrams, one tap": {"max_ngram": 2, "table_size_per_order": (30,), "kernel_size": 1},
    "4-grams, eps that shows": {"max_ngram": 4, "table_size_per_order": (30,) * 3, "norm_eps": 0.1},
}


def make_layer(seed=0, **changes):
    config = EngramConfig(
        layer_ids=(2,), max_ngram=3, heads=2, row_width=3, table_size_per_order=(30, 30), hidden=8, hc_mult=4,
        pad_id=EOS, form="qwen", norm_eps=1e-6, rows_multiple=16, compressed_size=60,
    ).replace(**changes)  # fmt: skip
    plan = HashPlan.build(config, 60, EOS)
    generator = torch.Generator().manual_seed(seed)
    fusion = QwenFusion(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    values = torch.randn(plan.layer(2).rows, config.row_width, generator=generator, dtype=torch.float64)
    return config, plan, fusion, values


def weights_of(fusion):
    """The same weights as the nested lists of the twin."""
    state, copies = fusion.state_dict(), fusion.config.hc_mult

    def by_copy(name):
        return state[name].view(copies, fusion.config.hidden, *state[name].shape[1:]).tolist()

    return QwenWeights(
        key_proj=by_copy("key_proj.weight"),
        value_proj=state["value_proj.weight"].tolist(),
        norm_key=by_copy("norm_key.weight"),
        norm_query=by_copy("norm_query.weight"),
        norm_conv=by_copy("norm_conv.weight"),
        conv1d=state["conv1d.weight"].view(copies, fusion.config.hidden, -1).tolist(),
    )


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_twins_agree(shape):
    config, plan, fusion, values = make_layer(**SHAPES[shape])
    ids = np.random.default_rng(1).integers(0, 60, 19)
    ids[[0, 5, 6, 12]] = EOS
    hidden = torch.randn(1, 19, config.hc_mult, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = NgramHasher(plan)(ids[None], 2)
    expected = Engram(fusion, DeviceTable(values))(hidden, rows) - hidden
    indices = toy_hashing.NgramHasher(json.loads(plan.to_json()))(ids.tolist(), 2)
    assert indices == rows[0].tolist()
    table = values.tolist()
    lookups = [[table[row] for row in of_position] for of_position in indices]
    arguments = (hidden[0].tolist(), lookups, weights_of(fusion), config.max_ngram)
    found = torch.tensor(engram_qwen(*arguments, config.norm_eps), dtype=torch.float64)
    torch.testing.assert_close(found, expected[0], rtol=0, atol=TOLERANCE)
    wrong = torch.tensor(engram_qwen(*arguments, 2 * config.norm_eps), dtype=torch.float64)
    assert (wrong - expected[0]).abs().max() > TOLERANCE
