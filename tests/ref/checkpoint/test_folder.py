"""Checkpoints opened where they lie: the published one at its full size (sparse files), a small one with real content,
and every way in which one can be wrong, with the sentence that says so.

    python -m pytest tests/ref/checkpoint/test_folder.py
"""

from __future__ import annotations

import copy
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram_ref.checkpoint.config_json import config_fields, read_config, table_rows
from engram_ref.checkpoint.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    TOKENIZER_FILE,
    ModelFolder,
    expected_tensors,
    tensor_name,
)
from engram_ref.checkpoint.sample import sample_bytes
from engram_ref.config import EngramConfig
from engram_ref.files.header import DTYPE_BITS, read_header
from engram_ref.hashing.plan import HashPlan
from engram_ref.tables import make_table

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"

# As published, Engram's part of it; a few of the other fields stand for the rest.
PUBLISHED = {
    "architectures": ["DeepseekV41ForCausalLM"],
    "model_type": "deepseek_v41",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [32, 32],
    },
    "text_config": {
        "vocab_size": 129280,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "rms_norm_eps": 1e-20,
        "hc_mult": 4,
        "hc_eps": 1e-6,
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 16000000,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 99092,
    },
}
NEEDED = [name for name in PUBLISHED["text_config"] if name not in ("num_attention_heads", "hc_eps")]
SECOND, THIRD = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.fixture(autouse=True)
def _cache(monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.fixture
def folder(sample_folder, tmp_path):
    """The sample as links, as the Hugging Face cache has its files; a test replaces what it spoils."""
    for file in sample_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def put(path, content):
    """In place of a link, what the test wants there."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def load(path):
    return json.loads(path.read_bytes())


def published(**text):
    config = copy.deepcopy(PUBLISHED)
    config["text_config"] |= text
    return config


def refuse(folder, *messages):
    with pytest.raises(ValueError) as refused:
        ModelFolder.open(folder)
    for message in messages:
        assert message in str(refused.value)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


# --- config.json ----------------------------------------------------------------------------------


def test_the_published_configuration_is_the_preset(tmp_path):
    put(tmp_path / "config.json", PUBLISHED)
    assert read_config(tmp_path) == EngramConfig.preset("v41-flash")
    flat = {**PUBLISHED, **PUBLISHED["text_config"]}
    del flat["text_config"]
    put(tmp_path / "config.json", flat)
    assert read_config(str(tmp_path)) == EngramConfig.preset("v41-flash")


def test_our_own_fields_are_the_published_ones(tmp_path):
    config = EngramConfig.preset("v41-flash")
    fields = config_fields(config, table_rows(config), 129280, 40)
    assert {**fields, "text_config": None} == {**PUBLISHED, "text_config": None}
    assert fields["text_config"] == {name: PUBLISHED["text_config"][name] for name in NEEDED}
    other = config.replace(
        layer_ids=(0, 3, 7),
        hidden=96,
        hc_mult=2,
        heads=3,
        max_ngram=3,
        row_width=64,
        pad_id=5,
        table_size_per_order=(100, 100),
        compressed_size=5403,
    )
    put(tmp_path / "config.json", config_fields(other, table_rows(other), 8182, 8))
    assert read_config(tmp_path) == other


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_field_is_named(tmp_path, name):
    config = published()
    del config["text_config"][name]
    put(tmp_path / "config.json", config)
    refuse(tmp_path, f"config.json: {name} is missing: take the config.json that came with the weights")


def changed(changes):
    """The published configuration with other values: in text_config, or after a slash from the top."""
    config = published()
    for path, value in changes.items():
        *keys, last = path[1:].split("/") if path.startswith("/") else ("text_config", path)
        place = config
        for key in keys:
            place = place[key]
        place[last] = value
    return config


CONTRADICTIONS = {
    "another model": ({"/model_type": "deepseek_v3"}, "model_type='deepseek_v3', not 'deepseek_v41'"),
    "no model": ({"/model_type": None}, "model_type=None"),
    "text no object": ({"/text_config": [1]}, "text_config=[1] is not an object"),
    "no quantisation": ({"/quantization_config": None}, "quantization_config=None is not an object"),
    "larger blocks": (
        {"/quantization_config/weight_block_size": [128, 128]},
        "weight_block_size=[128, 128]; the rows are stored with [32, 32], and with anything else they decode to wrong",
    ),
    "other scales": (
        {"/quantization_config/scale_fmt": "float32"},
        "scale_fmt='float32'; the rows are stored with 'ue8m0'",
    ),
    "another method": ({"/quantization_config/quant_method": "awq"}, "quant_method='awq'"),
    "another eps": ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06; the gate of this model computes with 1e-20"),
    "eps no number": ({"rms_norm_eps": "1e-20"}, "rms_norm_eps='1e-20'"),
    "two meanings": ({"/hidden_size": 1024}, "hidden_size is 1024 at the top level and 5120 in text_config"),
    "hidden real": ({"hidden_size": 5120.0}, "hidden_size=5120.0: must be an integer of at least 1"),
    "hidden text": ({"hidden_size": "5120"}, "hidden_size='5120': must be an integer of at least 1"),
    "heads 0": ({"engram_n_heads": 0}, "engram_n_heads=0: must be an integer of at least 1"),
    "copies true": ({"hc_mult": True}, "hc_mult=True: must be an integer"),
    "unigrams": ({"engram_max_ngram_size": 1}, "engram_max_ngram_size=1: must be an integer of at least 2"),
    "negative pad": ({"engram_pad_token_id": -1}, "engram_pad_token_id=-1"),
    "pad no token": ({"engram_pad_token_id": 129280}, "engram_pad_token_id=129280 does not fit vocab_size=129280"),
    "more compressed than tokens": ({"vocab_size": 99091}, "engram_compressed_vocab_size=99092 does not fit"),
    "layer too deep": ({"num_hidden_layers": 14}, "engram_layer_ids=[1, 14] does not fit num_hidden_layers=14"),
    "layers no list": ({"engram_layer_ids": 1}, "engram_layer_ids=1: must be a list of integers"),
    "layer real": ({"engram_layer_ids": [1, 14.0]}, "engram_layer_ids=[1, 14.0]: must be a list of integers"),
    "layer twice": ({"engram_layer_ids": [1, 1]}, "give at least one layer, each once"),
    "no layer": ({"engram_layer_ids": []}, "give at least one layer, each once"),
    "negative layer": ({"engram_layer_ids": [-1, 14]}, "must be an integer of at least 0"),
    "a width of no whole blocks": ({"engram_head_dim": 250}, "float8 rows need a multiple of 32"),
    "projection of no whole blocks": ({"hidden_size": 5121}, "(hc_mult + 1) * hidden_size = 25605"),
    "three tables": (
        {"engram_num_embeddings": [384006168, 384016682, 1]},
        "engram_num_embeddings has 3 entries and engram_layer_ids 2",
    ),
    "tables exchanged": (
        {"engram_num_embeddings": [384016682, 384006168]},
        "gives layer 1 384016682 rows; the 24 primes from engram_vocab_size=16000000 up give 384006168",
    ),
    "a row more": (
        {"engram_num_embeddings": [384006168, 384016683]},
        "gives layer 14 384016683 rows; the 24 primes from engram_vocab_size=16000000 up give 384016682",
    ),
    "other primes": (
        {"engram_vocab_size": 16000058},
        "gives layer 1 384006168 rows; the 24 primes from engram_vocab_size=16000058 up give 384006588",
    ),
    "fewer heads": ({"engram_n_heads": 7}, "the 21 primes from"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_named(tmp_path, case):
    changes, message = CONTRADICTIONS[case]
    put(tmp_path / "config.json", changed(changes))
    refuse(tmp_path, "config.json: ", message)


def test_a_configuration_that_is_none_is_refused(tmp_path):
    refuse(tmp_path, "no config.json in ")
    put(tmp_path / "config.json", b'{"model_type": ')
    refuse(tmp_path, "config.json is damaged: Expecting value: line 1 column 16 (char 15); download it again")
    put(tmp_path / "config.json", b"[1]")
    refuse(tmp_path, "config.json is damaged: it holds a list, not a JSON object")
    put(tmp_path / "config.json", b"\xff\xfe{}")
    refuse(tmp_path, "config.json is damaged")
    put(tmp_path / "config.json", b'{"model_type": "deepseek_v41", "model_type": "deepseek_v41"}')
    refuse(tmp_path, "the name 'model_type' stands there twice")
    refuse(tmp_path / "nowhere", "is not a folder: give the folder of a checkpoint")


# --- the published checkpoint, at its full size ---------------------------------------------------

SHARDS = {1: "model-00047-of-00048.safetensors", 14: "model-00048-of-00048.safetensors"}
# layer 1, layer 14: bytes as published
PUBLISHED_BYTES = {
    "embed.weight": (98_305_579_008, 98_308_270_592),
    "embed.scale": (3_072_049_344, 3_072_133_456),
    "wkv.weight": (157_286_400, 157_286_400),
    "wkv.scale": (153_600, 153_600),
    "q_weight": (40_960, 40_960),
    "k_weight": (40_960, 40_960),
}


def write_sparse(path, tensors):
    """A safetensors file with a real header and holes for data; where the tensors begin."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + DTYPE_BITS[dtype] // 8 * shape[0] * shape[1]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.fixture
def real_folder(tmp_path):
    """The two Engram files of the published model, their data holes that take no room; the other 46 are not there."""
    rows = dict(zip((1, 14), PUBLISHED["text_config"]["engram_num_embeddings"]))
    weight_map = {f"layers.{i}.attn_norm.weight": f"model-{i + 1:05}-of-00048.safetensors" for i in range(40)}
    for layer_id, file in SHARDS.items():
        tensors = {
            "embed.weight": ("F8_E4M3", (rows[layer_id], 256)),
            "embed.scale": ("F8_E8M0", (rows[layer_id], 8)),
            "wkv.weight": ("F8_E4M3", (25600, 6144)),
            "wkv.scale": ("F8_E8M0", (800, 192)),
            "q_weight": ("BF16", (4, 5120)),
            "k_weight": ("BF16", (4, 5120)),
        }
        named = {f"layers.{layer_id}.engram.{part}": tensor for part, tensor in tensors.items()}
        write_sparse(tmp_path / file, named)
        weight_map |= dict.fromkeys(named, file)
    put(tmp_path / "config.json", PUBLISHED)
    put(tmp_path / INDEX_FILE, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return tmp_path


def test_the_published_checkpoint_opens(real_folder, golden):
    model = ModelFolder.open(real_folder, sparse=True)
    assert model.config == EngramConfig.preset("v41-flash") and model.tokenizer_path is None
    assert model.vocab.digest == "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"
    assert model.tokenizer_sha256 == "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"
    recorded = golden("hash_v41.json")
    assert [layer.rows for layer in model.plan.layers] == recorded["rows"] == [384_006_168, 384_016_682]
    for layer, primes, offsets in zip(model.plan.layers, recorded["primes"], recorded["offsets"]):
        assert list(layer.multipliers) == recorded["multipliers"][str(layer.layer_id)]
        assert list(layer.primes) == [prime for order in primes for prime in order]
        assert list(layer.offsets) == offsets
    assert model.plan.pad_compressed == recorded["config"]["pad_compressed_id"]
    for part, nbytes in PUBLISHED_BYTES.items():
        assert tuple(model.tensor(layer_id, part).nbytes for layer_id in (1, 14)) == nbytes
    assert {model.tensor(1, part).path.name for part in PUBLISHED_BYTES} == {SHARDS[1]}
    assert {model.tensor(14, part).path.name for part in PUBLISHED_BYTES} == {SHARDS[14]}
    assert len(model.weight_map) == 52


@pytest.mark.parametrize("layer_id", [1, 14])
def test_the_last_row_of_the_published_table_is_read_in_place(real_folder, layer_id):
    """Rows lie up to 98 GB into the file: no offset may be cut to 32 bits."""
    tensors = read_header(real_folder / SHARDS[layer_id])
    codes, scales = (tensors[tensor_name(layer_id, part)] for part in ("embed.weight", "embed.scale"))
    last = codes.shape[0] - 1
    with open(codes.path, "r+b") as file:
        for entry, content in ((codes, bytes(range(1, 127)) + bytes(130)), (scales, bytes([127] * 8))):
            file.seek(entry.offset + last * entry.shape[1])
            file.write(content)
    stored = ModelFolder.open(real_folder, sparse=True).stored_rows(layer_id)
    assert stored.rows == last + 1 and stored.nbytes == (last + 1) * 264
    with make_table("file", stored) as table:
        first, found = table.start(torch.tensor([0, last])).wait()
    want = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16()
    assert torch.equal(found[:126], want) and not found[126:].any() and not first.any()


# --- a small checkpoint with content --------------------------------------------------------------


def content_of(entry):
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def test_the_sample_opens_and_holds_what_was_drawn(sample_folder):
    model = ModelFolder.open(sample_folder)
    assert model.tokenizer_path == sample_folder / TOKENIZER_FILE
    assert model.config == EngramConfig.preset("v41-flash").replace(table_size_per_order=(31, 31, 31), hidden=32)
    for layer in model.plan.layers:
        for part, (dtype, shape) in expected_tensors(model.config, layer).items():
            entry = model.tensor(layer.layer_id, part)
            assert (entry.dtype, entry.shape) == (dtype, shape)
            drawn = b"".join(piece.tobytes() for piece in sample_bytes(entry.name, dtype, shape, seed=3))
            assert content_of(entry) == drawn
    assert model.tensor(1, "embed.weight").path.name == SECOND
    assert model.tensor(14, "embed.weight").path.name == THIRD


def test_links_out_of_the_folder_are_the_owners_will(folder, sample_folder):
    """A folder of the Hugging Face cache is made of them."""
    linked, plain = ModelFolder.open(folder), ModelFolder.open(sample_folder)
    assert linked.plan == plain.plan and linked.tensors.keys() == plain.tensors.keys()
    assert [x.offset for x in linked.tensors.values()] == [x.offset for x in plain.tensors.values()]


def test_a_model_in_one_file(folder):
    single = {}
    data = b""
    for file in (SECOND, THIRD):
        for entry in read_header(folder / file).values():
            piece = content_of(entry)
            span = [len(data), len(data) + len(piece)]
            single[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
            data += piece
        (folder / file).unlink()
    text = json.dumps(single).encode()
    put(folder / SINGLE_FILE, len(text).to_bytes(8, "little") + text + data)
    (folder / INDEX_FILE).unlink()
    model = ModelFolder.open(folder)
    assert set(model.weight_map.values()) == {SINGLE_FILE} and len(model.weight_map) == 12
    assert model.stored_rows(14).rows == model.plan.layer(14).rows
    del single["layers.14.engram.k_weight"]
    text = json.dumps(single).encode()
    put(folder / SINGLE_FILE, len(text).to_bytes(8, "little") + text + data[:-256])
    refuse(folder, "has no layers.14.engram.k_weight: download the checkpoint again")


def test_the_other_files_need_not_be_there(folder):
    (folder / "model-00001-of-00003.safetensors").unlink()
    assert ModelFolder.open(folder).stored_rows(1).rows > 0


def test_codes_and_scales_may_lie_in_two_files(folder):
    """An index may put them anywhere."""
    name = tensor_name(1, "embed.scale")
    entry = read_header(folder / SECOND)[name]
    scales = content_of(entry)
    lone = json.dumps({name: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [0, entry.nbytes]}}).encode()
    put(folder / "scales.safetensors", len(lone).to_bytes(8, "little") + lone + scales)
    rewrite(folder / SECOND, drop={name})
    index = load(folder / INDEX_FILE)
    index["weight_map"][name] = "scales.safetensors"
    put(folder / INDEX_FILE, index)
    model = ModelFolder.open(folder)
    assert model.tensor(1, "embed.scale").path.name == "scales.safetensors"
    assert content_of(model.tensor(1, "embed.scale")) == scales
    assert [part.path.name for part in model.stored_rows(1).parts] == [SECOND, "scales.safetensors"]


def rewrite(path, drop=(), rename=None, **given):
    """The file again: without some tensors, others renamed, others with another dtype or shape of the same bytes."""
    header, data = {}, b""
    for entry in read_header(path).values():
        if entry.name in drop:
            continue
        piece = content_of(entry)
        dtype, shape = given.get(entry.name.rsplit("engram.")[-1].replace(".", "_"), (entry.dtype, list(entry.shape)))
        piece = (piece * 2)[: DTYPE_BITS[dtype] // 8 * shape[0] * (shape[1] if len(shape) > 1 else 1)]
        name = (rename or {}).get(entry.name, entry.name)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(header).encode()
    put(path, len(text).to_bytes(8, "little") + text + data)


def test_unknown_layers_and_parts_are_refused(sample_folder):
    model = ModelFolder.open(sample_folder)
    with pytest.raises(ValueError, match=r"layer_id=2: this plan has layers \[1, 14\]"):
        model.stored_rows(2)
    with pytest.raises(ValueError, match=r"part='bias': a layer has embed\.weight, embed\.scale, wkv\.weight"):
        model.tensor(1, "bias")


def test_a_file_that_was_changed_meanwhile_is_noticed(folder):
    model = ModelFolder.open(folder)
    header = read_header(folder / SECOND)
    rewrite(folder / SECOND, embed_weight=("F8_E4M3", [header[tensor_name(1, "embed.weight")].shape[0] - 1, 256]))
    rewrite(folder / SECOND, embed_scale=("F8_E8M0", [header[tensor_name(1, "embed.scale")].shape[0] - 1, 8]))
    with pytest.raises(ValueError, match=r"was changed after it was checked: call ModelFolder\.open again"):
        model.stored_rows(1)


@pytest.mark.parametrize("exchanged", [False, True], ids=["written to", "exchanged"])
def test_other_rows_of_the_same_shape_are_noticed(folder, exchanged):
    put(folder / SECOND, (folder / SECOND).read_bytes())
    model = ModelFolder.open(folder)
    entry = model.tensor(1, "embed.weight")
    content = entry.path.read_bytes()
    if exchanged:
        entry.path.rename(folder / "before")
    entry.path.write_bytes(content[: entry.offset] + b"\1" + content[entry.offset + 1 :])
    os.utime(entry.path, ns=(0, entry.stamp.changed + (not exchanged)))
    with pytest.raises(ValueError, match=rf"{SECOND} was changed after it was checked: call ModelFolder\.open again"):
        model.stored_rows(1)
    assert ModelFolder.open(folder).stored_rows(1).read().parts[0][0, 0] == 1


# --- what is wrong with weights and index ---------------------------------------------------------


def test_a_missing_shard(folder):
    (folder / THIRD).unlink()
    refuse(folder, f"{THIRD} is missing, and it holds Engram tensors: download it")
    (folder / THIRD).symlink_to(folder / "nowhere")
    refuse(folder, f"{THIRD} is missing, and it holds Engram tensors: download it")


def test_a_truncated_shard(folder):
    whole = (folder / THIRD).read_bytes()
    put(folder / THIRD, whole[:-1])
    refuse(folder, THIRD, f"has {len(whole) - 1} bytes, its header describes {len(whole)}: the file is cut off")


def test_a_header_of_absurd_length(folder):
    put(folder / SECOND, b"\xff" * 8 + (folder / SECOND).read_bytes()[8:])
    refuse(folder, SECOND, f"claims a header of {2**64 - 1} bytes")


def test_overlapping_tensors(folder):
    content = (folder / SECOND).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["layers.1.engram.k_weight"]["data_offsets"] = header["layers.1.engram.q_weight"]["data_offsets"]
    text = json.dumps(header).encode()
    put(folder / SECOND, len(text).to_bytes(8, "little") + text + content[8 + length :])
    refuse(
        folder, SECOND, "tensor 'layers.1.engram.", "so they overlap: the header is damaged, download the file again"
    )


@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        ("embed.weight", "I8"),
        ("embed.weight", "F8_E5M2"),
        ("embed.scale", "U8"),
        ("wkv.weight", "BF16"),
        ("wkv.scale", "F32"),
        ("q_weight", "F16"),
        ("k_weight", "F32"),
    ],
)
def test_wrong_dtypes(folder, part, dtype):
    name = tensor_name(1, part)
    entry = read_header(folder / SECOND)[name]
    shape = [entry.shape[0], entry.shape[1] // (DTYPE_BITS[dtype] // DTYPE_BITS[entry.dtype])]
    rewrite(folder / SECOND, **{part.replace(".", "_"): (dtype, shape)})
    refuse(folder, SECOND, f"tensor '{name}': {dtype}, not {entry.dtype}: use the weights as they were published")


@pytest.mark.parametrize("part", PUBLISHED_BYTES)
def test_wrong_shapes(folder, part):
    name = tensor_name(14, part)
    entry = read_header(folder / THIRD)[name]
    shape = [entry.shape[1], entry.shape[0]]
    rewrite(folder / THIRD, **{part.replace(".", "_"): (entry.dtype, shape)})
    refuse(folder, THIRD, f"tensor '{name}': shape {shape}; configuration and primes need {list(entry.shape)}")


@pytest.mark.parametrize("more", [-1, 1])
def test_a_table_with_another_number_of_rows(folder, more):
    shape = list(read_header(folder / SECOND)["layers.1.engram.embed.weight"].shape)
    rewrite(folder / SECOND, embed_weight=("F8_E4M3", [shape[0] + more, 256]))
    refuse(folder, f"tensor 'layers.1.engram.embed.weight': shape [{shape[0] + more}, 256]; ", f"need {shape}")


def test_scales_of_larger_blocks(folder):
    rows = read_header(folder / SECOND)["layers.1.engram.embed.scale"].shape[0]
    rewrite(folder / SECOND, embed_scale=("F8_E8M0", [rows, 2]))
    refuse(folder, f"'layers.1.engram.embed.scale': shape [{rows}, 2]; configuration and primes need [{rows}, 8]")


def test_exchanged_tables(folder):
    """Under the right names, in the other layer's place; each is whole, and would be read without an error."""
    for file, old, new in ((SECOND, 1, 14), (THIRD, 14, 1)):
        parts = ("embed.weight", "embed.scale")
        rewrite(folder / file, rename={tensor_name(old, part): tensor_name(new, part) for part in parts})
    index = load(folder / INDEX_FILE)
    for part in ("embed.weight", "embed.scale"):
        first, second = tensor_name(1, part), tensor_name(14, part)
        index["weight_map"] |= {first: THIRD, second: SECOND}
    put(folder / INDEX_FILE, index)
    refuse(folder, "'layers.1.engram.embed.weight': shape", "(so many rows has layer 14: the tables were exchanged)")


def test_exchanged_files(folder, sample_folder):
    for file, other in ((SECOND, THIRD), (THIRD, SECOND)):
        (folder / file).unlink()
        (folder / file).symlink_to(sample_folder / other)
    refuse(folder, f"says that layers.1.engram.embed.weight is in {SECOND}; it is in {THIRD}")


@pytest.mark.parametrize("part", PUBLISHED_BYTES)
def test_a_tensor_that_is_nowhere(folder, part):
    index = load(folder / INDEX_FILE)
    del index["weight_map"][tensor_name(14, part)]
    put(folder / INDEX_FILE, index)
    refuse(folder, f" has no {tensor_name(14, part)}: download the checkpoint again, its index included")


def test_a_tensor_that_is_only_in_the_index(folder):
    rewrite(folder / THIRD, drop={"layers.14.engram.embed.scale"})
    refuse(folder, f"says that layers.14.engram.embed.scale is in {THIRD}; it is in no file that was looked at")


def test_a_tensor_that_is_in_two_files(folder):
    rewrite(folder / THIRD, rename={"layers.14.engram.q_weight": "layers.1.engram.q_weight"})
    index = load(folder / INDEX_FILE)
    index["weight_map"]["layers.14.engram.q_weight"] = "model-00001-of-00003.safetensors"
    put(folder / INDEX_FILE, index)
    refuse(folder, f"says that layers.1.engram.q_weight is in {SECOND}; it is in {SECOND} and {THIRD}")


@pytest.mark.parametrize(
    "name", ["layers.1.engram.wkv.bias", "layers.20.engram.embed.weight", "layers.14.engram.conv.weight"]
)
def test_an_engram_tensor_that_the_layer_does_not_have(folder, name):
    index = load(folder / INDEX_FILE)
    index["weight_map"][name] = "model-00001-of-00003.safetensors"
    put(folder / INDEX_FILE, index)
    refuse(folder, f" has {name}; Engram as configured is layers.1, layers.14 with 6 tensors each")


def test_a_file_outside_the_folder(folder):
    index = load(folder / INDEX_FILE)
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / THIRD, outside)
    for file in (f"../{outside.name}", str(outside), "sub/x", "..", ".", "", "a\\b", "a\0b"):
        for name in ("layers.14.engram.embed.weight", "norm.weight"):
            spoiled = {**index, "weight_map": {**index["weight_map"], name: file}}
            put(folder / INDEX_FILE, spoiled)
            refuse(folder, f"{INDEX_FILE} names the file {file!r}: it must lie in the folder itself")


def test_an_index_that_is_none(folder):
    for content in (b"", b"{", b"[]", b'{"weight_map": {}, "weight_map": {}}'):
        put(folder / INDEX_FILE, content)
        refuse(folder, f"{INDEX_FILE} is damaged: ", "; download it again")
    for weight_map in (None, [], {"a": 1}, {"a": None}):
        put(folder / INDEX_FILE, {"weight_map": weight_map})
        refuse(folder, f"{INDEX_FILE} has no weight_map from tensors to files")
    (folder / INDEX_FILE).unlink()
    refuse(folder, f"has neither {INDEX_FILE} nor {SINGLE_FILE}: download the checkpoint again")


# --- the tokenizer --------------------------------------------------------------------------------


def test_the_tokenizer_of_another_model(folder, small_tokenizer):
    put(folder / TOKENIZER_FILE, lzma.decompress((GOLDEN / "deepseek_v3_tokenizer.json.xz").read_bytes()))
    refuse(folder, "tokenizer.json compresses to 98627 ids, ", "config.json says 99092: every row depends on it")
    put(folder / TOKENIZER_FILE, (small_tokenizer / TOKENIZER_FILE).read_bytes())
    refuse(folder, "tokenizer.json compresses to 5403 ids, ", "use the tokenizer.json that came with the weights")
    put(folder / TOKENIZER_FILE, b"{}")
    refuse(folder, "tokenizer.json is not a tokenizer.json")
    (folder / TOKENIZER_FILE).unlink()
    (folder / TOKENIZER_FILE).symlink_to(folder / "nowhere")  # there is one, it is only not here: no other may stand in
    refuse(folder, "no tokenizer at ", "tokenizer.json: give a tokenizer.json")


def test_the_tokenizers_digest_is_of_what_was_compressed(folder, monkeypatch):
    """Another file takes its place while the folder is being opened."""
    text, for_vocab = (folder / TOKENIZER_FILE).read_bytes(), HashPlan.for_vocab

    def and_replace(config, vocab):
        put(folder / TOKENIZER_FILE, b"another")
        return for_vocab(config, vocab)

    monkeypatch.setattr(HashPlan, "for_vocab", and_replace)
    assert ModelFolder.open(folder).tokenizer_sha256 == hashlib.sha256(text).hexdigest()


def test_a_tokenizer_of_the_right_size_with_another_map(folder):
    """Two tokens have changed places: as many compressed ids, other rows for every text."""
    content = load(folder / TOKENIZER_FILE)
    vocab = content["model"]["vocab"]
    first, second = (next(token for token, number in vocab.items() if number == wanted) for wanted in (500, 70_000))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    put(folder / TOKENIZER_FILE, content)
    refuse(folder, "compresses to 99092 ids as DeepSeek-V4's, but its map has digest ", "not the published one")


def test_the_packaged_tokenizer_is_measured_too(folder):
    config = load(folder / "config.json")
    config["text_config"]["engram_compressed_vocab_size"] = 99_091
    put(folder / "config.json", config)
    (folder / TOKENIZER_FILE).unlink()
    refuse(folder, "the packaged tokenizer, as ", "compresses to 99092 ids", "says 99091")


def test_another_tokenizer_may_have_a_model_of_its_own(tmp_path, small_tokenizer):
    """Only the published size is tied to the published map."""
    config = EngramConfig.preset("v41-flash").replace(compressed_size=5403, hidden=32, table_size_per_order=(31,) * 3)
    put(tmp_path / "config.json", config_fields(config, table_rows(config), 8182, 40))
    shutil.copy(small_tokenizer / TOKENIZER_FILE, tmp_path)
    refuse(tmp_path, f"has neither {INDEX_FILE} nor {SINGLE_FILE}")  # the tokenizer was accepted


# --- torch is not needed --------------------------------------------------------------------------

ALONE = """
import sys
for name in ("torch", "numba", "safetensors", "bench"):
    sys.modules[name] = None
from engram_ref.checkpoint.folder import ModelFolder
model = ModelFolder.open(sys.argv[1])
assert model.tensor(14, "embed.scale").shape == (model.plan.layer(14).rows, 8)
try:
    model.stored_rows(1)
except ImportError:
    print("ended well")
"""


def test_opening_needs_neither_torch_nor_numba(sample_folder):
    done = subprocess.run([sys.executable, "-c", ALONE, sample_folder], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ended well\n"), done.stderr


# --- numbers that would take memory or for ever ---------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engram_n_heads": 10**6}, "columns, orders times heads: must be at most"),
        ({"engram_max_ngram_size": 10**5}, "columns, orders times heads: must be at most"),
        ({"engram_max_ngram_size": 10**9}, "columns, orders times heads: must be at most"),
        ({"engram_max_ngram_size": 10**12}, "engram_max_ngram_size=1000000000000: must be at most"),
        ({"engram_head_dim": 2**31 - 1}, "row_width=2147483647: must be at most"),
        ({"engram_layer_ids": [10**9], "num_hidden_layers": 2**31 - 1}, "layer_ids=1000000000: must be at most"),
        ({"engram_layer_ids": list(range(10**5)), "num_hidden_layers": 10**6}, "100000 layers of 24 columns"),
        ({"engram_vocab_size": 10**18}, "engram_vocab_size=1000000000000000000: must be at most"),
        ({"engram_vocab_size": 10**400}, "engram_vocab_size=<an integer of some 4\\d\\d digits>: must be at most"),
        ({"engram_n_heads": 8.0}, "engram_n_heads=8.0: must be an integer"),
        ({"engram_n_heads": True}, "engram_n_heads=True: must be an integer"),
        ({"engram_n_heads": "8"}, "engram_n_heads='8': must be an integer"),
        ({"engram_n_heads": float("nan")}, "engram_n_heads=nan: must be an integer"),
        ({"engram_n_heads": [[[8]]] * 10**5}, "engram_n_heads=.*: must be an integer"),
        ({"engram_layer_ids": {"1": "\x1b[2J"}}, "engram_layer_ids=.*: must be a list of integers"),
        ({"rms_norm_eps": "x" * 10**6}, "rms_norm_eps='xxx.* the gate of this model computes with"),
    ],
    ids=range(16),
)  # fmt: skip
def test_numbers_have_bounds_before_they_are_used(folder, changes, message):
    put(folder / "config.json", published(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        ModelFolder.open(folder)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 600 and str(caught.value).isprintable()
