"""Copying scattered rows side by side, compiled: the fast path of `gather`.

A row of a table of gigabytes is in no cache, so copying rows one by one waits for memory once per row. Here the
processor is told of rows some way ahead, so that several are on their way at once.

The loop checks nothing; `engram_ref.rows.gather` does, and is what to call. Compiled once, then kept on disk by numba.

    python -m pytest tests/ref/rows/test_gather.py
"""

# mypy: disable-error-code="call-arg, call-overload, var-annotated"
# (the signatures of functions that numba compiles are not those that mypy sees)

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engram_ref.loops import compiled, emit_prefetch, pointer

CACHE_LINE = 64
_AHEAD_BYTES = 8192  # asked for ahead of the copy; a quarter of it is slower, twice as much no faster
_MAX_AHEAD = 64  # rows
_BYTES = ir.IntType(8).as_pointer()


@intrinsic
def _prefetch(typing_context, address):
    """Ask for the cache line at `address`."""

    def generate(context, builder, signature, arguments):
        emit_prefetch(builder, arguments[0], to_write=False, level=2)  # as read once, 0, was slower
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def _copy(typing_context, target, source, count):
    """The C library's memcpy, on addresses."""

    def generate(context, builder, signature, arguments):
        int64, flag = ir.IntType(64), ir.IntType(1)
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _BYTES, int64, flag])
        copy = builder.module.declare_intrinsic("llvm.memcpy", (_BYTES, _BYTES, int64), kind)
        target, source, count = arguments
        is_volatile = flag(0)
        places = [builder.inttoptr(address, _BYTES) for address in (target, source)]
        builder.call(copy, [*places, count, is_volatile])
        return context.get_dummy_value()

    return types.void(target, source, count), generate


@intrinsic
def _move(typing_context, target, source, count):
    """Copy so many bytes, a number that is known when this is compiled, with one load and one store."""
    if not isinstance(count, types.IntegerLiteral):
        return None  # asked again with the literal
    words = ir.VectorType(ir.IntType(64), count.literal_value // 8)

    def generate(context, builder, signature, arguments):
        target, source = (builder.inttoptr(address, words.as_pointer()) for address in arguments[:2])
        builder.store(builder.load(source, align=1), target, align=1)
        return context.get_dummy_value()

    return types.void(target, source, count), generate


@njit(inline="always")
def ask(row, row_bytes):
    """Ask for the cache lines of the bytes from an address on."""
    for line in range(0, row_bytes, CACHE_LINE):
        _prefetch(row + line)


@njit(inline="always")
def _place(table, rows, is_int64, at, row_bytes):
    """Address of the row whose number stands at `at`."""
    if is_int64:
        return table + pointer(rows, np.int64(0))[at] * row_bytes
    return table + np.int64(pointer(rows, np.int32(0))[at]) * row_bytes


@njit(inline="always")
def _copy_row(target, source, row_bytes):
    lines = row_bytes // CACHE_LINE * CACHE_LINE
    # Whole words behind whole cache lines, as in fp8 rows, memcpy looks at for longer than it copies them.
    if lines == row_bytes or (row_bytes - lines) % 8:
        _copy(target, source, row_bytes)
        return
    for offset in range(0, lines, CACHE_LINE):
        _move(target + offset, source + offset, 64)
    for offset in range(lines, row_bytes, 8):
        _move(target + offset, source + offset, 8)


def _copy_rows(table, rows, is_int64, first, last, row_bytes, out, out_stride):
    ahead = max(1, min(_MAX_AHEAD, _AHEAD_BYTES // row_bytes))
    for at in range(first, min(first + ahead, last)):
        ask(_place(table, rows, is_int64, at, row_bytes), row_bytes)
    target = out + first * out_stride
    for at in range(first, last):
        if at + ahead < last:
            ask(_place(table, rows, is_int64, at + ahead, row_bytes), row_bytes)
        _copy_row(target, _place(table, rows, is_int64, at, row_bytes), row_bytes)
        target += out_stride


# Addresses, since to unpack three arrays takes numba longer than to copy a few rows.
# copy_rows(address of the table, address of the row numbers, whether they are int64 (else int32), first and last: which
# of them to do, bytes of a row, address of the output, bytes from one row of it to the next).
_ARGUMENTS = ["void(int64, int64, boolean, int64, int64, int64, int64, int64)"]
copy_rows = compiled(_copy_rows, _ARGUMENTS, nogil=True)


def _are_below(rows, is_int64, count, limit):
    largest = np.uint64(0)
    if is_int64:
        wide = pointer(rows, np.uint64(0))
        for at in range(count):
            largest = max(largest, wide[at])
    else:
        narrow = pointer(rows, np.uint32(0))
        for at in range(count):
            largest = max(largest, np.uint64(narrow[at]))
    return count == 0 or largest < limit


# are_below(address of row numbers, whether they are int64 (else int32), how many, the limit) -> whether all of them are
# in 0 .. limit - 1; a negative one, read as an unsigned number, is above every limit that fits its type.
are_below = compiled(_are_below, ["boolean(int64, boolean, int64, uint64)"], nogil=True)
