"""The sample checkpoint: the published layout, numbers that are rows, the same for the same seed."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open

from engram_ref import cli
from engram_ref.checkpoint import sample
from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.checkpoint.sample import sample_bytes, sample_config, write_sample
from engram_ref.config import EngramConfig


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drawn(name, dtype, shape, seed):
    return np.concatenate(list(sample_bytes(name, dtype, shape, seed)))


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        sample.main(list(argv))
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err.startswith("sample_checkpoint: error: ") and said.err.count("\n") == 1
    return said.err


def test_the_layout_is_the_published_one(sample_folder):
    assert sorted(files_of(sample_folder)) == [
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    index = json.loads((sample_folder / "model.safetensors.index.json").read_text())
    parts = ("embed.weight", "embed.scale", "wkv.weight", "wkv.scale", "q_weight", "k_weight")
    for layer_id, file in ((1, "model-00002-of-00003.safetensors"), (14, "model-00003-of-00003.safetensors")):
        with safe_open(sample_folder / file, framework="pt") as tensors:
            assert set(tensors.keys()) == {f"layers.{layer_id}.engram.{part}" for part in parts}
            assert {index["weight_map"][name] for name in tensors.keys()} == {file}  # noqa: SIM118, no mapping
    assert set(index["weight_map"].values()) == {name for name in files_of(sample_folder) if name.startswith("model-")}
    config = json.loads((sample_folder / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [32, 32]
    assert config["text_config"]["engram_layer_ids"] == [1, 14]


def test_the_same_seed_gives_the_same_files(sample_folder, tmp_path):
    config = sample_config(first_prime=31, hidden=32)
    write_sample(tmp_path / "again", config, seed=3)
    assert files_of(tmp_path / "again") == files_of(sample_folder)
    write_sample(tmp_path / "other", config, seed=4)
    same = {name for name, content in files_of(sample_folder).items() if files_of(tmp_path / "other")[name] == content}
    assert same == {"config.json", "model.safetensors.index.json", "tokenizer.json"}


def test_codes_are_all_but_nan_and_scales_are_small():
    codes = drawn("a", "F8_E4M3", (1000, 256), 0)
    assert set(codes.tolist()) == set(range(256)) - {0x7F, 0xFF}
    assert set(drawn("a", "F8_E8M0", (1000, 8), 0).tolist()) == set(range(111, 119))
    gains = (drawn("a", "BF16", (64, 64), 0).view("<u2").astype("<u4") << 16).view("<f4")
    # of 4,096 draws from N(1, 1/8): the mean is within 0.002 and the spread within 0.0014, standard errors
    assert abs(gains.mean() - 1) < 0.01 and abs(gains.std() - 0.125) < 0.008


def test_every_tensor_has_numbers_of_its_own():
    shape = (8, 32)
    first = drawn("layers.1.engram.embed.weight", "F8_E4M3", shape, 0)
    assert len(first) == 256
    for name, seed in (("layers.14.engram.embed.weight", 0), ("layers.1.engram.embed.weight", 1)):
        assert not np.array_equal(first, drawn(name, "F8_E4M3", shape, seed))


def test_pieces_are_small(monkeypatch):
    """A table may be larger than memory."""
    monkeypatch.setattr(sample, "_PIECE", 1 << 10)
    for dtype, nbytes in (("F8_E4M3", 5_000), ("F8_E8M0", 5_000), ("BF16", 10_000)):
        pieces = [len(piece) for piece in sample_bytes("a", dtype, (5, 1000), 0)]
        assert max(pieces) == 1 << 10 and sum(pieces) == nbytes


def test_the_command_writes_what_opens(tmp_path, capsys):
    folder = tmp_path / "new" / "sample"
    sample.main([str(folder), "--first-prime", "20", "--hidden", "32", "--seed", "5"])
    assert str(folder) in capsys.readouterr().out
    config = ModelFolder.open(folder).config
    assert config == EngramConfig.preset("v41-flash").replace(table_size_per_order=(20, 20, 20), hidden=32)


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("somebody's")
    assert f"{tmp_path} is not empty: name a new folder" in fails(capsys, str(tmp_path))
    assert files_of(tmp_path) == {"config.json": b"somebody's"}
    assert "File exists" in fails(capsys, str(tmp_path / "config.json"))


def test_wrong_input_ends_in_one_line(tmp_path, capsys):
    new = str(tmp_path / "new")
    assert "hidden=33: must be a multiple of 32" in fails(capsys, new, "--hidden", "33")
    assert "'1' must be an integer of at least 2" in fails(capsys, new, "--first-prime", "1")
    assert "'-1' must be an integer of at least 0" in fails(capsys, new, "--seed=-1")
    assert "required: FOLDER" in fails(capsys)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device: " in fails(capsys, str(tmp_path / "new"), "--first-prime", "20")
    assert files_of(tmp_path / "new") == {}


def test_an_interruption_says_what_stays(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "_write_json", stopped)
    with pytest.raises(SystemExit) as ended:
        argv = [str(tmp_path), "--first-prime", "20", "--hidden", "32"]
        cli.run(lambda: sample.main(argv), sample.PROG, left=sample.LEFT)
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "sample_checkpoint: interrupted; files that were finished stay"
    assert all(name.startswith("model-") or name == "tokenizer.json" for name in files_of(tmp_path))
