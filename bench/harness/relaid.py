"""The price of one recorded program in every layout and at every padding, by kind of value.

A program is recorded once per schedule; where the table starts, how much padding lies above it and how wide a value is
change only what its first reads are charged (`engram_toy.tracer.first_reads`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from engram_toy.bytedmd import Recording
from engram_toy.models.layouts import Layout
from engram_toy.models.programs import Program
from engram_toy.tracer.first_reads import Start, first_reads
from engram_toy.tracer.stack import read_price


class Relaid:
    """One recording of one program under one definition of ByteDMD.

    Attributes:
        first: its first reads.
    """

    def __init__(self, recording: Recording, program: Program, recorded: Layout, definition: str = "lru") -> None:
        """`recorded` is the layout that the program was built in, without padding."""
        traced = recording.trace(definition)
        self.first = first_reads(recording.log, traced.depths, definition)
        self._kinds = [traced.kind_names[traced.kinds[place]] for place in self.first.places]
        self._rest = traced.tally()  # of the reads that no layout changes, once the first ones are taken out
        for place, kind in zip(self.first.places, self._kinds):
            self._rest[kind][traced.depths[place]] -= 1
        self._rest_costs: dict[int, dict[str, int]] = {}  # by bytes per element
        self._arguments = _numbers(recording.argument_sizes)
        self._above, self._pad = program.kinds.index("row"), program.kinds.index("pad")
        above = _rows(self._arguments[self._above], len(recorded.above))
        below = _rows(self._arguments[self._pad + 1], recorded.rows - len(recorded.above))
        self._table = recorded.join(above, below)  # the numbers of each row's values

    def lay(self, layout: Layout) -> Start:
        """The inputs as another layout lays them down."""
        above, below = layout.split(self._table)
        arguments = list(self._arguments)
        arguments[self._above] = list(chain.from_iterable(above))
        arguments[self._pad + 1] = list(chain.from_iterable(below))
        return self.first.lay(arguments, self._pad)

    @property
    def reads_by_kind(self) -> dict[str, int]:
        """How many reads there are, the same in every layout."""
        first = Counter(self._kinds)
        return {kind: sum(counts.values()) + first[kind] for kind, counts in self._rest.items()}

    @property
    def working_set(self) -> int:
        """Live inputs at the start, without the padding."""
        return len(set(self.first.inputs)) + len(self.first.unread)

    def cost_by_kind(self, start: Start, padding: int, bytes_per_element: int) -> dict[str, int]:
        """Price of the reads of every kind."""
        if bytes_per_element not in self._rest_costs:
            self._rest_costs[bytes_per_element] = {
                kind: self._rest_cost(kind, bytes_per_element) for kind in self._rest
            }
        costs = dict(self._rest_costs[bytes_per_element])
        first = Counter(zip(self._kinds, start.depths(padding)))
        for (kind, depth), reads in first.items():
            costs[kind] += reads * read_price(depth, bytes_per_element)
        return costs

    def _rest_cost(self, kind: str, bytes_per_element: int) -> int:
        counts = self._rest[kind]
        return sum(reads * read_price(depth, bytes_per_element) for depth, reads in counts.items() if reads)


def _numbers(sizes: Sequence[int]) -> list[Sequence[int]]:
    """The inputs of every argument; they are numbered from the last argument to the first."""
    ranges: list[Sequence[int]] = []
    end = 0
    for size in reversed(sizes):
        ranges.append(range(end, end + size))
        end += size
    return ranges[::-1]


def _rows(numbers: Sequence[int], rows: int) -> list[Sequence[int]]:
    width = len(numbers) // max(1, rows)
    return [numbers[row * width : (row + 1) * width] for row in range(rows)]
