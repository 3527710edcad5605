"""Exact LRU stack distances, compiled: what `engram_toy.tracer.stack.stack_depths` returns, over ten times sooner.

What: the same log in, the same depths out, bit for bit.
Why: every touch of a live value takes the next slot on a time axis (`engram_toy.fast.time_axis`), and a depth is the
number of taken slots from one slot up. A million touches need 200 kB; nothing is compacted.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engram_toy.fast.compiling import compiled
from engram_toy.fast.time_axis import count_from, full_axis, give_up
from engram_toy.tracer.stack import Log, check_log, unfit_returned, unstored_operand

_AHEAD = 16  # instructions; with millions of live values, waiting for memory is half of the time
# What becomes of the values of an instruction, one bit each.
LEFT_DIES, _RIGHT_DIES, _THIRD_DIES, RESULT_LIVES = 1, 2, 4, 8


def _fetch_soon(typing_context: Any, values: Any, place: Any) -> Any:
    """Ask the processor for one place of an array that will be read some instructions later."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        function = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(prefetch, [address, flag(1), flag(3), flag(1)])  # to be written, to stay in the caches, of data
        return context.get_dummy_value()

    return types.void(values, types.int64), generate


prefetch: Any = intrinsic(_fetch_soon)


@compiled()
def fates(inputs, left, right, third, needed, fate):
    """Walk back from the end: mark in `fate` who dies and lives where, and in `needed` who is ever read.

    Returns an instruction that reads a value not stored yet, or -1.
    """
    for k in range(len(left) - 1, -1, -1):
        a, b, c = left[k], right[k], third[k] if len(third) else -1
        if max(a, b, c) >= inputs + k:
            return k
        fate[k] = RESULT_LIVES * needed[inputs + k]
        # Of an operand that is there twice, the first one dies: it is the one that `replay` moves.
        if a >= 0 and not needed[a]:
            fate[k] |= LEFT_DIES
            needed[a] = True
        if b >= 0 and not needed[b]:
            fate[k] |= _RIGHT_DIES
            needed[b] = True
        if c >= 0 and not needed[c]:
            fate[k] |= _THIRD_DIES
            needed[c] = True
    return -1


@compiled()
def _price(value, argument_depth, slot_of, words, above, untaken):
    slot = slot_of[value]
    return argument_depth[value] if slot < 0 else count_from(words, above, slot) - untaken


@compiled()
def _move(value, dies, slot_of, words, above, new):
    """Give up the slot of an operand; take the next one if it lives on."""
    if slot_of[value] >= 0:
        give_up(words, above, slot_of[value])
    if dies:  # it would give up a new one at once: no count could tell
        return new
    slot_of[value] = new
    return new + 1


@compiled()
def replay(inputs, left, right, third, fate, argument_depth, slot_of, words, above, new, depths):
    """Price every instruction into `depths`; return how many reads there were, and the next slot."""
    reads = 0
    slots = 64 * len(words)
    for k in range(len(left)):
        a, b, c = left[k], right[k], third[k] if len(third) else -1
        # All operands are priced before any of them moves.
        untaken = slots - new
        if k + _AHEAD < len(left):  # of no operand, -1, it asks for a place before the array: only a hint
            prefetch(slot_of, left[k + _AHEAD])
            prefetch(slot_of, right[k + _AHEAD])
        if a >= 0:
            depths[reads] = _price(a, argument_depth, slot_of, words, above, untaken)
            reads += 1
        if b >= 0:
            depths[reads] = _price(b, argument_depth, slot_of, words, above, untaken)
            reads += 1
        if c >= 0:
            depths[reads] = _price(c, argument_depth, slot_of, words, above, untaken)
            reads += 1
        if a >= 0:
            new = _move(a, fate[k] & LEFT_DIES, slot_of, words, above, new)
        if b >= 0 and b != a:
            new = _move(b, fate[k] & _RIGHT_DIES, slot_of, words, above, new)
        if c >= 0 and c != a and c != b:
            new = _move(c, fate[k] & _THIRD_DIES, slot_of, words, above, new)
        if fate[k] & RESULT_LIVES:
            slot_of[inputs + k] = new
            new += 1
    return reads, new


@compiled()
def _depths_now(values, argument_depth, slot_of, words, above, new, depths):
    """The depths of live values when nothing moves: what one last instruction reading them all is charged."""
    for i in range(len(values)):
        depths[i] = _price(values[i], argument_depth, slot_of, words, above, 64 * len(words) - new)


