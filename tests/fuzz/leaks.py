"""Tables and prefetchers made and closed again and again: as many descriptors, threads and bytes as before.

python -m tests.fuzz --only leaks
"""

import gc
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.prefetch import Prefetcher
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, save_rows

WARM_UP = 20
ROWS, WIDTH = 4000, 64  # a megabyte: a table that stays is seen at once
MOST_BYTES = 32 << 20  # what allocators may keep; one table in thirty that stayed would be more


def run(count: int, seed: int) -> dict[str, Any]:
    """So many tables with a prefetcher each, in host memory and in a file in turns."""
    plan = HashPlan.build(EngramConfig.preset("tiny"), compressed_size=500, pad_compressed=2)
    hasher, layer = NgramHasher(plan), plan.layers[0]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(max(ROWS, layer.rows), WIDTH, generator=generator)
    ids = torch.randint(0, 500, (2, 300), generator=generator).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        save_rows(path, values)

        def once(number: int) -> None:
            rows = StoredRows.find(path) if number % 2 else values
            placement = "file" if number % 2 else "host"
            with make_table(placement, rows) as table:
                _fetch(Prefetcher(hasher, {layer.layer_id: table}), ids)

        for number in range(WARM_UP):
            once(number)
        before = _held()
        for number in range(count):
            once(number)
        after = _held()
    faults = [
        f"{name}: {before[name]:,} before, {after[name]:,} after {count} tables"
        for name, most in (("descriptors", 0), ("threads", 0), ("bytes", MOST_BYTES))
        if after[name] > before[name] + most
    ]
    return {"cases": count, "faults": faults}


def _fetch(prefetcher: Prefetcher, ids: np.ndarray) -> None:
    with prefetcher, prefetcher.start(ids) as fetch:
        for pending in fetch.values():
            pending.wait()


def _held() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }
