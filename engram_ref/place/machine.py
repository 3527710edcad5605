"""A machine as the predictions see it: what its memories have room for, and how fast rows come out of them.

    this_machine(Path.cwd())                    free memory and disk as the system says; the rates are assumed
    machine.with_rates({"bus": Rate(5e10, "measured")})

A rate is never without its origin: measured here, given by the caller, or assumed, and then of which hardware.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from engram_ref.free_memory import free_host_bytes

_HEADROOM = 1 << 28  # of host memory and disk, left to everybody else


@dataclass(frozen=True)
class Rate:
    """A speed or a delay, and where it is from.

    Attributes:
        value: bytes, rows or reads per second; of a delay, seconds; of what is lost beside a fetch, a share of it.
        source: "measured", "given", or "assumed: ..." with what was assumed.
    """

    value: float
    source: str


# The round figures of ordinary hardware of 2026; `--measure` or an option replaces each.
ASSUMED = {
    "device": Rate(3e12, "assumed: HBM3 of one accelerator"),
    "bus": Rate(5e10, "assumed: PCIe 5.0 x16 in practice"),
    "uva": Rate(3e7, "assumed: rows of 264 B that a GPU reads in place, as measured on an H200"),
    "gather": Rate(2e7, "assumed: one thread, rows on huge pages"),
    "memory": Rate(1.5e10, "assumed: one thread that copies"),
    "compute": Rate(4.9e14, "assumed: half of an H100's dense bfloat16 peak"),
    "processor": Rate(1e11, "assumed: a few cores, float32"),
    "reads": Rate(5e5, "assumed: one NVMe drive, random reads of 4 KiB, 64 in flight"),
    "start_device": Rate(5.7e-6, "assumed: one launch from ids to rows, as measured on an H200"),
    "start_host": Rate(2e-5, "assumed: one call that gathers"),
    "start_bus": Rate(2.7e-6, "assumed: the first row in place, as measured on an H200"),
    "start_staged": Rate(3.2e-4, "assumed: hashed and gathered by the CPU, and copied, as measured on an H200's host"),
    "start_disk": Rate(1e-4, "assumed: one read of an NVMe drive"),
    # What a step was longer for than windows explain: medians of all that is committed of one model with one layer.
    "beside_uva": Rate(0.6, "assumed: of a fetch in place, what blocks lose beside it, as measured on an H200"),
    "beside_staged": Rate(1.1e-3, "assumed: lost beside a fetch that the CPU stages, as measured on an H200"),
    "beside_hot": Rate(2.3e-3, "assumed: the same with a hot tier in front, as measured on an H200"),
    "beside_file": Rate(1.2e-3, "assumed: lost by a CPU beside a fetch from a file, as measured on two cores"),
}
UNITS = {
    **dict.fromkeys(ASSUMED, "s"),
    **dict.fromkeys(("device", "bus", "memory"), "B/s"),
    **dict.fromkeys(("uva", "gather"), "rows/s"),
    **dict.fromkeys(("compute", "processor"), "operations/s"),
    "reads": "reads/s",
    "beside_uva": "",  # a share
}


@dataclass(frozen=True)
class Machine:
    """What a table has to live with.

    Attributes:
        gpu: bytes of accelerator memory free for the table, beside weights and caches; None: the CPU computes.
        host: bytes of host memory that are free.
        disk: bytes of disk that are free, or that a table there already takes.
        rates: by the names of ASSUMED.
    """

    gpu: int | None
    host: int
    disk: int
    rates: Mapping[str, Rate] = field(default_factory=lambda: dict(ASSUMED))

    def __getitem__(self, name: str) -> float:
        return self.rates[name].value

    def with_rates(self, rates: Mapping[str, Rate]) -> Machine:
        """This machine with some rates replaced."""
        if strangers := rates.keys() - ASSUMED.keys():
            raise ValueError(f"no rate {', '.join(sorted(strangers))}: use {', '.join(ASSUMED)}")
        return replace(self, rates={**self.rates, **rates})


def this_machine(folder: Path, host: int | None = None) -> Machine:
    """The machine that this runs on, with assumed rates.

    Args:
        folder: on the disk that a table would lie on.
        host: bytes of host memory for the table; None: what the system says is free.

    Raises:
        ValueError: the system does not say how much memory is free.
    """
    if host is None:
        free = free_host_bytes()
        if free is None:
            raise ValueError("this system does not say how much memory is free: give --host, such as --host 64GB")
        host = max(0, free - _HEADROOM)
    disk = shutil.disk_usage(folder).free
    return Machine(free_gpu_bytes(), host, max(0, disk - _HEADROOM))


def free_gpu_bytes() -> int | None:
    """Free memory of the emptiest NVIDIA GPU, by its driver's own tool; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    free = [int(line) for line in done.stdout.splitlines() if line.strip().isdigit()] if done.returncode == 0 else []
    return max(free) << 20 if free else None  # the tool says MiB
