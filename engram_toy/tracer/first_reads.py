"""One recorded run, its inputs laid down in any other order: exact depths without running it again.

What: where inputs start on the stack is not part of what a program does. The log stays the same, so one recording
gives the trace of every layout of the table and of every padding.
Why: a value that has been read lies above everything untouched since, so the depth of every later read of it is a
matter of the log alone. Only the FIRST read of an input sees where it started: its depth is the number of live values
touched so far, which the log decides, plus the untouched live inputs from its own place up, which the order decides.
A program of ten million reads has some ten thousand first ones.

    first = first_reads(recording.log, recording.trace().depths)
    start = first.lay([[2, 3], [], [0, 1]], pad=1)     # arguments: inputs 2 and 3, the padding, inputs 0 and 1
    start.depths(padding=10**6)                        # of the first reads, in reading order

Under the definition "two-stack" a first read is charged the place of the input among the arguments, whatever else
was touched.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from engram_toy.tracer.stack import Log, check_definition

_STRETCH = 256  # instructions


@dataclass(frozen=True, slots=True)
class Start:
    """One way to lay down the inputs.

    Attributes:
        unpadded: depth of every first read, in reading order, without padding.
        buried: for each of them, 1 if the padding lies above the input.
    """

    unpadded: list[int]
    buried: bytearray

    def depths(self, padding: int) -> list[int]:
        """Depth of every first read with so many values of padding."""
        return [depth + padding if below else depth for depth, below in zip(self.unpadded, self.buried)]


@dataclass(frozen=True, slots=True)
class FirstReads:
    """Those reads of a log whose depth depends on where its inputs start.

    An instruction that reads the same input twice has two first reads of it, both charged at the same depth.

    Attributes:
        definition: of ByteDMD.
        places: which reads of the log they are, counted in reading order.
        inputs: the input that each reads.
        instructions: the instruction that each belongs to.
        touched: the part of each depth that no order changes; under "two-stack" none, 0.
        unread: inputs that are returned and never read.
    """

    definition: str
    places: array[int]
    inputs: array[int]
    instructions: array[int]
    touched: list[int]
    unread: tuple[int, ...]

    def lay(self, arguments: Sequence[Sequence[int]], pad: int) -> Start:
        """Lay down the inputs as the arguments of a function, argument 0 on top; each names its inputs left to right.

        Args:
            pad: the argument at whose place the padding is laid. Under "lru" it is held live, by being returned.
        """
        buried = set(chain.from_iterable(arguments[pad:]))
        if self.definition == "two-stack":
            place = {value: depth for depth, value in enumerate(chain.from_iterable(arguments), start=1)}
            depths = [place[value] for value in self.inputs]
        else:
            order = chain.from_iterable(reversed(arguments))  # the deepest first
            untouched = _untouched_above(self, {value: place for place, value in enumerate(order)})
            depths = [t + u for t, u in zip(self.touched, untouched)]
        return Start(depths, bytearray(value in buried for value in self.inputs))


def first_reads(log: Log, depths: Sequence[int], definition: str = "lru") -> FirstReads:
    """Find them; `depths` is what `stack_depths` makes of the log.

    Raises:
        ValueError: an unknown definition.
    """
    check_definition(definition)
    unseen = set(range(log.inputs))
    reads, touches = _touches(log, unseen)
    unread = tuple(value for value in log.returned if value in unseen)
    if definition == "two-stack":  # these are read at the end, with all that is returned
        end = len(log.left)
        touches += [(place, v, end) for place, v in enumerate(log.returned, start=reads) if v in unseen]
        unread = ()
    places, inputs, instructions = (array("q", column) for column in (zip(*touches) if touches else ((), (), ())))
    found = FirstReads(definition, places, inputs, instructions, [0] * len(touches), unread)
    if definition == "two-stack":
        return found
    untouched = _untouched_above(found, range(log.inputs))
    return replace(found, touched=[depths[place] - u for place, u in zip(places, untouched)])


def _touches(log: Log, unseen: set[int]) -> tuple[int, list[tuple[int, int, int]]]:
    """How many operands a log has, and (place, input, instruction) of those that read what is in `unseen` first.

    Takes what is read out of `unseen`. Most stretches of a log touch nothing new: sets see that sooner than a loop.
    """
    touches = []
    reads = 0
    stretches_with_third = {k // _STRETCH for k in log.third}
    for start in range(0, len(log.left), _STRETCH):
        left, right = log.left[start : start + _STRETCH], log.right[start : start + _STRETCH]
        known = start // _STRETCH not in stretches_with_third and unseen.isdisjoint(left) and unseen.isdisjoint(right)
        if known:
            reads += 2 * len(left) - left.count(-1) - right.count(-1)
            continue
        for k, (a, b) in enumerate(zip(left, right), start):
            operands = [v for v in (a, b, log.third.get(k, -1)) if v >= 0]
            if not unseen.isdisjoint(operands):
                touches += [(place, v, k) for place, v in enumerate(operands, start=reads) if v in unseen]
                unseen.difference_update(operands)
            reads += len(operands)
    return reads, touches


def _untouched_above(first: FirstReads, place: Sequence[int] | dict[int, int]) -> list[int]:
    """For every first read: how many live inputs from its own place up no earlier instruction has touched.

    A Fenwick tree over the places, the topmost first, filled from the last first read back to the first. Its loops are
    spelt out: calls would double the time.
    """
    ranks = [place[value] for value in first.inputs]
    unread = [place[value] for value in first.unread]
    rank = {p: r for r, p in enumerate(sorted({*ranks, *unread}, reverse=True), start=1)}
    ranks = [rank[p] for p in ranks]
    size = len(rank) + 1
    tree = [0] * size
    for r in (rank[p] for p in unread):
        while r < size:
            tree[r] += 1
            r += r & -r
    counts = [0] * len(ranks)
    end = len(ranks)
    while end:
        begin = end - 1
        while begin and first.instructions[begin - 1] == first.instructions[begin]:
            begin -= 1
        for r in set(ranks[begin:end]):  # the stack as it stands before the instruction
            while r < size:
                tree[r] += 1
                r += r & -r
        for i in range(begin, end):
            r, untouched = ranks[i], 0
            while r:
                untouched += tree[r]
                r &= r - 1
            counts[i] = untouched
        end = begin
    return counts
