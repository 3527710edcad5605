"""Both twins give the same stream of row indices: what the plain-Python layer reads is what the reference reads.

The twin gets the plan as JSON and shares no code with the reference. Real text, every preset, every edge of a
sequence, and random plans; integers by `==`. A wrong twin must fail the same comparison.
"""

import inspect
import json
import pydoc_data.topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engram_ref.hashing as ref
import engram_toy.hashing as toy
from engram_ref.config import PRESETS
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan
from engram_ref.vocab import load_tokenizer

BACKENDS = ("numpy", "numba")
MODULI = (2, 3, 10, 101, 1009, 646_403, 16_000_057, 2**31 - 19, 2**31 - 1)


def twin_of(plan: HashPlan) -> toy.NgramHasher:
    return toy.NgramHasher(json.loads(plan.to_json()))


def assert_twins_agree(plan: HashPlan, batch: list[list[int]], backends: tuple[str, ...] = BACKENDS) -> None:
    """Every layer, with and without offsets: the twin row by row, the reference as one batch."""
    twin = twin_of(plan)
    for layer in plan.layers:
        for offsets in (True, False):
            rows = [twin(ids, layer.layer_id, offsets) for ids in batch]
            for backend in backends:
                expected = ref.NgramHasher(plan, backend)(np.array(batch), layer.layer_id, offsets)
                assert rows == expected.tolist()


