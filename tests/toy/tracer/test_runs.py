"""A traced run beside the plain call: what goes in stays the caller's, what comes out is plain, and runs stay apart.

python -m pytest tests/toy/tracer/test_runs.py
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import itertools
import resource
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

from engram_toy.bytedmd import bytedmd, record, trace, trace_to_bytedmd, traced_eval
from engram_toy.functional import dot
from engram_toy.tracer.tracked import Tracked

ROOT = Path(__file__).parents[3]
Pair = namedtuple("Pair", "x y")


class Row(list):
    """A list with a method, and an attribute beside its items."""

    unit = "m"

    def total(self):
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Point:
    x: object
    y: object


class Slotted:
    __slots__ = ("__hidden", "x")

    def __init__(self, x):
        self.x, self.__hidden = x, [x]

    def hidden(self):
        return self.__hidden


def slotted(a, b):
    made = Slotted(a + b)
    return made


# --- results ----------------------------------------------------------------------------------------

HOLDERS = {
    "dict": lambda a, b: {"s": a + b, "b": [b]},
    "tracked keys": lambda a, b: {a + b: b, (a, b): 1},
    "defaultdict": lambda a, b: defaultdict(list, {"s": [a + b]}),
    "OrderedDict": lambda a, b: OrderedDict([(b, a), (a, b)]),
    "Counter": lambda a, b: Counter({a: b}),
    "set": lambda a, b: {a + b, b},
    "frozenset": lambda a, b: frozenset([a + b]),
    "deque": lambda a, b: deque([a + b, b], maxlen=2),
    "frozen dataclass": lambda a, b: Point(a + b, {"y": b}),
    "namespace": lambda a, b: SimpleNamespace(s=a + b),
    "named tuple": lambda a, b: Pair(a + b, Pair(b, a)),
    "list subclass": lambda a, b: Row([a + b, b]),
    "nested": lambda a, b: [({"s": [Pair(a + b, {b})]},)],
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_values_holds_plain_ones(name):
    function = HOLDERS[name]
    result = traced_eval(function, (3, 4))[1]
    assert result == function(3, 4) and type(result) is type(function(3, 4))
    assert repr(result) == repr(function(3, 4)) and "Tracked" not in str(found_types(result))


def found_types(value):
    parts = value.items() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else value
    whole = isinstance(value, (list, tuple, set, frozenset, deque, dict)) or hasattr(value, "__dict__")
    return [type(value), *map(found_types, parts)] if whole else type(value)


def test_slots_hold_plain_values_too():
    result = traced_eval(slotted, (3, 4))[1]
    assert (type(result.x), result.x, result.hidden()) == (int, 7, [7])


def test_what_holds_no_value_is_the_very_same():
    thing, table = SimpleNamespace(lock=threading.Lock(), module=sys), (1, [2])
    result = traced_eval(lambda a: [thing, table, len, SimpleNamespace], (1,))[1]
    assert result[0] is thing and result[1] is table and result[2:] == [len, SimpleNamespace]


def test_shared_and_circular_results_stay_so():
    def function(a):
        row = [a + 1]
        loop = {"row": row, "again": row}
        loop["self"] = loop
        return loop

    result = traced_eval(function, (1,))[1]
    assert result["row"] is result["again"] and result["self"] is result and result["row"] == [2]


def test_a_dict_holds_nothing_live_a_list_does():
    """As in the original: what the result is made of decides what lives to the end."""
    assert traced_eval(lambda a, b: ([b], a + a)[1:], (1, 2))[0] == [1, 1]
    assert (
        traced_eval(lambda a, b: [{"b": b}, b * 1, a + a], (1, 2))[0]
        == traced_eval(lambda a, b: [b * 1, a + a], (1, 2))[0]
    )


async def later(a):
    return a[0] + a[1]


async def stream(a):
    for x in a:
        yield x + x


def doubled(a):
    for x in a:
        yield x + x


class Awaitable:
    def __await__(self):
        yield


LAZY = {
    "generator": doubled,
    "generator expression": lambda a: (x + x for x in a),
    "map": lambda a: map(abs, a),
    "filter": lambda a: [filter(None, a)],
    "zip": lambda a: {"z": zip(a, a)},
    "islice": lambda a: Pair(1, itertools.islice(a, 2)),
    "reversed": lambda a: Point(reversed(a), 0),
    "iter": lambda a: {1: [iter(a)]},
    "coroutine": later,
    "async_generator": stream,
    "Awaitable": lambda a: (Awaitable(),),
    "left in an argument": lambda a: a.append(x for x in a),
}


@pytest.mark.parametrize("name", LAZY)
def test_work_that_is_not_done_is_refused_by_name(name, recwarn):
    with pytest.raises(ValueError, match="whose work is not done yet: use it up in the function"):
        bytedmd(LAZY[name], ([1, 2, 3],))
    assert not recwarn.list  # of a coroutine that was never awaited


def defaulting(a):
    def function(x=a[0]):
        return x + 1

    return function


KEEPING = {
    "function": lambda a: lambda: a[0] + a[1],
    "function with a default": defaulting,
    "method": lambda a: {"m": a[0].__add__},
    "builtin_function_or_method": lambda a: [a.append],
    "partial": lambda a: functools.partial(max, a[0]),
    "slice": lambda a: slice(a[0], a[1]),
    "KeyError": lambda a: KeyError(a[0]),
    "function of a defaultdict": lambda a: defaultdict(lambda: a[0]),
    "function of a cache": lambda a: SimpleNamespace(f=functools.lru_cache(lambda: a[0])),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_would_go_on_with_traced_values_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"a {name.split()[0]} that keeps traced values: return what it is made of"):
        bytedmd(KEEPING[name], ([1, 2, 3],))


def test_functions_and_views_without_traced_values_are_results_like_others():
    made = {1: 2}
    others = [len, made.get, lambda: made, functools.partial(max, 1), slice(1), KeyError(1), Point, object()]
    depths, result = traced_eval(lambda a: [*others, {0: a[0]}.values(), MappingProxyType({0: a[1]})], ([3, 4],))
    *same, values, proxy = result
    assert depths == [] and all(a is b for a, b in zip(same, others, strict=True))
    assert [type(x) for x in (*values, proxy[0])] == [int, int] and [*values, proxy[0]] == [3, 4]


def test_work_that_is_done_is_priced():
    want = bytedmd(lambda a: [x + x for x in a], ([1, 2, 3],))
    assert bytedmd(lambda a: list(doubled(a)), ([1, 2, 3],)) == want
    assert traced_eval(lambda a: asyncio.run(later(a)), ([1, 2],)) == ([2, 1], 3)


# --- arguments --------------------------------------------------------------------------------------


def test_the_callers_lists_stay_where_they_are():
    row = [1, 2]
    matrix = [row, [3, 4], (row,)]
    inner = list(map(id, matrix))

    def function(m, r):
        return m[0][0] * r[0] + m[1][1] * r[1] + m[2][0][1]

    first, second = (traced_eval(function, (matrix, row)) for _ in range(2))
    assert first == second == (first[0], function(matrix, row))
    assert list(map(id, matrix)) == inner and matrix[2][0] is row and matrix == [[1, 2], [3, 4], ([1, 2],)]


def test_what_the_function_changes_is_changed_and_nothing_else():
    row, kept = [1, 2], [3]
    matrix = [row, kept]

    def function(m):
        m[0], m[1] = m[1], m[0]
        m[1][0] = m[1][0] + 10
        m.append([m[0][0]])
        return m

    assert traced_eval(function, (matrix,))[1] is matrix
    assert matrix == [[3], [11, 2], [3]] and matrix[0] is kept and matrix[1] is row
    values = [1, 2]
    traced_eval(lambda a: values.append(3) or a[0], (values,))
    assert values == [1, 2, 3]  # what the function did past its argument is not undone


def test_a_new_list_in_an_argument_and_in_the_result_lives_to_the_end():
    def function(xs, y):
        new = [xs[0] + 1]
        xs[0] = new
        y + y
        y + y
        return new

    assert traced_eval(function, ([1], 5))[0] == traced_eval(lambda xs, y: (xs[0] + 1, y + y, y + y)[:1], ([1], 5))[0]


def repeated_in_place(xs, n):
    xs *= n
    return xs


def changed_by_its_repetition(xs, n):
    rows = [xs] * n
    for row in rows:
        row[0] = row[0] + n
    return rows


REPETITIONS = {
    "an argument": lambda xs, n: ([xs] * n)[0].append(7),
    "an argument's part": changed_by_its_repetition,
    "a row": lambda xs, n: (rows := [[0]] * n, rows[0].append(xs[0])),
    "number first": lambda xs, n: (rows := n * ([0],), rows[0].append(xs[0])),
    "dicts": lambda xs, n: (found := [{}] * n, found[0].update(key=xs[0])),
    "deque": lambda xs, n: (rows := deque([xs]) * n, rows[0].append(7)),
    "array": lambda xs, n: (cells := array("q", [0]) * n, cells.append(7)),
    "in place": repeated_in_place,
}


@pytest.mark.parametrize("n", [2, 0, True, np.int64(2)])
@pytest.mark.parametrize("name", REPETITIONS)
def test_a_traced_number_repeats_as_a_plain_one_does(name, n):
    def outcome(run):
        xs = [1, 2]
        try:
            return repr(run((xs, n))), xs
        except IndexError:  # no times
            return xs

    function = REPETITIONS[name]
    assert outcome(lambda args: traced_eval(function, args)[1]) == outcome(lambda args: function(*args))


def test_a_repetition_reads_its_number_once():
    for repeat in (lambda xs, n: xs * n, lambda xs, n: n * xs, lambda xs, n: xs * (n + 0)):
        run = trace(lambda xs, n: [repeat(xs, n)[0] + repeat([xs, 5], n)[1]], ([1], 2))  # noqa: B023 - called at once
        assert run.result == [6] and run.escapes == {"index": 2}
    assert traced_eval(lambda xs, n: (xs * n)[1] + ([5] * 2)[1], ([1], 2)) == ([2, 1], 6)
    with pytest.raises(TypeError):
        traced_eval(lambda xs, x: xs * x, ([1], 2.5))


@pytest.mark.parametrize(
    ("function", "depths"),
    [
        (lambda a, n: ([0] * n)[0] + a, [2, 1, 2]),
        (lambda a, n: sum([0] * n) + a, [2, 3, 1, 3, 1, 2, 1, 2]),
        (lambda a, n: [x * a for x in n * (1,)][-1], [2, 3, 4, 3, 1, 2, 1]),
        (lambda a, n: ([a] * n)[2] + a, [2, 1, 1]),
    ],
)
def test_repeated_numbers_are_new_values_as_in_the_original(function, depths):
    """The depths are those that the original gives."""
    assert traced_eval(function, (5, 3))[0] == depths


def test_changes_before_an_error_are_the_callers():
    values = [1, 2]

    def function(xs):
        xs[0] = xs[0] + 5
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bytedmd(function, (values,))
    assert values == [6, 2] and type(values[0]) is int


def test_containers_keep_their_types():
    row = Row([1, 2])
    row.unit = "km"
    assert traced_eval(lambda p: p.x + p.y, (Pair(1, 2),)) == ([2, 1], 3)
    assert traced_eval(lambda r: (r.total(), r.unit), (row,)) == (traced_eval(sum, ([1, 2],))[0], (3, "km"))
    assert traced_eval(lambda r: r.append(r[0] + 1), (row,)) == ([1], None)
    assert row == [1, 2, 2] and type(row) is Row
    moment = time.gmtime(0)
    assert traced_eval(lambda t: t.tm_year + 1, (moment,)) == ([1], 1971)
    assert traced_eval(lambda t: t, (moment,))[1] is moment


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (lambda p: p["x"], {"x": 1}),
        (lambda p: p.x, Point(1, 2)),
        (lambda p: p.items(), {"x": 1}),
        (lambda p: p.__setitem__("x", 1), {}),
        (list, "abc"),
        (lambda p: "x" in p, {"x": 1}),
        (len, {1, 2}),
    ],
)
def test_what_is_not_looked_into_says_so(function, argument):
    with pytest.raises((TypeError, AttributeError), match=r"tracked \w+ .*only lists, tuples and NumPy arrays"):
        bytedmd(function, (argument,))


def test_too_many_kinds_are_refused():
    values = list(range(300))
    with pytest.raises(ValueError, match=r"301 kinds of values.* at most 256"):
        trace(lambda *a: a[0] + a[1], values, kinds=[f"k{i}" for i in values])
    run = trace(lambda *a: a[254] + a[1], values[:255], kinds=[f"k{i}" for i in values[:255]])
    assert run.tally()["k254"] == {2: 1}


# --- runs and threads -------------------------------------------------------------------------------

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


# --- arrays -----------------------------------------------------------------------------------------


def store(a):
    a[0] = a[0] / 2
    return a[0] * 4


def add_in_place(a):
    a += a
    return a


def into_likes(a):
    out = np.zeros_like(a)
    for i in range(len(a)):
        out[i] = a[i] * a[i]
    return out


def views(a):
    a.T[0] = a.T[0] / 3
    a[:, 1] = [7.9] * len(a)
    return a, a[0] + a[1]


ARRAYS = {
    "structured": (lambda a, b: [a, b], [np.array([(1, 2.5), (3, 4)], "i4,f4"), np.array([(5, 6), (7, 8)], "i4,f4")]),
    "store": (store, [np.array([3, 2])]),
    "int64 wraps": (lambda a: a[0] * a[1], [np.array([2**62, 4])]),
    "uint8 wraps": (lambda a: a + a, [np.array([200, 100], np.uint8)]),
    "in place": (add_in_place, [np.array([100, -128], np.int8)]),
    "float32 rounds": (lambda a: a * 3, [np.array([0.1, 0.2], np.float32)]),
    "float16 overflows": (lambda a: a * a, [np.array([300, 2], np.float16)]),
    "complex64": (lambda a: a[0] * a, [np.array([0.1 + 2j, 3], np.complex64)]),
    "bool": (lambda a: a[0] & a, [np.array([True, False])]),
    "dates": (lambda a: (a[1] - a[0], a), [np.array(["2020-01-01", "2021-01-01"], "M8[D]")]),
    "division by zero": (lambda a: a / 0, [np.array([1.0, -1.0])]),
    "likes": (into_likes, [np.array([0.1, 0.2], np.float32)]),
    "views": (views, [np.arange(6).reshape(2, 3)]),
    "mixed": (lambda a, b: np.concatenate([a, b]) * 2, [np.array([1]), np.array([0.5], np.float32)]),
    "scalar on the left": (lambda a: np.int64(300) + a[0], [np.array([200], np.uint8)]),
    "computed, then stored": (lambda a: store(a / 2), [np.array([3, 2])]),
    "mean": (lambda a: a.mean(axis=0), [np.arange(6).reshape(2, 3)]),
    "empty": (lambda a: a[:0], [np.array([1], np.int16)]),
    "objects": (lambda a: a, [np.array([1, "x", None], object)]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_compute_as_numpy_does(name):
    function, arrays = ARRAYS[name]
    plain_arguments, traced_arguments = copy.deepcopy(arrays), copy.deepcopy(arrays)
    with np.errstate(all="ignore"):
        plain, traced = function(*plain_arguments), traced_eval(function, traced_arguments)[1]
    plain, traced = ([x] if not isinstance(x, (list, tuple)) else x for x in (plain, traced))
    for want, got in zip([*plain, *plain_arguments], [*traced, *traced_arguments], strict=True):
        assert type(got) is type(want) and got.dtype == want.dtype
        assert got.tolist() == want.tolist()


def test_arrays_are_priced_as_lists_are():
    def function(a):
        a[0] = a[1] * a[2] + a[0]
        return a[0] + a[3]

    for kind in (np.float64, np.int8, np.float32, object):
        assert traced_eval(function, (np.arange(4).astype(kind),))[0] == traced_eval(function, ([0, 1, 2, 3],))[0]
    a = np.array([1.0, 2.0])
    assert traced_eval(lambda s, a: s * a, (3.0, a))[0] == [
        3,
        3,
        3,
    ]  # each part on its own, then the scalar, as in the original


TOTALS = {
    "sum": lambda a: a.sum(),
    "sum of rows": lambda a: a.sum(axis=1),
    "kept axes": lambda a: np.sum(a, axis=0, keepdims=True),
    "mean": lambda a: a.mean(),
    "mean of rows": lambda a: np.mean(a, axis=1),
    "average": np.average,
    "weighted": lambda a: np.average(a[0], weights=np.array([3, 1, 4], np.float16)),
    "into a wider one": lambda a: np.add.reduce(a, out=np.zeros_like(a[0], dtype=np.float64)),
    "product": lambda a: a.prod(),
    "running sum": lambda a: a.cumsum(),
    "running product": lambda a: np.cumprod(a, axis=1),
    "trace": lambda a: a[:, :2].trace(),
    "nansum": np.nansum,
    "reduce": lambda a: np.add.reduce(a),
    "reduceat": lambda a: np.add.reduceat(a[0], [0, 2]),
    "across memory": lambda a: a.T.sum(axis=1),
    "backwards": lambda a: a[::-1, ::-1].sum(),
    "none": lambda a: a[:0].sum(),
}


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32])
@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_those_of_numpy_and_cost_what_wide_numbers_cost(name, kind):
    values = np.array([[100, 100, 101], [99, 100, 100]])
    array = (values % 2 if kind is bool else values).astype(kind)
    with np.errstate(all="ignore"):
        want, (trace, got) = TOTALS[name](array), traced_eval(TOTALS[name], (array.copy(),))
    assert type(got) is type(want) and got.dtype == want.dtype
    assert got.tolist() == want.tolist()
    if name != "nansum":  # which asks floats, one by one, whether they are numbers
        assert trace == traced_eval(TOTALS[name], (values.astype(np.int64),))[0]


def test_halves_are_rounded_once_they_are_added_up():
    for function in (np.sum, np.mean):
        ones = np.ones(4096, np.float16)  # added one by one in half precision, they end at 2048
        assert traced_eval(function, (ones,))[1] == function(ones)


@pytest.mark.parametrize("kind", [np.float64, np.int8, np.bool_, np.str_])
def test_numpy_scalars_that_are_one_object_are_separate_values_as_equal_numbers_are(kind):
    zero = kind(0)
    for padding in ([zero] * 4, (zero, [zero], zero, zero), np.array([zero] * 4, object)):
        assert traced_eval(lambda padding, row: (padding, row[0] + 1), (padding, [1]))[0] == [5]  # four lie above it
    assert traced_eval(lambda a, b: a + b, (zero, zero))[0] == [1, 2]


def test_an_array_that_is_not_written_to_is_left_alone():
    array = np.arange(3)
    array.setflags(write=False)
    assert traced_eval(lambda a: a + 1, (array,))[1].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        bytedmd(store, (array,))
    base = np.arange(4)

    def function(whole, half):
        whole[0] = whole[3]
        return half[1]

    traced_eval(function, (base, base[:2]))
    assert base.tolist() == [3, 1, 2, 3]  # the view, which was not written to, does not bring back what it held


def test_in_place_arithmetic_refuses_what_numpy_refuses():
    def halve(a):
        a /= 2
        return a

    for call in (lambda: halve(np.array([1, 2])), lambda: bytedmd(halve, (np.array([1, 2]),))):
        with pytest.raises(TypeError):
            call()


# --- prices and compiled loops ----------------------------------------------------------------------


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


BROKEN = """
import sys, warnings
if {broken}:
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "numba.core":
                raise ImportError("Numba needs NumPy 2.4 or less")
    sys.meta_path.insert(0, Broken())
