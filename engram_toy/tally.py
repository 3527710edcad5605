"""Counting reads: which kind of value was read, at which depth, how often.

`engram_toy.fast.tally` counts the same with numpy.
"""

from __future__ import annotations

from array import array
from collections import Counter

from engram_toy.stack import Log, read_values


def read_kinds(log: Log, definition: str, code_of_value: bytearray) -> bytes:
    """The kind of every read, in reading order; `code_of_value` holds a code per value of the log."""
    return bytes(map(code_of_value.__getitem__, read_values(log, definition)))


def tally(kinds: bytes, depths: array[int]) -> Counter[tuple[int, int]]:
    """How many reads there were of each (kind, depth)."""
    return Counter(zip(kinds, depths))
