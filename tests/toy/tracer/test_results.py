"""What a traced function returns is plain: containers hold plain values, and work that is not done yet is refused."""

import asyncio
import functools
import itertools
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from types import MappingProxyType, SimpleNamespace

import pytest

from engram_toy.bytedmd import bytedmd, traced_eval
from tests.toy.tracer.values import Pair, Point, Row


class Slotted:
    __slots__ = ("__hidden", "x")

    def __init__(self, x):
        self.x, self.__hidden = x, [x]

    def hidden(self):
        return self.__hidden


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
    result = traced_eval(lambda a, b: Slotted(a + b), (3, 4))[1]
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


# --- work that is not done ------------------------------------------------------------------------


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
