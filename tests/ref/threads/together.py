"""Work that several threads begin together."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What `work` gives for 0 .. count - 1, all begun together."""
    together = threading.Barrier(count)

    def run(number: int) -> Any:
        together.wait(10)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count), timeout=60))
