"""Layers of a checkpoint in DeepSeek-V4.1's layout: from every placement the rows and weights that were drawn."""

import numpy as np
import pytest
import torch

from engram_ref.checkpoint.folder import ModelFolder, expected_tensors, tensor_name
from engram_ref.checkpoint.sample import sample_bytes
from engram_ref.checkpoint.v41 import load_fusion_v41, load_layer_v41
from engram_ref.files.conventions import DTYPES
from engram_ref.hashing import NgramHasher
from engram_ref.rows import fp8
from engram_ref.tables import make_table

LAYERS = [1, 14]


@pytest.fixture(scope="module")
def model(sample_folder):
    return ModelFolder.open(sample_folder)


def drawn(model, layer_id, part):
    """A tensor straight from the generator, not from a file."""
    dtype, shape = expected_tensors(model.config, model.plan.layer(layer_id))[part]
    raw = np.concatenate(list(sample_bytes(tensor_name(layer_id, part), dtype, shape, seed=3)))
    return torch.from_numpy(raw).view(DTYPES[dtype]).view(shape)


def drawn_rows(model, layer_id):
    return fp8.dequantise(drawn(model, layer_id, "embed.weight"), drawn(model, layer_id, "embed.scale"))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_id", LAYERS)
def test_rows_read_in_place_are_those_that_were_drawn(model, layer_id):
    stored, want = model.stored_rows(layer_id), drawn_rows(model, layer_id)
    shuffled = torch.randperm(stored.rows, generator=torch.Generator().manual_seed(0))
    with make_table("file", stored) as table:
        assert same_bits(table.start(torch.arange(stored.rows)).wait(), want)
        assert same_bits(table.start(shuffled).wait(), want[shuffled])
    other = drawn_rows(model, 15 - layer_id)[: len(want)]
    assert not same_bits(other, want[: len(other)])  # the comparison would tell the layers apart


def test_the_rows_of_a_text_from_ids_to_values(model):
    """Token ids, compressed ids, row numbers, rows: all from what lies in the folder."""
    ids = np.random.default_rng(1).integers(0, 129_280, (2, 9))
    compressed = model.vocab(ids, dead=ids % 7 == 0)
    for layer_id in LAYERS:
        numbers = torch.from_numpy(NgramHasher(model.plan)(compressed, layer_id))  # [2, 9, 24]
        with make_table("file", model.stored_rows(layer_id)) as table:
            assert same_bits(table.start(numbers.flatten()).wait(), drawn_rows(model, layer_id)[numbers.flatten()])


# --- projection and gains -------------------------------------------------------------------------


@pytest.mark.parametrize("layer_id", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_those_that_were_drawn(model, layer_id, dtype):
    fusion = load_fusion_v41(model, layer_id, dtype=dtype)
    codes, scales = drawn(model, layer_id, "wkv.weight"), drawn(model, layer_id, "wkv.scale")
    found = dict(fusion.state_dict())
    assert same_bits(found.pop("wkv.weight"), fp8.dequantise(codes, scales, 32, dtype))
    assert same_bits(found.pop("q_weight"), drawn(model, layer_id, "q_weight").to(dtype))
    assert same_bits(found.pop("k_weight"), drawn(model, layer_id, "k_weight").to(dtype))
    assert not found and fusion.dtype == dtype


def test_fp8_weights_stay_as_they_are(model):
    fusion = load_fusion_v41(model, 1, fp8=True)
    assert same_bits(fusion.wkv.weight, drawn(model, 1, "wkv.weight"))
    assert same_bits(fusion.wkv.scale, drawn(model, 1, "wkv.scale"))
    assert fusion.dtype == torch.bfloat16


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8_weights", [False, True])
def test_a_layer_computes_the_same_from_every_placement(model, fp8_weights):
    generator = torch.Generator().manual_seed(2)
    config = model.config
    rows = torch.randint(model.plan.layer(14).rows, (2, 5, config.columns), generator=generator)
    hidden = torch.randn(2, 5, config.hc_mult, config.hidden, generator=generator).bfloat16()
    dead = torch.tensor([[False, True, False, False, True]] * 2)
    fusion = load_fusion_v41(model, 14)
    want = fusion(drawn_rows(model, 14)[rows].flatten(2), hidden, dead)
    assert not torch.equal(want[~dead], hidden[~dead]) and torch.equal(want[dead], hidden[dead])
    for placement, options in [("file", {}), ("host", {}), ("device", {}), ("hot", {"hot": torch.arange(40)})]:
        engram = load_layer_v41(model, 14, placement, fp8=fp8_weights, **options)
        assert engram.table.placement == placement
        assert same_bits(engram(hidden, rows, dead=dead), want)
        engram.table.close()


# --- what is refused ------------------------------------------------------------------------------


def overwrite(folder, entry, at, byte):
    """One byte of a tensor, in a file of its own instead of a link."""
    path = folder / entry.path.name
    content = bytearray(path.read_bytes())
    content[entry.offset + at] = byte
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize(("part", "byte"), [("wkv.weight", 0x7F), ("wkv.weight", 0xFF), ("wkv.scale", 0xFF)])
def test_a_projection_with_a_nan_is_refused(folder, model, part, byte):
    overwrite(folder, model.tensor(1, part), 5, byte)
    with pytest.raises(
        ValueError, match=r"layers\.1\.engram\.wkv\.weight or layers\.1\.engram\.wkv\.scale holds a NaN"
    ):
        load_fusion_v41(ModelFolder.open(folder), 1)


@pytest.mark.parametrize(("part", "byte"), [("embed.weight", 0xFF), ("embed.scale", 0xFF)])
def test_rows_with_a_nan_are_refused_where_they_are_loaded(folder, model, part, byte):
    row_bytes = 256 if part == "embed.weight" else 8
    overwrite(folder, model.tensor(14, part), 77 * row_bytes, byte)
    with pytest.raises(ValueError, match="NaN") as refused:
        load_layer_v41(ModelFolder.open(folder), 14, "host")
    assert "row 77" in str(refused.value)


def test_another_projection_of_the_same_shape_is_refused(folder):
    opened = ModelFolder.open(folder)
    overwrite(folder, opened.tensor(1, "q_weight"), 5, 1)
    for load in (load_fusion_v41, load_layer_v41):
        with pytest.raises(ValueError, match=r"was changed after it was checked: call ModelFolder\.open again"):
            load(opened, 1)


def test_unknown_layers_and_placements_are_refused(model):
    with pytest.raises(ValueError, match=r"layer_id=3: this plan has layers \[1, 14\]"):
        load_layer_v41(model, 3)
    with pytest.raises(ValueError, match="no placement 'nowhere'"):
        load_layer_v41(model, 1, "nowhere")
