"""DeepSeek-V4.1-Flash's hash from text to rows, asked of every implementation: NumPy, numba, torch, plain Python.

A DEAD token changes its own rows and those of the next three; cut anywhere, a sequence gives the rows of one shot.
Every way carries its own history. Integers by `==`, against one shot of the NumPy definition, whose numbers are those
of the record (`tests/ref/hashing/test_recorded.py`, `tests/toy/test_hashing.py`).
"""

import numpy as np
import pytest
import torch

from engram_ref.files.texts import read_text
from engram_ref.hashing import DEAD
from engram_ref.hashing.device_ids import DeviceVocab
from engram_ref.vocab import load_tokenizer
from tests.cross.ways import WAYS, Way

LENGTH = 64


@pytest.fixture
def plan(plans):
    return plans["v41-flash"]


@pytest.fixture(params=[name for name in WAYS if name != "triton"])  # the interpreter is slow: tests/ref/hashing has it
def way(request, plan):
    return Way(request.param, plan)


@pytest.fixture(scope="module")
def ids():
    """Two sequences, [2, 64]: one of text alone, one with images of one position and more."""
    rng = np.random.default_rng(11)
    ids = rng.integers(0, 99_092, (2, LENGTH))
    for start, end in ((0, 2), (9, 10), (14, 15), (17, 18), (19, 20), (30, 37), (62, 64)):
        ids[1, start:end] = DEAD
    return ids


def changed(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Positions of which some row differs, in some sequence."""
    return np.flatnonzero((a != b).any(axis=(0, 2, 3))).tolist()


# --- chunks ---------------------------------------------------------------------------------------


def test_every_length_in_every_two_chunks(way, plan, ids):
    """Every cut of the longest; of the shorter ones those at either end, and as far from it as an n-gram reaches."""
    whole = Way("numpy", plan).rows(ids)
    for length in range(1, LENGTH + 1):
        assert (way.rows(ids[:, :length]) == whole[:, :length]).all()
        near = {cut for k in range(5) for cut in (k, length - k) if 0 <= cut <= length}
        for cut in range(length + 1) if length == LENGTH else near:
            rows = way.in_chunks(ids[:, :length], [cut])
            assert rows.shape == (2, length, 2, 24) and (rows == whole[:, :length]).all(), (length, cut)


def test_every_length_token_by_token(way, ids):
    """What is hashed at one step does not depend on how many follow, so the longest run is a run of every length."""
    steps = way.in_chunks(ids, range(1, LENGTH))
    for length in range(1, LENGTH + 1):
        assert (steps[:, :length] == way.rows(ids[:, :length])).all()


@pytest.mark.parametrize("seed", range(5))
def test_many_chunks(way, plan, ids, seed):
    cuts = np.sort(np.random.default_rng(seed).integers(0, LENGTH + 1, 12))  # some of them twice: empty chunks
    assert (way.in_chunks(ids, cuts) == Way("numpy", plan).rows(ids)).all()


def test_no_tokens_leave_the_history_alone(way, ids):
    history, rows = way.history(2), []
    for chunk in (ids[:, :5], ids[:, :0], ids[:, 5:]):
        rows += [way.rows(chunk, history)] if chunk.size else []
        way.advance(history, chunk)
    assert (np.concatenate(rows, axis=1) == way.rows(ids)).all()


def test_a_lost_history_changes_three_positions(way, ids):
    parts = np.concatenate([way.rows(ids[:, :40]), way.rows(ids[:, 40:])], axis=1)
    assert changed(parts, way.rows(ids)) == [40, 41, 42]


def test_a_history_that_keeps_pads_for_dead_tokens_is_caught(way, plan, ids):
    """The DEAD token at 14 blocks what lies before it, also for a chunk that starts at 15."""
    history = way.history(2)
    way.advance(history, np.where(ids == DEAD, plan.pad_compressed, ids)[:, :15])
    assert changed(way.rows(ids[:, 15:], history), way.rows(ids)[:, 15:]) == [0, 1]


# --- DEAD tokens ----------------------------------------------------------------------------------


def test_a_dead_token_changes_its_rows_and_those_of_the_next_three(way, ids):
    text = ids[:1]
    before = way.rows(text)
    for position in range(LENGTH):
        masked = text.copy()
        masked[0, position] = DEAD
        after = way.rows(masked)
        assert changed(after, before) == list(range(position, min(LENGTH, position + 4)))
        # The fourth gram of position + 3 is the only one to reach back so far.
        if position + 3 < LENGTH:
            assert (after[0, position + 3, :, :16] == before[0, position + 3, :, :16]).all()


def test_after_a_dead_token_a_sequence_begins(way, ids):
    """The text between two images has the rows that it has alone."""
    assert (way.rows(ids[1:])[:, 37:62] == way.rows(ids[1:, 37:62])).all()


# --- real text ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(vocab_v4):
    """Token ids [1, 600] of Python's help topics, and where images stand for them."""
    tokens = np.array([load_tokenizer().encode(read_text(None)[1][:20_000], add_special_tokens=False).ids[:600]])
    rng, dead = np.random.default_rng(0), np.zeros(tokens.shape, dtype=bool)
    for start in rng.integers(0, 600, 12):
        dead[0, start : start + rng.integers(1, 9)] = True
    return tokens, dead


def test_text_has_images_and_much_else(text):
    tokens, dead = text
    assert tokens.shape == (1, 600) and len(np.unique(tokens)) > 100 and 20 < dead.sum() < 120


@pytest.mark.parametrize("masked", [False, True], ids=["text", "text with images"])
def test_from_text_to_rows(masked, way, plan, vocab_v4, text):
    tokens, dead = text[0], text[1] & masked
    compressed = vocab_v4(tokens, dead)
    assert (compressed == DEAD).sum() == dead.sum()
    assert (DeviceVocab(vocab_v4, "cpu")(torch.from_numpy(tokens), torch.from_numpy(dead)).numpy() == compressed).all()
    rows = way.rows(compressed)
    assert (rows == Way("numpy", plan).rows(compressed)).all()
    assert rows.min() >= 0 and all(rows[:, :, i].max() < layer.rows for i, layer in enumerate(plan.layers))
    assert (way.in_chunks(compressed, [100, 101, 102, 350]) == rows).all()
