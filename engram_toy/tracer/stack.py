"""Exact LRU stack distances and their price, in plain Python.

What: a log of instructions goes in, the stack depth of every read comes out, and a closed form turns depths
into a price, as ByteDMD (github.com/cybertronai/ByteDMD) defines both.
Why: walking the stack costs the depth of every read; at a million live values that is hours. Here the stack
is never built. Every touch of a live value takes the next slot on a time axis and gives up the slot of its
touch before, so the depth of a value is the number of taken slots from its own up to the newest
(Bennett and Kruskal 1975). `engram_toy.fast.stack` is the same idea, compiled.

    depths = stack_depths(Log(inputs=2, left=array("i", [0]), right=array("i", [1]), returned=[2]))
    price(depths)      # c = a + b: depths [2, 1], price 3
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import isqrt

DEFINITIONS = ("lru", "two-stack")

# A word holds the slots of 2**10 touches as one integer, a block is 2**7 words. Larger words make the shifts
# and counts slower, smaller ones the sums over blocks; the optimum is flat. Tests shrink both.
_WORD_SHIFT = 10
_BLOCK_SHIFT = 7


@dataclass(slots=True)
class Log:
    """What a function read and stored, one column entry per instruction.

    Values are numbered in the order in which they come to exist: the inputs first (value 0 lies deepest), then
    instruction k stores value `inputs + k`. It reads `left[k]`, `right[k]` and `third[k]`, in this order, all of
    them numbered below the value it stores; -1 stands for no operand, and `left[k]` is -1 only if all are.
    """

    inputs: int
    left: array[int]
    right: array[int]
    third: dict[int, int] = field(default_factory=dict)
    returned: list[int] = field(default_factory=list)  # distinct; live to the end
    argument_depth: array[int] | None = None  # the fixed depth of every input; "lru" needs none
    unstored: array[int] = field(default_factory=lambda: array("i"))  # numbers whose instructions store nothing


def stack_depths(log: Log, definition: str = "lru") -> array[int]:
    """Return the depth of every read in reading order, in live values; the top of the stack has depth 1.

    Under "lru" the live inputs start on the stack. Under "two-stack" the first read of an input is charged its
    `argument_depth`, and one more read of every returned value follows at the end.

    Raises ValueError for an unknown definition or a log that contradicts itself.
    """
    check_log(log, definition)
    argument_depth = log.argument_depth if definition == "two-stack" else None
    last = last_reads(log)
    slot_of = array("q", [-1]) * len(last)
    timeline = Timeline(log.inputs + 3 * len(log.left) + len(log.third))
    if argument_depth is None:
        for value in range(log.inputs):
            if last[value] >= 0:
                slot_of[value] = timeline.next
                timeline.next += 1
    depths = replay(log, argument_depth, last, slot_of, timeline)
    if argument_depth is not None:
        depths.extend(_depths_now(log.returned, argument_depth, slot_of, timeline))
    return depths


def check_definition(definition: str) -> None:
    """Raise ValueError for a definition that is not one of DEFINITIONS."""
    if definition not in DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}: use one of {', '.join(DEFINITIONS)}")


def check_log(log: Log, definition: str) -> None:
    """Raise ValueError if the log cannot be replayed; single operands and returned values are checked on the way."""
    check_definition(definition)
    instructions = len(log.left)
    if log.inputs < 0:
        raise ValueError(f"inputs is {log.inputs}: give a count of 0 or more")
    if len(log.right) != instructions:
        raise ValueError(f"left has {instructions} entries, right {len(log.right)}: give both one per instruction")
    for k, value in log.third.items():
        if not 0 <= k < instructions:
            raise ValueError(f"third names instruction {k}: give one of 0 .. {instructions - 1}")
        if not 0 <= value < log.inputs + k:
            raise unstored_operand(k)
    if definition == "two-stack":
        _check_argument_depth(log)


def _check_argument_depth(log: Log) -> None:
    if log.argument_depth is None:
        raise ValueError('argument_depth is None: give the depth of every input, or price "lru"')
    if len(log.argument_depth) != log.inputs:
        raise ValueError(f"argument_depth has {len(log.argument_depth)} entries: give one per input, {log.inputs}")
    if min(log.argument_depth, default=1) < 1:
        raise ValueError(f"argument_depth holds {min(log.argument_depth)}: depths start at 1")


def unstored_operand(k: int) -> ValueError:
    """The error for an instruction that reads what is not there."""
    return ValueError(f"instruction {k} reads a value that is not stored yet: operands must be older than results")


def unfit_returned(log: Log) -> ValueError:
    """The error for returned values that are not in the log, or there twice."""
    values = log.inputs + len(log.left)
    return ValueError(f"returned must name values of the log, 0 .. {values - 1}, and each of them once")


def read_values(log: Log, definition: str = "lru") -> array[int]:
    """Return the value behind every depth that `stack_depths` returns, in the same order."""
    check_log(log, definition)
    columns: list[Sequence[int]] = [log.left, log.right]
    if log.third:
        columns.append([log.third.get(k, -1) for k in range(len(log.left))])
    values = array("i", filter((-1).__lt__, chain.from_iterable(zip(*columns))))
    if definition == "two-stack":
        values.extend(log.returned)
    return values


def last_reads(log: Log) -> array[int]:
    """Return for every value the instruction of its last read: -1 if never read, beyond the last if returned."""
    # The entry too many stands at index -1, where absent operands write; it has no slot, so nothing reads it.
    last = array("i", [-1]) * (log.inputs + len(log.left) + 1)
    k = -1
    try:
        for k, a, b in zip(range(len(log.left)), log.left, log.right):
            last[a] = k
            last[b] = k
    except IndexError:
        raise unstored_operand(k) from None
    for k, value in log.third.items():
        last[value] = max(last[value], k)
    end = len(log.left)
    for value in log.returned:
        if not 0 <= value < len(last) - 1 or last[value] == end:
            raise unfit_returned(log)
        last[value] = end
    return last


class Timeline:
    """The time axis: which slots still hold the latest touch of a live value.

    All slots exist from the start and count as taken, so that taking one costs nothing; only giving one up
    writes. The untaken slots lie above `next` and are subtracted. For each block, `ranks` packs one counter per
    word into a single integer: how many slots are taken in the words above it. One subtraction then updates
    all of them, and one shift reads one, both at the speed of C.
    """

    __slots__ = ("below", "bit", "blocks", "next", "ranks", "shift", "words")

    def __init__(self, slots: int) -> None:
        word_slots, block_words = 1 << _WORD_SHIFT, 1 << _BLOCK_SHIFT
        block_slots = word_slots * block_words
        blocks = slots // block_slots + 1
        width = block_slots.bit_length()  # of one counter
        self.next = 0
        self.bit = [1 << i for i in range(word_slots)]
        self.shift = [width * word for word in range(block_words)]
        self.below = [0]  # below[w]: a one in every counter of a word under w
        for shift in self.shift:
            self.below.append(self.below[-1] + (1 << shift))
        self.words = [(1 << word_slots) - 1] * (blocks * block_words)
        self.ranks = [word_slots * sum(self.below[:block_words])] * blocks
        self.blocks = [block_slots] * blocks

    def depth(self, slot: int) -> int:
        """Count the taken slots from this one up."""
        block_shift = _WORD_SHIFT + _BLOCK_SHIFT
        word, block, top = slot >> _WORD_SHIFT, slot >> block_shift, self.next >> block_shift
        rank = self.ranks[block] >> self.shift[word % len(self.shift)]
        in_word = self.words[word] >> slot % len(self.bit)
        untaken = (top + 1 << block_shift) - self.next
        in_block = in_word.bit_count() + rank % (1 << self.shift[1])
        return in_block + sum(self.blocks[block + 1 : top + 1]) - untaken

    def settle(self, floor: int, word: int, cleared: int) -> None:
        """Write back the word that starts at slot `floor`, of which `cleared` more slots have been given up."""
        number = floor >> _WORD_SHIFT
        block = number >> _BLOCK_SHIFT
        self.words[number] = word
        self.ranks[block] -= cleared * self.below[number % len(self.shift)]
        self.blocks[block] -= cleared

    def clear(self, slot: int) -> None:
        """Give up a taken slot."""
        word, block = slot >> _WORD_SHIFT, slot >> _WORD_SHIFT + _BLOCK_SHIFT
        self.words[word] -= self.bit[slot % len(self.bit)]
        self.ranks[block] -= self.below[word % len(self.shift)]
        self.blocks[block] -= 1


def replay(
    log: Log, argument_depth: Sequence[int] | None, last: array[int], slot_of: array[int], timeline: Timeline
) -> array[int]:
    """Price every instruction of the log.

    The loop spells out what `depth` and `clear` do: calls would double its time. Most reads find their value in
    the word that is being filled, `newest`; its changes reach the ranks and blocks only when it is settled.
    """
    word_shift, block_shift = _WORD_SHIFT, _WORD_SHIFT + _BLOCK_SHIFT
    word_slots, word_mask, block_mask = 1 << word_shift, (1 << word_shift) - 1, (1 << _BLOCK_SHIFT) - 1
    counter_mask = (1 << timeline.shift[1]) - 1
    words, ranks, blocks = timeline.words, timeline.ranks, timeline.blocks
    bits, shifts, below = timeline.bit, timeline.shift, timeline.below
    third = log.third
    depths = array("i")
    charge = depths.append
    new = timeline.next
    floor, newest, cleared = new >> word_shift << word_shift, words[new >> word_shift], 0
    value = log.inputs
    for k, a, b in zip(range(len(log.left)), log.left, log.right):
        if new - floor >= word_slots or a < 0 or k in third:
            timeline.settle(floor, newest, cleared)
            if a < 0 or k in third:
                timeline.next = new
                depths.extend(_step(log, k, argument_depth, last, slot_of, timeline))
                new = timeline.next
                a = b = -1  # done
            floor, newest, cleared = new >> word_shift << word_shift, words[new >> word_shift], 0
        if a >= 0:
            s = slot_of[a]
            if s >= floor:
                bit = s & word_mask
                charge((newest >> bit).bit_count() - word_slots - floor + new)
                newest -= bits[bit]
                cleared += 1
            elif s < 0:
                charge(_first_read(a, argument_depth, k))
            else:
                w, block, bit, top = s >> word_shift, s >> block_shift, s & word_mask, new >> block_shift
                word, rank, place = words[w], ranks[block], w & block_mask
                above = (rank >> shifts[place] & counter_mask) - cleared - (top + 1 << block_shift) + new
                if block != top:
                    above += sum(blocks[block + 1 : top + 1])
                charge((word >> bit).bit_count() + above)
                words[w] = word - bits[bit]
                ranks[block] = rank - below[place]
                blocks[block] -= 1
        if b >= 0:
            t = slot_of[b]
            if b == a:
                charge(depths[-1])
            elif t >= floor:
                bit = t & word_mask
                # If a lay above b, it has given up its slot but still counts.
                charge((newest >> bit).bit_count() - word_slots - floor + new + (s > t))
                newest -= bits[bit]
                cleared += 1
            elif t < 0:
                charge(_first_read(b, argument_depth, k))
            else:
                w, block, bit, top = t >> word_shift, t >> block_shift, t & word_mask, new >> block_shift
                word, rank, place = words[w], ranks[block], w & block_mask
                above = (rank >> shifts[place] & counter_mask) - cleared - (top + 1 << block_shift) + new + (s > t)
                if block != top:
                    above += sum(blocks[block + 1 : top + 1])
                charge((word >> bit).bit_count() + above)
                words[w] = word - bits[bit]
                ranks[block] = rank - below[place]
                blocks[block] -= 1
        # A value that dies here takes no slot: nothing can tell.
        if a >= 0 and last[a] != k:
            slot_of[a] = new
            new += 1
        if b >= 0 and b != a and last[b] != k:
            slot_of[b] = new
            new += 1
        if last[value] >= 0:
            slot_of[value] = new
            new += 1
        value += 1
    timeline.settle(floor, newest, cleared)
    timeline.next = new
    return depths


def _step(
    log: Log,
    k: int,
    argument_depth: Sequence[int] | None,
    last: array[int],
    slot_of: array[int],
    timeline: Timeline,
) -> list[int]:
    """One instruction with any number of operands: return their depths and move them to the top."""
    operands = [v for v in (log.left[k], log.right[k], log.third.get(k, -1)) if v >= 0]
    depths = [_first_read(v, argument_depth, k) if slot_of[v] < 0 else timeline.depth(slot_of[v]) for v in operands]
    for v in dict.fromkeys(operands):
        if slot_of[v] >= 0:
            timeline.clear(slot_of[v])
        if last[v] != k:
            slot_of[v] = timeline.next
            timeline.next += 1
    return depths


def _first_read(value: int, argument_depth: Sequence[int] | None, k: int) -> int:
    """The fixed depth of an input that was never read; anything else without a slot is not stored yet."""
    if argument_depth is None or value >= len(argument_depth):
        raise unstored_operand(k)
    return argument_depth[value]


def _depths_now(
    values: Iterable[int], argument_depth: Sequence[int], slot_of: array[int], timeline: Timeline
) -> list[int]:
    """The depths of live values when nothing moves: what one last instruction reading them all is charged."""
    return [argument_depth[v] if slot_of[v] < 0 else timeline.depth(slot_of[v]) for v in values]


def cumulative_price(n: int) -> int:
    """Return S(n), the price of the topmost n bytes: the sum of ceil(sqrt(i)) over i = 1 .. n. S(0) is 0."""
    if n < 0:
        raise ValueError(f"cannot price {n} bytes: give a count of 0 or more")
    if n == 0:
        return 0
    m = isqrt(n - 1) + 1  # ceil(sqrt(n))
    return m * (6 * n - 2 * m * m + 3 * m - 1) // 6


def read_price(depth: int, bytes_per_element: int = 1) -> int:
    """Return the price of one read of all bytes of the element at this depth (1 is the top)."""
    if depth < 1:
        raise ValueError(f"depth {depth} is not on the stack: depths start at 1")
    if bytes_per_element == 1:
        return isqrt(depth - 1) + 1
    _check_bytes(bytes_per_element)
    return cumulative_price(depth * bytes_per_element) - cumulative_price((depth - 1) * bytes_per_element)


def _check_bytes(bytes_per_element: int) -> None:
    if not hasattr(bytes_per_element, "__index__") or bytes_per_element < 1:
        raise ValueError(f"bytes_per_element is {bytes_per_element}: an element has a whole number of bytes, 1 or more")


def price(depths: Iterable[int], bytes_per_element: int = 1) -> int:
    """Return the price of all these reads; depths that repeat are priced once and multiplied."""
    _check_bytes(bytes_per_element)
    return sum(count * read_price(depth, bytes_per_element) for depth, count in Counter(depths).items())


def read_kinds(log: Log, definition: str, code_of_value: bytearray) -> bytes:
    """The kind of every read, in reading order; `code_of_value` holds a code per value of the log."""
    return bytes(map(code_of_value.__getitem__, read_values(log, definition)))


def tally(kinds: bytes, depths: array[int]) -> Counter[tuple[int, int]]:
    """How many reads there were of each (kind, depth)."""
    return Counter(zip(kinds, depths))
