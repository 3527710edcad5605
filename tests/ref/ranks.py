"""Real processes for tests of tables that several of them share: forked from the one that runs the tests.

found = run_ranks(3, function, argument)            # function(rank, argument) in each, over gloo; what they return
"""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("fork")
LIMIT_S = 90  # of a whole test: a hang fails it, and leaves nobody behind


class Rank:
    """One process: what it returned, or how it ended."""

    def __init__(self, target, *arguments):
        mine, its = _SERVER.Pipe(duplex=False)
        self.answer: Connection = mine
        self.process = _SERVER.Process(target=_run, args=(its, target, *arguments), daemon=True)
        self.process.start()
        its.close()

    def result(self):
        """What its function returned; its error as AssertionError, with where it came from."""
        if not wait([self.answer], LIMIT_S):
            self.process.kill()
            raise AssertionError("a process hangs")
        try:
            good, value = pickle.loads(self.answer.recv_bytes())
        except EOFError:
            self.process.join(LIMIT_S)
            raise AssertionError(f"a process ended with {self.process.exitcode}") from None
        self.process.join(LIMIT_S)
        assert good, value
        return value


def _run(answer, target, *arguments):
    torch.set_num_threads(1)
    try:
        found = True, target(*arguments)
    except BaseException:
        found = False, traceback.format_exc()
    answer.send_bytes(pickle.dumps(found))  # torch's own pickling would need a third process
    answer.close()


def start_ranks(count, function, *arguments, timeout=30.0):
    """The processes, each of which begins with `function(rank, *arguments)` once all are there."""
    store = Path(tempfile.mkdtemp(prefix="engram-ranks-"), "store")
    return [Rank(_in_group, store, rank, count, timeout, function, *arguments) for rank in range(count)]


def run_ranks(count, function, *arguments, timeout=30.0):
    """What `function(rank, *arguments)` returned in each of so many processes."""
    return [rank.result() for rank in start_ranks(count, function, *arguments, timeout=timeout)]


def _in_group(store, rank, count, timeout, function, *arguments):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
    return function(rank, *arguments)
