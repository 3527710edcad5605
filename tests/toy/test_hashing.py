"""The twin's hash against V4.1-Flash's recorded rows; the plan, too, comes from the record, not from the reference.

What both twins are asked together is in `tests/cross`.
"""

import copy

import pytest

from engram_toy.hashing import DEAD, NgramHasher, TokenHistory

CASES = ["F1", "F2"]  # plain, and with a DEAD token at position 3


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("hash_v41.json")


@pytest.fixture(scope="module")
def plan(recorded):
    """What `NgramHasher` reads of a plan."""
    layers = [
        {
            "layer_id": layer_id,
            "multipliers": recorded["multipliers"][str(layer_id)],
            "primes": [prime for order in recorded["primes"][i] for prime in order],
            "offsets": recorded["offsets"][i],
        }
        for i, layer_id in enumerate(recorded["config"]["layer_ids"])
    ]
    sizes = {"compressed_size": recorded["config"]["compressed_vocab"], "max_ngram": 4}
    return {**sizes, "pad_compressed": recorded["config"]["pad_compressed_id"], "layers": layers}


def compressed(recorded, case):
    ids = [recorded["token_map_synthetic"][token] for token in recorded[case]["tokens"]]
    return [c if alive else DEAD for c, alive in zip(ids, recorded[case]["mask"] or [1] * len(ids))]


def hash_layers(plan, ids, history=None):
    """[T][layers][C], as the record has them."""
    rows = [NgramHasher(plan)(ids, layer["layer_id"], history=history) for layer in plan["layers"]]
    return [list(position) for position in zip(*rows)]


@pytest.mark.parametrize("case", CASES)
def test_recorded_rows(recorded, plan, case):
    assert hash_layers(plan, compressed(recorded, case)) == recorded[case]["rows_token_layer_col"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", range(9))
def test_recorded_rows_in_two_chunks(recorded, plan, case, cut):
    ids, history, rows = compressed(recorded, case), TokenHistory(plan), []
    for chunk in (ids[:cut], ids[cut:]):
        rows += hash_layers(plan, chunk, history) if chunk else []
        history.advance(chunk)
    assert rows == recorded[case]["rows_token_layer_col"]


@pytest.mark.parametrize("part", ["multipliers", "primes", "offsets"])
def test_a_wrong_constant_fails_the_record(recorded, plan, part):
    wrong = copy.deepcopy(plan)
    for layer in wrong["layers"]:
        layer[part][-1] += 2
    for case in CASES:
        assert hash_layers(wrong, compressed(recorded, case)) != recorded[case]["rows_token_layer_col"]


def test_the_dead_token_is_needed(recorded, plan):
    alive = [c if c != DEAD else plan["pad_compressed"] for c in compressed(recorded, "F2")]
    assert hash_layers(plan, alive) != recorded["F2"]["rows_token_layer_col"]
