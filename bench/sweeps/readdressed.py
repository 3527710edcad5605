"""One recorded run under a definition in which arguments have addresses, priced anew in every layout; and the floor.

Under "classic", "live", "stationary" and "opt" the log is kept, the addresses are written again, and the replay finds
all depths. The floor under all managers needs less.

    priced = Readdressed(recording, program, recorded, "stationary")
    priced.cost_by_kind(priced.lay(layout), padding=10**6, bytes_per_element=1)

It stands in for `bench.sweeps.pricing.Relaid`, which spares the replay where only first reads change.
"""

from __future__ import annotations

import importlib
import importlib.util
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from bench.price.job import price_of
from bench.sweeps.points import FLOOR
from engram_toy.bytedmd import Recording
from engram_toy.models.layouts import Layout
from engram_toy.models.programs import Program
from engram_toy.tracer.stack import Log, read_price

_WITHIN = 1e-4  # of the floor's sum, which is the same in every layout


class TableInputs:
    """Which inputs of a recording are the table's rows, and how a layout orders all inputs.

    Attributes:
        pad: the argument at whose place padding is laid.
    """

    def __init__(self, recording: Recording, program: Program, recorded: Layout) -> None:
        """`recorded` is the layout that the program was built in, without padding."""
        self._arguments = _numbers(recording.argument_sizes)
        self._above, self.pad = program.kinds.index("row"), program.kinds.index("pad")
        above = _rows(self._arguments[self._above], len(recorded.above))
        below = _rows(self._arguments[self.pad + 1], recorded.rows - len(recorded.above))
        self._table = recorded.join(above, below)  # the numbers of each row's values

    def laid(self, layout: Layout) -> list[Sequence[int]]:
        """The inputs of every argument as another layout lays them down."""
        above, below = layout.split(self._table)
        arguments = list(self._arguments)
        arguments[self._above] = list(chain.from_iterable(above))
        arguments[self.pad + 1] = list(chain.from_iterable(below))
        return arguments


class Readdressed:
    """A recording that is priced in layouts other than its own.

    Attributes:
        reads_by_kind: how many reads there are, the same in every layout; of the floor, all of one kind.
        working_set: inputs that are ever read or returned.
    """

    def __init__(self, recording: Recording, table: TableInputs, definition: str) -> None:
        self._recording, self._table, self._definition = recording, table, definition
        log = recording.log
        used = {value for column in (log.left, log.right, log.third.values(), log.returned) for value in column}
        self.working_set = sum(0 <= value < log.inputs for value in used)
        if definition == FLOOR:
            # The module that finds floors: compiled, where numba is installed.
            fast = importlib.util.find_spec("numba") is not None
            self._floors: Any = importlib.import_module("engram_toy.fast.floor" if fast else "engram_toy.floor")
            first, self._intervals = self._floors.waits(log)
            self._reused: dict[int, int] = {}  # by bytes per element
            self.reads_by_kind = {FLOOR: len(first) + len(self._intervals)}
        else:
            tally = recording.trace(definition).tally()
            self.reads_by_kind = {kind: sum(counts.values()) for kind, counts in tally.items()}

    def lay(self, layout: Layout) -> list[Sequence[int]]:
        """The inputs of every argument as another layout lays them down."""
        return self._table.laid(layout)

    def cost_by_kind(self, arguments: Sequence[Sequence[int]], padding: int, bytes_per_element: int) -> dict[str, int]:
        """Price of the reads of every kind; of the floor a bound itself, short of it by a ten-thousandth at most."""
        log = readdressed(self._recording.log, arguments, self._table.pad, padding)
        if self._definition == FLOOR:
            return {FLOOR: self._floor(log, bytes_per_element)}
        tally = replace(self._recording, log=log).trace(self._definition).tally()
        return {kind: price_of(counts, bytes_per_element) for kind, counts in tally.items()}

    def _floor(self, log: Log, bytes_per_element: int) -> int:
        """First loads, which the addresses decide, and the reuses, which are the same in every layout."""
        if bytes_per_element not in self._reused:
            low, _ = self._floors.bracket([], self._intervals, bytes_per_element, within=_WITHIN)
            self._reused[bytes_per_element] = low
        first, _ = self._floors.waits(log)  # the addresses decide these, and nothing else of the floor
        return self._reused[bytes_per_element] + sum(read_price(int(a), bytes_per_element) for a in first)


def readdressed(log: Log, arguments: Sequence[Sequence[int]], pad: int, padding: int) -> Log:
    """The same log with its inputs at other addresses: argument after argument, so many more from argument `pad` on."""
    # All that a layout decides here: padding that is not read only moves the arguments behind it.
    address = array("i", bytes(4 * log.inputs))
    place = 0
    for number, values in enumerate(arguments):
        place += padding * (number == pad)
        for value in values:
            place += 1
            address[value] = place
    return replace(log, argument_depth=address)


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
