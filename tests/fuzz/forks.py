"""A process that forks after or during fetches: the child fetches the right rows, and ends in time.

python -m tests.fuzz --only forks
"""

import os
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.prefetch import Prefetcher
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, save_rows

IN_TIME = 20.0  # seconds for a child, on a machine that does other things, too
WRONG = 3  # how a child ends that got other rows


def run(count: int, seed: int) -> dict[str, Any]:
    """So many forks, with a prefetcher over a host table and one over a file, every second while a fetch is running."""
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    draw, faults = np.random.default_rng(seed), []
    plan = HashPlan.build(EngramConfig.preset("tiny"), compressed_size=500, pad_compressed=2)
    hasher, layer = NgramHasher(plan), plan.layers[0]
    values = torch.randn(layer.rows, 8, generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        save_rows(path, values)
        for number in range(count):
            placement = ("host", "file")[number // 2 % 2]
            rows = StoredRows.find(path) if placement == "file" else values
            ids = draw.integers(0, 500, (2, 400))
            wanted = values[torch.from_numpy(hasher(ids, layer.layer_id).reshape(-1))]
            with make_table(placement, rows) as table, Prefetcher(hasher, {layer.layer_id: table}) as prefetcher:
                fetch = prefetcher.start(ids)
                if number % 2:
                    fetch.release()
                ended = _fork(prefetcher, layer.layer_id, ids, wanted)
                if ended != 0:
                    faults.append(f"{placement}, fork {'after' if number % 2 else 'during'} a fetch: child {ended}")
                if not number % 2:
                    with fetch:
                        if not torch.equal(fetch[layer.layer_id].wait(), wanted):
                            faults.append(f"{placement}: the parent has other rows after a fork")
    return {"cases": count, "faults": faults}


def _fork(prefetcher: Prefetcher, layer_id: int, ids: np.ndarray, wanted: torch.Tensor) -> int | str:
    """How a child ended that fetched the same."""
    child = os.fork()
    if child == 0:
        try:
            with prefetcher.start(ids) as fetch:
                same = bool(np.array_equal(fetch[layer_id].wait().numpy(), wanted.numpy()))
            prefetcher.close()
            os._exit(0 if same else WRONG)
        finally:
            os._exit(WRONG + 1)  # an error that nothing above expected
    began = time.monotonic()
    while time.monotonic() - began < IN_TIME:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"not ended within {IN_TIME:.0f} s"
