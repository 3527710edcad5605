"""A layer in a file: round trips, the demo's own checkpoint, and everything that must not be loaded."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.rivals.demo_layer import DemoWay
from engram_ref.checkpoint import load_layer, save_layer
from engram_ref.checkpoint.demo import OFFSETS, TABLE
from engram_ref.files.stored_rows import StoredRows
from engram_ref.fusion import DemoFusion
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.hashing import HashPlan
from tests.ref.test_layer import CONFIG, GOLDEN, RECORDED

RECORDED_LAYER = HashPlan.build(RECORDED, 5403, 2).layer(3)
LAYER = HashPlan.build(CONFIG, 40, 2).layer(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def make_layer(config=CONFIG, layer_plan=LAYER, dtype=torch.float32):
    """A fusion and a table in which NaN and -0.0 must survive too."""
    generator = torch.Generator().manual_seed(0)
    fusion = DemoFusion(config, dtype=dtype)
    fusion.reset_parameters(generator)
    values = torch.randn(layer_plan.rows, config.row_width, generator=generator)
    values[0, 0], values[1, 0] = float("nan"), -0.0
    return fusion, values.to(getattr(torch, config.row_dtype))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "engram.safetensors"
    save_layer(path, *make_layer(), LAYER)
    return path


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_is_layer(engram, fusion, values):
    loaded = engram.fusion.state_dict()
    assert loaded.keys() == fusion.state_dict().keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in fusion.state_dict().items())
    assert same_bits(engram.table.start(torch.arange(len(values))).wait(), values)


def change(path, rename=None, metadata=None, **tensors):
    """The file again, some tensors replaced, removed (None) or renamed, written by the safetensors library."""
    content = load_file(path)
    content.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})
    for old, new in (rename or {}).items():
        content[new] = content.pop(old)
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path, metadata)


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["device", "host", "file", "hot"])
def test_every_placement_loads_the_same_bits(saved, placement):
    options = {"hot": torch.arange(0, 200, 7), "behind": "file"} if placement == "hot" else {}
    engram = load_layer(saved, CONFIG, LAYER, placement, **options)
    assert engram.table.placement == placement
    assert_is_layer(engram, *make_layer())
    engram.table.close()


@pytest.mark.parametrize("row_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=name_of)
def test_every_dtype_survives(tmp_path, dtype, row_dtype):
    config = CONFIG.replace(row_dtype=name_of(row_dtype))
    layer = make_layer(config, dtype=dtype)
    save_layer(tmp_path / "x", *layer, LAYER)
    assert_is_layer(load_layer(tmp_path / "x", config, LAYER), *layer)


@pytest.mark.parametrize("changes", [dict(hidden=7, hc_mult=3, row_width=3), dict(hc_mult=1), dict(kernel_size=0)])
def test_odd_sizes_survive(tmp_path, changes):
    config = CONFIG.replace(row_dtype="bfloat16", **changes)
    layer = make_layer(config, dtype=torch.bfloat16)
    save_layer(tmp_path / "x", *layer, LAYER)
    assert_is_layer(load_layer(tmp_path / "x", config, LAYER, "file"), *layer)
    assert same_bits(load_file(tmp_path / "x")[TABLE], layer[1])  # as the safetensors library reads it


def test_another_dtype_to_compute_in(saved):
    engram = load_layer(saved, CONFIG, LAYER, dtype=torch.bfloat16)
    want = make_layer()[0].bfloat16().state_dict()
    assert all(torch.equal(engram.fusion.state_dict()[name], tensor) for name, tensor in want.items())
    assert engram.table.format.dtype == torch.float32


def test_two_layers_in_one_file_are_told_apart(tmp_path):
    config = CONFIG.replace(layer_ids=(1, 5))
    plan = HashPlan.build(config, 40, 2)
    content = {"model.embed.weight": torch.zeros(3, 3)}
    layers = {i: make_layer(config, plan.layer(i)) for i in (1, 5)}
    for i, layer in layers.items():
        save_layer(tmp_path / "one", *layer, plan.layer(i), prefix=f"layers.{i}.engram.")
        content |= load_file(tmp_path / "one")
    save_file(content, tmp_path / "all")
    for i, layer in layers.items():
        assert_is_layer(load_layer(tmp_path / "all", config, plan.layer(i), prefix=f"layers.{i}.engram."), *layer)
    with pytest.raises(ValueError, match=r"other primes|a table of"):
        load_layer(tmp_path / "all", config, plan.layer(1), prefix="layers.5.engram.")


def test_a_table_with_gaps_is_written_as_what_it_shows(tmp_path):
    fusion, values = make_layer()
    wide = torch.stack([values, values + 1], dim=2)[:, :, 0]
    assert not wide.is_contiguous()
    save_layer(tmp_path / "x", fusion, wide, LAYER)
    assert_is_layer(load_layer(tmp_path / "x", CONFIG, LAYER), fusion, values)


def test_rows_begin_on_a_page(saved):
    assert StoredRows.find(saved, TABLE).parts[0].offset % 4096 == 0


# --- the demo's checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["device", "host", "file"])
@pytest.mark.parametrize("case", ["A.case0", "A.case1", "A.case2"])
def test_the_recorded_layer_loads_and_agrees(case, placement):
    recorded = load_file(GOLDEN)
    engram = load_layer(GOLDEN, RECORDED, RECORDED_LAYER, placement, prefix="A.weights.")
    rows = recorded[f"{case}.hash_ids"] + recorded["A.weights.multi_head_embedding.offsets"]
    hidden = recorded[f"{case}.hidden_states"]
    want = hidden + recorded[f"{case}.output_f64"]  # the record itself is within 1.2e-6
    assert (engram(hidden, rows) - want).abs().max() < 5e-6
    engram.table.close()


def test_saved_names_shapes_and_dtypes_are_the_demos(tmp_path):
    engram = load_layer(GOLDEN, RECORDED, RECORDED_LAYER, prefix="A.weights.")
    values = engram.table.start(torch.arange(engram.table.rows)).wait()
    save_layer(tmp_path / "x", engram.fusion, values, RECORDED_LAYER, prefix="A.weights.")
    ours = load_file(tmp_path / "x")
    theirs = {name: tensor for name, tensor in load_file(GOLDEN).items() if name.startswith("A.weights.")}
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], tensor) for name, tensor in theirs.items())


def test_a_checkpoint_of_the_plain_way_drops_in(tmp_path):
    """Modules and file written by torch and safetensors alone."""
    plain = DemoWay(CONFIG)
    values = torch.randn(LAYER.rows, 4, generator=torch.Generator().manual_seed(1))
    save_file({**plain.state_dict(), TABLE: values, OFFSETS: torch.tensor(LAYER.offsets)}, tmp_path / "x")
    engram = load_layer(tmp_path / "x", CONFIG, LAYER)
    rows = torch.arange(80).view(2, 10, 4)
    hidden = torch.randn(2, 10, 2, 16, generator=torch.Generator().manual_seed(2))
    want = hidden + plain(values[rows].flatten(2), hidden)
    torch.testing.assert_close(engram(hidden, rows), want, rtol=0, atol=5e-6)


# --- what is refused ------------------------------------------------------------------------------


def refuse(path, message, config=CONFIG, layer_plan=LAYER, **options):
    with pytest.raises(ValueError, match=message) as refused:
        load_layer(path, config, layer_plan, **options)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_missing_names_are_refused(saved):
    change(saved, norm2__1__weight=None)
    refuse(saved, r"missing norm2\.1\.weight; unexpected nothing")


def test_unexpected_names_are_refused(saved):
    change(saved, extra__bias=torch.zeros(3))
    refuse(saved, r"missing nothing; unexpected extra\.bias")
    refuse(saved, r"missing nothing; unexpected extra\.bias, short_conv", CONFIG.replace(kernel_size=0))


@pytest.mark.parametrize("name", [TABLE, OFFSETS])
def test_a_file_without_table_or_offsets_is_refused(saved, name):
    change(saved, rename={name: "something.else"})
    refuse(saved, name)


def test_another_prefix_is_refused(saved):
    refuse(saved, r"no tensor 'layers\.1\.multi_head", prefix="layers.1.")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("norm1.0.weight", (15,)), ("short_conv.conv.weight", (32, 4, 1)), ("value_proj.weight", (16, 15))],
)
def test_other_shapes_are_refused(saved, name, shape):
    change(saved, **{name: torch.zeros(shape)})
    refuse(saved, rf"{name} has shape \({shape[0]},.*; this configuration needs \(")


def test_a_table_of_another_size_is_refused(saved):
    change(saved, **{TABLE: torch.zeros(LAYER.rows - 1, 4)})
    refuse(saved, rf"a table of \[{LAYER.rows - 1}, 4\]; .* need \[{LAYER.rows}, 4\]")
    change(saved, **{TABLE: torch.zeros(LAYER.rows, 5)})
    refuse(saved, rf"a table of \[{LAYER.rows}, 5\]")


def test_rows_of_another_dtype_are_refused_with_the_mend(saved):
    refuse(saved, r"use config\.replace\(row_dtype='float32'\)", CONFIG.replace(row_dtype="bfloat16"))


def test_a_table_hashed_with_other_primes_is_refused(saved):
    """Also where its size is the same."""
    first, second, *rest = LAYER.primes
    swapped = dataclasses.replace(LAYER, primes=(second, first, *rest), offsets=(0, second, *LAYER.offsets[2:]))
    assert swapped.rows == LAYER.rows
    refuse(saved, "hashed with other primes", layer_plan=swapped)


def test_a_table_hashed_with_other_multipliers_is_refused(saved):
    """The offsets cannot show it: they do not depend on the vocabulary, the multipliers do."""
    other = HashPlan.build(CONFIG, 41, 2).layer(1)
    assert other.offsets == LAYER.offsets
    refuse(saved, "hash constants differ", layer_plan=other)
    change(saved)  # without our metadata, as the demo's checkpoint, it cannot be seen
    load_layer(saved, CONFIG, other)


def test_weights_of_several_dtypes_need_a_decision(saved):
    change(saved, norm1__0__weight=torch.ones(16, dtype=torch.bfloat16))
    refuse(saved, "the weights are BF16, F32: say which to compute in, with dtype=")
    assert load_layer(saved, CONFIG, LAYER, dtype=torch.float32).fusion.dtype == torch.float32


def test_integer_weights_are_refused(saved):
    names = [name for name in load_file(saved) if name not in (TABLE, OFFSETS)]
    change(saved, **{name: load_file(saved)[name].to(torch.int64) for name in names})
    refuse(saved, "the weights are I64")


def test_a_truncated_file_is_refused(saved):
    os.truncate(saved, saved.stat().st_size - 1)
    refuse(saved, "the file is cut off")


def test_a_plan_of_another_configuration_is_refused(saved):
    other = dataclasses.replace(LAYER, layer_id=2)
    with pytest.raises(ValueError, match="build the plan from the same configuration"):
        load_layer(saved, CONFIG, other)
    with pytest.raises(ValueError, match="build the plan from the same configuration"):
        save_layer(saved, *make_layer(), other)


def test_the_form_v41_is_refused(saved, tmp_path):
    config = CONFIG.replace(form="v41", kernel_size=0)
    message = "form 'v41': a file under the demo's names holds a layer of form 'demo'"
    with pytest.raises(ValueError, match=message):
        load_layer(saved, config, LAYER)
    with pytest.raises(ValueError, match=message):
        save_layer(tmp_path / "x", V41Fusion(config), torch.zeros(LAYER.rows, 4), LAYER)
    assert not (tmp_path / "x").exists()


def test_plain_rows_are_refused_where_fp8_is_configured(tmp_path):
    config = CONFIG.replace(row_width=32)
    plan = HashPlan.build(config, 40, 2).layer(1)
    save_layer(tmp_path / "x", *make_layer(config.replace(row_dtype="bfloat16"), plan), plan)
    refuse(tmp_path / "x", r"replace\(row_dtype='bfloat16'\)", config.replace(row_dtype="float8_e4m3fn"), plan)


@pytest.mark.parametrize("spoil", [lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x.bfloat16(), lambda x: x[0]])
def test_a_table_that_does_not_fit_is_not_saved(saved, spoil):
    kept = saved.read_bytes()
    fusion, values = make_layer()
    with pytest.raises(ValueError, match="table_values"):
        save_layer(saved, fusion, spoil(values), LAYER)
    assert saved.read_bytes() == kept


def test_a_failed_save_leaves_nothing_and_keeps_the_older_file(saved, monkeypatch):
    kept = saved.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*engram\.safetensors"):
        save_layer(saved, *make_layer(), LAYER)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name] and saved.read_bytes() == kept


def test_the_header_holds_the_plan(saved):
    with safe_open(saved, framework="pt") as file:
        recorded = json.loads(file.metadata()["layer_plan"])
    assert recorded["multipliers"] == list(LAYER.multipliers) and recorded["primes"] == list(LAYER.primes)


def test_the_table_is_not_copied_to_be_saved(tmp_path, monkeypatch):
    """A table is larger than what is left of memory: no piece of it that is handled at a time may be."""
    sizes = []
    right = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: (sizes.append(x.nbytes), right(x))[1])
    config = CONFIG.replace(table_size_per_order=(300_000, 300_000))
    plan = HashPlan.build(config, 40, 2).layer(1)
    fusion, values = make_layer(config, plan)
    save_layer(tmp_path / "x", fusion, values, plan)
    assert sum(sizes) > plan.rows * 16 and max(sizes) <= 8 << 20
    assert_is_layer(load_layer(tmp_path / "x", config, plan), fusion, values)
