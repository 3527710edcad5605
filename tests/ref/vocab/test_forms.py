"""Which tokens share a compressed id: published digests, a golden map, forms written by hand.

Every multiplier derives from the size of this map, so it is compared in whole, by `==`; wrong candidates, each with one
normalisation step lost, show that the comparison would tell.
"""

import hashlib

import pytest

from engram_ref.vocab import CompressedVocab, forms, load_tokenizer
from tests.ref.vocab.loading import steps_without


def test_digest_is_of_little_endian_int32(vocab_v4):
    assert hashlib.sha256(vocab_v4.ids.astype("<i4").tobytes()).hexdigest() == vocab_v4.digest


def test_small_map_is_the_demos(vocab_small, golden):
    demo = golden("hash_demo.json")
    assert vocab_small.ids.tolist() == demo["compressed_map"]
    assert {c["compressed_vocab"] for c in demo["configs"].values()} == {len(vocab_small)}
    assert {c["compressed_map_sha256"] for c in demo["configs"].values()} == {
        hashlib.sha256(vocab_small.ids.astype("<i8").tobytes()).hexdigest()
    }


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
