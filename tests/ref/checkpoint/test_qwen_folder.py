"""A Qwen3.8-Flash-Next checkpoint, written by transformers itself: read in place, and refused however it is wrong."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from engram_ref.attach import offload_table, without_table
from engram_ref.checkpoint import sample
from engram_ref.checkpoint.qwen import load_layer_qwen
from engram_ref.checkpoint.qwen_config import read_qwen_config
from engram_ref.checkpoint.qwen_folder import QwenFolder
from engram_ref.config import EngramConfig
from engram_ref.files.header import read_header
from engram_ref.hashing import NgramHasher
from engram_ref.plan import check
from tests.ref.attach.test_offload import TWO_TABLES, make_model
from tests.ref.files.test_header import dig
from tests.ref.fusion.qwen_oracle import qwen4, text_config

PLE = "model.layers.2.ple."
TABLE = PLE + "ple_embedding.ngram_embedding."
CONSTANTS = ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")


@pytest.fixture(scope="module")
def model():
    return make_model(**TWO_TABLES, split_ngram_parts=13)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """What transformers saves: 13 shards of each table, in many files."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "model")


def table_of(model, block):
    return model.model.layers[block].ple.ple_embedding.ngram_embedding.weight.detach()


# --- read -----------------------------------------------------------------------------------------


def test_the_rows_are_those_that_were_saved(written, model):
    opened = QwenFolder.open(written)
    assert opened.config.layer_ids == (0, 2) and opened.config.row_dtype == "float32"
    assert {layer: len(shards) for layer, shards in opened.shards.items()} == {0: 13, 2: 13}
    for block in (0, 2):
        assert torch.equal(opened.stored_rows(block).read().values(), table_of(model, block))
    with pytest.raises(ValueError, match=r"this model has tables in layers \[0, 2\]: say which"):
        opened.stored_rows()
    with pytest.raises(ValueError, match=r"layer_id=1: this plan has layers \[0, 2\]"):
        opened.stored_rows(1)


@pytest.mark.parametrize("placement", ["file", "host"])
def test_a_layer_is_the_classs(written, model, placement):
    opened = QwenFolder.open(written)
    engram = load_layer_qwen(opened, 2, placement, dtype=torch.float64)
    ids = torch.randint(0, 1000, (2, 17), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 17, 4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = NgramHasher(opened.plan)(ids.numpy(), 2)
    with torch.no_grad():
        expected = model.model.layers[2].ple(hidden.float().flatten(-2), ids, None).view_as(hidden)
        found = engram(hidden, rows) - hidden
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)  # the class computes in float32
    engram.table.close()


def test_a_model_without_its_table_reads_it_from_the_folder(written, model):
    ids = torch.randint(0, 1000, (2, 17), generator=torch.Generator().manual_seed(0))
    with without_table():
        lean = qwen4.Qwen4ExpForCausalLM.from_pretrained(written).eval()
    opened = QwenFolder.open(written)
    rows = {block: opened.stored_rows(block) for block in opened.shards}
    with torch.no_grad(), offload_table(lean, "file", rows):
        assert torch.equal(lean(ids).logits, model(ids).logits)
    with torch.no_grad(), offload_table(model, "file", rows) as offloaded:  # one that has it: compared, then let go
        assert offloaded.freed_bytes == {"cpu": (16_896 + 18_688) * 8 * 4}
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_command_checks_it(written):
    lines = check(written)
    assert "form qwen, layers 0, 2" in lines[0] and "1000 token ids, hashed as they are; 7 ends a text" in lines[1]
    assert "layer 2: 18688 rows of 8 values, F32, in 13 tensors" in lines[-1]
    with pytest.raises(ValueError, match=r"gives layer_ids=.0, 2., preset qwen38-flash-next has .1,.: name the preset"):
        check(written, "qwen38-flash-next")


# --- config.json ----------------------------------------------------------------------------------


