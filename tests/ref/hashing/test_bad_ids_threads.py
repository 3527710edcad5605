"""Two threads, one hasher or vocabulary on a CPU: bad ids are raised in the call that got them, and change no other."""

import sys
import threading

import numpy as np
import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab
from engram_ref.vocab import CompressedVocab

VOCAB = CompressedVocab.from_map(np.arange(60) % 50)
PLAN = HashPlan.for_vocab(EngramConfig.preset("tiny").replace(layer_ids=(1,)), VOCAB)
GOOD = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (2, 7)))
CALLS = 300


def hashed(hasher):
    rows = NgramHasher(PLAN, "numpy")(GOOD.numpy(), 1)
    return lambda ids: hasher(ids)[1], torch.from_numpy(rows).long(), 50


def looked_up(vocab):
    return vocab, torch.from_numpy(VOCAB(GOOD.numpy())), 60


def from_tokens(hasher):
    vocab = DeviceVocab(VOCAB, "cpu")
    return lambda ids: hasher.from_tokens(ids, vocab).compressed, torch.from_numpy(VOCAB(GOOD.numpy())), 60


def advanced(history):
    def advance(ids):
        history.copy().advance(ids)  # a copy has an id range in common with the others
        return ids

    return advance, GOOD, 50


SHARED = {
    "hasher": lambda: hashed(DeviceHasher(PLAN, "cpu", False)),
    "vocabulary": lambda: looked_up(DeviceVocab(VOCAB, "cpu")),
    "tokens": lambda: from_tokens(DeviceHasher(PLAN, "cpu", False)),
    "history": lambda: advanced(DeviceHistory(PLAN, 2, "cpu")),
}


@pytest.fixture
def often():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_bad_ids_of_one_thread_are_not_those_of_another(shared):
    call, want, size = shared()
    wrong = []
    done = threading.Event()

    def give_bad(ids):
        while not done.is_set():
            try:
                call(ids)
            except ValueError as error:
                if f"contain {int(ids[1, 3])};" not in str(error):
                    wrong.append(f"another's number: {error}")
            else:
                wrong.append("not raised")

    threads = []
    for number in (size + 5, -7):
        ids = GOOD.clone()
        ids[1, 3] = number
        threads.append(threading.Thread(target=give_bad, args=(ids,)))
    try:
        for thread in threads:
            thread.start()
        for _ in range(CALLS):
            try:
                if not torch.equal(call(GOOD).long(), want):
                    wrong.append("other rows")
            except ValueError as error:
                wrong.append(f"raised in a call without: {error}")
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert not wrong, wrong[:3]
