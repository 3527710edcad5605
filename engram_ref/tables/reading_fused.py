"""Asking the disk for rows and reading them to their places, compiled: the fast path of `reading`.

No Python runs between the system calls, so that a fetch takes one turn at the interpreter lock and not three for
every row. Rows that follow each other in the file are read by one call, each to its own place. The C library is
called by name.

    python -m pytest tests/ref/test_file_table.py
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

from engram_ref.hashing_fused import compiled

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
def _find_runs(ordered, firsts):
    """Where each run of rows that follow each other begins, and at the end how many there are; the runs' number."""
    runs = rows = 0
    for at in range(len(ordered)):
        step = ordered[at] - ordered[at - 1] if at else 2
        if step > 1 or (step == 1 and rows == _MOST):
            firsts[runs] = at
            runs += 1
            rows = 0
        rows += step != 0
    firsts[runs] = len(ordered)
    return runs


@njit
def _aim(ordered, places, first, last, raw, vector):
    """Let the vector of struct iovec (address, length) name a run's places; how many rows it has."""
    rows = 0
    for at in range(first, last):
        if at == first or ordered[at] != ordered[at - 1]:
            vector[rows, 0] = raw.ctypes.data + places[at] * raw.shape[1]
            vector[rows, 1] = raw.shape[1]
            rows += 1
    return rows


def _read_rows(fd, ordered, places, start, raw, ahead, now):
    firsts = np.empty(len(ordered) + 1, dtype=np.int64)
    runs = _find_runs(ordered, firsts)
    vector = np.empty((_MOST, 2), dtype=np.int64)
    done = np.zeros(runs, dtype=np.bool_)
    total = 0
    for at in range(runs + ahead):
        if at < runs:
            offset = start + ordered[firsts[at]] * raw.shape[1]
            rows = _aim(ordered, places, firsts[at], firsts[at + 1], raw, vector)
            nbytes = rows * raw.shape[1]
            total += nbytes
            if now:
                done[at] = _preadv2(fd, vector.ctypes.data, rows, offset, _NOW) == nbytes
            if not done[at]:
                _fadvise(fd, offset, nbytes, _WILLNEED)
        late = at - ahead
        if late >= 0 and not done[late]:
            offset = start + ordered[firsts[late]] * raw.shape[1]
            rows = _aim(ordered, places, firsts[late], firsts[late + 1], raw, vector)
            if _preadv2(fd, vector.ctypes.data, rows, offset, 0) != rows * raw.shape[1]:
                return -1
    for at in range(1, len(ordered)):
        if ordered[at] == ordered[at - 1]:
            for byte in range(raw.shape[1]):
                raw[places[at], byte] = raw[places[at - 1], byte]
    return total


# read_rows(file, sorted row numbers, place of each in `raw`, byte of the file at which row 0 begins, raw, reads to be
# ahead, whether to try first what is in memory): how many bytes were read, or -1 if a row could not be read whole; the
# plain way will say why.
_ARGUMENTS: list[Any] = ["int64(int32, int64[::1], int64[::1], int64, uint8[:, ::1], int64, boolean)"]
read_rows = compiled(_read_rows, _ARGUMENTS, nogil=True) if can_compile() else None
