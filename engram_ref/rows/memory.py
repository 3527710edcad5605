"""Host memory for tables and staging: huge pages, page-locked for CUDA, counted before it is taken.

A table is read one row here, one row there: with 4 KiB pages nearly every row misses the TLB, so the memory
asks for huge pages, and says how much of it really got them. Memory that a GPU copies from or reads in place is
page-locked. Whoever forgets to close leaves nothing locked: the lock belongs to the mapping and ends before it.

    with HostMemory(rows * row_bytes) as memory:
        raw = memory.bytes.view(rows, row_bytes)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engram_ref.free_memory import HOST_GIB, free_host_bytes, kilobytes, text_of, total_host_bytes

HUGE_PAGE = 2 << 20  # of x86-64, and of arm64 with pages of 4 KiB
PIN_PIECE = 1 << 30  # bytes per cudaHostRegister call: one call for a whole table would hold the driver for minutes
_HEADROOM = 1 << 28  # left to everybody else


class HostMemory:
    """Zeroed memory of `nbytes`, on huge pages where the system grants them.

    Args:
        nbytes: of the memory.
        pinned: page-lock it at once.
        fd: of memory that others map, too (`engram_ref.tables.shared`), instead of new one; it is not zeroed.

    Attributes:
        bytes: the memory, uint8 [nbytes], which starts at a multiple of a huge page; shared memory, of a page.
        pinned: whether a GPU may read it in place.

    Raises:
        ValueError: it does not fit; the message gives both numbers.
    """

    def __init__(self, nbytes: int, pinned: bool = False, fd: int | None = None) -> None:
        self.nbytes = nbytes
        self.pinned = False
        if fd is None:
            require_host_bytes(nbytes)
            self._pages = _Pages(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._pages = _Pages(fd, max(nbytes, 1))  # shared: what one process writes, all see
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages refuses; `huge_page_share` says so
                self._pages.madvise(mmap.MADV_HUGEPAGE)
        # A byte of shared memory lies at one place of its file, whatever the address: this begins with the first.
        start = 0 if fd is not None else -torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8, count=max(nbytes, 1), offset=start)[:nbytes]
        if pinned:
            self.pin()

    def pin(self, piece: int = PIN_PIECE) -> None:
        """Page-lock it, until `close` or until nobody has the memory any more.

        Args:
            piece: bytes to lock at a time; one copy may not reach over two pieces (CUDA calls it an invalid value).

        Raises:
            ValueError: CUDA refuses; the memory is closed then.
        """
        self.pinned = True
        start = self.bytes.data_ptr()
        for offset in range(0, self.nbytes, piece):
            # Not torch's own pinned allocator: it rounds up to a power of two and keeps what is freed.
            error = self._pages.lock(start + offset, min(piece, self.nbytes - offset))
            if error:
                _forget_cuda_error()
                self.close()
                raise ValueError(f"CUDA refused to page-lock {self.nbytes:,} B of host memory (error {error})")

    @property
    def locked_pieces(self) -> int:
        """In how many pieces it is page-locked."""
        return len(self._pages.locked)

    def huge_page_share(self) -> float:
        """Share of the touched memory that lies on huge pages (from /proc/self/smaps); 0.0 where unknown."""
        address = self.bytes.data_ptr()
        resident = huge = 0
        for low, high, text in _mappings():
            if low < address + self.nbytes and address < high:
                resident += kilobytes(text, "Rss")
                huge += kilobytes(text, "AnonHugePages")
        return huge / resident if resident else 0.0

    def close(self) -> None:
        """Give the memory back; tensors made from it must not be used afterwards: they hold zeros.

        Memory that others map, too, lives until the last of them has closed it, and no tensor looks at it.
        """
        if self.pinned:
            self._pages.unlock()
            self.pinned = False
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        if hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):  # a sandbox may refuse; they then go with the last tensor
                self._pages.madvise(mmap.MADV_DONTNEED)  # the addresses stay mapped while a tensor looks at them

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Pages(mmap.mmap):
    """Mapped pages that are unlocked before they are unmapped, whichever way they end.

    The driver keeps what was registered: where the next mapping gets the same addresses, it refuses to lock them (error
    712), or reads the pages that were there before.
    """

    locked: Sequence[int] = ()  # addresses of the pieces
    _process: int | None = None

    def lock(self, address: int, nbytes: int) -> int:
        """Lock some of them; CUDA's error, 0 for none."""
        # Kept with the pages: when these go, at the end of the process, torch's own names may be gone.
        self._runtime, self._synchronize = torch.cuda.cudart(), torch.cuda.synchronize
        self._process = os.getpid()
        error = int(self._runtime.cudaHostRegister(address, nbytes, 0))
        if error == 0:
            self.locked = (*self.locked, address)
        return error

    def unlock(self) -> None:
        """Wait for the device, then unlock all of them; a forked child leaves the lock to its parent, whose it is."""
        pieces, process = self.locked, self._process
        self.locked, self._process = (), None
        if process != os.getpid():
            return
        try:
            self._synchronize()  # nothing may still be reading
        finally:
            for address in pieces:
                self._runtime.cudaHostUnregister(address)

    # The last tensor keeps the pages. A finaliser of the tensors' owner would come too early, the callback of a weak
    # reference too late: mmap unmaps before it makes these.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # then CUDA may be down already, and the process takes its locks with it
            self.unlock()


def _forget_cuda_error() -> None:
    """CUDA reports a refused call once more, at the next kernel, whoever starts it: let it be this one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _mappings() -> list[tuple[int, int, str]]:
    text = text_of(Path("/proc/self/smaps"))
    heads = list(re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*$", text, re.M))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [(int(h[1], 16), int(h[2], 16), text[h.end() : end]) for h, end in zip(heads, ends)]


def free_device_bytes(device: torch.device) -> int | None:
    """Memory of an accelerator that can still be taken; the CPU's is the host's."""
    if device.type == "cpu":
        return free_host_bytes()
    return torch.cuda.mem_get_info(device)[0]


def said_by(device: torch.device) -> str:
    """For a refusal: who says how much host memory is free, and how to say otherwise; nothing of an accelerator's."""
    if device.type != "cpu":
        return ""
    total = total_host_bytes() / 2**30
    return f" (MemTotal {total:.2f} GiB; where a machine grows as it is used, set {HOST_GIB})"


def require_host_bytes(nbytes: int) -> None:
    """Refuse with both numbers what host memory cannot hold."""
    require_bytes(nbytes, torch.device("cpu"))


def require_bytes(nbytes: int, device: torch.device) -> None:
    """Refuse with both numbers what a device's memory cannot hold.

    Raises:
        ValueError: fewer than `nbytes` are free.
    """
    free = free_device_bytes(device)
    if free is not None and nbytes + _HEADROOM > free:
        place = "host" if device.type == "cpu" else str(device)
        raise ValueError(
            f"{nbytes / 2**30:.2f} GiB do not fit into {place} memory, of which {free / 2**30:.2f} GiB are free"
            f"{said_by(device)}: take a smaller table or another placement"
        )
