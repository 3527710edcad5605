"""Errands: done once, waited for, called off for certain; all that are given together end together.

python -m pytest tests/ref/threads/test_errands.py
"""

from __future__ import annotations

import threading
import time

import pytest

from engram_ref.threads.errands import Done, Errand, Later, Pool, call_off


@pytest.fixture
def pool():
    made = Pool(2, "errand")
    yield made
    made.close()


def fail():
    raise OSError("the disk has gone")


def test_an_errand_is_done_once():
    done = []
    errand = Errand(lambda: done.append(1) or len(done))
    assert not errand.ended
    errand(), errand()
    assert errand.ended and errand.result() == 1 and done == [1]


def test_what_went_wrong_is_kept_and_an_interruption_raised_besides():
    errand = Errand(fail)
    errand()
    with pytest.raises(OSError, match="the disk has gone"):
        errand.result()

    def interrupted():
        raise KeyboardInterrupt

    errand = Errand(interrupted)
    with pytest.raises(KeyboardInterrupt):
        errand()
    assert errand.ended and isinstance(errand.error, KeyboardInterrupt)


def test_what_was_done_at_once_looks_like_an_errand_that_has_ended():
    done = Done(lambda: 3)
    done.wait()
    assert done.ended and done.error is None and done.result() == 3
    failed = Done(fail)
    assert failed.ended and isinstance(failed.error, OSError)
    with pytest.raises(OSError, match="the disk has gone"):
        failed.result()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Done(interrupted)


def test_what_is_left_for_later_is_done_once_by_whoever_waits():
    calls = []
    later = Later(lambda: calls.append("done") or object())
    assert calls == []
    found = []
    threads = [threading.Thread(target=lambda: found.append(later.wait())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["done"] and len(found) == 4 and len(set(map(id, found))) == 1


@pytest.mark.parametrize("error, again", [(OSError("gone"), OSError), (KeyboardInterrupt(), RuntimeError)])
def test_what_went_wrong_later_is_raised_each_time_and_not_tried_again(error, again):
    calls = []

    def fail():
        calls.append("done")
        raise error

    later = Later(fail)
    with pytest.raises(type(error)):
        later.wait()
    for _ in range(2):
        with pytest.raises(again):
            later.wait()
    assert calls == ["done"]


def test_one_that_was_called_off_never_begins_and_nobody_waits_for_it(pool):
    done = []
    errand = Errand(lambda: done.append(1))
    waiting = threading.Thread(target=errand.wait)
    waiting.start()
    errand.call_off()
    waiting.join(20)
    assert not waiting.is_alive()
    pool.give(errand)
    pool.close()
    assert not done
    with pytest.raises(RuntimeError, match="called off before it began"):
        errand.result()


def test_calling_off_waits_for_one_that_has_begun(pool):
    begun, done = threading.Event(), []

    def work():
        begun.set()
        time.sleep(0.05)
        done.append(1)

    errand = Errand(work)
    pool.give(errand)
    assert begun.wait(20) and errand.is_being_done
    call_off([errand])
    assert done == [1] and errand.error is None and not errand.is_being_done


def test_calling_off_goes_on_when_it_is_interrupted():
    calls = []

    class Stubborn(Errand):
        def call_off(self):
            calls.append(1)
            if len(calls) < 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_off([Stubborn(fail)])
    assert len(calls) == 3


def test_all_have_ended_when_one_fails(pool):
    done = []

    def slow():
        time.sleep(0.05)
        done.append(1)

    with pytest.raises(OSError, match="the disk has gone"):
        pool.do_all([fail, slow])
    assert done == [1]
    assert pool.do_all([lambda: 3, lambda: 4]) == [3, 4]


def test_all_have_ended_or_never_begin_when_the_caller_is_interrupted(pool, monkeypatch):
    written = []

    def slow():
        time.sleep(0.05)
        written.append(1)

    def interrupted(errand):
        raise KeyboardInterrupt

    monkeypatch.setattr(Errand, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.do_all([slow] * 6)
    before = len(written)
    pool.close()
    assert len(written) == before <= 2


def test_threads_end_with_the_pool_and_begin_again():
    pool = Pool(2, "errand")
    for _ in range(2):
        assert pool.do_all([threading.get_ident, threading.get_ident])
        assert any(thread.name.startswith("errand") for thread in threading.enumerate())
        pool.close()
        assert not any(thread.name.startswith("errand") for thread in threading.enumerate())
    pool.close()
