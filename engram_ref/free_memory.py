"""Host memory that is still free, as the system says it, a container's limit counted. Torch is not needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

HOST_GIB = "ENGRAM_HOST_GIB"
_CGROUPS = (  # what a container may take and has taken; version 2, version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def free_host_bytes() -> int | None:
    """Host memory that this process can still take, or None where the system does not say.

    ENGRAM_HOST_GIB says it instead, for a machine that is given memory only as it takes it.

    Raises:
        ValueError: ENGRAM_HOST_GIB is no number of GiB.
    """
    said = os.environ.get(HOST_GIB)
    if said:
        if not re.fullmatch(r"\d+(\.\d+)?", said):
            raise ValueError(f"{HOST_GIB}={said!r} must be a number of GiB, such as 118")
        return int(float(said) * 2**30)
    available = kilobytes(text_of(Path("/proc/meminfo")), "MemAvailable")
    rooms = [available * 1024] if available else []
    for names in _CGROUPS:
        limit, used, statistics = (text_of(Path("/sys/fs/cgroup", name)) for name in names)
        if limit.strip().isdigit() and used.strip().isdigit():
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", statistics, re.M)  # given up when needed
            rooms.append(int(limit) - int(used) + (int(cache[1]) if cache else 0))
    return max(0, min(rooms)) if rooms else None


def total_host_bytes() -> int:
    """Memory of the machine; 0 where the system does not say."""
    return 1024 * kilobytes(text_of(Path("/proc/meminfo")), "MemTotal")


def kilobytes(text: str, field: str) -> int:
    """A field of the kernel's reports on memory; 0 where it is not there."""
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.M)
    return int(found[1]) if found else 0


def text_of(path: Path) -> str:
    """What the system says there; nothing where it has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")  # names of mapped files may be of any encoding
    except OSError:
        return ""
