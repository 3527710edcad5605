"""DeepSeek-V4.1-Flash's hash from text to rows, asked of every implementation: NumPy, numba, torch, plain Python.

A DEAD token changes its own rows and those of the next three; cut anywhere, a sequence gives the rows of one shot.
Every way carries its own history. Integers by `==`, against one shot of the NumPy definition, whose numbers are those
of the record (`tests/ref/hashing/test_recorded.py`, `tests/toy/test_hashing.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import engram_toy.hashing as toy
from engram_ref.files.texts import read_text
from engram_ref.hashing import DEAD, HashPlan
from engram_ref.hashing import ngram as ref
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab
from engram_ref.vocab import load_tokenizer

LENGTH = 64


class Reference:
    """`engram_ref.hashing` with one of its backends."""

    def __init__(self, plan: HashPlan, backend: str) -> None:
        self.hasher = ref.NgramHasher(plan, backend)

    def history(self, batch: int) -> ref.TokenHistory:
        return ref.TokenHistory(self.hasher.plan, batch)

    def advance(self, history: ref.TokenHistory, ids: np.ndarray) -> None:
        history.advance(ids)

    def rows(self, ids: np.ndarray, history: ref.TokenHistory) -> np.ndarray:
        """[B, T, layers, C] of ids [B, T]."""
        layers = [self.hasher(ids, layer.layer_id, history=history) for layer in self.hasher.plan.layers]
        return np.stack(layers, axis=2)


class Device:
    """`engram_ref.hashing.device`, in plain torch on a CPU."""

    def __init__(self, plan: HashPlan) -> None:
        self.hasher = DeviceHasher(plan, "cpu", fused=False)

    def history(self, batch: int) -> DeviceHistory:
        return DeviceHistory(self.hasher.plan, batch, "cpu")

    def advance(self, history: DeviceHistory, ids: np.ndarray) -> None:
        history.advance(torch.from_numpy(ids))

    def rows(self, ids: np.ndarray, history: DeviceHistory) -> np.ndarray:
        return torch.stack([*self.hasher(torch.from_numpy(ids), history).values()], dim=2).numpy()


class Twin:
    """`engram_toy.hashing`, one sequence at a time."""

    def __init__(self, plan: HashPlan) -> None:
        self.hasher = toy.NgramHasher(json.loads(plan.to_json()))

    def history(self, batch: int) -> list[toy.TokenHistory]:
        return [toy.TokenHistory(self.hasher.plan) for _ in range(batch)]

    def advance(self, history: list[toy.TokenHistory], ids: np.ndarray) -> None:
        for sequence, past in zip(ids.tolist(), history):
            past.advance(sequence)

    def rows(self, ids: np.ndarray, history: list[toy.TokenHistory]) -> np.ndarray:
        layer_ids = [layer["layer_id"] for layer in self.hasher.plan["layers"]]
        sequences = [
            [self.hasher(sequence, layer_id, history=past) for layer_id in layer_ids]
            for sequence, past in zip(ids.tolist(), history)
        ]
        return np.array(sequences).swapaxes(1, 2)


WAYS = {
    "numpy": lambda plan: Reference(plan, "numpy"),
    "numba": lambda plan: Reference(plan, "numba"),
    "torch": Device,
    "twin": Twin,
}


@pytest.fixture
def plan(plans):
    return plans["v41-flash"]


@pytest.fixture(params=WAYS)
def way(request, plan):
    return WAYS[request.param](plan)


@pytest.fixture(scope="module")
def ids():
    """Two sequences, [2, 64]: one of text alone, one with images of one position and more."""
    rng = np.random.default_rng(11)
    ids = rng.integers(0, 99_092, (2, LENGTH))
    for start, end in ((0, 2), (9, 10), (14, 15), (17, 18), (19, 20), (30, 37), (62, 64)):
        ids[1, start:end] = DEAD
    return ids


def one_shot(way, ids: np.ndarray) -> np.ndarray:
    return way.rows(ids, way.history(len(ids)))


def in_chunks(way, ids: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """The rows of one chunk after the other, put together; an empty chunk only passes the history."""
    history, rows = way.history(len(ids)), []
    for chunk in np.split(ids, cuts, axis=1):
        if chunk.size:
            rows.append(way.rows(chunk, history))
        way.advance(history, chunk)
    return np.concatenate(rows, axis=1)


def changed(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Positions of which some row differs, in some sequence."""
    return np.flatnonzero((a != b).any(axis=(0, 2, 3))).tolist()


