"""The hash plan and the hash, stage by stage, against numbers that other implementations made.

Integers only, compared by `==`, with both backends. Wrong candidates, each with one plausible mistake, show that
the golden comparison would tell; everything that the reference promises to refuse is offered to it.

    python -m pytest tests/ref/hashing/test_ngram.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sympy

from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan, NgramHasher, TokenHistory, checksum

REGENERATE = Path(__file__).parents[2] / "golden" / "regenerate.py"
DEMO_CONFIGS = ["demo_default", "small", "ngram4", "pad_other"]
DEMO_BATCHES = {"text_0", "text_padded_id2", "single", "three", "rand_3x17"}  # those that we accept
DEEPSEEK = {"v3": "deepseek-v3 (128815 ids)", "v4": "deepseek-v4 (129280 ids)"}


def demo_config(fields: dict) -> EngramConfig:
    """Our configuration for one of the demo's."""
    return EngramConfig(
        layer_ids=fields["layer_ids"],
        max_ngram=fields["max_ngram_size"],
        heads=fields["n_head_per_ngram"],
        row_width=fields["n_embed_per_ngram"] // fields["n_head_per_ngram"],
        table_size_per_order=fields["engram_vocab_size"],
        hidden=64,
        pad_id=fields["pad_id"],
        seed=fields["seed"],
    )


def recipe_ids(recipe: dict, tokens: int) -> np.ndarray:
    return np.random.default_rng(recipe["seed"]).integers(0, tokens, recipe["shape"])


def flat(orders: list[list[int]]) -> list[int]:
    """Column order: one order after the other."""
    return [prime for order in orders for prime in order]


def digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()


def random_ids(size: int, shape: tuple[int, int], dead: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, size, shape)
    ids[rng.random(shape) < dead] = DEAD
    return ids


def assert_rows(got: np.ndarray, expected: object) -> None:
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    assert (got == expected).all()


@pytest.fixture
def tiny_plan():
    return HashPlan.build(EngramConfig.preset("tiny"), 100, 2)


@pytest.fixture
def v41(plans):
    return plans["v41-flash"]


# --- against the demo: four configurations on the small tokenizer ---------------------------------


@pytest.fixture(scope="session")
def demo_file(golden):
    return golden("hash_demo.json")


@pytest.fixture(params=DEMO_CONFIGS)
def demo(request, demo_file, vocab_small):
    """One configuration of the demo, and our plan for it."""
    case = demo_file["configs"][request.param]
    config = demo_config(case["config"])
    return case, HashPlan.build(config, len(vocab_small), vocab_small.pad(config.pad_id))


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


def plan_layers(plan: HashPlan) -> list[int]:
    return [layer.layer_id for layer in plan.layers]


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


@pytest.fixture(scope="session")
def v41_file(golden):
    return golden("hash_v41.json")


def v41_ids(v41_file: dict, case: str) -> np.ndarray:
    """Compressed ids of F1 or F2, [1, 8]."""
    tokens, mask = v41_file[case]["tokens"], v41_file[case]["mask"]
    ids = [v41_file["token_map_synthetic"][token] for token in tokens]
    return np.array([[c if alive else DEAD for c, alive in zip(ids, mask or [1] * len(ids))]])


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


def test_row_counts(plans):
    assert [layer.rows for layer in plans["v41-flash"].layers] == [384_006_168, 384_016_682]
    assert [layer.rows for layer in plans["demo"].layers] == [10_344_164, 10_348_242]


def test_demo_primes_as_the_v41_file_has_them(plans, v41_file):
    expected = [flat(layer) for layer in v41_file["demo_v1_primes_129280x5"]]
    assert [list(layer.primes) for layer in plans["demo"].layers] == expected


# --- wrong candidates -----------------------------------------------------------------------------

BUGS = ["precedence", "no pad", "shift off by one", "order of heads", "only the DEAD token is padded"]


