"""A memory that a real manager could have: rows stay where they are, and what is read again is copied up once.

    price_kept(reads, start(reads, held=True), row_bytes=264, padding=10**10)

Under the definition "stationary" no value ever moves, so offloaded rows are dear at every read; but a copy is a value
of its own and takes the lowest free address. Here a row that is read more than once is copied at its first read, which
knows the future as a prefetcher of deterministic addresses does, and the copy is dropped after its last one. The price
can be had, so it bounds from above what the best manager pays; `engram_toy.fast.floor` bounds it from below.
"""

from __future__ import annotations

import heapq

import numpy as np

from engram_toy.fast.compiling import compiled
from engram_toy.fast.last_reads import RowReads
from engram_toy.fast.rows import Start, addresses, check_depth, row_price


def price_kept(reads: RowReads, begin: Start, row_bytes: int, padding: int = 0) -> int:
    """Price of a stream of row reads: of each row one read where it lies, of one read again all uses from its copy.

    Args:
        begin: where the rows lie before the first read; a row's address is its place from the top.
        row_bytes: of one row.
        padding: bytes above all rows.

    Raises:
        ValueError: fewer than one byte a row, or addresses beyond 2^51.
    """
    check_depth(reads, row_bytes, padding)
    return int(_price(reads.links, addresses(begin), row_bytes, padding))


@compiled(nogil=True)
def _price(links, address, row_bytes, padding):
    again = np.zeros(len(links), np.bool_)  # whether the row of each read is read once more
    for link in links:
        if link >= 0:
            again[link] = True
    slot_of = np.zeros(len(links), np.int64)  # of the copy, at the last read of its row so far
    free = [np.int64(0) for _ in range(0)]  # empty, and numba knows of what
    taken, price = np.int64(0), 0
    for read in range(len(links)):
        link = links[read]
        if link < 0:
            price += row_price(padding + address[-1 - link] * row_bytes, row_bytes)
            if not again[read]:
                continue
            if len(free):
                slot = heapq.heappop(free)
            else:
                taken += 1
                slot = taken
        else:
            slot = slot_of[link]
        # Copies have addresses of their own, below no padding. The first use reads the copy, too.
        price += row_price(slot * row_bytes, row_bytes)
        if again[read]:
            slot_of[read] = slot
        else:
            heapq.heappush(free, slot)
    return price
