"""Kept maps: named by content, library and code, rebuilt where damaged, done without where none can be kept."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from engram_ref.vocab import CompressedVocab, compressed, forms, kept, published, tokenizer_file
from tests.ref.vocab.loading import steps_without


@pytest.fixture(scope="module")
def made(small_tokenizer, tmp_path_factory):
    """The cached small vocabulary."""
    folder = tmp_path_factory.mktemp("made")
    CompressedVocab.from_tokenizer(small_tokenizer, folder)
    (file,) = folder.iterdir()
    return file


@pytest.fixture
def cached(made, tmp_path):
    """A folder with the cached small vocabulary; its file."""
    return Path(shutil.copy(made, tmp_path))


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
    "a token more": lambda file: store(file, [*np.frombuffer(file.read_bytes()[32:], "<i4"), 0]),
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


def test_cached_vocabulary_needs_no_tokenizer_to_be_parsed(cached, small_tokenizer, monkeypatch):
    monkeypatch.setattr(compressed, "parse", None)
    assert len(CompressedVocab.from_tokenizer(small_tokenizer, cached.parent)) == 5_403