def candidate(plan: HashPlan, layer: LayerPlan, ids: list[int], bug: str | None) -> list[list[int]]:
    """Indices of one sequence in plain Python, without offsets; right unless it has a bug."""
    rows = []
    for p in range(len(ids)):
        mix, blocked, row = 0, False, []
        for s in range(plan.max_ngram):
            at = p - s - (bug == "shift off by one" and s > 0)
            term, blocked = candidate_id(plan, ids, at, blocked, bug)
            term *= layer.multipliers[s]
            primes = layer.primes[(s - 1) * plan.heads : s * plan.heads] if s else ()
            if bug == "order of heads":
                primes = primes[::-1]
            row += [mix ^ (term % p) if bug == "precedence" else (mix ^ term) % p for p in primes]
            mix ^= term
        rows.append(row)
    return rows


def candidate_id(plan: HashPlan, ids: list[int], at: int, blocked: bool, bug: str | None) -> tuple[int, bool]:
    absent = at < 0 or ids[at] == DEAD
    blocked = absent or (blocked and bug != "only the DEAD token is padded")
    pad = 0 if bug == "no pad" else plan.pad_compressed
    return (pad if blocked else ids[at]), blocked


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


# --- the pins -------------------------------------------------------------------------------------


def test_pinned_plans(cache_home, vocab_v4):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home)}
    run = subprocess.run(
        [sys.executable, str(REGENERATE), "--check"], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


def test_pinned_plans_notice_a_change(tmp_path, monkeypatch, capsys, cache_home, vocab_v4):
    spec = importlib.util.spec_from_file_location("regenerate", REGENERATE)
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    altered = tmp_path / "plans.json"
    altered.write_text(regenerate.FILE.read_text().replace("76632096046245", "76632096046247"))
    monkeypatch.setattr(regenerate, "FILE", altered)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    assert regenerate.main(["--check"]) == 1
    assert "76632096046247" in capsys.readouterr().out
    assert regenerate.main([]) == 0
    assert regenerate.main(["--check"]) == 0


def test_pins_are_of_every_preset(golden, plans):
    pinned = golden("plans.json")
    assert pinned.keys() == PRESETS.keys()
    for name, plan in plans.items():
        assert pinned[name]["checksum"] == json.loads(plan.to_json())["checksum"]
        assert [pin["multipliers"] for pin in pinned[name]["layers"]] == [list(x.multipliers) for x in plan.layers]


# --- the plan -------------------------------------------------------------------------------------


def test_primes_are_shared_out_once(plans):
    for plan in plans.values():
        primes = [p for layer in plan.layers for p in layer.primes]
        assert len(set(primes)) == len(primes)


def test_primes_by_hand():
    config = EngramConfig.preset("tiny").replace(layer_ids=(4, 0), heads=2, table_size_per_order=(10, 8))
    plan = HashPlan.build(config, 100, 2)
    # From 10: 11, 13. From 8 up, without those: 17, 19. Layer 0 goes on: 23, 29 and 31, 37.
    assert [layer.primes for layer in plan.layers] == [(11, 13, 17, 19), (23, 29, 31, 37)]
    assert [layer.offsets for layer in plan.layers] == [(0, 11, 24, 41), (0, 23, 52, 83)]
    assert [layer.rows for layer in plan.layers] == [60, 120]


def test_a_size_that_is_prime_is_taken():
    config = EngramConfig.preset("tiny").replace(heads=1, table_size_per_order=(11, 7))
    assert HashPlan.build(config, 100, 2).layers[0].primes == (11, 7)


def test_thousands_of_columns_take_no_longer_each(monkeypatch):
    """Every prime from a size up is found once: a search that began at the size each time took three quarters of an
    hour for as many columns as a configuration may have."""
    nextprime, found = sympy.nextprime, []
    monkeypatch.setattr(sympy, "nextprime", lambda n: found.append(nextprime(n)) or found[-1])
    config = EngramConfig.preset("tiny").replace(
        layer_ids=tuple(range(16)), heads=64, table_size_per_order=(16_000_000, 16_000_000)
    )
    primes = [prime for layer in HashPlan.build(config, 100, 2).layers for prime in layer.primes]
    assert primes == found == sorted(set(primes)) and len(primes) == 16 * 64 * 2


def test_multipliers_are_odd_and_cannot_overflow(plans):
    for plan in plans.values():
        for layer in plan.layers:
            assert all(m % 2 == 1 for m in layer.multipliers)
            assert (plan.compressed_size - 1) * max(layer.multipliers) <= INT64_MAX


def test_multipliers_depend_on_seed_layer_and_size():
    config = EngramConfig.preset("tiny")
    plan = HashPlan.build(config, 100, 2)
    others = [
        HashPlan.build(config.replace(seed=1), 100, 2),
        HashPlan.build(config.replace(layer_ids=(2,)), 100, 2),
        HashPlan.build(config, 101, 2),
    ]
    for other in others:
        assert other.layers[0].multipliers != plan.layers[0].multipliers
        assert other.layers[0].primes == plan.layers[0].primes


@pytest.mark.parametrize("size", [99_091, 99_093])
def test_v41_needs_its_vocabulary(size):
    with pytest.raises(ValueError, match=f"vocabulary of {size} ids; this configuration needs exactly 99092"):
        HashPlan.build(EngramConfig.preset("v41-flash"), size, 2)


@pytest.mark.parametrize("size", [0, -1, 100.0, True, None])
def test_compressed_size_is_a_positive_integer(size):
    with pytest.raises(ValueError, match=f"compressed_size={size}: must be an integer of at least 1"):
        HashPlan.build(EngramConfig.preset("tiny"), size, 0)


def test_compressed_size_fits_an_id():
    with pytest.raises(ValueError, match=r"exceeds 2\^63 - 1"):
        HashPlan.build(EngramConfig.preset("tiny"), 2**63, 0)


@pytest.mark.parametrize(
    ("pad", "message"), [(-1, "integer of at least 0"), (2.7, "integer of at least 0"), (100, r"must be in 0 \.\. 99")]
)
def test_pad_out_of_range(pad, message):
    with pytest.raises(ValueError, match=f"pad_compressed={pad}: .*{message}"):
        HashPlan.build(EngramConfig.preset("tiny"), 100, pad)


def test_smallest_vocabulary(backend):
    plan = HashPlan.build(EngramConfig.preset("tiny"), 1, 0)
    rows = NgramHasher(plan, backend)([[0, DEAD]], 1)
    assert (rows[0] == plan.layers[0].offsets).all()


def test_table_beyond_int32_primes_is_refused():
    config = EngramConfig.preset("tiny").replace(table_size_per_order=(2**31, 2**31))
    with pytest.raises(ValueError, match=r"prime \d+ exceeds 2\^31 - 1"):
        HashPlan.build(config, 100, 2)


def test_the_largest_prime_is_the_largest_int32():
    layer = LayerPlan(0, (3, 5), (2**31 - 1,), (0,))
    plan = HashPlan(10, 2, 2, 1, (layer,))
    with pytest.raises(ValueError, match=r"prime 2147483648 exceeds 2\^31 - 1"):
        dataclasses.replace(plan, layers=(dataclasses.replace(layer, primes=(2**31,)),))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "compressed_size=0: must be an integer of at least 1"),
        (-1, "compressed_size=-1: must be an integer of at least 1"),
        ("9", "compressed_size='9': must be an integer"),
        (2**63, r"compressed_size=9223372036854775808 exceeds 2\^63 - 1: ids are 64-bit integers"),
    ],
)
def test_sizes_that_no_ids_have_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        HashPlan.build(EngramConfig.preset("tiny"), size, 0)