# --- chunks ---------------------------------------------------------------------------------------


def test_every_length_in_every_two_chunks(way, plan, ids):
    """Every cut of the longest; of the shorter ones those at either end, and as far from it as an n-gram reaches."""
    whole = one_shot(Reference(plan, "numpy"), ids)
    for length in range(1, LENGTH + 1):
        assert (one_shot(way, ids[:, :length]) == whole[:, :length]).all()
        near = {cut for k in range(5) for cut in (k, length - k) if 0 <= cut <= length}
        for cut in range(length + 1) if length == LENGTH else near:
            rows = in_chunks(way, ids[:, :length], [cut])
            assert rows.shape == (2, length, 2, 24) and (rows == whole[:, :length]).all(), (length, cut)


def test_every_length_token_by_token(way, ids):
    """What is hashed at one step does not depend on how many follow, so the longest run is a run of every length."""
    steps = in_chunks(way, ids, range(1, LENGTH))
    for length in range(1, LENGTH + 1):
        assert (steps[:, :length] == one_shot(way, ids[:, :length])).all()


@pytest.mark.parametrize("seed", range(5))
def test_many_chunks(way, plan, ids, seed):
    cuts = np.sort(np.random.default_rng(seed).integers(0, LENGTH + 1, 12))  # some of them twice: empty chunks
    assert (in_chunks(way, ids, cuts) == one_shot(Reference(plan, "numpy"), ids)).all()


def test_no_tokens_leave_the_history_alone(way, ids):
    history, rows = way.history(2), []
    for chunk in (ids[:, :5], ids[:, :0], ids[:, 5:]):
        rows += [way.rows(chunk, history)] if chunk.size else []
        way.advance(history, chunk)
    assert (np.concatenate(rows, axis=1) == one_shot(way, ids)).all()


def test_a_lost_history_changes_three_positions(way, ids):
    parts = np.concatenate([one_shot(way, ids[:, :40]), one_shot(way, ids[:, 40:])], axis=1)
    assert changed(parts, one_shot(way, ids)) == [40, 41, 42]


def test_a_history_that_keeps_pads_for_dead_tokens_is_caught(way, plan, ids):
    """The DEAD token at 14 blocks what lies before it, also for a chunk that starts at 15."""
    history = way.history(2)
    way.advance(history, np.where(ids == DEAD, plan.pad_compressed, ids)[:, :15])
    assert changed(way.rows(ids[:, 15:], history), one_shot(way, ids)[:, 15:]) == [0, 1]


# --- DEAD tokens ----------------------------------------------------------------------------------


def test_a_dead_token_changes_its_rows_and_those_of_the_next_three(way, ids):
    text = ids[:1]
    before = one_shot(way, text)
    for position in range(LENGTH):
        masked = text.copy()
        masked[0, position] = DEAD
        after = one_shot(way, masked)
        assert changed(after, before) == list(range(position, min(LENGTH, position + 4)))
        # The fourth gram of position + 3 is the only one to reach back so far.
        if position + 3 < LENGTH:
            assert (after[0, position + 3, :, :16] == before[0, position + 3, :, :16]).all()


def test_after_a_dead_token_a_sequence_begins(way, ids):
    """The text between two images has the rows that it has alone."""
    assert (one_shot(way, ids[1:])[:, 37:62] == one_shot(way, ids[1:, 37:62])).all()


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
    rows = one_shot(way, compressed)
    assert (rows == one_shot(Reference(plan, "numpy"), compressed)).all()
    assert rows.min() >= 0 and all(rows[:, :, i].max() < layer.rows for i, layer in enumerate(plan.layers))
    assert (in_chunks(way, compressed, [100, 101, 102, 350]) == rows).all()
