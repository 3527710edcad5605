"""What reading some rows asks of memory: aligned lines of 128 bytes and sectors of 32, counted from their addresses.

A warp's load is cut at lines, and each line is a request that names the sectors it wants.

    asked([Span(0, 264, 256), Span(256, 264, 8)], rows)      # codes by one load, scales by another
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bench.schemas.lookup_speed import Asked

LINE, SECTOR = 128, 32  # bytes
WIDTH = 2 * LINE  # values of the rows that are read in other ways: with one byte each, two lines of codes


class Span(NamedTuple):
    """What one load asks for of each row.

    Attributes:
        start: where it begins in row 0, in bytes from a multiple of LINE.
        stride: bytes from row to row.
        nbytes: how many it wants.
    """

    start: int
    stride: int
    nbytes: int


def asked(spans: Iterable[Span], rows: np.ndarray) -> Asked:
    """Of rows of any shape, by all loads together."""
    found: Asked = {"lines": 0, "sectors": 0}
    for span in spans:  # what another load asked for is counted again: whether a cache has it, only a GPU can tell
        first = span.start + rows.astype(np.int64) * span.stride
        found["lines"] += _touched(first, span.nbytes, LINE)
        found["sectors"] += _touched(first, span.nbytes, SECTOR)
    return found


def _touched(first: np.ndarray, nbytes: int, unit: int) -> int:
    """In how many aligned stretches of `unit` bytes lie so many bytes from each address on, all together."""
    return int(((first + nbytes - 1) // unit - first // unit + 1).sum())
