"""Maps that are published are compared with what was published, however the tokenizer is named."""

import types

import pytest

from engram_ref.vocab import CompressedVocab, load_tokenizer, published
from tests.ref.vocab.loading import fake_transformers


def test_map_that_differs_from_the_published_one(small_tokenizer, tmp_path, monkeypatch, vocab_small):
    key = published.fingerprint(load_tokenizer(small_tokenizer))
    monkeypatch.setitem(published.KNOWN_MAPS, key, vocab_small.digest)
    assert len(CompressedVocab.from_tokenizer(small_tokenizer, tmp_path / "fits")) == len(vocab_small)
    monkeypatch.setitem(published.KNOWN_MAPS, key, "0" * 64)
    with pytest.raises(ValueError, match=f"has digest {vocab_small.digest}, published is 0000"):
        CompressedVocab.from_tokenizer(small_tokenizer, tmp_path / "differs")
    assert not (tmp_path / "differs").exists()


def test_the_published_map_is_compared_however_the_tokenizer_is_named(small_tokenizer, tmp_path, monkeypatch):
    loaded = types.SimpleNamespace(backend_tokenizer=load_tokenizer(small_tokenizer))
    monkeypatch.setitem(published.KNOWN_MAPS, published.fingerprint(loaded.backend_tokenizer), "0" * 64)
    fake_transformers(monkeypatch, lambda name, **options: loaded)
    with pytest.raises(ValueError, match="published is 0000"):
        CompressedVocab.from_tokenizer("owner/model", tmp_path)


@pytest.mark.parametrize("version", ["v4", "v3"])
def test_known_files_are_known_maps(version, request):
    vocab = request.getfixturevalue(f"vocab_{version}")
    assert vocab.digest in {published.KNOWN_MAPS[tokens] for tokens in published.KNOWN_FILES.values()}
