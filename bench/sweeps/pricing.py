"""Prices of all cases that one recording serves: the work of one process.

    records = price_cases(Job(cases, config, plan, stream))    one record per case: counts, digests, shares

Nothing here measures time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.price.job import output_digest, price_of
from bench.price.models import digest, make_workload, row_stream
from bench.setup.streams import Stream
from bench.sweeps.points import Case
from bench.sweeps.readdressed import Readdressed, TableInputs, reads_by_kind, trace, without
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_toy.bytedmd import Recording, Trace, record
from engram_toy.models.layouts import Layout, most_frequent
from engram_toy.models.programs import Workload, build
from engram_toy.tracer import stack
from engram_toy.tracer.first_reads import FirstReads, Start, first_reads
from engram_toy.tracer.stack import Log

if TYPE_CHECKING:
    from engram_toy.fast import first_reads as fast_first_reads

Indices = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Job:
    """Cases that share a recording, and what it is a recording of."""

    cases: tuple[Case, ...]
    config: EngramConfig
    plan: HashPlan
    stream: Stream


def price_cases(job: Job) -> list[dict[str, Any]]:
    """Run the program once, without padding; then price it as every case lays it down."""
    one = job.cases[0]
    workload = make_workload(one.model, job.config, job.plan, job.stream.measured, one.settings.seed)
    indices = workload.row_indices()
    if row_stream(job.plan, workload.layer_id, job.stream.measured).tolist() != indices:
        raise AssertionError(f"{one.model}: the twin's row indices are not the reference's")
    calibration = row_stream(job.plan, workload.layer_id, job.stream.calibration).tolist()
    layouts = Layouts(workload, indices, calibration)
    recorded = layouts.of(one)
    program = build(workload, one.boundary, recorded, padding=0)
    recording = record(program.function, program.arguments, program.kinds)
    facts = _facts(recording, indices, layouts)
    table = TableInputs(recording, program, recorded)
    found: list[dict[str, Any]] = [{}] * len(job.cases)
    for definition in dict.fromkeys(case.settings.definition for case in job.cases):
        relaid = (Relaid if definition in stack.DEFINITIONS else Readdressed)(recording, table, definition)
        reads = relaid.reads_by_kind
        # Of the definition: some read at the end what is returned.
        facts |= {"reads": sum(reads.values()), "reads_by_kind": reads, "working_set": relaid.working_set}
        places = [i for i, case in enumerate(job.cases) if case.settings.definition == definition]
        for i, price in zip(places, _prices(relaid, layouts, [job.cases[i] for i in places])):
            found[i] = price | facts
    return found


def _prices(relaid: Relaid | Readdressed, layouts: Layouts, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What differs between the cases of a recording; each layout is laid down once for all of its paddings."""
    starts: dict[frozenset[int], Any] = {}
    prices = []
    for case in cases:
        layout = layouts.of(case)
        if layout.above not in starts:
            starts[layout.above] = relaid.lay(layout)
        settings = case.settings
        costs = relaid.cost_by_kind(starts[layout.above], settings.padding, settings.bytes_per_element)
        prices.append(
            {
                "cost": sum(costs.values()),
                "cost_by_kind": costs,
                "rows_above": len(layout.above),
                "share_below": layouts.share_below(layout),
                "share_wrong": len(layout.wrong) / layouts.lookups,
            }
        )
    return prices


def _facts(recording: Recording, indices: Indices, layouts: Layouts) -> dict[str, Any]:
    """What all cases of a recording have in common."""
    rows = {row for position in indices for row in position}
    return {
        "rows": layouts.rows,
        "lookups": layouts.lookups,
        "distinct_rows": len(rows),
        "row_stream_sha256": digest(np.array(indices)),
        "escapes": dict(sorted(recording.escapes.items())),
        "untracked_outputs": recording.untracked,
        "output_sha256": output_digest(recording.result),
    }


