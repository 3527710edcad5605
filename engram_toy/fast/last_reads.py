"""Which read of a table row was its last one before: what a stack distance rests on, for real table sizes.

    linker = Linker(tokens=len(ids), layers=2, columns=24)
    for rows, bounds in tables:                   # [T, C] row numbers of one layer, [C + 1] where its columns begin
        linker.add_layer(rows, bounds)
    reads = linker.finish()                       # reads.links, one entry per read, in the order of reading

Memory is 4 bytes a read, and nothing else that grows with the text but the distinct rows and one column's hash table
per core.

The order of reading: step by step; within a step layer by layer; then token by token and column by column.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_toy.fast.compiling import compiled

MOST_READS = 2**31 - 1  # links are 32-bit integers


@dataclass(frozen=True)
class RowReads:
    """A stream of row reads.

    Attributes:
        links: int32 [reads]. The number of the read before of the same row; for the first read of a row -1 - k, with k
            the row's place in `rows`.
        rows: int64 [distinct], ascending: the rows that are read, numbered over all layers.
        table_rows: rows of all layers, read or not.
        step_reads: reads of one step.
    """

    links: np.ndarray
    rows: np.ndarray
    table_rows: int
    step_reads: int

    def frequency(self) -> np.ndarray:
        """How often each row of `rows` is read, int64 [distinct]."""
        counts = np.zeros(len(self.rows), np.int64)
        _count_reads(self.links, np.empty(len(self.links), np.int32), counts)
        return counts

    def first_in_step(self) -> np.ndarray:
        """Which reads are the first of their row in their step, bool [reads]."""
        # A link to a read of an earlier step, or to none, lies before the step's first read.
        return self.links < np.arange(len(self.links), dtype=np.int64) // self.step_reads * self.step_reads

    def ranked(self) -> np.ndarray:
        """The rows that are read, the most frequent first; of equals, the smaller row: int64 [distinct]."""
        return self.rows[np.argsort(-self.frequency(), kind="stable")]


class Linker:
    """Builds `RowReads`, a layer at a time, so that the rows of one layer only are held.

    Args:
        tokens: in the stream, whole steps.
        layers, columns: of the table; every layer has as many columns.
        tokens_per_step: tokens that are worked on together, layer by layer.

    Raises:
        ValueError: no whole steps, or more reads than can be numbered.
    """

    def __init__(self, tokens: int, layers: int, columns: int, tokens_per_step: int = 1) -> None:
        if tokens_per_step < 1 or tokens % tokens_per_step:
            raise ValueError(f"{tokens} tokens are no whole number of steps of {tokens_per_step}: cut the stream")
        if tokens * layers * columns > MOST_READS:
            raise ValueError(
                f"{tokens:,} tokens read {tokens * layers * columns:,} rows; at most {MOST_READS:,} can be numbered"
            )
        self._shape = (tokens, columns)
        self._layers = layers
        self._step = tokens_per_step
        self._links = np.empty(tokens * layers * columns, np.int32)
        self._distinct: list[np.ndarray] = []
        self._found = 0
        self._layer = 0
        self._rows_before = 0

    def add_layer(self, rows: np.ndarray, bounds: Iterable[int]) -> None:
        """The next layer's row numbers.

        Args:
            rows: integers [T, C], counted from the layer's first row.
            bounds: C + 1 of them; column c has the rows bounds[c] up to bounds[c + 1].

        Raises:
            ValueError: another shape, one layer too many, or a row outside its column.
        """
        edges = np.asarray(list(bounds), np.int64)
        if self._layer == self._layers:
            raise ValueError(f"layer {self._layer + 1} of {self._layers}: no further one was announced")
        if rows.shape != self._shape or len(edges) != rows.shape[1] + 1:
            raise ValueError(
                f"rows of shape {rows.shape} with {len(edges)} bounds; this stream needs {self._shape} "
                f"and {self._shape[1] + 1}"
            )
        # To sort tens of millions of row numbers costs more than to price them. Every column has rows of its own: one
        # at a time is walked with a small hash table of its rows, and the cores share the columns.
        columns = range(rows.shape[1])
        found = _on_all_cores(lambda column: self._link(rows, edges, column), columns)
        firsts = np.cumsum([self._found, *map(len, found)])
        # Only now: a row's place counts the rows of all columns before its own.
        _on_all_cores(lambda column: self._name(rows, column, found[column], firsts[column]), columns)
        self._distinct += [distinct + self._rows_before for distinct in found]
        self._found = int(firsts[-1])
        self._rows_before += int(edges[-1])
        self._layer += 1

    def finish(self) -> RowReads:
        """The whole stream.

        Raises:
            ValueError: layers are missing.
        """
        if self._layer < self._layers:
            raise ValueError(f"{self._layer} of {self._layers} layers were added: add the others first")
        distinct = np.concatenate(self._distinct) if self._distinct else np.empty(0, np.int64)
        return RowReads(self._links, distinct, self._rows_before, self._step * self._layers * self._shape[1])

    def _link(self, rows: np.ndarray, edges: np.ndarray, column: int) -> np.ndarray:
        """Link the reads of one column; its distinct rows, ascending, counted from the layer's first."""
        low, high = int(edges[column]), int(edges[column + 1])
        slots = 1 << max(4, (2 * min(len(rows), high - low)).bit_length())  # half empty at least
        keys, last = np.full(slots, -1, np.int64), np.empty(slots, np.int32)
        outside = _link_column(rows, column, low, high, keys, last, self._links, *self._where(column))
        if outside >= 0:
            raise ValueError(
                f"row {rows[outside, column]} of token {outside} lies outside column {column}, {low} .. {high - 1}"
            )
        return np.sort(keys[keys >= 0])

    def _name(self, rows: np.ndarray, column: int, distinct: np.ndarray, first: int) -> None:
        """Write the place of its row into every first read of a column."""
        _name_column(rows, column, distinct, first, self._links, *self._where(column))

    def _where(self, column: int) -> tuple[int, int, int, int]:
        """What the number of a read follows from: tokens and reads of a step, reads of a token, and the first read."""
        tokens, columns = self._step, self._shape[1]
        return tokens, tokens * self._layers * columns, columns, self._layer * tokens * columns + column


