"""The ByteDMD price of a step's rows: a byte read at depth d of one big LRU stack costs ceil(sqrt(d)).

    rows_price(..., buried=0, since=0)                       # a table that stays above the weights
    rows_price(..., buried=live_bytes, since=step_bytes)     # one below what is live, then below what a step reads

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
    return (2 / 3) * ((above + size) ** 1.5 - above**1.5) / size  # the integral of the root, over its length


def rows_price(
    reads: float,
    row_bytes: int,
    table_bytes: float,
    first: float,
    distinct: float,
    reuse_root: float,
    buried: float,
    since: float,
) -> float:
    """Price of the row reads of one step.

    Args:
        reads: row reads of the step.
        first: share that was never read before.
        distinct: share that is the first of its row in the step.
        reuse_root: mean root of the row reads since the last read of the same row.
        buried: bytes of other things above a row that was never read.
        since: bytes of other things above one that was read in the step before.
    """
    # Each first read is the first in its step, too; but the two shares may be of different parts of a text.
    fresh = min(first, distinct)
    roots = (
        fresh * mean_root(buried, table_bytes)
        # The root of a sum: of `since`, and of the bytes of all rows read since.
        + (distinct - fresh) * math.hypot(math.sqrt(since), reuse_root * math.sqrt(row_bytes))
        + (1 - distinct) * math.sqrt(distinct * reads * row_bytes)
    )
    return reads * row_bytes * roots


def weights_price(nbytes: float, blocks: int) -> float:
    """Price of reading the weights of a step once, each block by one instruction, all others above it."""
    return nbytes * mean_root(nbytes * (1 - 1 / blocks), nbytes / blocks)