def test_plans_are_values():
    plan = HashPlan.build(EngramConfig.preset("tiny"), 100, 2)
    same = HashPlan.from_json(plan.to_json())
    assert plan == same and hash(plan) == hash(same) and hash(plan.layers[0]) == hash(same.layers[0])
    for value, name in ((plan, "heads"), (plan.layers[0], "primes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, ())


CONTRADICTIONS = {
    "offsets not the running sum": (dict(offsets=(0, 8)), "offsets are not the running sum of the primes"),
    "offsets start elsewhere": (dict(offsets=(1, 8)), "offsets are not the running sum of the primes"),
    "an offset missing": (dict(offsets=(0,)), "offsets are not the running sum of the primes"),
    "a multiplier missing": (dict(multipliers=(3,)), "1 multipliers and 2 primes; .* need 2 and 2"),
    "a prime missing": (dict(primes=(7,), offsets=(0,)), "2 multipliers and 1 primes; .* need 2 and 2"),
    "multiplier zero": (dict(multipliers=(0, 5)), "=0: must be an integer of at least 1"),
    "negative multiplier": (dict(multipliers=(3, -5)), "=-5: must be an integer of at least 1"),
    "modulus one": (dict(primes=(1, 7), offsets=(0, 1)), "=1: must be an integer of at least 2"),
    "modulus above int32": (dict(primes=(7, 2**31), offsets=(0, 7)), r"prime \d+ exceeds 2\^31 - 1"),
    "overflow": (dict(multipliers=(3, INT64_MAX // 99 + 1)), r"id 99 times multiplier \d+ exceeds 2\^63 - 1"),
}
SOUND = LayerPlan(4, (3, 5), (7, 11), (0, 7))


def test_sound_plan_is_accepted():
    largest = dataclasses.replace(SOUND, layer_id=5, multipliers=(3, INT64_MAX // 99))
    assert HashPlan(100, 2, 2, 2, (SOUND, largest)).layers == (SOUND, largest)


def test_a_multiplier_that_is_no_64_bit_integer_is_refused():
    """Of a vocabulary of one id no product exceeds anything."""
    with pytest.raises(ValueError, match=r"layer 0: multiplier 9223372036854775808 exceeds 2\^63 - 1"):
        HashPlan(1, 0, 2, 1, (LayerPlan(0, (1, 2**63), (7,), (0,)),))


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradicting_plan_is_refused(case):
    changes, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=f"layer 4.*{message}"):
        HashPlan(100, 2, 2, 2, (dataclasses.replace(SOUND, **changes),))


# --- JSON -----------------------------------------------------------------------------------------


def test_json_round_trip(plans):
    for plan in plans.values():
        text = plan.to_json()
        assert HashPlan.from_json(text) == plan
        assert HashPlan.from_json(text).to_json() == text
        assert HashPlan.from_json(json.dumps(json.loads(text), sort_keys=True)) == plan


TAMPERED = [
    ("compressed_size",),
    ("pad_compressed",),
    ("max_ngram",),
    ("heads",),
    ("checksum",),
    ("layers", 0, "layer_id"),
    *[("layers", 0, field, i) for field in ("multipliers", "primes", "offsets") for i in (0, 1)],
]


def tampered(plan: HashPlan, path: tuple, change: object) -> str:
    """The plan's JSON with `change` applied to the container and key at the end of `path`."""
    body = json.loads(plan.to_json())
    place = body
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return json.dumps(body)


def add_two(place, key):
    place[key] = place[key] + 2 if isinstance(place[key], int) else "0" * 64


def drop(place, key):
    del place[key]


def to_text(place, key):
    place[key] = f"{place[key]} "


@pytest.mark.parametrize("path", TAMPERED, ids=str)
@pytest.mark.parametrize("change", [add_two, drop, to_text])
def test_tampered_json_is_refused(path, change, tiny_plan):
    with pytest.raises(ValueError, match="hash plan"):
        HashPlan.from_json(tampered(tiny_plan, path, change))


def signed(body):
    """JSON of a plan whose checksum fits, whatever is in it."""
    return json.dumps({**body, "checksum": checksum(body)})


@pytest.mark.parametrize(
    "change",
    [
        {"compressed_size": None},
        {"compressed_size": "100"},
        {"compressed_size": 100.0},
        {"heads": None},
        {"pad_compressed": 3.5},
        {"max_ngram": "3"},
        {"layers": []},
        {"layers": None},
        {"extra": 1},
    ],
    ids=str,
)
def test_signed_json_of_a_wrong_type_is_refused(change, tiny_plan):
    body = json.loads(tiny_plan.to_json())
    del body["checksum"]
    assert HashPlan.from_json(signed(body)) == tiny_plan
    with pytest.raises(ValueError, match="not a hash plan"):
        HashPlan.from_json(signed({**body, **change}))


@pytest.mark.parametrize("field", ["layer_id", "multipliers", "primes", "offsets"])
@pytest.mark.parametrize("value", [None, "1", [3.5, 1, 1], "drop"], ids=str)
def test_signed_json_of_a_wrong_layer_is_refused(field, value, tiny_plan):
    body = json.loads(tiny_plan.to_json())
    del body["checksum"]
    body["layers"][0][field] = value
    if value == "drop":
        del body["layers"][0][field]
    with pytest.raises(ValueError, match="not a hash plan"):
        HashPlan.from_json(signed(body))


def test_a_layer_named_twice_is_refused(tiny_plan):
    with pytest.raises(ValueError, match="each once"):
        dataclasses.replace(tiny_plan, layers=tiny_plan.layers * 2)


@pytest.mark.parametrize("bad", [[[100]], [[-2]], [[10**18]], [[1.5]]], ids=str)
def test_history_refuses_what_hashing_refuses(bad, tiny_plan):
    history = TokenHistory(tiny_plan, 1)
    with pytest.raises(ValueError, match="compressed ids"):
        history.advance(np.array(bad))
    assert (history.ids == DEAD).all()


def test_unknown_field_is_refused(tiny_plan):
    with pytest.raises(ValueError, match="it was altered"):
        HashPlan.from_json(json.dumps({**json.loads(tiny_plan.to_json()), "seed": 0}))


@pytest.mark.parametrize("text", ["", "null", "3", "[]", "[1]", "{}", '"plan"', '{"checksum": "0"}', "{"])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"not a hash plan: .*; write one with HashPlan\.to_json"):
        HashPlan.from_json(text)


# --- histories ------------------------------------------------------------------------------------
# That chunks equal one shot, and how far a DEAD token reaches, is shown in tests/cross/test_hash_v41.py.


def test_history_keeps_the_last_ids(v41):
    history = TokenHistory(v41, 2)
    assert history.ids.tolist() == [[DEAD] * 3] * 2
    history.advance(np.array([[1], [2]]))
    assert history.ids.tolist() == [[DEAD, DEAD, 1], [DEAD, DEAD, 2]]
    history.advance(np.array([[3, 4, 5, 6], [7, 8, 9, DEAD]]))
    assert history.ids.tolist() == [[4, 5, 6], [8, 9, DEAD]]


def test_history_is_read_not_advanced(v41, backend):
    history = TokenHistory(v41, 1)
    history.advance(np.array([[5, 6, 7]]))
    NgramHasher(v41, backend)([[8, 9]], 1, history=history)
    assert history.ids.tolist() == [[5, 6, 7]]


def test_history_copy_is_independent(v41):
    history = TokenHistory(v41, 1)
    history.advance(np.array([[5, 6, 7]]))
    twin = history.copy()
    assert not np.shares_memory(twin.ids, history.ids)
    twin.advance(np.array([[8]]))
    assert (history.ids.tolist(), twin.ids.tolist()) == ([[5, 6, 7]], [[6, 7, 8]])
    history.advance(np.array([[9]]))
    assert (history.ids.tolist(), twin.ids.tolist()) == ([[6, 7, 9]], [[6, 7, 8]])


def test_history_does_not_alias_the_chunk(v41):
    history, chunk = TokenHistory(v41, 1), np.array([[5, 6, 7, 8]])
    history.advance(chunk)
    chunk[:] = 0
    assert history.ids.tolist() == [[6, 7, 8]]


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (4,), (2, 4, 1)], ids=str)
def test_history_refuses_a_chunk_of_other_sequences(shape, v41):
    with pytest.raises(ValueError, match="this history follows 2 sequences"):
        TokenHistory(v41, 2).advance(np.zeros(shape, dtype=np.int64))


@pytest.mark.parametrize("dtype", [np.float64, bool, object])
def test_history_takes_integers_only(dtype, v41):
    history = TokenHistory(v41, 1)
    with pytest.raises(ValueError, match="give integers"):
        history.advance(np.array([[1]], dtype=dtype))
    assert history.ids.tolist() == [[DEAD] * 3]


def test_history_of_unsigned_ids(v41):
    history = TokenHistory(v41, 1)
    history.advance(np.array([[1, 2]], dtype=np.uint64))
    assert (history.ids.dtype, history.ids.tolist()) == (np.int64, [[DEAD, 1, 2]])


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_hasher_refuses_a_history_of_other_sequences(sequences, v41, backend):
    ids = np.zeros((3, 4), dtype=np.int64)
    with pytest.raises(ValueError, match=rf"a history of \({sequences}, 3\); 3 sequences"):
        NgramHasher(v41, backend)(ids, 1, history=TokenHistory(v41, sequences))


# --- DEAD tokens ----------------------------------------------------------------------------------


def test_only_pads_give_the_row_of_a_dead_token(v41, backend):
    hasher = NgramHasher(v41, backend)
    rows = hasher(np.full((1, 5), DEAD), 1)
    assert_rows(rows, hasher(np.full((1, 5), v41.pad_compressed), 1))
    assert (rows == rows[:, :1]).all()


# --- shapes, dtypes, limits -----------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_stay_within_the_table(preset, plans, backend):
    plan = plans[preset]
    hasher = NgramHasher(plan, backend)
    size = plan.compressed_size
    ids = np.array([[size - 1] * 9, [0] * 9, [size - 1, DEAD, size - 1, size - 1, 0, size - 1, 1, size - 2, size - 1]])
    for layer in plan.layers:
        columns = hasher(ids, layer.layer_id, offsets=False)
        assert (columns >= 0).all() and (columns < layer.primes).all()
        rows = hasher(ids, layer.layer_id)
        assert rows.min() >= 0 and rows.max() < layer.rows <= 2**31 - 1
        assert_rows(rows, columns + np.array(layer.offsets))


def test_largest_hash_is_exact(backend):
    plan = HashPlan(2**32, 0, 2, 2, (LayerPlan(0, (2**31, 2**31 - 1), (2**31 - 1, 101), (0, 2**31 - 1)),))
    ids = [2**32 - 1, 2**32 - 2]
    expected = candidate(plan, plan.layers[0], ids, None)
    assert NgramHasher(plan, backend)([ids], 0, offsets=False)[0].tolist() == expected


def test_shape_and_dtype(plans, backend):
    hasher = NgramHasher(plans["demo"], backend)
    for shape in ((1, 1), (1, 7), (3, 1), (3, 65)):
        rows = hasher(np.zeros(shape, dtype=np.int64), 15)
        assert (rows.shape, rows.dtype) == ((*shape, 16), np.int32)


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids.astype(np.int32),
        lambda ids: ids.astype(np.uint32),
        lambda ids: ids.astype(">i8"),
        lambda ids: ids.tolist(),
        lambda ids: np.asfortranarray(ids),
        lambda ids: np.repeat(ids, 2, axis=1)[:, ::2],
        lambda ids: ids[::-1, ::-1].copy()[::-1, ::-1],
    ],
    ids=["int32", "uint32", "big-endian", "list", "Fortran order", "strided", "negative strides"],
)
def test_other_forms_of_the_same_ids(convert, v41, backend):
    ids = random_ids(v41.compressed_size, (3, 50))
    hasher = NgramHasher(v41, backend)
    assert_rows(hasher(convert(ids), 1), hasher(ids, 1))


def test_ids_are_left_alone(v41, backend):
    ids = random_ids(v41.compressed_size, (2, 20), dead=0.2)
    before = ids.copy()
    NgramHasher(v41, backend)(ids, 1)
    assert (ids == before).all()


def test_permuted_batch_permutes_the_rows(v41, backend):
    ids = random_ids(v41.compressed_size, (5, 20), dead=0.1)
    hasher = NgramHasher(v41, backend)
    order = [3, 0, 4, 1, 2]
    assert_rows(hasher(ids[order], 1), hasher(ids, 1)[order])


def test_later_tokens_do_not_change_earlier_rows(v41, backend):
    ids = random_ids(v41.compressed_size, (2, 20), dead=0.1)
    hasher = NgramHasher(v41, backend)
    whole = hasher(ids, 1)
    for length in range(1, 20):
        assert_rows(hasher(ids[:, :length], 1), whole[:, :length])


def test_two_configurations_side_by_side(plans, backend):
    ids = random_ids(99_092, (2, 10))
    demo, v41 = NgramHasher(plans["demo"], backend), NgramHasher(plans["v41-flash"], backend)
    alone = demo(ids, 1)
    assert v41(ids, 1).shape == (2, 10, 24)
    assert_rows(demo(ids, 1), alone)
    # The first three multipliers of layer 1 are shared; the tables are not.
    assert not (v41(ids, 1, offsets=False)[..., :16] == demo(ids, 1, offsets=False)).any(axis=2).all()


# --- what is refused ------------------------------------------------------------------------------

BAD_IDS = {
    "float": (np.array([[1.0]]), "compressed ids of dtype float64: give integers"),
    "bool": (np.array([[True]]), "compressed ids of dtype bool: give integers"),
    "object": (np.array([[1, None]], dtype=object), "compressed ids of dtype object: give integers"),
    "no dimension": (np.array(1), r"compressed ids of shape \(\): give a batch of sequences, \[B, T\]"),
    "one dimension": (np.array([1, 2]), r"compressed ids of shape \(2,\): give a batch of sequences, \[B, T\]"),
    "three dimensions": (np.ones((1, 2, 3), dtype=int), r"compressed ids of shape \(1, 2, 3\): give a batch"),
    "no sequences": (np.empty((0, 5), dtype=int), r"compressed ids of shape \(0, 5\): an empty batch"),
    "no tokens": (np.empty((1, 0), dtype=int), r"compressed ids of shape \(1, 0\): an empty batch"),
    "below DEAD": (np.array([[0, -2]]), r"compressed ids contain -2; the vocabulary has -1 \.\. 99"),
    "size": (np.array([[0, 100]]), r"compressed ids contain 100; the vocabulary has -1 \.\. 99"),
    "least": (np.array([[-(2**63)]]), "compressed ids contain -9223372036854775808"),
    "largest": (np.array([[2**63 - 1]]), "compressed ids contain 9223372036854775807"),
    "huge": (np.array([[2**64 - 1]], dtype=np.uint64), "compressed ids contain 18446744073709551615"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(case, tiny_plan, backend):
    ids, message = BAD_IDS[case]
    with pytest.raises(ValueError, match=message):
        NgramHasher(tiny_plan, backend)(ids, 1)


@pytest.mark.parametrize("bad", [-2, 100])
@pytest.mark.parametrize("place", [(0, 0), (1, 33), (2, 99)], ids=str)
def test_one_bad_id_anywhere_is_found(bad, place, tiny_plan, backend):
    ids = random_ids(100, (3, 100))
    ids[place] = bad
    with pytest.raises(ValueError, match=f"compressed ids contain {bad};"):
        NgramHasher(tiny_plan, backend)(ids, 1)


def test_unknown_layer(v41, backend):
    with pytest.raises(ValueError, match=r"layer_id=15: this plan has layers \[1, 14\]"):
        v41.layer(15)
    with pytest.raises(ValueError, match=r"layer_id=15: this plan has layers \[1, 14\]"):
        NgramHasher(v41, backend)([[1]], 15)


def test_unknown_backend(tiny_plan):
    with pytest.raises(ValueError, match="backend='torch': use 'numpy' or 'numba'"):
        NgramHasher(tiny_plan, "torch")


def test_default_backend(tiny_plan, monkeypatch):
    assert NgramHasher(tiny_plan).backend == "numba"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    assert NgramHasher(tiny_plan).backend == "numpy"
