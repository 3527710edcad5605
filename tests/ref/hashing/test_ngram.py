"""The hasher and what it remembers of sequences: ids in every form, histories, shapes, and what both refuse.

Integers only, compared by `==`, with both backends; against recorded numbers they are held in test_recorded.py.
"""

import importlib.util

import numpy as np
import pytest

from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import DEAD, HashPlan, LayerPlan, NgramHasher, TokenHistory
from tests.ref.hashing.recorded import assert_rows, candidate, random_ids

# --- histories ------------------------------------------------------------------------------------
# That chunks equal one shot, that hashing reads a history and does not advance it, and how far a DEAD token reaches, is
# shown in tests/cross/test_hash_v41.py.


def test_history_keeps_the_last_ids(v41):
    history = TokenHistory(v41, 2)
    assert history.ids.tolist() == [[DEAD] * 3] * 2
    history.advance(np.array([[1], [2]]))
    assert history.ids.tolist() == [[DEAD, DEAD, 1], [DEAD, DEAD, 2]]
    history.advance(np.array([[3, 4, 5, 6], [7, 8, 9, DEAD]]))
    assert history.ids.tolist() == [[4, 5, 6], [8, 9, DEAD]]


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


@pytest.mark.parametrize("bad", [[[100]], [[-2]], [[10**18]], [[1.5]]], ids=str)
def test_history_refuses_what_hashing_refuses(bad, tiny_plan):
    history = TokenHistory(tiny_plan, 1)
    with pytest.raises(ValueError, match="compressed ids"):
        history.advance(np.array(bad))
    assert (history.ids == DEAD).all()


# --- shapes, dtypes, limits -----------------------------------------------------------------------


def test_smallest_vocabulary(backend):
    plan = HashPlan.build(EngramConfig.preset("tiny"), 1, 0)
    rows = NgramHasher(plan, backend)([[0, DEAD]], 1)
    assert (rows[0] == plan.layers[0].offsets).all()


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
    "below DEAD": (np.array([[0, 3], [-1, -2]]), r"compressed ids contain -2; the vocabulary has -1 \.\. 99"),
    "size": (np.array([[0, 3], [100, 99]]), r"compressed ids contain 100; the vocabulary has -1 \.\. 99"),
    "least": (np.array([[-(2**63)]]), "compressed ids contain -9223372036854775808"),
    "largest": (np.array([[2**63 - 1]]), "compressed ids contain 9223372036854775807"),
    "huge": (np.array([[2**64 - 1]], dtype=np.uint64), "compressed ids contain 18446744073709551615"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(case, tiny_plan, backend):
    ids, message = BAD_IDS[case]
    with pytest.raises(ValueError, match=message):
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
