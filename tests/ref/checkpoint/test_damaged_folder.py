"""What is wrong with a checkpoint's weights or with their index is said in a sentence that names file and tensor."""

import shutil

import pytest

from engram_ref.checkpoint.folder import INDEX_FILE, SINGLE_FILE, tensor_name
from engram_ref.files.header import DTYPE_BITS, read_header
from tests.ref.checkpoint.folders import PUBLISHED_BYTES, SECOND, THIRD, load, put, refuse, rewrite

# --- files ----------------------------------------------------------------------------------------


def test_a_missing_shard(folder):
    (folder / THIRD).unlink()
    refuse(folder, f"{THIRD} is missing, and it holds Engram tensors: download it")
    (folder / THIRD).symlink_to(folder / "nowhere")
    refuse(folder, f"{THIRD} is missing, and it holds Engram tensors: download it")


def test_a_truncated_shard(folder):
    whole = (folder / THIRD).read_bytes()
    put(folder / THIRD, whole[:-1])
    refuse(folder, THIRD, f"has {len(whole) - 1} bytes, its header describes {len(whole)}: the file is cut off")


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


# --- the index ------------------------------------------------------------------------------------


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
    shutil.copy(folder / THIRD, folder / SINGLE_FILE)  # which must not stand in for an index that is not here
    (folder / INDEX_FILE).symlink_to(folder / "nowhere")
    refuse(folder, f"{INDEX_FILE} is a link that leads nowhere: download the checkpoint again")
