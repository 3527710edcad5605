"""The least that any memory manager with perfect foresight must pay: a bound under every placement and prefetch.

    misses([(0, 3), (1, 2)], capacity=1)                     # 1: one place cannot hold both values
    floor(first_addresses=[5], intervals=[(0, 3), (1, 2)])   # 3 for the first load, 1 for each other read, 1 missed: 6

What: a manager may place every value at any of the addresses 1, 2, ... at any time. Writing is free, a read at address
a costs ceil(sqrt(a)), and a value moves only by being read. An input starts at an address of its own, where its first
load finds it. Of the reads that remain, each ends an interval that began with the value's store or read before.
Why: ceil(sqrt(a)) is 1 plus the number of k >= 1 with k*k < a. So the whole price is at least that of the first loads,
1 for every other read, and for every k the number of those reads that come from beyond the first k*k addresses, or
bring their value back from there. An interval that does not takes one of those places all along, open at both ends: at
most so many intervals can be spared as c places can hold, and `misses` counts the others.
How: the most intervals that c places can hold are found by taking them in the order of their ends (`_misses`).

`engram_toy.fast.floor` finds the same numbers compiled, and the floor under rows of a table. The floor is not ordered
against "lru", "two-stack", "live" and "stationary": on a stack values move up for free when others die, and those with
arguments of their own have every address twice. It lies below "classic".
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import isqrt

from engram_toy.definitions import find, single_reads
from engram_toy.tracer.stack import Log, read_price

Interval = Sequence[float]  # begin and end


def misses(intervals: Iterable[Interval], capacity: int) -> int:
    """The least number of reads that any manager serves from beyond the first `capacity` addresses.

    Args:
        intervals: (begin, end) for each read that is not the first load of an input: the moment of its value's store or
            read before, and its own. In any order.

    Raises:
        ValueError: a capacity below 0, or an interval that ends before it begins.
    """
    check_capacity(capacity)
    return _misses(_ends_before(intervals), capacity)


def floor(first_addresses: Iterable[int], intervals: Iterable[Interval], bytes_per_element: int = 1) -> int:
    """The bound, exactly.

    Args:
        first_addresses: of every input that is loaded, from 1, counted in elements.
        intervals: as for `misses`.

    Raises:
        ValueError: as `misses`; an address below 1, or less than one byte an element.
    """
    return bracket(first_addresses, intervals, bytes_per_element, within=0)[0]


def bracket(
    first_addresses: Iterable[int], intervals: Iterable[Interval], bytes_per_element: int = 1, within: float = 0.01
) -> tuple[int, int]:
    """The bound between two numbers, which differ by at most this share of the lower one; much sooner than `floor`.

    The lower one is a bound itself. Arguments and errors as for `floor`.
    """
    ends = _ends_before(intervals)
    first = sum(read_price(address, bytes_per_element) for address in first_addresses)
    return enclose(lambda capacity: _misses(ends, capacity), len(ends), first, bytes_per_element, within)


def waits(log: Log) -> tuple[list[int], list[tuple[int, int]]]:
    """`first_addresses` and `intervals` of a traced run; returned values are read at the end, as in `live`."""
    events = single_reads(log)
    begin = array("q", [-1]) * (events.inputs + len(events.left))
    first, intervals = [], []
    for k, value in enumerate(events.left):
        if value >= 0:
            if value < events.inputs and begin[value] < 0:
                first.append((events.argument_depth or ())[value])
            else:
                intervals.append((begin[value], 2 * k))
            begin[value] = 2 * k
        begin[events.inputs + k] = 2 * k + 1  # the store comes after the load
    return first, intervals


def enclose(
    misses: Callable[[int], int], reuses: int, first: int, bytes_per_element: int, within: float
) -> tuple[int, int]:
    """The sum of the bound, from `misses` at as few capacities as will do.

    What is missed falls as the capacity grows, so of all roots between two that were tried it is known from both sides.
    The gap that leaves most open is divided until enough is known.

    Args:
        misses: at a capacity in elements.
        reuses: how many intervals there are.
        first: price of the first loads.

    Raises:
        ValueError: less than one byte an element, or a share below 0.
    """
    if bytes_per_element < 1 or within < 0:
        raise ValueError(f"{bytes_per_element} bytes an element, within {within}: give at least 1, and 0 or more")
    at = cache(misses)

    @cache
    def missed(root: int) -> int:
        """Bytes read from beyond the first root*root bytes."""
        # An element of b bytes is b values that are read together: c bytes hold what c/b places do, and between two
        # whole numbers of places exactly what lies between them (a flow of least cost is linear there).
        places, rest = divmod(root * root, bytes_per_element)
        beyond = rest and rest * at(places + 1)  # asked only where it counts: a question walks all intervals
        return (bytes_per_element - rest) * at(places) + beyond

    def open_between(left: int, right: int) -> tuple[int, int, int]:
        return -(right - left - 1) * (missed(left) - missed(right)), left, right

    roots = [1]
    while missed(roots[-1]):
        roots.append(2 * roots[-1])
    gaps = [open_between(*pair) for pair in pairwise(roots)]
    heapify(gaps)
    low = first + bytes_per_element * reuses + missed(1)
    low += sum((right - left) * missed(right) for _, left, right in gaps)
    unknown = -sum(gap for gap, _, _ in gaps)
    while unknown > within * low:
        gap, left, right = heappop(gaps)
        middle = min(max(isqrt(left * right), left + 1), right - 1)
        halves = open_between(left, middle), open_between(middle, right)
        for half in halves:
            heappush(gaps, half)
        unknown += gap - halves[0][0] - halves[1][0]
        low += (middle - left) * (missed(middle) - missed(right))
    return low, low + unknown


def check_capacity(capacity: int) -> None:
    """Raise ValueError for a capacity below 0."""
    if capacity < 0:
        raise ValueError(f"capacity is {capacity}: give a count of 0 or more")


def _ends_before(intervals: Iterable[Interval]) -> array[int]:
    """For every interval, in the order of their ends, how many of those before it end by the time it begins."""
    ordered = sorted(intervals, key=lambda interval: (interval[1], interval[0]))
    ends = [end for _, end in ordered]
    for begin, end in ordered:
        if begin > end:
            raise ValueError(f"interval ({begin}, {end}) ends before it begins: give (begin, end)")
    return array("q", (min(bisect_right(ends, begin), place) for place, (begin, _) in enumerate(ordered)))


def _misses(ends_before: Sequence[int], capacity: int) -> int:
    """How many intervals cannot be kept. Mark n stands where interval n has ended and its place is free."""
    nearest = array("q", range(len(ends_before) + 1))  # the mark that is left at or below each; 0 for none
    unused, missed = capacity, 0
    for mark, begin in enumerate(ends_before, start=1):
        # Most are kept where each takes, of the places free since its begin, the one that fell free last (Carlisle and
        # Lloyd 1995, Faigle and Nawijn 1995).
        free = find(nearest, begin)
        if free:
            nearest[free] = free - 1
        elif unused:
            unused -= 1
        else:
            missed += 1
            nearest[mark] = mark - 1
    return missed
