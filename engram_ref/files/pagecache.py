"""What the system keeps of a file in memory: dropped, so that a read is honestly cold, and counted, to prove it."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

_WINDOW = 1 << 30  # bytes of the file looked at in one go


def drop_pages(fd: int) -> None:
    """Make the system forget a file's pages, its unwritten ones after writing them.

    Raises:
        ValueError: this system has no call for it.
    """
    if not hasattr(os, "posix_fadvise"):
        raise ValueError("this system cannot drop a file's pages from memory: measure with direct=True or on Linux")
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(*fds: int) -> float:
    """Share of the pages of some files that are in memory, 0.0 .. 1.0; nothing is read to find out.

    Linux tells it to those who may write the file, and tells all others 1.0.

    Raises:
        OSError: the system does not say.
    """
    sizes = [os.fstat(fd).st_size for fd in fds]
    pages = sum(-(-size // mmap.PAGESIZE) for size in sizes)
    cached = 0
    for fd, size in zip(fds, sizes):
        cached += sum(_cached_pages(fd, start, min(_WINDOW, size - start)) for start in range(0, size, _WINDOW))
    return cached / pages


def _cached_pages(fd: int, start: int, length: int) -> int:
    states = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
    with mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start) as pages:
        view = np.frombuffer(pages, dtype=np.uint8)
        address = view.ctypes.data
        del view  # or the mapping could not be closed
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(states.ctypes.data)):
            raise OSError(ctypes.get_errno(), "mincore does not say which pages are in memory")
    return int((states & 1).sum())
