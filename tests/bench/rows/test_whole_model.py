"""Whole models by the bytes of a step: what was published, to the byte, and the price of a cycle, by definition."""

import itertools

import pytest

from bench.rows.whole_model import MODELS, OTHERS, Surroundings, step_price
from engram_toy.tracer.stack import read_price


def test_the_dense_models_are_their_matrices():
    """Each block's seven matrices and the output's embeddings, bfloat16, whatever the step does."""
    for name, hidden, inner in (("dense-4b", 2560, 9728), ("dense-8b", 4096, 12_288)):
        block = 2 * hidden * 32 * 128 + 2 * hidden * 8 * 128 + 3 * hidden * inner
        model = MODELS[name]
        assert model.blocks == 36
        nbytes = 2 * (36 * block + 151_936 * hidden)
        assert model.decode_bytes == model.prefill_bytes == model.all_bytes == nbytes
        for mode, sequences in (("decode", 9), ("prefill", 1)):  # keys and values of eight heads of 128, two bytes each
            caches = {context: sequences * context * 36 * 2 * 8 * 128 * 2 for context in (0, 4096, 32_768, 131_072)}
            assert model.surroundings(mode, 9) == [
                Surroundings("", context, nbytes + kv, nbytes + kv) for context, kv in caches.items()
            ]


def test_v41_flash_reads_one_tokens_experts_or_the_expected_ones_or_all_of_its_files():
    """Six of 384 experts a token, 289 GB of them all: none of three tokens chooses one with (378 / 384)^3."""
    model, every = MODELS["v41-flash"], 307_000_000_000
    assert model.blocks == 40 and model.all_bytes == every
    for mode, one, shared in (("decode", 8_000_000_000, 8_000_000_000 - 4_515_625_000), ("prefill", 4_000_000_000, 0)):
        chosen = 289_000_000_000 - round(289_000_000_000 * 378**3 / 384**3)
        assert model.surroundings(mode, 3) == [
            Surroundings("one", 0, one, every),
            Surroundings("expected", 0, shared + chosen, every),
            Surroundings("all", 0, every, every),
        ]


def test_of_qwen_the_active_weights_alone_are_known():
    """Six billion, bfloat16."""
    assert OTHERS["qwen38-flash-next"].surroundings("decode", 9) == [Surroundings("", 0, 12 * 10**9, 12 * 10**9)]


def test_an_expert_that_no_step_reads_buries_a_row_once():
    """A row's first read passes it, and leaves it below. Of drawn ones, two steps read more than one."""
    model = MODELS["v41-flash"]
    one, expected, every = model.surroundings("decode", 512)
    assert model.above(one, 512) == [8_000_000_000, 307_000_000_000]
    assert model.above(every, 512) == [307_000_000_000] * 2
    shared = 8_000_000_000 - 4_515_625_000
    after = [round(289_000_000_000 * (1 - (378 / 384) ** (512 * steps))) for steps in range(1, 5)]
    assert model.above(expected, 512) == [*(shared + nbytes for nbytes in after), 307_000_000_000]
    assert after[-1] == 289_000_000_000 and len(model.above(expected, 1)) > 1000


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


@pytest.mark.parametrize("above", [0, 13])
@pytest.mark.parametrize(("nbytes", "blocks"), [(24, 8), (25, 8), (7, 1), (5, 5), (100, 7), (3, 4)])
def test_a_step_is_a_cycle_of_blocks(nbytes, blocks, above):
    """Byte by byte: every block lies under all others, its own bytes one under the other, read as one instruction."""
    edges = [nbytes * i // blocks for i in range(blocks + 1)]
    sizes = [high - low for low, high in itertools.pairwise(edges)]
    assert sum(sizes) == nbytes and max(sizes) - min(sizes) <= 1
    deepest = nbytes + above
    assert step_price(nbytes, blocks, above) == sum(
        read_price(depth) for size in sizes for depth in range(deepest - size + 1, deepest + 1)
    )