from engram_toy.bytedmd import trace
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        run = trace(lambda a: (a[0] + a[1], a), (list(range(200_000)),))
print(run.compiled, run.cost(), len(caught), *[str(w.message)[:18] for w in caught])
"""


def test_a_numba_that_cannot_be_imported_is_named_once():
    lines = []
    for broken in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", BROKEN.format(broken=broken)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.split(maxsplit=3))
    (_, price, warned, *_), (compiled, same_price, warned_once, text) = lines
    assert (warned, warned_once, compiled, price) == ("0", "1", "False", same_price)
    assert text.startswith("numba is not used")


COMPILED = "from engram_toy.fast.compiling import compiled\n@compiled()\ndef twice(x): return x + x\nprint(twice(3))"


def no_file_may_grow():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize("limit", [None, no_file_may_grow], ids=["nowhere to write", "nothing can be written"])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, limit):
    cache = str(tmp_path / "cache")
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
    if limit is None:
        for name in ("cache", "__pycache__"):
            (tmp_path / name).write_text("a file where the folder would be")
    (tmp_path / "loop.py").write_text(COMPILED)
    done = subprocess.run(
        [sys.executable, "loop.py"], env=env, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit
    )
    assert (done.stdout, done.returncode) == ("6\n", 0), done.stderr
