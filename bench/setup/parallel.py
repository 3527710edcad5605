"""One function over many jobs, a process per core; workers end with their parent, however it ends."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from engram_ref import cli

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """The option that says how many processes."""
    help, cores = "processes (default: all cores)", os.cpu_count() or 1
    parser.add_argument("--jobs", type=cli.at_least(1, 1 << 10), default=cores, metavar="N", help=help)


def in_parallel(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], processes: int
) -> Iterator[tuple[int, _Result]]:
    """Start the jobs in their order; yield each one's place and result as it finishes.

    An error, or a Ctrl-C, ends the workers at once.
    """
    context = multiprocessing.get_context("spawn")  # a fork would take locks of other threads along
    with ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(function, job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # the pool would wait until its jobs are done
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def end_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and do not outlive it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in workers only

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
