"""Every published definition of ByteDMD's depth, from one log: `depths(log, name)`.

    lru         one stack; branch main of the original, and what ByteDMD means here
    two-stack   arguments at fixed depth on a stack of their own, all operands of an instruction priced before any moves
    classic     operand by operand; nothing ever leaves the stack
    live        operand by operand; a value leaves at its last read, and one that is never read is never on the stack
    stationary  nothing moves: an argument keeps its place, a computed value takes the lowest free one of a second arena
    opt         the depth that a reader who knows the future would need at the fullest moment of the wait

Why: a verdict that holds under one of them only is a verdict on the definition. The last four are defined on single
events, as the original's development branch of 2026-04-26 has them: an instruction loads its operands one after the
other and then stores its result; the end loads every returned value once. Arguments lie at fixed depth, and the first
load of one is charged that depth.

How: `single_reads` writes a log as such events, an instruction for each load. Then `classic` and `live` are what
`engram_toy.tracer.stack` does with two stacks. `engram_toy.fast.definitions` finds the same depths compiled; the bound
under all managers is `engram_toy.floor`.

    depths(Log(inputs=2, left=array("i", [0]), right=array("i", [1]), returned=[2], argument_depth=array("i", [1, 2])),
           "live")                                                     # c = a + b; then c is read: [1, 2, 1]
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from heapq import heappop, heappush

from engram_toy.tracer import stack
from engram_toy.tracer.stack import Log

DEFINITIONS = (*stack.DEFINITIONS, "classic", "live", "stationary", "opt")


def depths(log: Log, definition: str = "lru") -> array[int]:
    """Return the depth of every read in reading order; the top of a stack, or the first place, is 1.

    But for "lru", one read of every returned value follows at the end, and the log must hold its `argument_depth`.

    Raises ValueError for an unknown definition or a log that contradicts itself.
    """
    check_definition(definition)
    if definition in stack.DEFINITIONS:
        return stack.stack_depths(log, definition)
    events = single_reads(log)
    if definition == "stationary":
        return _fixed_places(events)
    if definition == "opt":
        return _fullest_waits(events)
    return _stacked(events, stay=definition == "classic")


def check_definition(definition: str) -> None:
    """Raise ValueError for a definition that is not one of DEFINITIONS."""
    if definition not in DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}: use one of {', '.join(DEFINITIONS)}")


def reads_like(definition: str) -> str:
    """The definition of `engram_toy.tracer.stack` that has the same reads, in the same order."""
    return "lru" if definition == "lru" else "two-stack"


def single_reads(log: Log) -> Log:
    """The same values with one read per instruction, the returned ones read at the end.

    The last read of an instruction stores its result; what the others seem to store is in `unstored`.

    Raises ValueError for a log that contradicts itself.
    """
    stack.check_log(log, "two-stack")
    values = log.inputs + len(log.left)
    if len(set(log.returned)) != len(log.returned) or not all(0 <= value < values for value in log.returned):
        raise stack.unfit_returned(log)
    number = array("i", range(log.inputs))  # of every value, among the single reads
    left, unstored = array("i"), array("i")
    read, drop, nothing = left.append, unstored.append, set(log.unstored)
    for k, a, b in zip(range(len(log.left)), log.left, log.right):
        if a >= log.inputs + k or b >= log.inputs + k:
            raise stack.unstored_operand(k)
        *earlier, last = [v for v in (a, b, log.third.get(k, -1)) if v >= 0] or [-1]
        for value in earlier:
            drop(log.inputs + len(left))
            read(number[value])
        number.append(log.inputs + len(left))
        read(number[last] if last >= 0 else -1)
        if nothing and log.inputs + k in nothing:
            drop(number[-1])
    for value in log.returned:
        drop(log.inputs + len(left))
        read(number[value])
    return replace(log, left=left, right=array("i", [-1]) * len(left), third={}, returned=[], unstored=unstored)


def _stacked(events: Log, stay: bool) -> array[int]:
    """One stack of what has been loaded or stored; `stay`: nothing leaves it."""
    last = stack.last_reads(events)
    if stay:
        last = array("i", [len(events.left)]) * len(last)
        for value in events.unstored:
            last[value] = -1
    slot_of = array("q", [-1]) * len(last)
    return stack.replay(events, events.argument_depth, last, slot_of, stack.Timeline(2 * len(events.left)))


def _fixed_places(events: Log) -> array[int]:
    """The place of every value that is read: an argument's own, or the lowest that is free when a value is stored."""
    last = stack.last_reads(events)
    place = array("i", events.argument_depth or ()) + array("i", [0]) * len(events.left)
    free: list[int] = []
    depths, places = array("i"), 0
    for k, value in enumerate(events.left):
        if value >= 0:
            depths.append(place[value])
            if last[value] == k and value >= events.inputs:
                heappush(free, place[value])
        stored = events.inputs + k
        if last[stored] >= 0:
            places += not free
            place[stored] = heappop(free) if free else places
    return depths


def _fullest_waits(events: Log) -> array[int]:
    """One more than the most values that waited at one moment of a value's own wait and were read before it.

    Every load and store is one moment. A wait runs from a value's store or load, that moment included, up to its next
    load; the moment of its begin is not among those that a value looks at.

    Let F be, at every moment, the number of waits that were going on then and have ended since. The most of F from a
    moment on goes down by ones as the moment goes up. These steps are marks, and what is asked is how many there are
    from the moment after the begin on.
    """
    fixed, count, nothing = events.argument_depth or (), len(events.left), set(events.unstored)
    before = array("i", [-1]) * (events.inputs + count)  # how many marks lie before the begin of a value's wait
    after = array("i", before)  # how many lie before the moment after
    nearest = array("i", range(count + 1))  # the mark that is left at or below each; 0 for none
    timeline, marks = stack.Timeline(count), 0
    depths = array("i")
    newest = 0  # the value of the moment before
    for k, value in enumerate(events.left):
        if value >= 0:
            if before[value] < 0:
                depths.append(fixed[value])
            else:
                depths.append(1 + (timeline.depth(after[value]) if after[value] < marks else 0))
                # The wait ends now, and adds one to F from its begin on: the nearest mark before that is rubbed out,
                # and one is made at the moment before now.
                mark = find(nearest, before[value])
                if mark:
                    timeline.clear(mark - 1)
                    nearest[mark] = mark - 1
                after[newest] += 1  # the mark is made at its begin, neither before it nor after
                marks += 1
                timeline.next = marks
            before[value] = after[value] = marks
            newest = value
        if events.inputs + k not in nothing:
            newest = events.inputs + k
            before[newest] = after[newest] = marks
    return depths


def find(nearest: array[int], mark: int) -> int:
    """The mark at or before this one that has not been rubbed out; shortens the way for the next who asks."""
    while nearest[mark] != mark:
        nearest[mark] = mark = nearest[nearest[mark]]
    return mark
