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
from dataclasses import dataclass
from itertools import chain

from engram_toy.stack import Log, check_definition


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
        touched: the part of each depth that no order changes.
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
    places, inputs, instructions = array("q"), array("i"), array("i")
    unseen = bytearray(b"\1") * log.inputs + bytes(len(log.left)) + b"\0"  # the last for absent operands, -1
    third = log.third
    read, counted = 0, 0  # reads of the instructions before `counted`; none between has a third operand
    for k, (a, b) in enumerate(zip(log.left, log.right)):
        if not (unseen[a] or unseen[b] or k in third):
            continue
        read += _reads_between(log, counted, k)
        counted = k
        operands = [v for v in (a, b, third.get(k, -1)) if v >= 0]
        for place, value in enumerate(operands, start=read):
            if unseen[value]:
                places.append(place)
                inputs.append(value)
                instructions.append(k)
        for value in operands:
            unseen[value] = 0
    unread = tuple(value for value in log.returned if unseen[value])
    if definition == "two-stack":  # these are read at the end, with all that is returned
        read += _reads_between(log, counted, len(log.left))
        for place, value in enumerate(log.returned, start=read):
            if unseen[value]:
                places.append(place)
                inputs.append(value)
                instructions.append(len(log.left))
        return FirstReads(definition, places, inputs, instructions, [0] * len(places), ())
    found = FirstReads(definition, places, inputs, instructions, [], unread)
    untouched = _untouched_above(found, range(log.inputs))
    found.touched.extend(depths[place] - u for place, u in zip(places, untouched))
    return found


def _reads_between(log: Log, start: int, end: int) -> int:
    """How many operands the instructions start .. end - 1 have; only the first of them may have a third."""
    absent = log.left[start:end].count(-1) + log.right[start:end].count(-1)
    return 2 * (end - start) - absent + (start < end and start in log.third)


def _untouched_above(first: FirstReads, place: Sequence[int] | dict[int, int]) -> list[int]:
    """For every first read: how many live inputs from its own place up no earlier instruction has touched.

    A Fenwick tree over the places, filled from the last first read back to the first.
    """
    live = {place[value] for value in (*first.inputs, *first.unread)}
    rank = {p: r for r, p in enumerate(sorted(live, reverse=True), start=1)}  # 1 is the topmost
    tree = [0] * (len(rank) + 1)
    for value in first.unread:
        _add(tree, rank[place[value]])
    counts: list[int] = []
    end = len(first.inputs)
    while end:
        begin = end - 1
        while begin and first.instructions[begin - 1] == first.instructions[end - 1]:
            begin -= 1
        ranks = [rank[place[value]] for value in first.inputs[begin:end]]
        for r in set(ranks):  # the stack as it stands before the instruction
            _add(tree, r)
        counts.extend(_count(tree, r) for r in reversed(ranks))
        end = begin
    counts.reverse()
    return counts


def _add(tree: list[int], rank: int) -> None:
    while rank < len(tree):
        tree[rank] += 1
        rank += rank & -rank


def _count(tree: list[int], rank: int) -> int:
    total = 0
    while rank:
        total += tree[rank]
        rank &= rank - 1
    return total
