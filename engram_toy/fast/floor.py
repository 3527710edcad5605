"""The bound under all memory managers, compiled: what `engram_toy.floor` finds, and the same for rows of a table.

misses(intervals, capacity), floor(first_addresses, intervals), bracket(first_addresses, intervals)
row_floor(reads, start(reads, held=True), row_bytes=264)      # (low, high), within 1 %
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engram_toy import floor as plain
from engram_toy.fast.compiling import compiled
from engram_toy.fast.definitions import single_reads
from engram_toy.fast.last_reads import RowReads
from engram_toy.fast.rows import Start, addresses, check_depth, row_price
from engram_toy.floor import Interval, check_capacity, enclose
from engram_toy.tracer.stack import Log, read_price


def misses(intervals: Iterable[Interval], capacity: int) -> int:
    """See `engram_toy.floor.misses`, which it equals; an array [N, 2] will do."""
    check_capacity(capacity)
    return _missed(_ends_before(intervals), capacity)


def floor(first_addresses: Iterable[int], intervals: Iterable[Interval], bytes_per_element: int = 1) -> int:
    """See `engram_toy.floor.floor`, which it equals; `intervals` may be an array [N, 2]."""
    return bracket(first_addresses, intervals, bytes_per_element, within=0)[0]


def bracket(
    first_addresses: Iterable[int], intervals: Iterable[Interval], bytes_per_element: int = 1, within: float = 0.01
) -> tuple[int, int]:
    """See `engram_toy.floor.bracket`, which it equals; `intervals` may be an array [N, 2]."""
    ends = _ends_before(intervals)
    first = sum(read_price(int(address), bytes_per_element) for address in first_addresses)
    return enclose(lambda capacity: _missed(ends, capacity), len(ends), first, bytes_per_element, within)


def waits(log: Log) -> tuple[np.ndarray, np.ndarray]:
    """See `engram_toy.floor.waits`, which it equals but for the order; intervals as an array [N, 2]."""
    events = single_reads(log)
    left = np.asarray(events.left, np.int64)
    order = np.argsort(left, kind="stable")  # of each value, its reads from the first to the last
    order = order[np.searchsorted(left[order], 0) :]  # the others read nothing
    value = left[order]
    first = np.r_[True, value[1:] != value[:-1]][: len(value)]
    # Event k loads at 2k and stores at 2k + 1. A value's first wait begins at its store, the others at its load before.
    begin = np.where(first, 2 * (value - events.inputs) + 1, 2 * np.r_[0, order[:-1]][: len(value)])
    loaded = first & (value < events.inputs)
    addresses = np.asarray(events.argument_depth or (), np.int64)[value[loaded]]
    return addresses, np.stack([begin, 2 * order], axis=1)[~loaded]


def row_floor(reads: RowReads, begin: Start, row_bytes: int, padding: int = 0, within: float = 0.01) -> tuple[int, int]:
    """The bound for a stream of row reads, between two numbers; the lower one is a bound itself.

    Args:
        begin: where the rows lie before the first read; a row's address is its place from the top.
        row_bytes: of one row.
        padding: bytes above all rows at the start.
        within: the share of the lower number by which the upper may exceed it.

    Raises:
        ValueError: less than one byte a row, or addresses beyond 2^51.
    """
    check_depth(reads, row_bytes, padding)
    again = np.cumsum(reads.links >= 0, dtype=np.int32)
    ends = again[reads.links[reads.links >= 0]]  # of each wait: how many others have ended by its begin
    first = _first_prices(addresses(begin), row_bytes, padding)
    return enclose(lambda capacity: _missed(ends, capacity), len(ends), int(first), row_bytes, within)


def _ends_before(intervals: Iterable[Interval]) -> np.ndarray:
    """See `engram_toy.floor._ends_before`."""
    pairs = intervals if isinstance(intervals, np.ndarray) else np.array(list(intervals))
    begins, ends = pairs.reshape(-1, 2).T
    if (begins > ends).any():
        return np.array(plain._ends_before(pairs.tolist()))  # raises
    order = np.lexsort((begins, ends))
    before = np.searchsorted(ends[order], begins[order], side="right")
    return np.minimum(before, np.arange(len(before)))


def _missed(ends_before: np.ndarray, capacity: int) -> int:
    # Where places fell free is a set of numbers, of which the largest up to some number is asked for: a bit for each,
    # and levels of words over them that say which words below hold any. Most questions end in the first word.
    sizes = [len(ends_before) // 64 + 1]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 64 + 1)
    starts = np.cumsum([0, *sizes[:-1]])
    return _keep(ends_before, capacity, np.zeros(sum(sizes), np.uint64), starts)


def _leading_zeros(typing_context: Any, word: Any) -> Any:
    """The processor's own count of the zeros above the highest set bit of a 64-bit word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))  # 1: it is never asked of zero

    return types.uint64(types.uint64), generate


leading_zeros: Any = intrinsic(_leading_zeros)


@compiled(nogil=True)
def _keep(ends_before, capacity, bits, starts):
    """See `engram_toy.floor._misses`."""
    unused, missed = capacity, 0
    for number in range(len(ends_before)):
        free = _last(bits, starts, np.int64(ends_before[number]) - 1)
        if free >= 0:
            _remove(bits, starts, free)
        elif unused > 0:
            unused -= 1
        else:
            missed += 1
            continue
        _add(bits, starts, number)
    return missed


@compiled()
def _last(bits, starts, place):
    """The largest member up to `place`, or -1."""
    for level in range(len(starts)):
        if place < 0:
            return -1
        word = bits[starts[level] + (place >> 6)] << np.uint64(63 - (place & 63))
        if word:
            place -= np.int64(leading_zeros(word))
            for below in range(level - 1, -1, -1):
                place = 64 * place + 63 - np.int64(leading_zeros(bits[starts[below] + place]))
            return place
        place = (place >> 6) - 1
    return -1


@compiled()
def _add(bits, starts, place):
    for start in starts:
        word = bits[start + (place >> 6)]
        bits[start + (place >> 6)] = word | np.uint64(1) << np.uint64(place & 63)
        if word:  # the levels above know of this word
            return
        place >>= 6


@compiled()
def _remove(bits, starts, place):
    for start in starts:
        word = bits[start + (place >> 6)] ^ np.uint64(1) << np.uint64(place & 63)
        bits[start + (place >> 6)] = word
        if word:  # it still holds something, as the levels above say
            return
        place >>= 6


@compiled()
def _first_prices(place, row_bytes, padding):
    """Price of reading each row once where it starts."""
    total = 0
    for address in place:
        total += row_price(padding + address * row_bytes, row_bytes)
    return total
