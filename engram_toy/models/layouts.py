"""The four variants: where the table's rows start, and when they are copied. Nothing else differs.

Arguments of a traced function start on the stack in their order, the first on top. A layout splits the
table into rows that start ABOVE the padding and rows that start BELOW it, so that a function called as
f(..., above, ..., pad, below) finds the former shallow and the latter buried:

    resident          every row above
    offload_naive     every row below
    offload_prefetch  every row below; the rows of the next position are copied before they are needed
    offload_hot       the most frequent rows above, the others below
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from engram_toy.bytedmd import label
from engram_toy.functional import Vector, copy

VARIANTS = ("resident", "offload_naive", "offload_prefetch", "offload_hot")


@dataclass(frozen=True)
class Layout:
    """Where rows start and when they move.

    Attributes:
        name: the variant.
        rows: number of table rows.
        above: numbers of the rows that start above the padding.
        prefetch: copy those of each position's rows that start below while the position before is being worked on.
        wrong: (position, column) of a lookup that the prefetch mispredicts -> the row that it copies, in vain.
    """

    name: str
    rows: int
    above: frozenset[int]
    prefetch: bool = False
    wrong: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def variant(cls, name: str, rows: int, hot: Collection[int] = ()) -> Layout:
        """One of VARIANTS for a table of so many rows; `hot` are the rows that offload_hot keeps above."""
        if name == "resident":
            return cls(name, rows, frozenset(range(rows)))
        if name == "offload_naive":
            return cls(name, rows, frozenset())
        if name == "offload_prefetch":
            return cls(name, rows, frozenset(), prefetch=True)
        if name == "offload_hot":
            return cls(name, rows, frozenset(hot))
        raise ValueError(f"no variant {name!r}: use one of {', '.join(VARIANTS)}")

    def split(self, table: Sequence[Vector]) -> tuple[list[Vector], list[Vector]]:
        """The rows that start above and those that start below, both in table order."""
        above = [row for number, row in enumerate(table) if number in self.above]
        below = [row for number, row in enumerate(table) if number not in self.above]
        return above, below

    def join(self, above: Sequence[Vector], below: Sequence[Vector]) -> list[Vector]:
        """The table again, by row number. References move, values do not: this reads nothing."""
        shallow, deep = iter(above), iter(below)
        return [next(shallow if number in self.above else deep) for number in range(self.rows)]

    def lookups(self, table: Sequence[Vector], indices: Sequence[Sequence[Any]]) -> Iterator[list[Vector]]:
        """The rows of one position after the other, each [C, D]; `indices` is [T, C]."""
        if not self.prefetch:
            for position in indices:
                yield [table[index] for index in position]
            return
        staged = self._staged(table, 0, indices[0])
        for number, position in enumerate(indices[1:]):
            # The next position is copied first: a prefetch is ahead of the work on this one.
            current, staged = staged, self._staged(table, number + 1, position)
            yield _arrived(table, indices[number], current)
        yield _arrived(table, indices[-1], staged)

    def _staged(self, table: Sequence[Vector], number: int, position: Sequence[Any]) -> list[Vector | None]:
        """The rows of a position, copied if they lie below; None where another row was copied instead."""
        rows: list[Vector | None] = []
        for column, index in enumerate(position):
            if (number, column) in self.wrong:
                copy(table[self.wrong[number, column]])  # read, and used by nobody: what a wrong guess costs
                rows.append(None)
            else:
                row = operator.index(index)  # the one read of the index, as without prefetch
                rows.append(table[row] if row in self.above else label(copy(table[row]), "staged row"))
        return rows


def _arrived(table: Sequence[Vector], position: Sequence[Any], staged: Sequence[Vector | None]) -> list[Vector]:
    """The rows of a position when they are needed; what was mispredicted is read where it lies."""
    return [table[index] if row is None else row for index, row in zip(position, staged)]


def most_frequent(indices: Sequence[Sequence[int]], count: int) -> list[int]:
    """The `count` row numbers that occur most often; of equals, the smaller number first."""
    tally = Counter(chain.from_iterable(indices))
    return sorted(sorted(tally), key=tally.__getitem__, reverse=True)[:count]  # of equals, the order stays
