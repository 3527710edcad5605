"""Every definition of depth, compiled: what `engram_toy.definitions.depths` returns, over ten times sooner."""

from __future__ import annotations

from array import array
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any

import numpy as np

from engram_toy import definitions
from engram_toy.fast import stack as fast_stack
from engram_toy.fast.compiling import compiled
from engram_toy.fast.stack import LEFT_DIES, RESULT_LIVES
from engram_toy.fast.time_axis import count_from, full_axis, give_up
from engram_toy.tracer import stack
from engram_toy.tracer.stack import Log


def depths(log: Log, definition: str = "lru") -> array[int]:
    """Return the depth of every read in reading order; see `engram_toy.definitions.depths`, which it equals."""
    definitions.check_definition(definition)
    if definition in stack.DEFINITIONS:
        return fast_stack.stack_depths(log, definition)
    events = single_reads(log)
    left, fixed = np.asarray(events.left, np.int32), np.asarray(events.argument_depth, np.int32)
    stored = np.full(len(left), True)
    stored[np.asarray(events.unstored, np.int64) - events.inputs] = False
    if definition == "opt":
        return _array(_fullest_waits(events.inputs, left, fixed, stored, *full_axis(len(left))))
    needed = np.zeros(events.inputs + len(left), np.bool_)
    fate, none = np.zeros(len(left), np.uint8), np.empty(0, np.int32)
    # It finds no fault: `single_reads` has refused what reads too early.
    fast_stack.fates(events.inputs, left, np.full(len(left), -1, np.int32), none, needed, fate)
    if definition == "stationary":
        return _array(_fixed_places(events.inputs, left, fixed, fate))
    if definition == "classic":
        fate[:] = RESULT_LIVES * stored  # nothing ever leaves
    return fast_stack.replayed(events, fate)


def single_reads(log: Log) -> Log:
    """The same log as `engram_toy.definitions.single_reads` makes, its columns NumPy's."""
    stack.check_log(log, "two-stack")
    inputs, count = log.inputs, len(log.left)
    returned = fast_stack.returned_column(log)
    if len(returned) and (not 0 <= returned.min() <= returned.max() < inputs + count or _twice(returned)):
        raise stack.unfit_returned(log)
    operands = np.stack([np.asarray(log.left, np.int32), np.asarray(log.right, np.int32)], axis=1)
    if log.third:
        operands = np.column_stack([operands, fast_stack.third_column(log)])
    early = operands.max(axis=1, initial=-1) >= inputs + np.arange(count)
    if early.any():
        raise stack.unstored_operand(int(early.argmax()))
    kept = operands >= 0
    kept[:, 0] |= ~kept.any(axis=1)  # without operands, an instruction is one event all the same
    end = np.cumsum(kept.sum(axis=1)) - 1  # the last read of every instruction
    number = np.concatenate([np.arange(inputs), inputs + end]).astype(np.int32)
    reads = operands[kept]
    left = np.concatenate([np.where(reads >= 0, number[reads], -1), number[returned]]).astype(np.int32)
    dropped = np.full(len(left), True)
    dropped[end] = False
    dropped[number[np.asarray(log.unstored, np.int64)] - inputs] = True
    columns: dict[str, Any] = {"left": left, "right": np.full(len(left), -1, np.int32), "third": {}, "returned": []}
    return replace(log, **columns, unstored=array("i", (inputs + np.flatnonzero(dropped)).astype(np.int32).tobytes()))


def _twice(values: np.ndarray) -> bool:
    return len(np.unique(values)) != len(values)


def _array(depths: np.ndarray) -> array[int]:
    result = array("i")
    result.frombytes(depths.tobytes())
    return result


@compiled()
def _fixed_places(inputs, left, fixed, fate):
    """See `engram_toy.definitions._fixed_places`."""
    place = np.zeros(inputs + len(left), np.int32)
    place[:inputs] = fixed
    depths, reads, places = np.empty(len(left), np.int32), 0, 0
    free = [np.int32(0) for _ in range(0)]  # empty, and numba knows of what
    for k in range(len(left)):
        value = left[k]
        if value >= 0:
            depths[reads] = place[value]
            reads += 1
            if fate[k] & LEFT_DIES and value >= inputs:  # its last read; arguments keep their places
                heappush(free, place[value])
        if fate[k] & RESULT_LIVES:  # the result is read later
            if len(free):
                place[inputs + k] = heappop(free)
            else:
                places += 1
                place[inputs + k] = places
    return depths[:reads]


@compiled()
def find(nearest, mark):
    """See `engram_toy.definitions.find`."""
    while nearest[mark] != mark:
        nearest[mark] = nearest[nearest[mark]]
        mark = nearest[mark]
    return mark


@compiled()
def _fullest_waits(inputs, left, fixed, stored, words, above):
    """See `engram_toy.definitions._fullest_waits`."""
    count = len(left)
    before, after = np.full(inputs + count, -1, np.int32), np.full(inputs + count, -1, np.int32)
    nearest = np.arange(count + 1).astype(np.int32)
    depths, reads, marks, newest = np.empty(count, np.int32), 0, 0, 0
    for k in range(count):
        value = left[k]
        if value >= 0:
            if before[value] < 0:
                depths[reads] = fixed[value]
            else:
                depths[reads] = 1
                if after[value] < marks:
                    # Slots that have no mark yet are taken, too.
                    depths[reads] += count_from(words, above, after[value]) - (64 * len(words) - marks)
                mark = find(nearest, before[value])
                if mark:
                    give_up(words, above, mark - 1)
                    nearest[mark] = mark - 1
                after[newest] += 1
                marks += 1
            reads += 1
            before[value] = after[value] = marks
            newest = value
        if stored[k]:
            newest = inputs + k
            before[newest] = after[newest] = marks
    return depths[:reads]
