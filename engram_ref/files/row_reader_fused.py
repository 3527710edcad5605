"""Asking the disk for rows and reading them to their places, compiled: the fast path of `row_reader`.

Rows that follow each other in the file are read by one call, each to its own place. Where rows lie in two parts, the
disk is asked for both before either is waited for. The C library is called by name.

    python -m pytest tests/ref/files/test_row_reader.py tests/ref/tables/test_file.py
"""

# mypy: disable-error-code="call-arg, call-overload"
# (the signatures of functions that numba compiles are not those that mypy sees)

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import numpy as np
from numba import njit, types

from engram_ref.loops import compiled

_MOST = 64  # rows of one read; the system takes 1024
_FILE, _FLAG, _NUMBER = types.int32, types.int32, types.int64
_preadv2 = types.ExternalFunction("preadv2", _NUMBER(_FILE, _NUMBER, types.int32, _NUMBER, _FLAG))
_fadvise = types.ExternalFunction("posix_fadvise", types.int32(_FILE, _NUMBER, _NUMBER, _FLAG))
_NOW, _WILLNEED = os.RWF_NOWAIT, os.POSIX_FADV_WILLNEED


def can_compile() -> bool:
    """Whether the C library has what the loop calls, with 64-bit file positions."""
    library = ctypes.CDLL(None)
    return sys.maxsize > 2**32 and all(hasattr(library, name) for name in ("preadv2", "posix_fadvise"))


@njit
def _find_runs(ordered, bounds, firsts, shards):
    """Where each run of rows that follow each other begins, and at the end how many there are; the runs' number.

    `shards` takes the number of the tensor that each lies in.
    """
    runs = rows = shard = 0
    for at in range(len(ordered)):
        step = ordered[at] - ordered[at - 1] if at else 2
        while ordered[at] >= bounds[shard + 1]:
            shard += 1
            step = 2  # no run goes from one tensor on into another
        if step > 1 or (step == 1 and rows == _MOST):
            firsts[runs] = at
            shards[runs] = shard
            runs += 1
            rows = 0
        rows += step != 0
    firsts[runs] = len(ordered)
    return runs


@njit
def _read_run(part, ordered, places, first, last, raw, vector, flag):
    """Whether one call read this part of a run's rows, each to its place; `vector` is for the calls' struct iovec."""
    fd, start, column, width = part
    target = raw.ctypes.data + column
    rows = 0
    for at in range(first, last):
        if at == first or ordered[at] != ordered[at - 1]:
            vector[rows, 0] = target + places[at] * raw.shape[1]
            vector[rows, 1] = width
            rows += 1
    return _preadv2(fd, vector.ctypes.data, rows, start + ordered[first] * width, flag) == rows * width


@njit
def _repeat(ordered, places, raw):
    """Copy each row to the other places at which it is wanted; how many different rows there are."""
    unique = min(1, len(ordered))
    for at in range(1, len(ordered)):
        if ordered[at] != ordered[at - 1]:
            unique += 1
            continue
        for byte in range(raw.shape[1]):
            raw[places[at], byte] = raw[places[at - 1], byte]
    return unique


@njit(inline="always")
def _part(parts, row):
    return parts[row, 0], parts[row, 1], parts[row, 2], parts[row, 3]


@njit(inline="always")
def _ask_run(part, ordered, first, last):
    """Ask the disk for this part of a run's rows."""
    fd, start, _, width = part
    rows = ordered[last - 1] - ordered[first] + 1
    _fadvise(fd, start + ordered[first] * width, rows * width, _WILLNEED)


def _ask_rows(parts, bounds, ordered):
    firsts = np.empty(len(ordered) + 1, dtype=np.int64)
    shards = np.empty(len(ordered), dtype=np.int64)
    per_row = len(parts) // (len(bounds) - 1)
    for at in range(_find_runs(ordered, bounds, firsts, shards)):
        for index in range(per_row):
            _ask_run(_part(parts, shards[at] * per_row + index), ordered, firsts[at], firsts[at + 1])


def _read_rows(parts, bounds, ordered, places, raw, ahead, now):
    firsts = np.empty(len(ordered) + 1, dtype=np.int64)
    shards = np.empty(len(ordered), dtype=np.int64)
    runs = _find_runs(ordered, bounds, firsts, shards)
    vector = np.empty((_MOST, 2), dtype=np.int64)
    per_row = len(parts) // (len(bounds) - 1)
    done = np.zeros((runs, per_row), dtype=np.bool_)
    for at in range(runs + ahead):
        late = at - ahead  # the run that has been asked for long enough to be waited for
        for index in range(per_row):
            if at < runs:
                part = _part(parts, shards[at] * per_row + index)
                first, last = firsts[at], firsts[at + 1]
                if now:
                    done[at, index] = _read_run(part, ordered, places, first, last, raw, vector, _NOW)
                if not done[at, index]:
                    _ask_run(part, ordered, first, last)
            if late < 0 or done[late, index]:
                continue
            part = _part(parts, shards[late] * per_row + index)
            if not _read_run(part, ordered, places, firsts[late], firsts[late + 1], raw, vector, 0):
                return -1
    return _repeat(ordered, places, raw)


# read_rows(parts: int64 [S*P, 4], of each its file, byte of it at which row 0 would begin, its first column of `raw`
# and its width; the first row of each of the S tensors and how many rows there are, [S + 1]; sorted row numbers; place
# of each in `raw`; raw; runs of rows to be ahead; whether to try first what is in memory): how many different rows were
# read, or -1 if one could not be read whole; the plain way will say why.
_ARGUMENTS: list[Any] = ["int64(int64[:, ::1], int64[::1], int64[::1], int64[::1], uint8[:, ::1], int64, boolean)"]
# One turn at the interpreter lock for a fetch, and not three for every row.
read_rows = compiled(_read_rows, _ARGUMENTS, nogil=True) if can_compile() else None

# ask_rows(the first three of these): asks the disk for the rows, and waits for none.
ask_rows = compiled(_ask_rows, ["void(int64[:, ::1], int64[::1], int64[::1])"], nogil=True) if can_compile() else None
