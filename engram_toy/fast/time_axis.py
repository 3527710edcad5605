"""The time axis behind compiled stack distances: which slots are taken, and how many from one slot up.

A machine word holds 64 slots and a Fenwick tree counts the taken slots of the words above, so a count costs one
popcount and some twenty additions, however long the axis. `engram_toy.fast.stack` prices values on it,
`engram_toy.fast.rows` whole rows.

    words, above = full_axis(slots)               # every slot counts as taken: only giving one up writes
    give_up(words, above, 3)
    count_from(words, above, 0)                   # taken slots from slot 0 up, those beyond the end included
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from engram_toy.fast.compiling import compiled


def _bit_count(typing_context: Any, word: Any) -> Any:
    """The processor's own count of the set bits of a 64-bit word; numba has no name for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


popcount: Any = intrinsic(_bit_count)  # called with the word alone; its signature would say otherwise


@compiled()
def count_from(words, above, slot):
    """Count the taken slots from this one up, the untaken ones at the end included."""
    # Unsigned positions spare every access the test for negative ones.
    slot, one = np.uint64(slot), np.uint64(1)
    node = slot >> np.uint64(6)
    taken = np.int64(popcount(words[node] >> (slot & np.uint64(63))))
    node += np.uint64(2)  # nodes are numbered from 1, and the word itself is counted
    while node < len(above):
        taken += above[node]
        node += node & (~node + one)  # its lowest set bit: an unsigned number has no negative
    return taken


@compiled()
def give_up(words, above, slot):
    """Give up a slot."""
    slot = np.uint64(slot)
    words[slot >> np.uint64(6)] ^= np.uint64(1) << (slot & np.uint64(63))  # it was taken: this clears it
    settle(above, slot >> np.uint64(6), 1)


@compiled()
def settle(above, word, slots):
    """Let the tree know that so many slots of a word have been given up."""
    node, one = np.uint64(word) + np.uint64(1), np.uint64(1)
    while node > np.uint64(0):
        above[node] -= slots
        node &= node - one


def full_axis(slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Words and Fenwick tree of a time axis on which every slot counts as taken: only giving one up writes."""
    words = np.full(slots // 64 + 1, 2**64 - 1, np.uint64)
    node = np.arange(len(words) + 1)
    # Node n counts the words n, n + 1, ... n + lowbit(n) - 1, numbered from 1.
    return words, (64 * np.minimum(node & -node, len(words) + 1 - node)).astype(np.int32)


def axis_of(taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words and Fenwick tree of a time axis on which the slots of these booleans are taken, and none beyond."""
    words = np.zeros(len(taken) // 64 + 1, np.uint64)
    packed = np.packbits(taken, bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    up_to = np.zeros(len(words) + 1, np.int64)
    whole = len(taken) // 64
    up_to[1 : whole + 1] = taken[: whole * 64].reshape(-1, 64).sum(axis=1)
    up_to[-1] = taken[whole * 64 :].sum()  # the last word is never full
    node = np.arange(len(words) + 1)
    # The words that a node counts, as in `full_axis`.
    last = np.minimum(node + (node & -node), len(words) + 1) - 1
    up_to = np.cumsum(up_to)
    above = up_to[last] - up_to[np.maximum(node - 1, 0)]
    return words, above.astype(np.int32)
