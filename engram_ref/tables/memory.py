"""Host memory for tables and staging: huge pages, page-locked for CUDA, counted before it is taken.

A table is read one row here, one row there: with 4 KiB pages nearly every row misses the TLB, so the memory
asks for huge pages, and says how much of it really got them. Memory that a GPU copies from or reads in place is
page-locked with cudaHostRegister in pieces: torch's own pinned allocator rounds up to a power of two and keeps
what is freed. One copy may not span two pieces (CUDA calls it an invalid value), so what is copied as a whole is
locked as a whole.

    with HostMemory(rows * row_bytes) as memory:
        raw = memory.bytes.view(rows, row_bytes)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from pathlib import Path
from types import TracebackType

import torch

_SAID = "ENGRAM_HOST_GIB"
HUGE_PAGE = 2 << 20
PIN_PIECE = 1 << 30  # bytes per cudaHostRegister call: one call for a whole table would hold the driver for minutes
_HEADROOM = 1 << 28  # left to everybody else
_CGROUPS = (  # what a container may take and has taken; version 2, version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


class HostMemory:
    """Zeroed memory of `nbytes`, on huge pages where the system grants them.

    Attributes:
        bytes: the memory, uint8 [nbytes], which starts at a multiple of a huge page.
        pinned: whether a GPU may read it in place.

    Raises:
        ValueError: it does not fit; the message gives both numbers.
    """

    def __init__(self, nbytes: int, pinned: bool = False) -> None:
        require_host_bytes(nbytes)
        self.nbytes = nbytes
        self.pinned = False
        self._pieces: list[int] = []
        self._pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages refuses; `huge_page_share` says so
                self._pages.madvise(mmap.MADV_HUGEPAGE)
        start = -torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8, count=max(nbytes, 1), offset=start)[:nbytes]
        if pinned:
            self.pin()

    def pin(self, piece: int = PIN_PIECE) -> None:
        """Page-lock it; to be undone by `close`, which the owner must call.

        Args:
            piece: bytes to lock at a time; one copy may not reach over two pieces.

        Raises:
            ValueError: CUDA refuses; the memory is closed then.
        """
        runtime = torch.cuda.cudart()
        self.pinned = True
        for offset in range(0, self.nbytes, piece):
            address = self.bytes.data_ptr() + offset
            error = int(runtime.cudaHostRegister(address, min(piece, self.nbytes - offset), 0))
            if error != 0:
                _forget_cuda_error()
                self.close()
                raise ValueError(f"CUDA refused to page-lock {self.nbytes:,} B of host memory (error {error})")
            self._pieces.append(address)

    def huge_page_share(self) -> float:
        """Share of the touched memory that lies on huge pages (from /proc/self/smaps); 0.0 where unknown."""
        address = self.bytes.data_ptr()
        resident = huge = 0
        for low, high, text in _mappings():
            if low < address + self.nbytes and address < high:
                resident += _kilobytes(text, "Rss")
                huge += _kilobytes(text, "AnonHugePages")
        return huge / resident if resident else 0.0

    def close(self) -> None:
        """Give the memory back; tensors made from it must not be used afterwards: they hold zeros."""
        if self.pinned:
            torch.cuda.synchronize()  # nothing may still be reading
            for address in self._pieces:
                torch.cuda.cudart().cudaHostUnregister(address)
            self._pieces = []
            self.pinned = False
        self.bytes = torch.empty(0, dtype=torch.uint8)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)  # the addresses stay mapped while a tensor looks at them

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _forget_cuda_error() -> None:
    """CUDA reports a refused call once more, at the next kernel, whoever starts it: let it be this one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _mappings() -> list[tuple[int, int, str]]:
    text = _text(Path("/proc/self/smaps"))
    heads = list(re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*$", text, re.M))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [(int(h[1], 16), int(h[2], 16), text[h.end() : end]) for h, end in zip(heads, ends)]


def _kilobytes(text: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.M)
    return int(found[1]) if found else 0


def _text(path: Path) -> str:
    """What the system says there; nothing where it has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def free_host_bytes() -> int | None:
    """Host memory that this process can still take, or None where the system does not say.

    ENGRAM_HOST_GIB says it instead, for a machine that is given memory only as it takes it.

    Raises:
        ValueError: ENGRAM_HOST_GIB is no number of GiB.
    """
    said = os.environ.get(_SAID)
    if said:
        if not re.fullmatch(r"\d+(\.\d+)?", said):
            raise ValueError(f"{_SAID}={said!r} must be a number of GiB, such as 118")
        return int(float(said) * 2**30)
    available = _kilobytes(_text(Path("/proc/meminfo")), "MemAvailable")
    rooms = [available * 1024] if available else []
    for names in _CGROUPS:
        limit, used, statistics = (_text(Path("/sys/fs/cgroup", name)) for name in names)
        if limit.strip().isdigit() and used.strip().isdigit():
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", statistics, re.M)  # given up when needed
            rooms.append(int(limit) - int(used) + (int(cache[1]) if cache else 0))
    return max(0, min(rooms)) if rooms else None


def free_device_bytes(device: torch.device) -> int | None:
    """Memory of an accelerator that can still be taken; the CPU's is the host's."""
    if device.type == "cpu":
        return free_host_bytes()
    return torch.cuda.mem_get_info(device)[0]


def said_by(device: torch.device) -> str:
    """For a refusal: who says how much host memory is free, and how to say otherwise; nothing of an accelerator's."""
    if device.type != "cpu":
        return ""
    total = _kilobytes(_text(Path("/proc/meminfo")), "MemTotal") / 2**20
    return f" (MemTotal {total:.2f} GiB; where a machine grows as it is used, set {_SAID})"


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
