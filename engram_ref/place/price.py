"""The ByteDMD price of a step's rows: a byte read at depth d of one big LRU stack costs ceil(sqrt(d)).

    rows_price(..., buried=0, unread=0)                       # a table that stays above the weights
    rows_price(..., buried=step_bytes, unread=live_bytes)     # one below what steps read, and below all that is live

In closed form, from counts of a text: a row that was never read before lies anywhere in the table; one of an earlier
step below what was read since; one read in the same step below the rows of the step. `bench/production.py` prices every
single read instead; docs/where-should-my-table-live.md has the error.
"""

from __future__ import annotations

import math


def mean_root(above: float, size: float) -> float:
    """Mean of sqrt(above + x) for x anywhere in 0 .. size."""
    if size <= 0:
        return math.sqrt(above)
    return (2 / 3) * ((above + size) ** 1.5 - above**1.5) / size


def rows_price(
    reads: float,
    row_bytes: int,
    table_bytes: float,
    first: float,
    distinct: float,
    reuse_root: float,
    buried: float,
    unread: float,
) -> float:
    """Price of the row reads of one step.

    Args:
        reads: row reads of the step.
        first: share that was never read before.
        distinct: share that is the first of its row in the step.
        reuse_root: mean root of the row reads since the last read of the same row.
        buried: bytes that lie above a row which was last read in another step.
        unread: bytes that lie above one which was never read; what no step reads is passed by its first read.
    """
    fresh = min(first, distinct)
    roots = (
        fresh * mean_root(unread, table_bytes)
        + (distinct - fresh) * math.hypot(math.sqrt(buried), reuse_root * math.sqrt(row_bytes))
        + (1 - distinct) * math.sqrt(distinct * reads * row_bytes)
    )
    return reads * row_bytes * roots


def weights_price(nbytes: float, blocks: int) -> float:
    """Price of reading the weights of a step once, each block by one instruction, all others above it."""
    return nbytes * mean_root(nbytes * (1 - 1 / blocks), nbytes / blocks)
