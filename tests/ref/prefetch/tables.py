"""What the tests of prefetching fetch: two layers of a small plan, and tables that take their time."""

import threading
import time

import numpy as np
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.tables import RowFormat, Table
from engram_ref.tables.base import Ready, check_rows

CPU = torch.device("cpu")


CONFIG = EngramConfig.preset("tiny").replace(layer_ids=(1, 3))


PLAN = HashPlan.build(CONFIG, 500, 2)


class SlowTable(Table):
    """A table in memory that takes its time: the stand-in for whatever makes a fetch worth hiding."""

    placement = "slow"
    waits = True

    def __init__(self, values, seconds=0.0, fail_at=None):
        super().__init__(len(values), RowFormat(values.dtype, values.shape[1]), CPU, CPU)
        self.values, self.seconds, self.fail_at = values, seconds, fail_at
        self.fetches = self.trims = 0
        self.threads = set()

    def start(self, rows, out=None):
        self.threads.add(threading.current_thread().name)
        self.fetches += 1
        if self.fetches == self.fail_at:
            raise OSError("the disk has gone")
        time.sleep(self.seconds)
        check_rows(rows, self.rows)
        return Ready(torch.index_select(self.values, 0, rows, out=out) if out is not None else self.values[rows])

    def stored(self, rows):
        return self.values[rows].view(torch.uint8)

    def _held(self):
        return {"host": self.values.nbytes}

    def trim(self):
        self.trims += 1


def make_values(layer_id):
    generator = torch.Generator().manual_seed(layer_id)
    return torch.randn(PLAN.layer(layer_id).rows, CONFIG.row_width, generator=generator)


def slow_tables(values, seconds=0.0, fail_at=None):
    return {layer_id: SlowTable(v, seconds, fail_at) for layer_id, v in values.items()}


def expected(values, ids, layer_id, history=None):
    rows = NgramHasher(PLAN, "numpy")(ids, layer_id, history=history)
    return values[layer_id][torch.from_numpy(rows).long().reshape(-1)]


def numbers(ids, layer_id):
    return torch.from_numpy(NgramHasher(PLAN)(ids, layer_id).reshape(-1))


def random_ids(seed, shape=(2, 9)):
    return np.random.default_rng(seed).integers(0, PLAN.compressed_size, shape)


def alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("engram-prefetch")]


class Gated(SlowTable):
    """A table whose large fetches wait until they may go on."""

    def __init__(self, values):
        super().__init__(values)
        self.begun, self.may_end = threading.Event(), threading.Event()

    def start(self, rows, out=None):
        if len(rows) > 1000:
            self.begun.set()
            assert self.may_end.wait(30)
        return super().start(rows, out)
