"""First reads of inputs, compiled: what `engram_toy.tracer.first_reads` finds, over twenty times sooner.

What: the same log in, the same reads and depths out; columns are NumPy's where the twin has lists.
Why: sweeps lay one recording down hundreds of times, and in plain Python that took as long as recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from engram_toy.fast.compiling import compiled
from engram_toy.fast.stack import returned_column, third_column
from engram_toy.tracer.stack import Log, check_definition


@dataclass(frozen=True, slots=True)
class Start:
    """One way to lay down the inputs; see `engram_toy.tracer.first_reads.Start`."""

    unpadded: np.ndarray
    buried: np.ndarray

    def depths(self, padding: int) -> np.ndarray:
        """Depth of every first read with so many values of padding."""
        return self.unpadded + padding * self.buried


@dataclass(frozen=True, slots=True)
class FirstReads:
    """Those reads of a log whose depth depends on its inputs' start; see `engram_toy.tracer.first_reads.FirstReads`."""

    definition: str
    places: np.ndarray
    inputs: np.ndarray
    instructions: np.ndarray
    touched: np.ndarray
    unread: np.ndarray

    def lay(self, arguments: Sequence[Sequence[int]], pad: int) -> Start:
        """Lay down the inputs as the arguments of a function; see `engram_toy.tracer.first_reads.FirstReads.lay`."""
        order = np.fromiter(chain.from_iterable(arguments), np.int64)
        behind = len(order) - sum(map(len, arguments[pad:]))  # from here on, the padding lies above
        position = _positions(order)
        depths = 1 + position[self.inputs]
        buried = depths > behind
        if self.definition != "two-stack":
            deepest_first = _positions(np.fromiter(chain.from_iterable(reversed(arguments)), np.int64))
            depths = self.touched + self._untouched_above(deepest_first, len(order))
        return Start(depths, buried)

    def _untouched_above(self, place: np.ndarray, size: int) -> np.ndarray:
        return _untouched_above(place[self.inputs], self.instructions, place[self.unread], size)


def _positions(order: np.ndarray) -> np.ndarray:
    """Where each value stands in an order."""
    position = np.empty(order.max(initial=-1) + 1, np.int64)
    position[order] = np.arange(len(order))
    return position


def first_reads(log: Log, depths: Sequence[int], definition: str = "lru") -> FirstReads:
    """Find them; see `engram_toy.tracer.first_reads.first_reads`, which it equals."""
    check_definition(definition)
    left, right, third = np.asarray(log.left, np.int32), np.asarray(log.right, np.int32), third_column(log)
    first_of = np.full(log.inputs, -1, np.int64)
    columns = np.empty((3, 3 * log.inputs), np.int64)  # an instruction may read one input three times
    reads, found = _touches(left, right, third, first_of, columns)
    returned = returned_column(log)
    at_end = np.flatnonzero(np.isin(returned, np.flatnonzero(first_of < 0)))
    places, inputs, instructions = columns[:, :found]
    if definition == "two-stack":  # returned values are read at the end
        places, inputs = np.r_[places, reads + at_end], np.r_[inputs, returned[at_end]]
        instructions = np.r_[instructions, np.full(len(at_end), len(left))]
        return FirstReads(definition, places, inputs, instructions, np.zeros(len(places), np.int64), returned[:0])
    unread = returned[at_end]
    untouched = _untouched_above(inputs, instructions, unread, log.inputs)
    touched = np.asarray(depths, np.int64)[places] - untouched
    return FirstReads(definition, places, inputs, instructions, touched, unread)


@compiled()
def _touches(left, right, third, first_of, columns):
    """See `engram_toy.tracer.first_reads._touches`; marks in `first_of` the instruction that reads an input first."""
    reads, found = 0, 0
    for k in range(len(left)):
        for value in (np.int64(left[k]), np.int64(right[k]), np.int64(third[k] if len(third) else -1)):
            if value < 0:
                continue
            # An instruction that reads an input twice has two first reads of it.
            if value < len(first_of) and (first_of[value] < 0 or first_of[value] == k):
                first_of[value] = k
                columns[0, found], columns[1, found], columns[2, found] = reads, value, k
                found += 1
            reads += 1
    return reads, found


@compiled()
def _untouched_above(places, instructions, unread, size):
    """See `engram_toy.tracer.first_reads._untouched_above`; of `size` places, 0 is the deepest."""
    tree = np.zeros(size + 1, np.int64)
    for place in unread:
        _count(tree, size - place)  # ranks begin at the top, so that a prefix of the tree is what lies above
    counts = np.empty(len(places), np.int64)
    end = len(places)
    while end:
        begin = end - 1
        _count(tree, size - places[begin])
        # The stack as it stands before an instruction has all that it touches first, each input once.
        while begin and instructions[begin - 1] == instructions[begin]:
            begin -= 1
            if not (places[begin] == places[begin + 1 : end]).any():
                _count(tree, size - places[begin])
        for i in range(begin, end):
            rank, untouched = size - places[i], 0
            while rank:
                untouched += tree[rank]
                rank &= rank - 1
            counts[i] = untouched
        end = begin
    return counts


@compiled()
def _count(tree, rank):
    while rank < len(tree):
        tree[rank] += 1
        rank += rank & -rank
