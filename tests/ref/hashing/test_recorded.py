"""The hash, stage by stage, against numbers that other implementations made: the demo's, and those of V4.1-Flash.

Integers only, compared by `==`, with both backends. Wrong candidates, each with one plausible mistake, show that the
comparison would tell.
"""

import numpy as np
import pytest

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from tests.ref.hashing.recorded import (
    DEMO_BATCHES,
    DEMO_CONFIGS,
    assert_rows,
    candidate,
    demo_config,
    digest,
    flat,
    plan_layers,
    recipe_ids,
    v41_ids,
)

DEEPSEEK = {"v3": "deepseek-v3 (128815 ids)", "v4": "deepseek-v4 (129280 ids)"}


# --- against the demo: four configurations on the small tokenizer ---------------------------------


def test_every_demo_configuration_is_tested(demo_file):
    assert list(demo_file["configs"]) == DEMO_CONFIGS


def test_demo_plan(demo):
    case, plan = demo
    assert (plan.compressed_size, plan.pad_compressed) == (case["compressed_vocab"], case["compressed_pad_id"])
    assert [str(layer.layer_id) for layer in plan.layers] == list(case["primes"]) == list(case["multipliers"])
    for layer in plan.layers:
        assert list(layer.multipliers) == case["multipliers"][str(layer.layer_id)]
        assert list(layer.primes) == flat(case["primes"][str(layer.layer_id)])


def test_demo_hashes(demo, demo_file, vocab_small, backend):
    case, plan = demo
    assert case["hashes"].keys() - {"negative"} == DEMO_BATCHES
    hasher = NgramHasher(plan, backend)
    for batch in DEMO_BATCHES:
        compressed = vocab_small(demo_file["batches"][batch])
        for layer_id in plan_layers(plan):
            assert_rows(hasher(compressed, layer_id, offsets=False), case["hashes"][batch][str(layer_id)])


def test_demo_digests(demo, demo_file, vocab_small, backend):
    case, plan = demo
    assert case["digests"].keys() - {"negative"} == DEMO_BATCHES | {"r_4x1024"}
    batches = dict(demo_file["batches"], r_4x1024=recipe_ids(demo_file["recipes"]["r_4x1024"], len(vocab_small.ids)))
    hasher = NgramHasher(plan, backend)
    for batch in DEMO_BATCHES | {"r_4x1024"}:
        for layer_id in plan_layers(plan):
            rows = hasher(vocab_small(batches[batch]), layer_id, offsets=False)
            assert digest(rows) == case["digests"][batch][str(layer_id)]


@pytest.mark.parametrize("batch", ["text_1", "two", "extremes", "r_1x4096"])
def test_demo_batches_without_numbers_agree_between_backends(batch, demo_file, vocab_small):
    ids = demo_file["batches"].get(batch) or recipe_ids(demo_file["recipes"][batch], len(vocab_small.ids))
    plan = HashPlan.build(demo_config(demo_file["configs"]["ngram4"]["config"]), len(vocab_small), 0)
    for layer_id in plan_layers(plan):
        got = NgramHasher(plan, "numba")(vocab_small(ids), layer_id)
        assert_rows(got, NgramHasher(plan, "numpy")(vocab_small(ids), layer_id))


def test_negative_ids_of_the_demo_are_refused(demo, demo_file, vocab_small, backend):
    _, plan = demo
    with pytest.raises(ValueError, match="token ids contain -2147483648"):
        vocab_small(demo_file["batches"]["negative"])
    with pytest.raises(ValueError, match="compressed ids contain -2147483648"):
        NgramHasher(plan, backend)(demo_file["batches"]["negative"], plan.layers[0].layer_id)


# --- against the demo on the real tokenizers ------------------------------------------------------


