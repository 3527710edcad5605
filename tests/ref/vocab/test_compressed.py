"""The map in use: made from an array, called with ids and masks, and what both refuse."""

import hashlib

import numpy as np
import pytest

from engram_ref.hashing import DEAD
from engram_ref.vocab import CompressedVocab

# --- from_map -------------------------------------------------------------------------------------


def test_from_map():
    vocab = CompressedVocab.from_map([0, 1, 0, 2, 1])
    assert (vocab.ids.dtype, vocab.ids.tolist(), len(vocab)) == (np.int64, [0, 1, 0, 2, 1], 3)
    assert vocab.digest == hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in (0, 1, 0, 2, 1))).hexdigest()


BAD_MAPS = {
    "empty": [],
    "does not start at 0": [1, 0],
    "gap": [0, 2, 1],
    "late gap": [0, 1, 1, 0, 3],
    "negative": [0, -1, 1],
    "two dimensions": [[0, 1], [2, 3]],
    "a number": 0,
    "nothing": None,
    "fractions": [0, 0.9, 1.5],
    "texts": ["0", "1"],
    "beyond int64": [0, 2**70],
    "DEAD in disguise": np.array([0, 1, 2**64 - 1, 2], dtype=np.uint64),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_from_map_refuses(case):
    with pytest.raises(ValueError, match="not a compressed map"):
        CompressedVocab.from_map(BAD_MAPS[case])


def test_from_map_does_not_alias():
    ids = np.array([0, 1, 2])
    vocab = CompressedVocab.from_map(ids)
    ids[2] = 0
    assert vocab.ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        vocab.ids[0] = 1


# --- call -----------------------------------------------------------------------------------------


@pytest.fixture
def five():
    return CompressedVocab.from_map([0, 1, 0, 2, 1])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.uint64])
def test_call(five, dtype):
    got = five(np.array([[3, 2, 1], [4, 4, 0]], dtype=dtype))
    assert got.dtype == np.int64
    assert got.tolist() == [[2, 0, 1], [1, 1, 0]]


def test_call_takes_lists_and_strided_arrays(five):
    assert five([[3, 2, 1]]).tolist() == [[2, 0, 1]]
    ids = np.array([[3, 9, 2, 9], [4, 9, 0, 9]])
    assert five(ids[:, ::2]).tolist() == [[2, 0], [1, 0]]
    assert five(ids[:, ::2].T).tolist() == [[2, 1], [0, 0]]


def test_call_gives_a_fresh_array(five):
    got = five([[3, 2]])
    got[:] = 7
    assert five([[3, 2]]).tolist() == [[2, 0]]


def test_dead_mask(five):
    dead = [[False, True, False], [True, True, True]]
    assert five([[3, 2, 1], [4, 4, 0]], dead=dead).tolist() == [[2, DEAD, 1], [DEAD, DEAD, DEAD]]
    assert five([[3, 2]], dead=[[False, False]]).tolist() == [[2, 0]]


def test_dead_ids_are_not_looked_at(five):
    ids = np.array([[3, -100, 10**6, 2]])
    assert five(ids, dead=[[False, True, True, False]]).tolist() == [[2, DEAD, DEAD, 0]]
    assert ids.tolist() == [[3, -100, 10**6, 2]]
    with pytest.raises(ValueError, match="token ids contain -100"):
        five(ids, dead=[[False, False, True, False]])


@pytest.mark.parametrize(
    "dead",
    [[[0, 1]], [[0.0, 1.0]], [[True]], [True, False], [[True, False, True]], True],
    ids=["int", "float", "short", "one dimension", "long", "scalar"],
)
def test_bad_dead_mask(five, dead):
    with pytest.raises(ValueError, match=r"give booleans of shape \(1, 2\)"):
        five([[3, 2]], dead=dead)


BAD_IDS = {
    "float": ([[1.0, 2.0]], "token ids of dtype float64: give integers"),
    "bool": ([[True, False]], "token ids of dtype bool: give integers"),
    "object": (np.array([[1, None]], dtype=object), "token ids of dtype object: give integers"),
    "text": ([["a"]], "token ids of dtype <U1: give integers"),
    "one dimension": ([1, 2], r"token ids of shape \(2,\): give a batch of sequences, \[B, T\]"),
    "three dimensions": ([[[1]]], r"token ids of shape \(1, 1, 1\)"),
    "no sequences": (np.empty((0, 5), dtype=int), r"token ids of shape \(0, 5\): an empty batch"),
    "no tokens": (np.empty((1, 0), dtype=int), r"token ids of shape \(1, 0\): an empty batch"),
    "too large": ([[0, 5]], r"token ids contain 5; the vocabulary has 0 \.\. 4"),
    "negative": ([[0, -1]], r"token ids contain -1; the vocabulary has 0 \.\. 4"),
    "huge": (np.array([[2**64 - 1]], dtype=np.uint64), "token ids contain 18446744073709551615"),
}


def test_a_mask_does_not_hide_wrong_ids(five):
    with pytest.raises(ValueError, match="dtype bool: give integers"):
        five([[True, False]], dead=[[False, False]])


@pytest.mark.parametrize("case", BAD_IDS)
def test_call_refuses(five, case):
    ids, message = BAD_IDS[case]
    with pytest.raises(ValueError, match=message):
        five(ids)


def test_pad_is_a_token_id(vocab_v4, vocab_v3, vocab_small, golden):
    assert (vocab_v4.pad(2), vocab_v3.pad(2), vocab_small.pad(2)) == (2, 2, 2)
    other = golden("hash_demo.json")["configs"]["pad_other"]
    assert vocab_small.pad(other["config"]["pad_id"]) == other["compressed_pad_id"] == 596
    for outside in (-1, 8_182):
        with pytest.raises(ValueError, match=rf"token ids contain {outside}; the vocabulary has 0 \.\. 8181"):
            vocab_small.pad(outside)
