"""Which vocabulary a plan, a table and a cached map belong to: another one of the same size is told, everywhere."""

import dataclasses
import hashlib
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from engram_ref.attach import attach
from engram_ref.checkpoint import load_layer, save_layer
from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.config import EngramConfig
from engram_ref.files.header import read_metadata
from engram_ref.fusion import DemoFusion
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.vocab import CompressedVocab, kept, load_tokenizer, published, tokenizer_json
from engram_toy.hashing import NgramHasher as ToyHasher
from tests.ref.attach.models import VOCAB, make_layers, make_model

CONFIG = EngramConfig.preset("tiny").replace(table_size_per_order=(31, 31), hidden=8)
ONE = CompressedVocab.from_map([0, 1, 2, 3, 0, 1, 2, 3, 4])
OTHER = CompressedVocab.from_map([0, 1, 2, 3, 3, 2, 1, 0, 4])  # as many ids, of as many tokens
PLAN = HashPlan.for_vocab(CONFIG, ONE)
BARE = HashPlan.build(CONFIG, len(ONE), ONE.pad(CONFIG.pad_id))


@pytest.fixture
def silent():
    """No warning is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- the plan -------------------------------------------------------------------------------------


def test_a_plan_knows_its_vocabulary():
    assert PLAN.vocab_digest == ONE.digest != OTHER.digest and BARE.vocab_digest is None
    assert PLAN != BARE and dataclasses.replace(PLAN, vocab_digest=None) == BARE
    assert [x.constants() for x in PLAN.layers] == [x.constants() for x in BARE.layers]


def test_json_keeps_it_and_old_json_has_none():
    body = json.loads(PLAN.to_json())
    assert body["vocab_digest"] == ONE.digest and HashPlan.from_json(PLAN.to_json()) == PLAN
    assert json.loads(BARE.to_json()).keys() == body.keys() - {"vocab_digest"} == {
        *("compressed_size", "pad_compressed", "max_ngram", "heads", "layers", "checksum")
    }  # fmt: skip
    assert HashPlan.from_json(BARE.to_json()) == BARE
    assert body["layers"] == json.loads(BARE.to_json())["layers"]
    body["vocab_digest"] = OTHER.digest
    with pytest.raises(ValueError, match="it was altered"):
        HashPlan.from_json(json.dumps(body))


def test_the_twin_hashes_with_the_same_integers():
    ids = [1, 3, 0, 2, 4, 4]
    rows = NgramHasher(PLAN, "numpy")(np.array([ids]), 1)[0].tolist()
    assert ToyHasher(json.loads(PLAN.to_json()))(ids, 1) == ToyHasher(json.loads(BARE.to_json()))(ids, 1) == rows


@pytest.mark.parametrize(
    "digest", ["", "0" * 63, "G" * 64, ONE.digest.upper(), 3, ONE.digest + "\n", b"0" * 64], ids=str
)
def test_what_is_no_digest_is_refused(digest):
    with pytest.raises(ValueError, match="must be 64 lower-case hexadecimal digits"):
        dataclasses.replace(PLAN, vocab_digest=digest)


def test_another_vocabulary_is_refused(silent):
    PLAN.require_vocab(ONE)
    with pytest.raises(
        ValueError, match=f"{OTHER.digest}; the plan was made for {ONE.digest}, another one of the same"
    ):
        PLAN.require_vocab(OTHER)
    with pytest.raises(ValueError, match="a vocabulary of 3 compressed ids; the plan was made for 5"):
        PLAN.require_vocab(CompressedVocab.from_map([0, 1, 2]))


def test_a_plan_that_cannot_tell_says_so():
    for vocab in (ONE, OTHER):
        with pytest.warns(UserWarning, match="knows the size of its vocabulary, 5, and not which one it is"):
            BARE.require_vocab(vocab)


# --- where they meet ------------------------------------------------------------------------------


@pytest.mark.parametrize("as_array", [False, True])
def test_attach_compares(as_array):
    numbers = np.arange(VOCAB)
    model, layers = make_model(), make_layers()
    right = CompressedVocab.from_map(np.append(numbers, 5))  # one more token, the same ids
    wrong = CompressedVocab.from_map(np.append(numbers, 6))
    plan = dataclasses.replace(layers.plan, vocab_digest=right.digest)
    give = (lambda vocab: vocab.ids) if as_array else (lambda vocab: vocab)
    with pytest.raises(ValueError, match="another one of the same size"):
        attach(model, layers.engrams, plan, give(wrong))
    with attach(model, layers.engrams, plan, give(right)), torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    with (
        pytest.warns(UserWarning, match="not which one it is"),
        attach(model, layers.engrams, layers.plan, give(wrong)),
    ):
        pass


def saved(path, plan):
    fusion = DemoFusion(CONFIG)
    save_layer(path, fusion, torch.zeros(plan.layer(1).rows, CONFIG.row_width), plan.layer(1))
    return path


def test_a_saved_layer_records_vocabulary_and_pad(tmp_path, silent):
    path = saved(tmp_path / "layer.safetensors", PLAN)
    assert json.loads(read_metadata(path)["layer_plan"]) == {
        **json.loads(json.dumps(PLAN.layer(1).constants())),
        "pad_compressed": PLAN.pad_compressed,
        "vocab_digest": ONE.digest,
    }
    load_layer(path, CONFIG, PLAN.layer(1)).table.close()
    for other, name in (
        (HashPlan.for_vocab(CONFIG, OTHER), "vocab_digest"),
        (HashPlan.for_vocab(CONFIG.replace(pad_id=8), ONE), "pad_compressed"),
        (HashPlan.for_vocab(CONFIG.replace(seed=1), ONE), "multipliers"),
    ):
        with pytest.raises(ValueError, match=f"hash constants differ from those of the plan for layer 1: {name} is"):
            load_layer(path, CONFIG, other.layer(1))


def test_half_an_identity_is_told(tmp_path):
    for stored, given, told in ((BARE, PLAN, "plan"), (PLAN, BARE, "file")):
        path = saved(tmp_path / "layer.safetensors", stored)
        with pytest.warns(UserWarning, match=f"only the {told} says vocab_digest: .* is unknown"):
            load_layer(path, CONFIG, given.layer(1)).table.close()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '"layer"', "{}"], ids=lambda text: text[:8])
def test_a_damaged_record_is_refused(text):
    with pytest.raises(ValueError, match=r"here: (its hash constants are damaged|hash constants differ)") as caught:
        PLAN.layer(1).require_recorded(text, "here")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


# --- a checkpoint folder --------------------------------------------------------------------------


@pytest.fixture
def folder(sample_folder, tmp_path):
    return shutil.copytree(sample_folder, tmp_path / "model")


def change(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_whole_folder_opens_in_silence(folder, silent, vocab_v4):
    assert ModelFolder.open(folder).plan.vocab_digest == vocab_v4.digest


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"engram_pad_token_id": 1}, "pad_compressed"),
        ({"engram_pad_token_id": 129_279}, "pad_compressed"),
        # As many columns, rows and parameters; every row is another one.
        ({"engram_max_ngram_size": 3, "engram_n_heads": 12}, "multipliers"),
        ({"engram_max_ngram_size": 5, "engram_n_heads": 6}, "multipliers"),
    ],
    ids=str,
)
def test_a_changed_constant_is_refused(folder, changes, name):
    change(folder, **changes)
    with pytest.raises(ValueError, match=f"hash constants differ from those of the plan for layer 1: {name} is"):
        ModelFolder.open(folder)


def without_records(folder):
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_where_nothing_is_recorded_a_warning_says_what_is_believed(folder):
    without_records(folder)
    change(folder, engram_pad_token_id=1)
    with pytest.warns(UserWarning, match=r"layers \[1, 14\] records .* engram_pad_token_id=1, .* are believed"):
        ModelFolder.open(folder)


def test_the_published_tables_are_known(tmp_path):
    from engram_ref.checkpoint import folder as model_folder

    config = EngramConfig.preset("v41-flash")
    assert model_folder._is_published(tmp_path, config)
    assert not model_folder._is_published(tmp_path, config.replace(table_size_per_order=(31, 31, 31), pad_id=7))
    other = {"max_ngram": 3, "heads": 12, "table_size_per_order": (16_000_000,) * 2}
    for changes, name in (({"pad_id": 1}, "pad_id=1"), (other, "max_ngram=3")):
        with pytest.raises(ValueError, match=f"gives {name}; the tables are of the published size"):
            model_folder._is_published(tmp_path, config.replace(**changes))


# --- the cache ------------------------------------------------------------------------------------


def resign(file, ids):
    """A cached map that is signed as its writer signs."""
    stored = np.asarray(ids, "<i4").tobytes()
    file.write_bytes(hashlib.sha256(file.name.encode() + b"\0" + stored).digest() + stored)


def test_a_signed_map_is_not_believed(small_tokenizer, tmp_path, vocab_small, monkeypatch):
    CompressedVocab.from_tokenizer(small_tokenizer, tmp_path)
    (file,) = tmp_path.iterdir()
    resign(file, vocab_small.ids)
    stored = file.read_bytes()
    CompressedVocab.from_tokenizer(small_tokenizer, tmp_path)
    assert file.read_bytes() == stored  # the signature is the writer's
    # Another one as long, in which nothing but a published digest tells it: by the tokens, then by the file.
    tokens = published.fingerprint(load_tokenizer(small_tokenizer))
    monkeypatch.setitem(published.KNOWN_MAPS, tokens, vocab_small.digest)
    for known in ({}, {hashlib.sha256(tokenizer_json(small_tokenizer)).hexdigest(): tokens}):
        monkeypatch.setattr(kept, "KNOWN_FILES", known)
        resign(file, np.append(vocab_small.ids[:-1], 0))
        assert CompressedVocab.from_tokenizer(small_tokenizer, tmp_path).digest == vocab_small.digest


def test_the_map_of_another_tokenizer_is_not_believed_under_this_name(tmp_path):
    maps = {}
    for name, words in (("one", ["a", "A", "b", "c"]), ("two", ["a", "b", "B", "c"])):
        file = tmp_path / f"{name}.json"
        file.write_text(Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a")).to_str())
        maps[name] = CompressedVocab.from_tokenizer(file, tmp_path / name).ids.tolist()
    assert maps == {"one": [0, 0, 1, 2], "two": [0, 1, 1, 2]}
    (one,), (two,) = ((tmp_path / name).iterdir() for name in maps)
    two.write_bytes(one.read_bytes())
    assert CompressedVocab.from_tokenizer(tmp_path / "two.json", tmp_path / "two").ids.tolist() == maps["two"]