class Layouts:
    """From a case to the layout of its table.

    Attributes:
        rows: of the table.
        lookups: how many the text makes.
    """

    def __init__(self, workload: Workload, indices: Indices, calibration: Indices) -> None:
        """`indices` is the stream of rows, [T][C]; `calibration` that of another text, which chooses hot rows."""
        self.rows = len(workload.table)
        self.lookups = sum(map(len, indices))
        self._indices = indices
        self._counts = Counter(row for position in indices for row in position)
        ranked = most_frequent(calibration, self.rows)
        unseen = set(range(self.rows)).difference(ranked)
        self._ranked = [*ranked, *sorted(unseen)]  # the hottest first
        self._known: dict[tuple[Any, ...], Layout] = {}

    def of(self, case: Case) -> Layout:
        """Rows of the offloaded share lie below, unless they are hot."""
        s = case.settings
        key = (case.variant, s.share, case.hot, s.wrong, s.seed)
        if key not in self._known:
            self._known[key] = self._make(case)
        return self._known[key]

    def _make(self, case: Case) -> Layout:
        s = case.settings
        if case.variant == "resident":
            return Layout.variant("resident", self.rows)
        below = self.below(s.share, s.seed).difference(self._ranked[: int(case.hot * self.rows)])
        above = frozenset(range(self.rows)) - below
        wrong = self._wrong(s.wrong, s.seed) if case.prefetches else {}
        return Layout(case.variant, self.rows, above, case.prefetches, wrong)

    def below(self, share: float, seed: int) -> set[int]:
        """Rows that take this share of the lookups, as nearly as they can, and all rows that nobody looks up.

        Rows are drawn in an order that the seed says; a larger share takes all rows of a smaller one but the last few.
        """
        drawn = sorted(self._counts)
        random.Random(f"share {seed}").shuffle(drawn)  # a text as seed: none of the numbers that weights are drawn from
        left = round(share * self.lookups)
        chosen = set(range(self.rows)).difference(drawn)
        for row in drawn:
            if self._counts[row] <= left:
                chosen.add(row)
                left -= self._counts[row]
        return chosen

    def share_below(self, layout: Layout) -> float:
        """Share of the lookups that go to rows below."""
        return sum(n for row, n in self._counts.items() if row not in layout.above) / self.lookups

    def _wrong(self, share: float, seed: int) -> dict[tuple[int, int], int]:
        """Mispredicted lookups, and another row for each; a larger share contains those of a smaller one."""
        generator = random.Random(f"wrong {seed}")
        places = [(t, c) for t, position in enumerate(self._indices) for c in range(len(position))]
        generator.shuffle(places)
        # For all places, mistaken or not: a place has the same other row whatever the share.
        others = {place: generator.randrange(self.rows - 1) for place in places}
        mistaken = [(t, c, others[t, c], self._indices[t][c]) for t, c in places[: round(share * len(places))]]
        # Counted past the row that was asked for, 0 .. n - 2 become all others of 0 .. n - 1.
        return {(t, c): other + (other >= asked) for t, c, other, asked in mistaken}


class Relaid:
    """One recording of one program under one definition of ByteDMD.

    Attributes:
        first: its first reads.
        reads_by_kind: how many reads there are, the same in every layout.
    """

    def __init__(self, recording: Recording, table: TableInputs, definition: str = "lru") -> None:
        self._table = table
        traced = trace(recording, definition)
        self.first = _first_reads(recording.log, traced, definition)
        places = np.asarray(self.first.places, np.int64)
        self._kinds = np.frombuffer(traced.kinds, np.uint8)[places]
        self._names = traced.kind_names
        self.reads_by_kind = reads_by_kind(traced)
        self._rest = without(traced, places).tally()  # of the reads that no layout changes
        self._rest_costs: dict[int, dict[str, int]] = {}  # by bytes per element

    def lay(self, layout: Layout) -> Start | fast_first_reads.Start:
        """The inputs as another layout lays them down."""
        return self.first.lay(self._table.laid(layout), self._table.pad)

    @property
    def working_set(self) -> int:
        """Live inputs at the start, without the padding."""
        return len(set(self.first.inputs)) + len(self.first.unread)

    def cost_by_kind(
        self, start: Start | fast_first_reads.Start, padding: int, bytes_per_element: int
    ) -> dict[str, int]:
        """Price of the reads of every kind."""
        if bytes_per_element not in self._rest_costs:
            self._rest_costs[bytes_per_element] = {
                kind: price_of(counts, bytes_per_element) for kind, counts in self._rest.items()
            }
        costs = dict(self._rest_costs[bytes_per_element])
        depths = np.asarray(start.depths(padding))
        for code in np.unique(self._kinds).tolist():
            found, reads = np.unique(depths[self._kinds == code], return_counts=True)
            costs[self._names[code]] += price_of(dict(zip(found.tolist(), reads.tolist())), bytes_per_element)
        return costs


def _first_reads(log: Log, traced: Trace, definition: str) -> FirstReads | fast_first_reads.FirstReads:
    """By the engine that found the depths."""
    if not traced.compiled:
        return first_reads(log, traced.depths, definition)
    from engram_toy.fast import first_reads as fast

    return fast.first_reads(log, traced.depths, definition)
