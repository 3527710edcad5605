"""Prefetched rows are those of the table, bit for bit: steps of random sizes in two threads, released in any order.

python -m tests.fuzz --only prefetch
"""

import random
import threading
from typing import Any

import numpy as np
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.prefetch import Fetch, Prefetcher
from engram_ref.tables import make_table

VOCAB = 500
BUFFERS = 3
CLOSE_EVERY = 250  # steps of a thread between two closes


def run(count: int, seed: int) -> dict[str, Any]:
    """So many steps, half of them in each of two threads that share tables."""
    plan = HashPlan.build(EngramConfig.preset("tiny"), compressed_size=VOCAB, pad_compressed=2)
    hasher, width = NgramHasher(plan), 8
    generator = torch.Generator().manual_seed(seed)
    values = {layer.layer_id: torch.randn(layer.rows, width, generator=generator) for layer in plan.layers}
    faults: list[str] = []
    with_tables = {layer_id: make_table("host", rows) for layer_id, rows in values.items()}

    def steps(thread: int, share: int) -> None:
        try:
            _steps(random.Random(f"{seed} {thread}"), share, hasher, with_tables, values, faults)
        except Exception as error:  # a fault like any other: it is counted and shown
            faults.append(f"thread {thread}: {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=steps, args=(i, share)) for i, share in enumerate((count - count // 2, count // 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for table in with_tables.values():
        table.close()
    return {"cases": count, "faults": faults}


def _steps(chance: random.Random, count: int, hasher: NgramHasher, tables: Any, values: Any, faults: list[str]) -> None:
    draw = np.random.default_rng(chance.randrange(1 << 32))
    for first in range(0, count, CLOSE_EVERY):
        held: list[tuple[Fetch, np.ndarray]] = []
        with Prefetcher(hasher, tables, buffers=BUFFERS) as prefetcher:
            for _ in range(min(CLOSE_EVERY, count - first)):
                if len(held) == BUFFERS:
                    _check(*held.pop(chance.randrange(BUFFERS)), hasher, values, faults)
                ids = draw.integers(0, VOCAB, (chance.randint(1, 3), chance.choice((1, 9, 200))))
                held.append((prefetcher.start(ids), ids.copy()))
                ids[:] = 0  # the caller may go on with it
            for fetch, ids in held[1:]:
                _check(fetch, ids, hasher, values, faults)
            # the first of them is still in flight when the prefetcher closes


def _check(fetch: Fetch, ids: np.ndarray, hasher: NgramHasher, values: Any, faults: list[str]) -> None:
    with fetch:
        for layer_id, rows in values.items():
            wanted = rows[torch.from_numpy(hasher(ids, layer_id).reshape(-1))]
            if not torch.equal(fetch[layer_id].wait(), wanted):
                faults.append(f"layer {layer_id}: other rows for {ids.shape}")
