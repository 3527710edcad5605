"""Traced runs stay apart: values of other runs and second threads are refused; and a trace has a price."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engram_toy.bytedmd import bytedmd, record, trace_to_bytedmd, traced_eval
from engram_toy.functional import dot
from engram_toy.tracer.tracked import Tracked

KEPT = {
    "right": lambda a, old: a + old,
    "left": lambda a, old: old + a,
    "alone": lambda a, old: old + 1,
    "reflected": lambda a, old: 1 - old,
    "compared": lambda a, old: old < 3,
    "converted": lambda a, old: int(old),
    "hashed": lambda a, old: {old},
    "third": lambda a, old: pow(a, 2, old),
    "returned": lambda a, old: [a, old],
    "in a dict": lambda a, old: {"old": old},
    "inner product": lambda a, old: dot([old], [old]),
    "mixed inner product": lambda a, old: dot([a, a], [a, old]),
    "passed on": lambda a, old: bytedmd(lambda x: x + 1, ([old],)),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_value_of_an_earlier_run_is_refused(name):
    kept = []
    traced_eval(lambda a: kept.append(a) or a, (5,))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"5 (was kept from|belongs to) an?(other)? traced run"):
            bytedmd(lambda a: KEPT[name](a, kept[0]), (2,))


def test_a_value_of_a_run_that_failed_is_refused_as_well():
    kept = []
    with pytest.raises(ZeroDivisionError):
        traced_eval(lambda a: kept.append(a) or a / 0, (5,))
    with pytest.raises(ValueError, match="5 was kept"):
        kept[0] + 1


def test_runs_within_runs():
    assert traced_eval(lambda a: traced_eval(lambda b: b + 1, (2,))[1] + a, (5,)) == ([1], 8)
    for function in (lambda a: bytedmd(lambda b: b + a, (1,)), lambda a: traced_eval(lambda b: [a], (1,))):
        with pytest.raises(ValueError, match="5 belongs to another traced run"):
            bytedmd(function, (5,))


def in_threads(work, swallow):
    def function(xs):
        errors = []

        def guarded(x):
            try:
                work(x)
            except ValueError as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(x,)) for x in xs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors and not swallow:
            raise errors[0]
        return xs[0] + 1

    return function


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("work", [lambda x: x + x, float, lambda x: -x, lambda x: dot([x], [x]), lambda x: x == 1])
def test_a_second_thread_is_refused_even_where_its_error_is_lost(work, swallow):
    with pytest.raises(ValueError, match="in a second thread"):
        bytedmd(in_threads(work, swallow), ([1, 2],))


def test_a_pool_that_was_there_before_is_refused():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with pytest.raises(ValueError, match="in a second thread"):
            bytedmd(lambda a: pool.submit(lambda: a + a).result(), (1,))
        assert bytedmd(lambda a: pool.submit(lambda: 1).result() + a, (1,)) == 1
        assert pool.submit(bytedmd, lambda a: a + a, (1,)).result() == 2  # whole runs may run anywhere


def test_a_trace_has_a_price():
    depths, _ = traced_eval(lambda a, b, c: (a + b) + c, (1, 2, 3))
    assert [trace_to_bytedmd(depths, size) for size in (1, 2)] == [6, 14]
    assert trace_to_bytedmd(trace=[], bytes_per_element=4) == 0
    for size in (0, -1, 1.5, "2"):
        with pytest.raises((ValueError, TypeError)):
            trace_to_bytedmd(depths, size)
    with pytest.raises(ValueError, match=r"bytes_per_element is 1\.5"):
        trace_to_bytedmd(depths, 1.5)


def test_a_recording_is_plain_and_copies_of_values_are_the_values():
    recording = record(lambda a: [copy.copy(a) + copy.deepcopy(a)], (2,))
    assert recording.result == [4] and list(recording.log.left) == list(recording.log.right) == [0]
    assert not isinstance(recording.result[0], Tracked)
