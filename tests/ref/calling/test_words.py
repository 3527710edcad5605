"""Words between threads: what is posted is seen, with all that was written before it; waiting ends."""

import threading
import time

import numpy as np
import pytest

from engram_ref.calling import words


@pytest.fixture(params=["compiled", "plain"])
def both(request, monkeypatch):
    """The words of either kind."""
    if request.param == "plain":
        monkeypatch.setattr(words, "post", words._plain_post)
        monkeypatch.setattr(words, "_look", words._plain_look)
    elif words.post is words._plain_post:
        pytest.skip("numba is not installed")
    return words


def test_whoever_sees_the_word_sees_what_was_written_before(both):
    memory = np.zeros((2, 4096), np.int64)  # a word, and what it speaks of
    word = memory[0].ctypes.data
    missed = []

    def read():
        for turn in range(1, 51):
            assert both.wait_for(word, 2 * turn - 1, 10.0) == 2 * turn - 1
            missed.extend(memory[1][memory[1] != turn])
            both.post(word, 2 * turn)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for turn in range(1, 51):
        memory[1] = turn
        both.post(word, 2 * turn - 1)
        assert both.wait_for(word, 2 * turn, 10.0) == 2 * turn
    reader.join(10)
    assert not reader.is_alive() and not missed


def test_waiting_ends_and_what_is_more_is_enough(both):
    word = np.array([-3], np.int64)
    begin = time.perf_counter()
    assert both.wait_for(word.ctypes.data, -2, 0.06) is None
    assert 0.06 <= time.perf_counter() - begin < 5
    assert both.wait_for(word.ctypes.data, -4, 0.0) == both.peek(word.ctypes.data) == -3


def test_waiting_that_is_called_off_ends_at_once(both):
    word, off = np.zeros(1, np.int64), threading.Event()
    threading.Timer(0.1, off.set).start()
    begin = time.perf_counter()
    assert both.wait_for(word.ctypes.data, 1, 30.0, off.is_set) is None
    assert time.perf_counter() - begin < 10
    word[0] = 1
    assert both.wait_for(word.ctypes.data, 1, 30.0, off.is_set) == 1, "it was there"


def test_plain_words_are_refused_where_accesses_have_no_order(monkeypatch):
    monkeypatch.setattr(words.platform, "machine", lambda: "aarch64")
    for call in (lambda: words._plain_post(0, 1), lambda: words._plain_look(0, 1, 1)):
        with pytest.raises(ValueError, match="on aarch64 words between processors need numba"):
            call()
