"""Copying scattered rows side by side, compiled: the fast path of `gather`.

A row of a table of gigabytes is in no cache, so copying rows one by one waits for memory once per row. Here the
processor is told of rows some way ahead, so that several are on their way at once, and a large output is written
past the caches, which saves reading each of its lines before overwriting it. Only whole cache lines can be written so;
rows that are not made of them (264 bytes of fp8) are put side by side in the nearest cache until they fill some.

The loop is given addresses, because unpacking three arrays takes numba longer than copying a few rows; it checks
nothing. `engram_ref.tables.gather` does, and is what to call. Compiled once, then kept on disk by numba.

    python -m pytest tests/ref/test_gather.py
"""

# mypy: disable-error-code="call-arg, call-overload"
# (the signatures of functions that numba compiles are not those that mypy sees)

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engram_ref.hashing_fused import compiled, pointer

CACHE_LINE = 64
_AHEAD_BYTES = 8192  # asked for ahead of the copy; a quarter of it is slower, twice as much no faster
_MAX_AHEAD = 64  # rows
_BYTES = ir.IntType(8).as_pointer()


@intrinsic
def _prefetch(typing_context, address):
    """Ask for the cache line at `address`, to be read once."""

    def generate(context, builder, signature, arguments):
        int32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, int32, int32, int32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (_BYTES,), kind)
        to_read, once, data = int32(0), int32(0), int32(1)
        builder.call(prefetch, [builder.inttoptr(arguments[0], _BYTES), to_read, once, data])
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
def _stream(typing_context, target, source):
    """Copy one cache line past the caches; `target` must be where a line begins."""

    def generate(context, builder, signature, arguments):
        line = ir.VectorType(ir.IntType(64), CACHE_LINE // 8)
        target, source = (builder.inttoptr(address, line.as_pointer()) for address in arguments)
        store = builder.store(builder.load(source, align=1), target, align=CACHE_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(target, source), generate


@intrinsic
def fence(typing_context):
    """What was written past the caches is in memory before anything that follows."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


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
def _stream_whole(target, source, nbytes):
    for offset in range(0, nbytes, CACHE_LINE):
        _stream(target + offset, source + offset)


@njit
def _lines_end_after(row_bytes):
    """The fewest rows that fill whole cache lines."""
    rows = 1
    while rows * row_bytes % CACHE_LINE:
        rows *= 2
    return rows


def _copy_rows(table, rows, is_int64, first, last, row_bytes, out, out_stride):
    ahead = max(1, min(_MAX_AHEAD, _AHEAD_BYTES // row_bytes))
    for at in range(first, min(first + ahead, last)):
        ask(_place(table, rows, is_int64, at, row_bytes), row_bytes)
    target = out + first * out_stride
    for at in range(first, last):
        if at + ahead < last:
            ask(_place(table, rows, is_int64, at + ahead, row_bytes), row_bytes)
        _copy(target, _place(table, rows, is_int64, at, row_bytes), row_bytes)
        target += out_stride


def _stream_rows(table, rows, is_int64, first, last, row_bytes, out):
    group = _lines_end_after(row_bytes)
    lines = np.empty(group * row_bytes + CACHE_LINE, dtype=np.uint8)
    gathered = lines.ctypes.data + -lines.ctypes.data % CACHE_LINE
    ahead = max(1, min(_MAX_AHEAD, _AHEAD_BYTES // row_bytes))
    for at in range(first, min(first + ahead, last)):
        ask(_place(table, rows, is_int64, at, row_bytes), row_bytes)
    target = out + first * row_bytes
    for start in range(first, last, group):
        stop = min(start + group, last)
        for at in range(start, stop):
            if at + ahead < last:
                ask(_place(table, rows, is_int64, at + ahead, row_bytes), row_bytes)
            source = _place(table, rows, is_int64, at, row_bytes)
            if group == 1:
                _stream_whole(target, source, row_bytes)
            else:
                _copy(gathered + (at - start) * row_bytes, source, row_bytes)
        nbytes = (stop - start) * row_bytes
        if group > 1:
            whole = nbytes // CACHE_LINE * CACHE_LINE
            _stream_whole(target, gathered, whole)
            _copy(target + whole, gathered + whole, nbytes - whole)
        target += nbytes
    fence()


# Of both: address of the table, address of the row numbers, whether they are int64 (else int32), first and last: which
# of them to do, bytes of a row, address of the output. copy_rows writes a row every so many bytes; stream_rows writes
# them side by side, past the caches: the output, and in it row `first`, must begin where a cache line does.
_ARGUMENTS = "int64, int64, boolean, int64, int64, int64, int64"
copy_rows = compiled(_copy_rows, [f"void({_ARGUMENTS}, int64)"], nogil=True)
stream_rows = compiled(_stream_rows, [f"void({_ARGUMENTS})"], nogil=True)
