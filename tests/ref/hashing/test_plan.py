"""The plan of the hash: its constants, the pins of every preset, its JSON, and what is no plan.

Everything that a plan promises to refuse is offered to it, be it built or read.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import sympy

from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import INT64_MAX, HashPlan, LayerPlan, checksum

REGENERATE = Path(__file__).parents[2] / "golden" / "regenerate.py"


# --- the pins -------------------------------------------------------------------------------------


def test_pinned_plans(tmp_path, monkeypatch, capsys, vocab_v4):
    """The command finds the file as the code would write it, and a changed number in it."""
    spec = importlib.util.spec_from_file_location("regenerate", REGENERATE)
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    assert regenerate.main(["--check"]) == 0, capsys.readouterr().out
    altered = tmp_path / "plans.json"
    altered.write_text(regenerate.FILE.read_text().replace("76632096046245", "76632096046247"))
    monkeypatch.setattr(regenerate, "FILE", altered)
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


# --- the constants --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("size", [0, -1, 100.0, True, None, "9"])
def test_compressed_size_is_a_positive_integer(size):
    with pytest.raises(ValueError, match=f"compressed_size={size!r}: must be an integer of at least 1"):
        HashPlan.build(EngramConfig.preset("tiny"), size, 0)


def test_compressed_size_fits_an_id():
    with pytest.raises(ValueError, match=r"compressed_size=9223372036854775808 exceeds 2\^63 - 1: ids are 64-bit"):
        HashPlan.build(EngramConfig.preset("tiny"), 2**63, 0)


@pytest.mark.parametrize(
    ("pad", "message"), [(-1, "integer of at least 0"), (2.7, "integer of at least 0"), (100, r"must be in 0 \.\. 99")]
)
def test_pad_out_of_range(pad, message):
    with pytest.raises(ValueError, match=f"pad_compressed={pad}: .*{message}"):
        HashPlan.build(EngramConfig.preset("tiny"), 100, pad)


def test_table_beyond_int32_primes_is_refused():
    config = EngramConfig.preset("tiny").replace(table_size_per_order=(2**31, 2**31))
    with pytest.raises(ValueError, match=r"prime \d+ exceeds 2\^31 - 1"):
        HashPlan.build(config, 100, 2)


def test_plans_are_values():
    plan = HashPlan.build(EngramConfig.preset("tiny"), 100, 2)
    same = HashPlan.from_json(plan.to_json())
    assert plan == same and hash(plan) == hash(same) and hash(plan.layers[0]) == hash(same.layers[0])
    for value, name in ((plan, "heads"), (plan.layers[0], "primes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, ())


# --- plans that contradict themselves -------------------------------------------------------------


SOUND = LayerPlan(4, (3, 5), (7, 11), (0, 7))
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


def test_a_layer_named_twice_is_refused(tiny_plan):
    with pytest.raises(ValueError, match="each once"):
        dataclasses.replace(tiny_plan, layers=tiny_plan.layers * 2)


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


def test_unknown_field_is_refused(tiny_plan):
    with pytest.raises(ValueError, match="it was altered"):
        HashPlan.from_json(json.dumps({**json.loads(tiny_plan.to_json()), "seed": 0}))


@pytest.mark.parametrize("text", ["", "null", "3", "[]", "[1]", "{}", '"plan"', '{"checksum": "0"}', "{"])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"not a hash plan: .*; write one with HashPlan\.to_json"):
        HashPlan.from_json(text)