@pytest.mark.parametrize("version", DEEPSEEK)
def test_demo_on_deepseek_tokenizers(version, request, golden, backend):
    case = golden("hash_demo_deepseek_tokenizers.json")[DEEPSEEK[version]]
    vocab = request.getfixturevalue(f"vocab_{version}")
    config = EngramConfig.preset("demo")
    plan = HashPlan.build(config, len(vocab), vocab.pad(config.pad_id))
    assert (len(vocab.ids), len(vocab), vocab.digest) == (case["vocab"], case["compressed"], case["map_sha256"])
    assert plan.pad_compressed == case["pad_compressed"]
    recipe = case["digests"]["r_4x1024"]
    hasher = NgramHasher(plan, backend)
    for layer in plan.layers:
        key = str(layer.layer_id)
        assert list(layer.multipliers) == case["multipliers"][key]
        sentence = hasher(vocab([case["sentence_ids"]]), layer.layer_id, offsets=False)
        assert_rows(sentence[0], case["sentence_hashes"][key])
        rows = hasher(vocab(recipe_ids(recipe, len(vocab.ids))), layer.layer_id, offsets=False)
        assert digest(rows) == recipe[key]


# --- against V4.1-Flash ---------------------------------------------------------------------------


def test_v41_plan(v41, v41_file):
    assert plan_layers(v41) == v41_file["config"]["layer_ids"]
    assert v41.compressed_size == v41_file["config"]["compressed_vocab"]
    assert v41.pad_compressed == v41_file["config"]["pad_compressed_id"]
    for i, layer in enumerate(v41.layers):
        assert list(layer.multipliers) == v41_file["multipliers"][str(layer.layer_id)]
        assert list(layer.primes) == flat(v41_file["primes"][i])
        assert list(layer.offsets) == v41_file["offsets"][i]
        assert layer.rows == v41_file["rows"][i]


@pytest.mark.parametrize("case", ["F1", "F2"])
def test_v41_rows(case, v41, v41_file, backend):
    expected = np.array(v41_file[case]["rows_token_layer_col"])  # [T, layers, C]
    for i, layer_id in enumerate(plan_layers(v41)):
        rows = NgramHasher(v41, backend)(v41_ids(v41_file, case), layer_id)
        assert rows.dtype == np.int32
        assert_rows(rows[0], expected[:, i])


def test_demo_primes_as_the_v41_file_has_them(plans, v41_file):
    expected = [flat(layer) for layer in v41_file["demo_v1_primes_129280x5"]]
    assert [list(layer.primes) for layer in plans["demo"].layers] == expected


# --- wrong candidates -----------------------------------------------------------------------------


BUGS = ["precedence", "no pad", "shift off by one", "order of heads", "only the DEAD token is padded"]


def equals_golden(v41: HashPlan, v41_file: dict, bug: str | None) -> bool:
    same = []
    for case in ("F1", "F2"):
        expected = np.array(v41_file[case]["rows_token_layer_col"])
        for i, layer in enumerate(v41.layers):
            rows = candidate(v41, layer, v41_ids(v41_file, case)[0].tolist(), bug)
            same.append((np.array(rows) + layer.offsets == expected[:, i]).all())
    return all(same)


def test_right_candidate_passes(v41, v41_file):
    assert equals_golden(v41, v41_file, None)


@pytest.mark.parametrize("bug", BUGS)
def test_wrong_candidate_fails(bug, v41, v41_file):
    assert not equals_golden(v41, v41_file, bug)


@pytest.mark.parametrize("bug", BUGS[:4])
def test_wrong_candidate_fails_on_the_demo(bug, demo_file, vocab_small):
    case = demo_file["configs"]["small"]
    plan = HashPlan.build(demo_config(case["config"]), len(vocab_small), case["compressed_pad_id"])
    layer = plan.layers[0]
    ids = vocab_small(demo_file["batches"]["text_0"])[0].tolist()
    expected = case["hashes"]["text_0"][str(layer.layer_id)][0]
    assert candidate(plan, layer, ids, None) == expected
    assert candidate(plan, layer, ids, bug) != expected
