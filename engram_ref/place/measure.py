"""This machine's rates, measured in under a minute with the tables that would serve the rows.

    measured(Path("."), row_bytes=264)          # Rates by the names of `machine.ASSUMED`

A fetch of one row says how long a fetch takes to begin, a fetch of many how many rows follow in a second. Tables are
small against a real one, but far larger than the processor's caches; the file is read past the page cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_rows
from engram_ref.place.energy import pages_per_row
from engram_ref.place.machine import Rate
from engram_ref.rows.memory import HostMemory, free_host_bytes
from engram_ref.tables import make_table
from engram_ref.tables.base import Table

_TABLE = 1 << 29  # bytes
_COPY = 1 << 27  # bytes
_MANY = 1 << 14  # rows of a fetch in memory
_SOME = 1 << 11  # rows of a fetch from a file
_FACTOR, _FACTOR_GPU = 1 << 10, 1 << 12  # rows and columns of matrices that are multiplied
_REPEATS = 7  # of which the median is taken
_SOURCE = "measured"


def measured(folder: Path | None, row_bytes: int) -> dict[str, Rate]:
    """Rates of this machine.

    Args:
        folder: on the disk in question; a file of half a GiB is written there, and removed. None: there is no disk.
        row_bytes: of the rows that are to be fetched.

    Raises:
        OSError: no file can be written there.
    """
    width = -(-row_bytes // 2)  # bfloat16 values, two bytes each
    free = free_host_bytes()
    nbytes = _TABLE if free is None else min(_TABLE, free // 8)
    count = max(1, nbytes // (2 * width)) * width // 4 + 1  # integers of 8 bytes, four values each
    rows = torch.randint(-(2**62), 2**62, (count,), device="cpu")  # every byte its own
    # Views, not conversions: the bits stay random, and numbers they need not be.
    values = rows.view(torch.int16)[: rows.numel() * 4 // width * width].view(-1, width).view(torch.bfloat16)
    found = _in_memory(values)
    if folder is not None:
        found.update(_on_disk(values, folder))
    if torch.cuda.is_available():
        found.update(_on_gpu(values))
    return found


def _in_memory(values: Tensor) -> dict[str, Rate]:
    with make_table("host", values) as table:
        start, rate = _start_and_rate(table, _MANY, 1.0)
    with HostMemory(_COPY) as source, HostMemory(_COPY) as target:
        source.bytes.fill_(0xA5)  # memory that was never written is one page of zeros, and always cached
        copy = _median(lambda: target.bytes.copy_(source.bytes))
    return {
        "start_host": Rate(start, _SOURCE),
        "gather": Rate(rate, _SOURCE),
        "memory": Rate(2 * _COPY / copy, f"{_SOURCE}: bytes read and written"),
        "processor": Rate(
            _operations_per_second(torch.randn(_FACTOR, _FACTOR, dtype=torch.float32, device="cpu")),
            f"{_SOURCE}: float32",
        ),
    }


def _operations_per_second(factor: Tensor) -> float:
    """Of a product of square matrices, a multiplication and an addition for each element of both."""
    return 2 * len(factor) ** 3 / _median(_ended(lambda: factor @ factor))


def _on_disk(values: Tensor, folder: Path) -> dict[str, Rate]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place, "rows.safetensors")
        save_rows(path, values)
        # Direct: what was just written still lies in the page cache.
        with make_table("file", StoredRows.find(path), direct=True) as table:
            start, rate = _start_and_rate(table, _SOME, pages_per_row(2 * values.shape[1]))
    return {"start_disk": Rate(start, _SOURCE), "reads": Rate(rate, f"{_SOURCE}: past the page cache")}


def _start_and_rate(table: Table, many: int, reads_per_row: float) -> tuple[float, float]:
    """Seconds of a fetch of one row, and reads per second of a large one, fresh rows each time."""
    draws = torch.Generator().manual_seed(0)

    def fetch(count: int) -> Callable[[], object]:
        # Fresh rows for every run: those of the one before are in the caches.
        numbers = iter(torch.randint(table.rows, (2 + _REPEATS, count), generator=draws).to(table.index_device))
        return _ended(lambda: table.start(next(numbers)).wait())

    start = _median(fetch(1))
    # Noise may make many rows seem as quick as one.
    return start, many * reads_per_row / max(_median(fetch(many)) - start, 1e-9)


def _on_gpu(values: Tensor) -> dict[str, Rate]:
    target = torch.empty(_COPY, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(target)
    with HostMemory(_COPY, pinned=True) as host:
        bus = _median(_ended(lambda: target.copy_(host.bytes, non_blocking=True)))
        small = _median(_ended(lambda: target[:1].copy_(host.bytes[:1], non_blocking=True)))
    within = _median(_ended(lambda: other.copy_(target)))
    launch = _median(_ended(lambda: other[:1].copy_(target[:1])))  # a byte takes the launch alone
    factor = torch.randn(_FACTOR_GPU, _FACTOR_GPU, dtype=torch.bfloat16, device="cuda")
    with make_table("uva", values, "cuda") as table:
        _, in_place = _start_and_rate(table, _MANY, 1.0)
    with make_table("host", values, "cuda") as table:
        staged, _ = _start_and_rate(table, _MANY, 1.0)
    return {
        "bus": Rate(_COPY / bus, _SOURCE),
        "uva": Rate(in_place, _SOURCE),
        "start_staged": Rate(staged, f"{_SOURCE}: without the hash"),
        "start_bus": Rate(small, _SOURCE),
        "device": Rate(2 * _COPY / within, f"{_SOURCE}: bytes read and written"),
        "start_device": Rate(launch, _SOURCE),
        "compute": Rate(_operations_per_second(factor), f"{_SOURCE}: bfloat16"),
    }


def _ended(work: Callable[[], object]) -> Callable[[], None]:
    """Work that is waited for, if it is a GPU's."""

    def run() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _median(work: Callable[[], object]) -> float:
    """Median seconds of some runs, the first two left out."""
    samples = []
    for _ in range(2 + _REPEATS):
        begin = time.perf_counter()
        work()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[2:])
