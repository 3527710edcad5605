"""One recorded run under a definition in which arguments have addresses, priced anew in every layout; and the floor.

Under "classic", "live" and "opt" the first read of an input is charged its address, under "stationary" every read of
it; no other read knows where inputs lie. So one replay does for all layouts, and so it is with the floor.

    priced = Readdressed(recording, program, recorded, "stationary")
    priced.cost_by_kind(priced.lay(layout), padding=10**6, bytes_per_element=1)

It stands in for `bench.sweeps.pricing.Relaid`, where first reads are charged for what lies above the input.
"""

from __future__ import annotations

import importlib.util
import sys
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from bench.price.job import price_of
from bench.sweeps.points import FLOOR
from engram_toy.bytedmd import Recording, Trace
from engram_toy.definitions import reads_like
from engram_toy.models.layouts import Layout
from engram_toy.models.programs import Program
from engram_toy.tracer.stack import Log

_WITHIN = 1e-4  # of the floor's sum, which is the same in every layout


class TableInputs:
    """Which inputs of a recording are the table's rows, and how a layout orders all inputs.

    Attributes:
        pad: the argument at whose place padding is laid.
    """

    def __init__(self, recording: Recording, program: Program, recorded: Layout) -> None:
        """`recorded` is the layout that the program was built in, without padding."""
        self._arguments = recording.argument_inputs
        self._above, self.pad = program.kinds.index("row"), program.kinds.index("pad")  # the first rows are those above
        above = _rows(self._arguments[self._above], len(recorded.above))
        below = _rows(self._arguments[self.pad + 1], recorded.rows - len(recorded.above))  # they follow the padding
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
        self._table, self._inputs = table, recording.log.inputs
        self.working_set = _used(recording.log)
        self._rest_costs: dict[int, dict[str, int]] = {}  # by bytes per element
        if definition == FLOOR:
            self._lay_bare(recording.log)
            return
        traced = trace(recording, definition)
        places, values = _addressed(recording.log, definition, traced.compiled)
        self.reads_by_kind = reads_by_kind(traced)
        kinds = np.frombuffer(traced.kinds, np.uint8)[places]
        self._values = {name: values[kinds == code] for code, name in enumerate(traced.kind_names)}
        tally = without(traced, places).tally()
        self._rest = lambda nbytes: {kind: price_of(counts, nbytes) for kind, counts in tally.items()}

    def _lay_bare(self, log: Log) -> None:
        """The same of the floor: first loads, which the addresses decide, and the reuses."""
        if importlib.util.find_spec("numba") is not None:
            from engram_toy.fast.floor import bracket, waits
        else:
            from engram_toy.floor import bracket, waits  # type: ignore[assignment]
        # Every input at an address of its own, which says afterwards which input it was.
        first, intervals = waits(replace(log, argument_depth=array("i", range(1, log.inputs + 1))))
        self._values = {FLOOR: np.asarray(first, np.int64) - 1}
        self.reads_by_kind = {FLOOR: len(first) + len(intervals)}
        self._rest = lambda nbytes: {FLOOR: bracket([], intervals, nbytes, within=_WITHIN)[0]}

    def lay(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """The address of every input as another layout lays them down, without padding; and whether that lies above."""
        return addresses(self._inputs, self._table.laid(layout), self._table.pad)

    def cost_by_kind(self, laid: tuple[np.ndarray, np.ndarray], padding: int, bytes_per_element: int) -> dict[str, int]:
        """Price of the reads of every kind; of the floor a bound itself, short of it by a ten-thousandth at most."""
        if bytes_per_element not in self._rest_costs:
            self._rest_costs[bytes_per_element] = self._rest(bytes_per_element)
        costs = dict(self._rest_costs[bytes_per_element])
        address = laid[0] + padding * laid[1]
        for kind, values in self._values.items():
            found, reads = np.unique(address[values], return_counts=True)
            costs[kind] += price_of(dict(zip(found.tolist(), reads.tolist())), bytes_per_element)
        return costs


def addresses(inputs: int, arguments: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Where every input lies, argument after argument from 1, and whether it does so from argument `pad` on."""
    # All that a layout decides here: padding that is not read only moves the arguments behind it.
    order = np.fromiter(chain.from_iterable(arguments), np.int64)
    address = np.zeros(inputs, np.int64)
    address[order] = np.arange(1, 1 + len(order))
    return address, address > sum(map(len, arguments[:pad]))


def _addressed(log: Log, definition: str, compiled: bool) -> tuple[np.ndarray, np.ndarray]:
    """The reads that are charged the address of an input, by their places in reading order, and that input.

    Every read of an input where arguments stay where they are, else the first one alone.
    """
    if compiled:
        from engram_toy.fast.stack import read_values
    else:
        from engram_toy.tracer.stack import read_values  # type: ignore[assignment]
    values = np.asarray(read_values(log, reads_like(definition)))
    places = np.flatnonzero(values < log.inputs)
    if definition != "stationary":
        first = np.full(log.inputs, -1)
        first[values[places[::-1]]] = places[::-1]  # of all that go to one place, the last stays
        places = np.sort(first[first >= 0])
    return places, values[places]


def _used(log: Log) -> int:
    """How many inputs are ever read or returned."""
    used = np.zeros(log.inputs + len(log.left) + 1, np.bool_)  # -1, no operand, is the entry too many
    for column in (log.left, log.right, list(log.third.values()), log.returned):
        used[np.asarray(column, np.int64)] = True
    return int(used[: log.inputs].sum())


def trace(recording: Recording, definition: str) -> Trace:
    """The depth of every read, compiled where that is worth it: also of a short run, once numba has been loaded."""
    loaded = "engram_toy.fast.definitions" in sys.modules  # by a longer one, in this worker
    return recording.trace(definition, compiled=loaded or None)


def without(traced: Trace, places: np.ndarray) -> Trace:
    """A trace without the reads at these places."""
    kept = np.full(len(traced.depths), True)
    kept[places] = False
    depths = array("i", np.asarray(traced.depths, np.int32)[kept].tobytes())
    return replace(traced, depths=depths, kinds=np.frombuffer(traced.kinds, np.uint8)[kept].tobytes())


def reads_by_kind(traced: Trace) -> dict[str, int]:
    """How many reads there are of every kind."""
    counts = np.bincount(np.frombuffer(traced.kinds, np.uint8), minlength=len(traced.kind_names))
    return dict(zip(traced.kind_names, counts.tolist()))


def _rows(numbers: Sequence[int], rows: int) -> list[Sequence[int]]:
    width = len(numbers) // max(1, rows)  # no rows at all are above, or below, in some layouts
    return [numbers[row * width : (row + 1) * width] for row in range(rows)]
