"""Checkpoints opened where they lie: the published one at full size (sparse files), and a small one with content."""

import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import pytest
import torch

from engram_ref.checkpoint import folder as folder_module
from engram_ref.checkpoint.config_json import config_fields, table_rows
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
from engram_ref.vocab import KNOWN_MAPS
from tests.ref.checkpoint.folders import (
    PUBLISHED,
    PUBLISHED_BYTES,
    SECOND,
    THIRD,
    content_of,
    load,
    put,
    refuse,
    rewrite,
)

GOLDEN = Path(__file__).parents[2] / "golden"


# --- the published checkpoint, at its full size ---------------------------------------------------

SHARDS = {1: "model-00047-of-00048.safetensors", 14: "model-00048-of-00048.safetensors"}


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


def test_unknown_layers_and_parts_are_refused(sample_folder):
    model = ModelFolder.open(sample_folder)
    with pytest.raises(ValueError, match=r"layer_id=2: this plan has layers \[1, 14\]"):
        model.stored_rows(2)
    with pytest.raises(ValueError, match=r"part='bias': a layer has embed\.weight, embed\.scale, wkv\.weight"):
        model.tensor(1, "bias")


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


def test_a_tokenizer_of_the_right_size_with_another_map(folder, monkeypatch):
    """As many compressed ids, other rows for every text; what is published is changed, for a map takes 2 s."""
    monkeypatch.setattr(folder_module, "KNOWN_MAPS", {key: value[::-1] for key, value in KNOWN_MAPS.items()})
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
