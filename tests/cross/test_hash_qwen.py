"""The hash of Qwen3.8-Flash-Next, asked of every implementation here: NumPy, numba, torch, Triton, plain Python.

Against row numbers captured from transformers' class, and against the class itself: any configuration, the end of text
anywhere, caches, chunks, batches. Integers by `==`.
"""

import json
import pydoc_data.topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_ref.config import EngramConfig
from engram_ref.hashing import DEAD, HashPlan, LayerPlan
from engram_ref.vocab import CompressedVocab, load_tokenizer, vocab_for
from tests.cross.ways import WAYS, Way

CASES = ("small", "second layer", "4-grams, 3 heads", "as released")


@pytest.fixture(params=WAYS)
def way_name(request):
    return request.param


def config_of(vocab_size: int, max_ngram: int, heads: int, base: int, eos: int, seed: int, layers: int) -> EngramConfig:
    return EngramConfig(
        layer_ids=tuple(range(layers)), max_ngram=max_ngram, heads=heads, row_width=1,
        table_size_per_order=(base,) * (max_ngram - 1), hidden=8, pad_id=eos, seed=seed, form="qwen",
        compressed_size=vocab_size, rows_multiple=128, norm_eps=1e-6,
    )  # fmt: skip


def plan_of(config: EngramConfig) -> HashPlan:
    assert config.compressed_size is not None
    return HashPlan.build(config, config.compressed_size, config.pad_id)


@pytest.fixture(params=CASES)
def captured(request, golden):
    """A case of the record, and the configuration that it was made with."""
    case = golden("hash_qwen.json")["cases"][request.param]
    made = case["config"]
    config = config_of(
        made["vocab_size"], made["ngram_size"], made["heads_per_ngram"], made["ngram_vocab_size_base"], made["eos"],
        made["seed"], case["ple_layer_index"] + 1,
    )  # fmt: skip
    return case, config


# --- what was captured from the class -------------------------------------------------------------


def test_the_constants_are_those_of_the_class(captured):
    case, config = captured
    layer = plan_of(config).layers[-1]
    assert list(layer.multipliers) == case["multipliers"]
    assert list(layer.primes) == case["primes"] and list(layer.offsets) == case["offsets"]
    assert layer.rows == case["rows"]


def test_the_rows_are_those_of_the_class(captured, way_name):
    case, config = captured
    way, layer = Way(way_name, plan_of(config)), case["ple_layer_index"]
    for batch in case["batches"]:
        ids = np.array(batch["ids"])
        assert way.rows(ids)[:, :, layer].tolist() == batch["rows"]
        steps = range(1, ids.shape[1]) if way_name != "triton" else [ids.shape[1] // 2]  # the interpreter is slow
        assert way.in_chunks(ids, steps)[:, :, layer].tolist() == batch["rows"]


def test_the_preset_is_the_released_geometry(golden):
    case = golden("hash_qwen.json")["cases"]["as released"]
    layer = HashPlan.for_vocab(EngramConfig.preset("qwen38-flash-next"), CompressedVocab.identity(248_320)).layers[0]
    assert (layer.layer_id, layer.rows) == (1, 320_001_536)
    assert (list(layer.primes), list(layer.multipliers)) == (case["primes"], case["multipliers"])


# --- the class itself -----------------------------------------------------------------------------


@st.composite
def questions(draw) -> tuple[EngramConfig, np.ndarray, list[int]]:
    """Any configuration; token ids [B, T] in which the end of text is as likely as all others together; cuts."""
    vocab_size = draw(st.sampled_from([2, 3, 50, 1000, 248_320, 2**31 - 1]))
    eos = draw(st.integers(0, vocab_size - 1))
    config = config_of(
        vocab_size, draw(st.integers(2, 6)), draw(st.integers(1, 9)), draw(st.sampled_from([2, 3, 100, 1009])), eos,
        draw(st.one_of(st.just(1234), st.integers(0, 2**40))), draw(st.integers(1, 3)),
    )  # fmt: skip
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    token = st.one_of(st.just(eos), st.integers(0, vocab_size - 1), st.sampled_from([0, vocab_size - 1]))
    ids = draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=batch, max_size=batch))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4))) if length > 1 else []
    return config, np.array(ids), cuts


