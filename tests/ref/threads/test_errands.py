"""Errands: done once, waited for, called off for certain; all that are given together end together."""

import gc
import threading
import time

import pytest

from engram_ref.threads.errands import Done, Errand, Later, Pool, call_off
from tests.ref.threads.together import in_threads


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
    found = in_threads(lambda _: later.wait())
    assert calls == ["done"] and len(set(map(id, found))) == 1


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


def threads_of(pool, count):
    """A pool's threads, each of which has something to do at the same time."""
    together = threading.Barrier(count)

    def meet():
        together.wait(20)
        return threading.current_thread()

    return pool.do_all([meet] * count)


def all_end(threads):
    for thread in threads:
        thread.join(20)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("in_a_circle", [False, True])
def test_threads_end_with_a_pool_that_was_forgotten(in_a_circle):
    pool = Pool(3, "errand")
    if in_a_circle:
        pool.itself = pool
    threads = threads_of(pool, 3)
    del pool
    gc.collect()
    assert all_end(threads)


def test_what_was_given_to_a_forgotten_pool_is_done():
    begun, go_on, done = threading.Event(), threading.Event(), []
    pool = Pool(1, "errand")
    pool.give(lambda: (begun.set(), go_on.wait(20), done.append(threading.current_thread())))
    errand = Errand(lambda: done.append(2))
    pool.give(errand)
    assert begun.wait(20)
    del pool
    gc.collect()
    go_on.set()
    errand.wait()
    assert done[1:] == [2] and all_end(done[:1])


def test_a_pool_that_its_own_thread_lets_go_of_ends_it():
    """The last who has it is the work that it was given."""
    held, go_on = [Pool(1, "errand")], threading.Event()
    (thread,) = threads_of(held[0], 1)
    pool = held[0]
    pool.give(lambda kept=held: (go_on.wait(20), kept.clear()))
    del pool
    go_on.set()
    assert all_end([thread])


@pytest.mark.filterwarnings("error")
def test_a_pool_whose_making_was_interrupted_is_let_go_of(monkeypatch):
    def interrupted(pool):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pool, "renew", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Pool(1, "errand")
    gc.collect()


def test_a_pool_is_let_go_of_while_its_own_lock_is_held():
    """Garbage is collected in the middle of anything, in any thread."""
    pool = Pool(1, "errand")
    (thread,) = threads_of(pool, 1)
    with pool._lock:
        del pool
    assert all_end([thread])


def test_threads_end_with_the_pool_and_begin_again():
    pool = Pool(2, "errand")
    for _ in range(2):
        assert pool.do_all([threading.get_ident, threading.get_ident])
        assert any(thread.name.startswith("errand") for thread in threading.enumerate())
        pool.close()
        assert not any(thread.name.startswith("errand") for thread in threading.enumerate())
    pool.close()
