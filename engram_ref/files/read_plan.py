"""Which reads of a file bring which rows: rows that lie side by side come together, blocks are read once.

reads = plan_reads(unique, part)        # unique: row numbers, sorted, without repeats; part: of a stored table
reads.lengths.sum()                     # bytes that the reads will return
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from engram_ref.files.conventions import BLOCK, round_up
from engram_ref.files.validated import StoredPart

_LONGEST = 1 << 17  # bytes of one read, if a row is not longer


@dataclass(frozen=True)
class Reads:
    """The reads that bring some rows, in the order of the file; all arrays are int64.

    Attributes:
        offsets: byte of the file at which each read begins, [K].
        lengths: bytes that it must return, [K].
        first: the first of the rows that it brings, and at the end how many rows there are, [K + 1].
        starts: byte of the file at which each row begins, [U].
    """

    offsets: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def split(self, parts: int) -> list[Reads]:
        """The same reads in `parts` runs, one after the other."""
        bounds = [len(self) * part // parts for part in range(parts + 1)]
        return [
            Reads(self.offsets[low:high], self.lengths[low:high], self.first[low : high + 1], self.starts)
            for low, high in itertools.pairwise(bounds)
        ]


def rows_in(ordered: np.ndarray, part: StoredPart) -> slice:
    """Which of some sorted row numbers lie in a part."""
    low, high = np.searchsorted(ordered, (part.first, part.first + part.rows)).tolist()
    return slice(low, high)


def plan_reads(unique: np.ndarray, part: StoredPart, direct: bool = False) -> Reads:
    """The reads for row numbers that are sorted and unique, [U], and lie in the part.

    Rows that touch are read together, up to 128 KiB; with `direct`, rows touch if their blocks do.
    """
    starts = (unique.astype(np.int64) - part.first) * part.row_bytes + part.offset  # [U]
    low, high = starts, starts + part.row_bytes
    if direct:
        low, high = low // BLOCK * BLOCK, round_up(high)
    begins = np.ones(len(unique), dtype=bool)
    np.greater(low[1:], high[:-1], out=begins[1:])
    if not begins.all():
        _cut(begins, low, max(1, _LONGEST - int((high - low).max())))
    first = np.append(np.flatnonzero(begins), len(unique))
    offsets = low[first[:-1]]
    lengths = np.minimum(high[first[1:] - 1], part.file_bytes) - offsets
    return Reads(offsets, lengths, first, starts)


def _cut(begins: np.ndarray, low: np.ndarray, most: int) -> None:
    """Let a new read begin after every `most` bytes of a run."""
    in_run = low - np.maximum.accumulate(np.where(begins, low, 0))
    begins[1:] |= in_run[1:] // most != in_run[:-1] // most