@settings(max_examples=25, deadline=None)
@given(question=questions(), data=st.data())
def test_any_configuration_gives_the_rows_of_the_class(question, data):
    from tests.ref.fusion.qwen_oracle import ClassRows

    config, ids, cuts = question
    assert config.compressed_size is not None
    index = data.draw(st.integers(0, len(config.layer_ids) - 1))
    oracle = ClassRows(config, config.compressed_size, index)
    plan = plan_of(config)
    assert plan.layers[index].rows == oracle.table_rows
    expected = oracle(torch.from_numpy(ids)).tolist()
    assert oracle.in_chunks(torch.from_numpy(ids), cuts).tolist() == expected
    for name in WAYS:
        way = Way(name, plan)
        assert way.rows(ids)[:, :, index].tolist() == expected, name
        assert way.in_chunks(ids, cuts)[:, :, index].tolist() == expected, name


def test_a_hash_that_lets_eos_close_itself_is_caught(golden):
    """An end of text that stood behind its own segment would be hashed without it: DEAD does that, so it is not EOS."""
    case = golden("hash_qwen.json")["cases"]["small"]
    config = config_of(1000, 3, 8, 1009, 7, 1234, 1)
    ids = next(np.array(b["ids"]) for b in case["batches"] if b["ids"][0][:2] == [7, 821])
    rows = next(b["rows"] for b in case["batches"] if b["ids"][0][:2] == [7, 821])
    assert Way("numpy", plan_of(config)).rows(np.where(ids == 7, DEAD, ids))[:, :, 0].tolist() != rows


# --- real text, of a tokenizer that is not the model's --------------------------------------------


def test_text(way_name, small_tokenizer):
    """The token ids of any tokenizer are below 248,320: hashed as they are, with an end of text after each topic."""
    topics = [pydoc_data.topics.topics[name][:160] for name in ("assert", "del", "pass")]
    tokenizer = load_tokenizer(small_tokenizer)
    eos = 248_044
    ids = np.array([[token for text in topics for token in (*tokenizer.encode(text).ids, eos)]])
    assert len(set(ids[0].tolist())) > 40
    plan = plan_of(EngramConfig.preset("qwen38-flash-next"))
    expected, way = Way("numpy", plan).rows(ids), Way(way_name, plan)
    assert (way.in_chunks(ids, [5, 6, 40]) == expected).all()
    # A text behind the end of another one is hashed as if it stood alone.
    last = len(tokenizer.encode(topics[-1]).ids) + 1
    assert (way.rows(ids[:, -last:]) == expected[:, -last:]).all()


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_says_what_ends_a_segment_and_only_then():
    config = config_of(1000, 3, 2, 1009, 7, 1234, 2)
    plan = plan_of(config)
    body = json.loads(plan.to_json())
    assert (body["segment_end"], body["rows_multiple"]) == (7, 128)
    assert HashPlan.from_json(plan.to_json()) == plan
    demo = json.loads(HashPlan.build(EngramConfig.preset("tiny"), 1000, 2).to_json())
    assert not demo.keys() & {"segment_end", "rows_multiple"}


def test_rows_that_were_hashed_with_another_end_are_refused():
    plan, other = (plan_of(config_of(1000, 3, 2, 1009, eos, 1234, 1)).layers[0] for eos in (7, 8))
    plan.require_recorded(plan.to_json(), "t")
    with pytest.raises(ValueError, match=r"t: hash constants differ .*: pad_compressed is 8 there and 7 in the plan"):
        plan.require_recorded(other.to_json(), "t")
    without = json.loads(plan.to_json())
    for name, text in (("segment_end", "None there and 7"), ("rows_multiple", "None there and 128")):
        with pytest.raises(ValueError, match=f"{name} is {text} in the plan"):
            plan.require_recorded(json.dumps({k: v for k, v in without.items() if k != name}), "t")


@pytest.mark.parametrize(("field", "value"), [("segment_end", 1000), ("segment_end", -1), ("rows_multiple", 0)])
def test_a_plan_refuses_an_end_that_is_no_id(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}: must be"):
        HashPlan(1000, 7, 2, 1, (LayerPlan(0, (1, 3), (11,), (0,)),), **{field: value})


def test_the_vocabulary_of_token_ids_as_they_are():
    vocab = vocab_for(EngramConfig.preset("qwen38-flash-next"))
    assert len(vocab) == 248_320 and vocab([[0, 5, 248_319]]).tolist() == [[0, 5, 248_319]]
    with pytest.raises(ValueError, match=r"token ids contain 248320; the vocabulary has 0 .. 248319"):
        vocab([[248_320]])
    with pytest.raises(ValueError, match="compressed_size=None: form qwen hashes token ids as they are"):
        vocab_for(EngramConfig.preset("qwen38-flash-next").replace(compressed_size=None))
    with pytest.raises(ValueError, match="size=0: must be an integer of at least 1"):
        CompressedVocab.identity(0)