def third_column(log: Log) -> np.ndarray:
    """The third operands as a column, empty if there are none."""
    third = np.full(len(log.left) if log.third else 0, -1, np.int32)
    for k, value in log.third.items():
        third[k] = value
    return third


def returned_column(log: Log) -> np.ndarray:
    """Numbers of the returned values, int32."""
    # By way of an array: twice as fast as numpy on a long list.
    return np.asarray(array("i", log.returned), np.int32)


def stack_depths(log: Log, definition: str = "lru") -> array[int]:
    """Return the depth of every read in reading order; see `engram_toy.tracer.stack.stack_depths`, which it equals.

    The first call compiles for some seconds, unless an earlier run left the result in numba's cache.
    """
    check_log(log, definition)
    two_stack = definition == "two-stack"
    left, right, third = np.asarray(log.left, np.int32), np.asarray(log.right, np.int32), third_column(log)
    returned = returned_column(log)

    needed = np.zeros(log.inputs + len(left), np.bool_)
    if len(returned) and not 0 <= returned.min() <= returned.max() < len(needed):
        raise unfit_returned(log)
    needed[returned] = True
    if needed.sum() != len(returned):
        raise unfit_returned(log)
    fate = np.zeros(len(left), np.uint8)
    early = fates(log.inputs, left, right, third, needed, fate)
    if early >= 0:
        raise unstored_operand(early)

    live = np.flatnonzero(needed[: log.inputs]) if not two_stack else np.empty(0, np.int64)
    return replayed(log, fate, live, two_stack)


def replayed(log: Log, fate: np.ndarray, live: Sequence[int] | np.ndarray = (), two_stack: bool = True) -> array[int]:
    """The depths of a checked log, whose values meet these fates; `live` inputs are on the stack from the start."""
    left, right, third = np.asarray(log.left, np.int32), np.asarray(log.right, np.int32), third_column(log)
    returned = returned_column(log)
    argument_depth = np.asarray(log.argument_depth if two_stack else (), np.int32)
    slots = log.inputs + 3 * len(left) + len(log.third)  # of an instruction: its operands, and its result
    words, above = full_axis(slots)
    slot_of = np.full(log.inputs + len(left), -1, np.int32 if slots < 2**31 else np.int64)
    slot_of[np.asarray(live, np.int64)] = np.arange(len(live))
    depths = np.empty(2 * len(left) + len(log.third) + two_stack * len(returned), np.int32)
    columns = (log.inputs, left, right, third, fate, argument_depth)
    reads, new = replay(*columns, slot_of, words, above, len(live), depths)
    if two_stack:
        _depths_now(returned, argument_depth, slot_of, words, above, new, depths[reads:])
        reads += len(returned)
    result = array("i")
    result.frombytes(depths[:reads].tobytes())
    return result


def read_values(log: Log, definition: str = "lru") -> np.ndarray:
    """The value behind every depth; see `engram_toy.tracer.stack.read_values`, which it equals."""
    columns = [np.asarray(log.left, np.int32), np.asarray(log.right, np.int32)]
    if log.third:
        columns.append(third_column(log))
    operands = np.stack(columns, axis=1).ravel()
    reads = operands[operands >= 0]
    if definition == "two-stack":
        reads = np.concatenate([reads, returned_column(log)])
    return reads


def read_kinds(log: Log, definition: str, code_of_value: bytearray) -> bytes:
    """The kind of every read; see `engram_toy.tracer.stack.read_kinds`, which it equals."""
    return np.frombuffer(code_of_value, np.uint8)[read_values(log, definition)].tobytes()


def tally(kinds: bytes, depths: array[int]) -> Counter[tuple[int, int]]:
    """How many reads there were of each (kind, depth); see `engram_toy.tracer.stack.tally`, which it equals."""
    kind_of_read = np.frombuffer(kinds, np.uint8)
    depth_of_read = np.asarray(depths, np.int32)
    counts: Counter[tuple[int, int]] = Counter()
    for kind in np.unique(kind_of_read).tolist():
        found, reads = np.unique(depth_of_read[kind_of_read == kind], return_counts=True)
        counts.update({(kind, depth): n for depth, n in zip(found.tolist(), reads.tolist())})
    return counts
