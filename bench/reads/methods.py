"""The ways to read fp8 rows in place, by name: where rows lie, in which order they are read, and by what.

The controls tell causes apart:

  in_order  rows that follow each other: the requests of `as_is`, to memory that is read as it lies
  shuffled  the rows of `in_order` in any order: no more addresses to translate, but memory is read here and there. A
            GPU may map host memory in pages of 4 KiB, however large those of the CPU are: a stretch of the table that
            is a small part of it still has thousands.
  stream    as many bytes as the lines of the rows, in order, 16 for each lane: the most that the bus gives a kernel
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.reads.requests import LINE

PADDED = 3 * LINE  # bytes from row to row where each begins with a line and fits into three


@dataclass(frozen=True)
class Method:
    """What tells a way from the others.

    Attributes:
        what: in words.
        layout: of the rows, see `bench.reads.layouts`.
        order: of the row numbers: random, sorted, shuffled or in_order.
        by: library, which is its gather, or one of `bench.reads.kernels`; stream is a plain copy.
        options: of `read`.
    """

    what: str
    layout: str = "packed"
    order: str = "random"
    by: str = "library"
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "as_is": Method("packed rows by the library's gather: a warp asks for a row's codes, then for its scales"),
    "pieces": Method("64 B of four rows at once: the library's gather as it was", by="pieces"),
    "sorted": Method("in order of address, the sort in its time", by="sorting"),
    "presorted": Method("in order of address, sorted beforehand", order="sorted"),
    "few": Method("one row for a program, of one warp", by="read", options={"tile": 1, "warps": 1}),
    "many": Method("eight rows for each of two warps of a program", by="read", options={"tile": 16}),
    "past_l1": Method("loads that no L1 keeps (.cg)", by="read", options={"cached": ".cg"}),
    "evict_first": Method("loads that L1 and L2 give up first", by="read", options={"evicted": "evict_first"}),
    "lines": Method("whole lines of 128 B, from which the row is picked", by="lines"),
    "padded": Method(f"rows {PADDED} B apart, each begins with a line", layout="padded"),
    "padded_lines": Method("padded rows by whole lines", layout="padded", by="lines"),
    "split": Method("codes in two whole lines, scales elsewhere in host memory", layout="split"),
    "scales_there": Method("codes in two whole lines, scales in device memory", layout="scales_there"),
    "shuffled": Method("control: rows that follow each other, in any order", order="shuffled"),
    "in_order": Method("control: rows that follow each other", order="in_order"),
    "stream": Method("control: as many bytes as three lines for each row, as one stretch", by="stream"),
}