@pytest.fixture(scope="module")
def text_ids(vocab_v4):
    """Compressed ids of the first 300 tokens of the Python manual's topics."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = load_tokenizer().encode(text[:20_000], add_special_tokens=False).ids[:300]
    return vocab_v4([tokens])[0].tolist()


# --- one shot -------------------------------------------------------------------------------------


def test_text_is_long_and_varied(text_ids):
    assert len(text_ids) == 300 and len(set(text_ids)) > 60


@pytest.mark.parametrize("preset", PRESETS)
def test_real_text(preset, plans, text_ids):
    assert_twins_agree(plans[preset], [text_ids])


@pytest.mark.parametrize("preset", PRESETS)
def test_batch_row_by_row(preset, plans, text_ids):
    assert_twins_agree(plans[preset], [text_ids[:50], text_ids[100:150], text_ids[250:]])


EDGES = {
    "one token": [7],
    "two tokens": [7, 8],
    "three tokens": [7, 8, 9],
    "pads": [2, 2, 2, 2, 2],
    "largest ids": [99_091] * 6,
    "zeros": [0] * 6,
    "one DEAD": [DEAD],
    "DEAD first": [DEAD, 7, 8, 9, 10],
    "DEAD last": [7, 8, 9, 10, DEAD],
    "DEAD in the middle": [7, 8, 9, DEAD, 10, 11, 12, 13],
    "DEAD every other": [7, DEAD, 8, DEAD, 9, DEAD],
    "all DEAD": [DEAD] * 5,
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("preset", PRESETS)
def test_edges(preset, edge, plans):
    assert_twins_agree(plans[preset], [EDGES[edge]])


# --- a wrong twin ---------------------------------------------------------------------------------


def with_precedence_bug(ids, multipliers, primes, offsets, pad, before=(), segment_end=None):
    """As if `a ^ b % m` were `(a ^ b) % m`."""
    rows = []
    for p in range(len(ids)):
        terms = [(ids[p - s] if p >= s else pad) * m for s, m in enumerate(multipliers)]
        rows.append([(terms[0] ^ terms[1] % prime) + offset for prime, offset in zip(primes, offsets)])
    return rows


def without_pad(ids, multipliers, primes, offsets, pad, before=(), segment_end=None):
    return hash_columns(ids, multipliers, primes, offsets, 0, before)


def without_offsets(ids, multipliers, primes, offsets, pad, before=(), segment_end=None):
    return hash_columns(ids, multipliers, primes, None, pad, before)


def with_shifts_reversed(ids, multipliers, primes, offsets, pad, before=(), segment_end=None):
    return hash_columns(ids, [multipliers[0], *multipliers[:0:-1]], primes, offsets, pad, before)


hash_columns = toy.hash_columns  # the right one, whatever the test below puts in its place


@pytest.mark.parametrize("wrong", [with_precedence_bug, without_pad, without_offsets, with_shifts_reversed])
def test_wrong_twin_is_caught(wrong, plans, text_ids, monkeypatch):
    assert_twins_agree(plans["demo"], [text_ids[:20]])
    monkeypatch.setattr(toy, "hash_columns", wrong)
    with pytest.raises(AssertionError):
        assert_twins_agree(plans["demo"], [text_ids[:20]])


# --- chunks ---------------------------------------------------------------------------------------


def stream_both(plan: HashPlan, backend: str, ids: list[int], cuts: list[int]) -> dict[int, list[list[int]]]:
    """Rows of every layer, the chunks put together; twin and reference are compared chunk by chunk."""
    hasher, twin = ref.NgramHasher(plan, backend), twin_of(plan)
    history, twin_history = ref.TokenHistory(plan, 1), toy.TokenHistory(twin.plan)
    rows: dict[int, list[list[int]]] = {layer.layer_id: [] for layer in plan.layers}
    for start, end in zip([0, *cuts], [*cuts, len(ids)]):
        chunk = ids[start:end]
        for layer in plan.layers:
            got = twin(chunk, layer.layer_id, history=twin_history)
            assert got == hasher(np.array([chunk]), layer.layer_id, history=history)[0].tolist()
            rows[layer.layer_id] += got
        history.advance(np.array([chunk]))
        twin_history.advance(chunk)
        assert twin_history.ids == history.ids[0].tolist()
    return rows


CUTS = {
    "one shot": [],
    "one token at a time": list(range(1, 60)),
    "prefill, then decode": [40, *range(41, 60)],
    "odd chunks": [1, 3, 4, 9, 31],
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dead", [(), (0, 17, 18, 40, 59)], ids=["plain", "with DEAD"])
@pytest.mark.parametrize("preset", ["demo", "v41-flash"])
def test_chunks(preset, dead, cuts, plans, text_ids, backend):
    ids = [DEAD if p in dead else c for p, c in enumerate(text_ids[:60])]
    twin = twin_of(plans[preset])
    whole = {layer.layer_id: twin(ids, layer.layer_id) for layer in plans[preset].layers}
    assert stream_both(plans[preset], backend, ids, CUTS[cuts]) == whole


# --- random plans ---------------------------------------------------------------------------------


@st.composite
def random_plans(draw) -> HashPlan:
    max_ngram, heads = draw(st.integers(2, 5)), draw(st.integers(1, 9))
    size = draw(st.sampled_from([1, 2, 50, 99_092, 2**31, INT64_MAX]))
    largest = INT64_MAX // max(1, size - 1)
    layers = []
    for layer_id in draw(st.lists(st.integers(0, 60), min_size=1, max_size=2, unique=True)):
        columns = (max_ngram - 1) * heads
        primes = draw(st.lists(st.sampled_from(MODULI), min_size=columns, max_size=columns))
        multipliers = draw(st.lists(st.integers(1, largest), min_size=max_ngram, max_size=max_ngram))
        offsets = tuple(sum(primes[:i]) for i in range(columns))
        layers.append(LayerPlan(layer_id, tuple(multipliers), tuple(primes), offsets))
    return HashPlan(size, draw(st.integers(0, size - 1)), max_ngram, heads, tuple(layers))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_plans(data):
    plan = data.draw(random_plans())
    length = data.draw(st.integers(1, 20))
    edge = st.sampled_from([DEAD, 0, plan.compressed_size - 1])
    token = st.one_of(edge, st.integers(DEAD, plan.compressed_size - 1))
    row = st.lists(token, min_size=length, max_size=length)
    assert_twins_agree(plan, data.draw(st.lists(row, min_size=1, max_size=3)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_chunks(data):
    plan = data.draw(random_plans())
    ids = data.draw(st.lists(st.integers(DEAD, plan.compressed_size - 1), min_size=2, max_size=20))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1))))
    stream_both(plan, data.draw(st.sampled_from(BACKENDS)), ids, cuts)


# --- the same surface -----------------------------------------------------------------------------

BAD_CALLS = {
    "id too large": ([1, 99_092], 1),
    "id below DEAD": ([1, -2], 1),
    "huge id": ([2**62], 1),
    "no ids": ([], 1),
    "unknown layer": ([1], 3),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_both_refuse_with_a_value_error(case, plans, backend):
    ids, layer_id = BAD_CALLS[case]
    plan = plans["v41-flash"]
    with pytest.raises(ValueError):
        ref.NgramHasher(plan, backend)(np.array([ids], dtype=np.int64), layer_id)
    with pytest.raises(ValueError):
        twin_of(plan)(ids, layer_id)


def test_messages_are_the_same(plans):
    plan = plans["v41-flash"]
    for ids, layer_id in ([1, 99_092], 1), ([-2], 1), ([1], 3):
        with pytest.raises(ValueError) as expected:
            ref.NgramHasher(plan)([ids], layer_id)
        with pytest.raises(ValueError) as got:
            twin_of(plan)(ids, layer_id)
        assert str(got.value) == str(expected.value)


def test_same_names():
    assert toy.DEAD == ref.DEAD == -1
    for name in ("NgramHasher", "TokenHistory"):
        assert inspect.isclass(getattr(toy, name)) and inspect.isclass(getattr(ref, name))
    assert inspect.isfunction(toy.hash_columns) and inspect.isfunction(ref.hash_columns)


def test_same_arguments():
    def arguments(function) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(toy.NgramHasher.__call__) == arguments(ref.NgramHasher.__call__)
    assert arguments(toy.TokenHistory.advance) == arguments(ref.TokenHistory.advance)
    assert arguments(toy.NgramHasher.layer) == arguments(ref.HashPlan.layer)


def test_twin_reads_the_plan_that_the_reference_writes(plans):
    for plan in plans.values():
        body = json.loads(plan.to_json())
        for layer in plan.layers:
            assert twin_of(plan).layer(layer.layer_id) in body["layers"]
            assert tuple(twin_of(plan).layer(layer.layer_id)["primes"]) == layer.primes


@pytest.mark.parametrize("bad", [[1.5], [None], ["a"], [[1]], [True], [10**18], [-2], []], ids=str)
def test_the_twin_refuses_what_the_reference_refuses(bad, plans):
    plan = plans["tiny"]
    with pytest.raises(ValueError):
        ref.NgramHasher(plan)([bad], 1)
    with pytest.raises(ValueError, match="compressed ids"):
        twin_of(plan)(bad, 1)
    if bad:
        with pytest.raises(ValueError, match="compressed ids"):
            toy.TokenHistory(twin_of(plan).plan).advance(bad)


def test_histories_are_copied_alike(plans):
    plan = plans["tiny"]
    history, twin_history = ref.TokenHistory(plan, 1), toy.TokenHistory(twin_of(plan).plan)
    history.advance([[7]])
    twin_history.advance([7])
    saved, twin_saved = history.copy(), twin_history.copy()
    history.advance([[8, 9]])
    twin_history.advance([8, 9])
    assert saved.ids[0].tolist() == twin_saved.ids == [DEAD, 7]
    assert history.ids[0].tolist() == twin_history.ids == [8, 9]