def published(**changes):
    """What the published file says of its table."""
    text = {
        "hidden_size": 2560, "hc_count": 4, "num_hidden_layers": 48, "ple_layer_ids": [2], "ple_embed_dim": 2560,
        "eos_token_id": 248_044, "vocab_size": 248_320, "rms_norm_eps": 1e-6, **changes,
    }  # fmt: skip
    return {"model_type": "qwen4_exp", "text_config": {k: v for k, v in text.items() if v is not ...}}


def read(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    return read_qwen_config(tmp_path)


def test_the_published_configuration_is_the_preset(tmp_path):
    preset = EngramConfig.preset("qwen38-flash-next")
    assert read(tmp_path, published()) == preset
    assert read(tmp_path, published(ple_embed_dim=...)) == preset  # as wide as the stream
    assert read(tmp_path, published(eos_token_id=[248_044, 248_046])) == preset
    assert read(tmp_path, {"model_type": "qwen4_exp_text", **published()["text_config"]}) == preset
    assert read(tmp_path, published(ple_layer_ids=[9, 2, 2])).layer_ids == (1, 8)


def test_defaults_are_those_of_the_class(tmp_path):
    """A file with nothing but what the class itself demands."""
    given = text_config(
        **{name: getattr(type(text_config()), name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
        ngram_vocab_size_base=20_000_000, ple_embed_dim=None,
    )  # fmt: skip
    found = read(tmp_path, {"model_type": "qwen4_exp_text", "ple_layer_ids": [1], "eos_token_id": 7})
    assert (found.compressed_size, found.hidden, found.hc_mult) == (given.vocab_size, given.hidden_size, given.hc_count)
    assert (found.max_ngram, found.heads, found.row_width) == (3, 8, given.ple_embed_dim // 16)
    assert (found.seed, found.rows_multiple, found.norm_eps) == (given.seed, 128, given.rms_norm_eps)
    assert found.kernel_size == given.ple_conv_kernel_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ple_layer_ids": []}, r"ple_layer_ids=\[\]: this model has no n-gram table"),
        ({"ple_layer_ids": ...}, "ple_layer_ids=None: this model has no n-gram table"),
        ({"ple_layer_ids": [0]}, "ple_layer_ids=0: must be an integer of at least 1"),
        ({"ple_layer_ids": [49]}, "ple_layer_ids=49: must be at most 48"),
        ({"ple_layer_ids": [2.0]}, "ple_layer_ids=2.0: must be an integer"),
        ({"ple_embed_dim": 2561}, "ple_embed_dim=2561: must be a multiple of its 16 columns"),
        ({"eos_token_id": None}, "eos_token_id=None: must be an integer"),
        ({"eos_token_id": []}, r"eos_token_id=\[\]: must be an integer"),
        ({"eos_token_id": 248_320}, "eos_token_id=248320: must be at most 248319"),
        ({"rms_norm_eps": "1e-6"}, "norm_eps='1e-6': form qwen needs a number"),
        ({"ngram_size": 1}, "ngram_size=1: must be an integer of at least 2"),
        ({"ngram_size": 64, "heads_per_ngram": 1024}, "must be at most 16384 together"),
        ({"seed": -1}, "seed=-1: must be an integer of at least 0"),
        ({"vocab_size": True}, "vocab_size=True: must be an integer"),
    ],
)
def test_a_wrong_field_is_refused(tmp_path, changes, message):
    with pytest.raises(
        ValueError, match=f"config.json: .*{message}.*; take the config.json that came with the weights"
    ):
        read(tmp_path, published(**changes))


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_type='llama', not 'qwen4_exp' or 'qwen4_exp_text'"):
        read(tmp_path, {**published(), "model_type": "llama"})
    with pytest.raises(ValueError, match="text_config=3 is not an object"):
        read(tmp_path, {**published(), "text_config": 3})
    with pytest.raises(ValueError, match=r"no config\.json in"):
        read_qwen_config(tmp_path / "elsewhere")


def test_a_sample_is_read_as_what_transformers_saves(tmp_path, capsys):
    sample.main([str(tmp_path / "sample"), "--preset", "qwen38-flash-next", "--first-prime", "100"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it records how its rows are hashed
        folder = QwenFolder.open(tmp_path / "sample")
    preset = EngramConfig.preset("qwen38-flash-next")
    assert folder.config == preset.replace(table_size_per_order=(100, 100), hidden=64)
    assert [len(shards) for shards in folder.shards.values()] == [sample.QWEN_SHARDS] * len(preset.layer_ids)
    layer = preset.layer_ids[0]
    ids = torch.tensor([[5, 7, 11]])
    engram = load_layer_qwen(folder, layer, dtype=torch.float32)
    rows = NgramHasher(folder.plan)(ids.numpy(), layer_id=layer)
    whole = torch.cat([load_file(x.path)[x.name] for x in folder.shards[layer]])
    assert torch.equal(engram.table.start(torch.from_numpy(rows).reshape(-1)).wait(), whole[rows.reshape(-1)])
    assert check(tmp_path / "sample") and "check it with" in capsys.readouterr().out


# --- damaged checkpoints --------------------------------------------------------------------------


def rewrite(folder, change):
    """All tensors of the checkpoint through `change`, in one file."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


DAMAGES = {
    "a shard is missing": (drop(f"{TABLE}shard_4.weight"), "table of layer 2: shard_4 missing, of shards up to 12"),
    "the last shard is missing": (
        drop(f"{TABLE}shard_12.weight"),
        r"table of layer 2: \d+ rows in 12 tensors; the 16 primes from 1009 up, .* give 18688",
    ),
    "a shard too many": (put(f"{TABLE}shard_13.weight", lambda _: torch.zeros(1, 8)), "18689 rows in 14 tensors"),
    "a shard twice": (
        put(f"{TABLE}shard_04.weight", lambda _: torch.zeros(1, 8)),
        r"shard_0?4\.weight is no shard, or one that is there twice",
    ),
    "a shard under a number of another script": (
        lambda tensors: tensors.update({f"{TABLE}shard_\u0664.weight": tensors.pop(f"{TABLE}shard_4.weight")}),
        "is no shard, or one that is there twice",
    ),
    **{
        f"a tensor twice, of layer {number}": (
            put(f"model.layers.{number}.ple.{part}", lambda _: torch.zeros(1, 8)),
            rf"has model\.layers\..+\.ple\.{part}: its layer's number is not written as transformers does",
        )
        for number, part in {
            "02": "ple_embedding.ngram_embedding.shard_0.weight",
            "00": "key_proj.weight",
            "\u0662": "conv1d.weight",
            "0000002": "norm_key.weight",
        }.items()
    },
    "a stranger among them": (put(f"{TABLE}scale", lambda _: torch.zeros(1, 8)), "scale is no shard"),
    "no shards": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(TABLE)],
        "table of layer 2: no tensor",
    ),
    "another width": (put(f"{TABLE}shard_3.weight", lambda t: t[:, :7].clone()), r"has shape \[\d+, 7\]; .* 8 values"),
    "another dtype": (put(f"{TABLE}shard_3.weight", lambda t: t.half()), "shard_3.weight is F16, the first is F32"),
    "no rows but numbers": (
        put(f"{TABLE}shard_0.weight", lambda t: t.to(torch.int32)),
        "is I32, the first is I32: rows are one of BF16, F16, F32",
    ),
    "a weight is missing": (drop(f"{PLE}norm_conv.weight"), r"has no layers\.2\.ple\.norm_conv\.weight"),
    "a weight of another shape": (put(f"{PLE}key_proj.weight", lambda t: t[:-1].clone()), r"shape \[255, 128\]; the"),
    "a weight of another layer": (put(f"{PLE}gate.weight", lambda _: torch.zeros(1)), "layer 2 has gate.weight, which"),
    "a layer that has none": (
        put("model.layers.3.ple.key_proj.weight", lambda _: torch.zeros(1)),
        r"n-gram tensors in layers \[0, 2, 3\]; config.json has ple_layer_ids=\[1, 3\], counted from 1",
    ),
    "two models": (
        put("model.language_model.layers.2.ple.key_proj.weight", lambda _: torch.zeros(1)),
        "has n-gram layers under 'model.' and 'model.language_model.'",
    ),
    **{
        name: (put(f"{PLE}ple_embedding.{name}", lambda t: t + 2), rf"{name} is \[.*the rows were hashed otherwise")
        for name in CONSTANTS
    },
    "constants of another kind": (
        put(f"{PLE}ple_embedding.layer_multipliers", lambda t: t.double()),
        r"layer_multipliers is F64 \[3\], not I64 \[3\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(folder, damage):
    change, message = DAMAGES[damage]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        QwenFolder.open(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [f"{TABLE}shard_3.weight", f"{PLE}key_proj.weight"])
def test_a_tensor_that_was_never_written_is_refused_whatever_it_is(folder, name):
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    first = read_header(path)[name].offset
    dig(path, first, first + read_header(path)[name].nbytes)
    with pytest.raises(ValueError, match=f"tensor '{re.escape(name)}': byte .* was never written"):
        QwenFolder.open(folder)
    assert QwenFolder.open(folder, sparse=True).sparse


def test_an_unharmed_one_is_not(folder):
    rewrite(folder, lambda tensors: None)
    assert len(QwenFolder.open(folder).shards[2]) == 13


def test_one_tensor_for_the_table_and_no_constants(folder, model):
    def change(tensors):
        for block in (0, 2):
            prefix = f"model.layers.{block}.ple.ple_embedding."
            for name in [n for n in tensors if n.startswith(prefix)]:
                del tensors[name]
            tensors[f"{prefix}ngram_embedding.weight"] = table_of(model, block).clone()

    rewrite(folder, change)
    lacking = (
        r"has no layers\.0\.ple\.ple_embedding\.layer_multipliers, .*layers\.2\..*: with others, every row would be"
    )
    with pytest.warns(UserWarning, match=lacking):
        opened = QwenFolder.open(folder)
    assert torch.equal(opened.stored_rows(2).read().values(), table_of(model, 2))


def test_an_index_that_says_otherwise_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = f"{TABLE}shard_5.weight"
    other = next(file for file in content["weight_map"].values() if file != content["weight_map"][name])
    for change, message in (
        ({name: other}, f"says that {re.escape(name)} is in {other}; it is in"),
        ({name: "../model.safetensors"}, "must lie in the folder itself"),
    ):
        changed = {**content, "weight_map": {**content["weight_map"], **change}}
        index.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            QwenFolder.open(folder)
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not name model\.layers\.2\.ple.*shard_5\.weight, which its files have"):
        QwenFolder.open(folder)


def exchange(entry):
    """Another file with the same names and shapes: every tensor one larger."""
    tensors = {name: tensor + 1 for name, tensor in load_file(entry.path).items()}
    entry.path.unlink()
    save_file(tensors, entry.path, metadata={"format": "pt"})  # as transformers has it: no byte is moved


def test_other_values_of_the_same_shape_are_noticed(folder, model):
    opened = QwenFolder.open(folder)
    shard, weight = opened.shards[2][3], opened.tensors[2]["conv1d.weight"]
    exchange(shard)
    with pytest.raises(ValueError, match=rf"{shard.path.name} was changed after it was checked: call QwenFolder\.open"):
        opened.stored_rows(2)
    again = QwenFolder.open(folder)
    assert not torch.equal(again.stored_rows(2).read().values(), table_of(model, 2))
    exchange(weight)
    with pytest.raises(
        ValueError, match=rf"{weight.path.name} was changed after it was checked: call QwenFolder\.open"
    ):
        load_layer_qwen(again, 2)
