"""Tables in several processes, for their tests: values that are the same in all, requests of each, and comparisons.

Functions that `run_ranks` starts stand in the test files themselves, above the test that starts them.
"""

import numpy as np
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from tests.ref.rows.fp8_pairs import random_rows as random_fp8_rows

R, D = 1009, 12
FP8 = random_fp8_rows(R, 64)
PLAN = HashPlan.build(EngramConfig.preset("tiny"), 97, 2)
LAYERS = [layer.layer_id for layer in PLAN.layers]


def values_of(rows=R, width=D, dtype=torch.float32):
    """Random bytes as values, NaN and -0.0 among them; the same in every process."""
    generator = torch.Generator().manual_seed(rows)
    raw = torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def numbers_for(rank, step=0, most=200, rows=R):
    """Any row numbers, more for a higher rank; none on rank 0 in every third step, none anywhere in every seventh."""
    rng = np.random.default_rng([rank, step])
    count = 0 if step % 7 == 6 or (rank == 0 and step % 3 == 2) else int(rng.integers(0, most * (rank + 1)))
    dtype = (np.int32, np.int64)[step % 2]
    return torch.from_numpy(rng.integers(0, rows, count).astype(dtype))


def same(got, values, numbers):
    """Whether these are the rows, byte by byte."""
    expected = values[numbers.long()].contiguous()
    return got.dtype == values.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def said(work):
    """The error of something: its class and its words."""
    try:
        work()
    except (ValueError, OSError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return None