def _on_all_cores(work: Callable[[int], Any], items: Iterable[int]) -> list[Any]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


@compiled(nogil=True)
def _slot(keys, row):
    """Where a row stands in a hash table, or would."""
    mask = np.uint64(len(keys) - 1)
    mixed = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: neighbours land far apart
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while keys[slot] != row and keys[slot] >= 0:
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled(nogil=True)
def _link_column(rows, column, low, high, keys, last, links, tokens, step_reads, stride, first):
    """Link every read to the one before; -1 where there is none. Returns a token whose row is outside, or -1."""
    number, in_step = np.int64(first), 0
    for t in range(len(rows)):
        row = np.int64(rows[t, column])
        if row < low or row >= high:
            return t
        slot = _slot(keys, row)
        links[number] = last[slot] if keys[slot] == row else -1
        keys[slot], last[slot] = row, number
        number, in_step = number + stride, in_step + 1
        if in_step == tokens:
            # On to the next step, past the reads of the other layers in this one.
            number, in_step = number + step_reads - tokens * stride, 0
    return -1


@compiled(nogil=True)
def _name_column(rows, column, distinct, first_place, links, tokens, step_reads, stride, first):
    number, in_step = np.int64(first), 0
    for t in range(len(rows)):
        if links[number] < 0:
            place = np.searchsorted(distinct, np.int64(rows[t, column]))
            links[number] = -1 - (first_place + place)
        number, in_step = number + stride, in_step + 1
        if in_step == tokens:
            number, in_step = number + step_reads - tokens * stride, 0


@compiled(nogil=True)
def _count_reads(links, place, counts):
    for read in range(len(links)):
        link = links[read]
        place[read] = -1 - link if link < 0 else place[link]
        counts[place[read]] += 1
