"""Whole models by the bytes of a step: what was published, to the byte, and the price of a cycle, by definition.

python -m pytest tests/bench/rows/test_whole_model.py
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from bench.rows.whole_model import MODELS, step_price
from engram_toy.tracer.stack import read_price


def test_the_dense_models_are_their_matrices():
    """Each block's seven matrices and the output's embeddings, bfloat16, whatever the step does."""
    for name, hidden, inner in (("dense-4b", 2560, 9728), ("dense-8b", 4096, 12_288)):
        block = 2 * hidden * 32 * 128 + 2 * hidden * 8 * 128 + 3 * hidden * inner
        model = MODELS[name]
        assert model.blocks == 36
        assert model.step_bytes("decode") == model.step_bytes("prefill") == 2 * (36 * block + 151_936 * hidden)


def test_v41_flash_is_half_a_byte_a_weight_or_all_of_its_files():
    active, every = MODELS["v41-flash"], MODELS["v41-flash-all"]
    assert (active.step_bytes("decode"), active.step_bytes("prefill")) == (8_000_000_000, 4_000_000_000)
    assert every.step_bytes("decode") == every.step_bytes("prefill") == 307_000_000_000
    assert active.blocks == every.blocks == 40 and active.table == every.table


def test_the_layers_projections_have_the_width_of_the_models_weights():
    """Keys for every residual copy and one value, from the embedding's 1,280 or 3 x 2,048 numbers."""
    for name, hidden in (("dense-4b", 2560), ("dense-8b", 4096)):
        assert MODELS[name].engram_weight_bytes() == 1 * (1 + 1) * hidden * 1280 * 2
    assert MODELS["v41-flash"].engram_weight_bytes() == 2 * (4 + 1) * 5120 * 3 * 2048 * 1


@pytest.mark.parametrize(("name", "hidden"), [("dense-4b", 2560), ("dense-8b", 4096)])
def test_the_papers_table(name, hidden):
    """One layer before the second block, one residual copy; 100 B parameters, divided among eight heads' two orders."""
    table = MODELS[name].table
    assert (table.layer_ids, table.hidden, table.hc_mult) == ((1,), hidden, 1)
    assert table.table_size_per_order == (100_000_000_000 // 1280,) * 2


@pytest.mark.parametrize(("nbytes", "blocks"), [(24, 8), (25, 8), (7, 1), (5, 5), (100, 7), (3, 4)])
def test_a_step_is_a_cycle_of_blocks(nbytes, blocks):
    """Byte by byte: every block lies under all others, its own bytes one under the other, read as one instruction."""
    edges = [nbytes * i // blocks for i in range(blocks + 1)]
    sizes = [high - low for low, high in itertools.pairwise(edges)]
    assert sum(sizes) == nbytes and max(sizes) - min(sizes) <= 1
    assert step_price(nbytes, blocks) == sum(
        read_price(depth) for size in sizes for depth in range(nbytes - size + 1, nbytes + 1)
    )


def test_a_model_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["dense-4b"].blocks = 1
