"""Row reads within the steps of a model: depths found once, priced below any number of weights; and prefetched rows.

    events = as_read(reads, held=True)                        # or prefetched(reads, held=True, for_one_use=False)
    priced = price_steps(events, start(reads, held=True), row_bytes=264, above=[[0], [8 * 10**9]])
    priced.prices                         # int64 [2, steps]: the table pinned above 8 GB of weights, and below them

Between two steps a model reads weights, which then lie above every row that was not read in the same step. How many
bytes they are changes no depth among the rows, so one stack serves every model around the same table. Where each step
reads other weights, the longer a row has not been read the more lie above it; before its first read, all that is live.

A prefetch works one step ahead: before the rows of a step are used, those of the next step are copied, each by an
instruction that reads it. What the copy is decides what it costs. One that stands for its original takes its place: the
row is simply read twice. One for a single use lies beside its original until it is used, and then is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engram_toy.fast.compiling import compiled
from engram_toy.fast.last_reads import MOST_READS, RowReads
from engram_toy.fast.rows import STORE, Start, check_depth, place_of_each, row_depths, row_price


@dataclass(frozen=True)
class Events:
    """Reads of rows and copies, step by step.

    Attributes:
        reads: the stream that they come from.
        links: int32 [events]; the event that touched the same block last, -1 - k for the first touch of the k-th row,
            or `STORE` where a copy is put on the stack.
        stays: bool [events]; whether the block lies on the stack after the event.
        begins: int64 [steps + 1]; the first event of each step.
    """

    reads: RowReads
    links: np.ndarray
    stays: np.ndarray
    begins: np.ndarray


@dataclass(frozen=True)
class StepPrices:
    """What the rows of every step cost.

    Attributes:
        prices: int64 [places, steps].
        fresh: int64 [steps]; blocks that the step touches and the step before it did not leave on top.
    """

    prices: np.ndarray
    fresh: np.ndarray


def as_read(reads: RowReads, held: bool) -> Events:
    """The stream without any prefetch. `held`: every row is live to the end; else until its last read."""
    begins = np.arange(0, len(reads.links) + 1, max(1, reads.step_reads))
    return Events(reads, reads.links, _stays(reads.links, held), begins)


def prefetched(reads: RowReads, held: bool, for_one_use: bool) -> Events:
    """The stream with a copy for every read, made one step ahead; the first step's copies are made at its begin.

    Args:
        held: as for `as_read`, of the rows.
        for_one_use: the copy serves the one read that it was made for; else it stands for its original from then on.

    Raises:
        ValueError: more events than can be numbered.
    """
    count = len(reads.links)
    events = count * (3 if for_one_use else 2)  # copies for one use are put beside what they are copies of
    if events > MOST_READS:
        raise ValueError(f"{count:,} reads with copies are {events:,} events: at most {MOST_READS:,} can be numbered")
    steps = count // max(1, reads.step_reads)
    links, begins = np.empty(events, np.int32), np.empty(steps + 1, np.int64)
    dies = np.zeros(events, np.bool_)
    last = np.full(len(reads.rows), -1, np.int32)
    staged = np.empty((2, reads.step_reads), np.int32)
    _stage(place_of_each(reads.links), steps, for_one_use, last, staged, links, dies, begins)
    return Events(reads, links, _stays(links, held) & ~dies, begins)


def price_steps(events: Events, begin: Start, row_bytes: int, above: Sequence[Sequence[int]]) -> StepPrices:
    """Price the rows of every step below the bytes of each of several places.

    Args:
        begin: where the rows lie before the first read.
        row_bytes: of one row.
        above: per place the bytes that lie above a row which was last read 1, 2, ... steps ago, and as the last entry
            those above one that was never read. What was read before all that are given takes the last but one. A
            single number is all of these: weights that every step reads, or 0 for a table that is pinned above them.

    Raises:
        ValueError: fewer than one byte a row, or a stack deeper than 2^51 bytes.
    """
    for place in above:
        check_depth(events.reads, row_bytes, max(place))
    steps = len(events.begins) - 1
    found = StepPrices(np.zeros((len(above), steps), np.int64), np.zeros(steps, np.int64))
    depths = row_depths(events.links, begin, events.stays)
    places = _aligned(above)
    _price_steps(depths, events.links, events.begins, row_bytes, places, found.prices, found.fresh)
    return found


def _aligned(above: Sequence[Sequence[int]]) -> np.ndarray:
    """All places by steps since the last read, equally long: int64 [places, steps + 1]."""
    # A single number holds for all steps, and for what was never read.
    later = [[*place[:-1]] or [*place] for place in above]
    longest = max(map(len, later))
    return np.array([[*row, *row[-1:] * (longest - len(row)), place[-1]] for row, place in zip(later, above)], np.int64)


@compiled(nogil=True)
def _stays(links, held):
    """Whether a block lies on the stack after each event: always if `held`, else if a later event touches it."""
    stays = np.full(len(links), held)
    for link in links:
        if link >= 0:
            stays[link] = True
    return stays


@compiled(nogil=True)
def _stage(place, steps, for_one_use, last, staged, links, dies, begins):
    """Write the events of a prefetch one step ahead. `staged` holds the copies of two steps, which take turns."""
    event, step_reads = 0, staged.shape[1]
    for step in range(steps):
        begins[step] = event
        # Copies for the next step; at the first one, for itself, too.
        for ahead in range(step + (step > 0), min(step + 2, steps)):
            for read in range(step_reads):
                row = place[ahead * step_reads + read]
                links[event] = last[row] if last[row] >= 0 else -1 - row
                last[row] = event
                event += 1
                if for_one_use:
                    links[event] = STORE
                    staged[ahead % 2, read] = event
                    event += 1
        for read in range(step_reads):
            row = place[step * step_reads + read]
            if for_one_use:
                links[event] = staged[step % 2, read]
                dies[event] = True
            else:
                links[event], last[row] = last[row], event
            event += 1
    begins[steps] = event


@compiled(nogil=True)
def _price_steps(depths, links, begins, row_bytes, above, prices, fresh):
    never = above.shape[1] - 1
    for step in range(len(begins) - 1):
        for event in range(begins[step], begins[step + 1]):
            deepest = depths[event] * row_bytes
            if deepest == 0:  # a copy is put on top: writing is free
                continue
            if links[event] >= begins[step]:
                price = row_price(deepest, row_bytes)
                for place in range(len(above)):
                    prices[place, step] += price
                continue
            fresh[step] += 1
            since = never
            # When it was read last need not be found where every step reads the same.
            if links[event] >= 0:
                since = 0 if never == 1 else min(_steps_since(begins, links[event], step), never) - 1
            for place in range(len(above)):
                prices[place, step] += row_price(deepest + above[place, since], row_bytes)


@compiled(nogil=True)
def _steps_since(begins, event, step):
    return step + 1 - np.searchsorted(begins[: step + 1], event, side="right")
