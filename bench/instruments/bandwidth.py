"""How fast bytes move on this machine: copies in both directions, and random reads of a disk as fio measures them."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.instruments.clocks import Clock, device_clock, total
from bench.schemas.common import Bandwidth, Limits
from bench.schemas.wall import Disk, UnknownDisk
from engram_ref.rows.memory import HostMemory

COPY_BYTES = 1 << 28  # of one copy; within one piece of registered memory
COPIES = 9  # samples; odd, so that the median is one
_WARM_UP = 2  # copies before the first that counts


def copy_bandwidth(device: torch.device) -> Limits:
    """What this machine can copy at most: raw samples, and bytes per second of their median.

    Returns:
        `copy`: pinned host memory to the device; on a CPU, RAM to RAM by one thread, bytes counted once.
        `gather`: within the device, bytes read and written both counted; None on a CPU.
    """
    cuda = device.type == "cuda"
    with HostMemory(COPY_BYTES, pinned=cuda) as host:
        host.bytes.fill_(0xA5)  # memory that was never written is one page of zeros, and always cached
        if not cuda:
            return {"copy": _ram_copy(host), "gather": None}
        target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        clock = device_clock(device)
        copy = _copy_samples(lambda: target.copy_(host.bytes, non_blocking=True), COPIES, clock)
        other = torch.empty_like(target)
        gather = _copy_samples(lambda: other.copy_(target), COPIES, clock)
    within = _bandwidth("device to device", 2 * COPY_BYTES, gather)
    return {
        "copy": _bandwidth("pinned host to device", COPY_BYTES, copy),
        "gather": {**within, "counted": "bytes read and written"},
    }


def _ram_copy(source: HostMemory) -> Bandwidth:
    with HostMemory(source.nbytes) as target:
        to, by = target.bytes.numpy(), source.bytes.numpy()
        samples = _copy_samples(lambda: np.copyto(to, by), COPIES, Clock())
    return _bandwidth("memcpy in RAM", source.nbytes, samples)


def _copy_samples(copy: Callable[[], object], repeats: int, clock: Clock) -> list[float]:
    samples = []
    for _ in range(_WARM_UP + repeats):
        clock.begin()
        copy()
        clock.mark("copied")
        samples.append(total(clock.end()))
    return samples[_WARM_UP:]


def _bandwidth(what: str, nbytes: int, samples: list[float]) -> Bandwidth:
    return {"bytes_per_s": nbytes / statistics.median(samples), "samples_s": samples, "bytes": nbytes, "what": what}


_DEPTH = 64  # reads that fio has in flight


def fio_random_read(path: Path, seconds: float) -> Disk | UnknownDisk:
    """What the disk under a file can do: random reads of 4 KiB, past the page cache, 64 at a time.

    Returns:
        reads_per_s, bytes_per_s and what was measured; or reads_per_s None and why.
    """
    if shutil.which("fio") is None:
        return {"reads_per_s": None, "why": "fio is not installed"}
    name = str(path).replace(":", r"\:")  # to fio a colon separates files
    command = ["fio", "--name=limit", f"--filename={name}", "--readonly", "--rw=randread", "--bs=4k", "--direct=1"]
    command += ["--ioengine=libaio", f"--iodepth={_DEPTH}", f"--runtime={round(1000 * seconds)}ms", "--time_based"]
    # Left alone, fio reads the same places in every run.
    done = subprocess.run([*command, "--randrepeat=0", "--output-format=json"], capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return {"reads_per_s": None, "why": f"fio failed: {said[0] if said else done.returncode}"}
    # fio may say something before its JSON.
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    what = f"fio, 4 KiB random direct reads, {_DEPTH} in flight, {seconds:g} s"
    return {"reads_per_s": read["iops"], "bytes_per_s": float(read["bw_bytes"]), "what": what}
