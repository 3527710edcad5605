"""The exact ByteDMD price of reading rows of a real table, at row granularity: tens of millions of reads in seconds.

    reads = linker.finish()                                     # engram_toy.fast.last_reads
    priced = price_rows(reads, start(reads, held=True), row_bytes=264)
    priced.total, priced.reads, priced.cost                     # price; reads and price by depth, first and later ones

What: one LRU stack of rows, each a block of `row_bytes` bytes. One instruction reads a whole row, so a row at depth d
occupies the bytes (d - 1)*b + 1 .. d*b and costs S(d*b) - S((d - 1)*b), which is what `engram_toy.bytedmd` charges for
one value of b bytes. Read value by value instead, each byte would be charged ceil(sqrt(d*b)): `by_value` sums that.

Where rows lie at first is a `Start`: the whole table, live from the first read to the last (held live: something else
may still want any row), or only what this text reads, and only until its last read (compacted: ByteDMD's own liveness,
in which a row that is never read again occupies nothing). A hot tier starts above the rest.

A model around the table reads its weights once a step. Between two steps they all come to lie above every row, so
`between_steps` bytes are added to the depth of a row whose last read was in another step, or that was never read.
Without them the table is pinned above the weights. `engram_toy.fast.placing` prices several such places at once.

That is the definition "lru". Under the others of `engram_toy.definitions` a row's first read is charged its address,
its place in the `Start` from the top; under "stationary" every read is. Each instruction reads one row and none is
returned, so "two-stack" and "live" are one here. `engram_toy.fast.floor` has the bound under all managers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from engram_toy.definitions import check_definition
from engram_toy.fast.compiling import compiled
from engram_toy.fast.definitions import find
from engram_toy.fast.last_reads import RowReads
from engram_toy.fast.stack import prefetch
from engram_toy.fast.time_axis import axis_of, count_from, full_axis, give_up, settle

BINS = 64  # powers of two of depth in bytes
MOST_BYTES = 1 << 51  # the root of a depth beyond 2^52 may be rounded
# A longer row may span several steps of the root, over which a sum leaves 64 bits. Shipped ones have hundreds.
MOST_ROW_BYTES = 1 << 20
_AHEAD = 16  # reads; of many distinct rows, waiting for memory is most of the time
STORE = -(2**31)  # in the place of a link: a block is put on top, and nothing is read


@dataclass(frozen=True)
class Start:
    """Where rows lie before the first read.

    Attributes:
        rank: int32 [distinct]; place of each row that is read, among those, from the bottom of the stack.
        buried: int64 [distinct]; rows above each that are never read, but live.
        held: every row is live to the end; else until its last read.
    """

    rank: np.ndarray
    buried: np.ndarray
    held: bool


@dataclass(frozen=True)
class Priced:
    """What a stream of reads costs.

    Attributes:
        total: price of all reads.
        by_value: the same, if every value of a row were read by an instruction of its own, a byte each.
        reads, cost: int64 [2, BINS]; first reads of a row and later ones, by depth: bin b is 2^b .. 2^(b+1) - 1 bytes.
        steps: int64 [steps]; price of each step.
        depths: int64, depth in bytes of the deepest byte of each read; empty unless asked for.
    """

    total: int
    by_value: int
    reads: np.ndarray
    cost: np.ndarray
    steps: np.ndarray
    depths: np.ndarray


def start(reads: RowReads, held: bool, hot: np.ndarray | None = None) -> Start:
    """The table in the order of its rows, the last on top; the rows of a hot tier, in the same order, above all others.

    Args:
        held: the whole table is live to the end; else only rows that are read, and until their last read.
        hot: int64, ascending; rows of the tier, read or not, numbered over all layers. None for no tier.

    Raises:
        ValueError: hot rows that do not ascend, or are not of this table.
    """
    rows = reads.rows
    if hot is None or not len(hot):
        places = np.arange(len(rows))
        # Rows above each in the table, less those of them that are read.
        idle = (reads.table_rows - 1 - rows) - (len(rows) - 1 - places)
        return Start(places.astype(np.int32), idle * held, held)  # compacted, nothing idle is there
    if hot[0] < 0 or hot[-1] >= reads.table_rows or np.any(hot[1:] <= hot[:-1]):
        raise ValueError(f"hot rows must ascend within 0 .. {reads.table_rows - 1}")
    hot_below, is_hot = among(rows, hot)
    hot_read = np.cumsum(is_hot)  # up to and with each row
    cold_read = np.arange(1, len(rows) + 1) - hot_read
    all_hot, all_cold = int(is_hot.sum()), len(rows) - int(is_hot.sum())
    rank = np.where(is_hot, all_cold + hot_read - 1, cold_read - 1).astype(np.int32)
    if not held:
        return Start(rank, np.zeros(len(rows), np.int64), held)
    hot_above = len(hot) - hot_below - is_hot
    cold_above = reads.table_rows - 1 - rows - hot_above
    # Likewise, tier by tier: above a cold row lies all of the tier, above a hot one nothing cold.
    idle_hot = np.where(is_hot, hot_above - (all_hot - hot_read), len(hot) - all_hot)
    idle_cold = np.where(is_hot, 0, cold_above - (all_cold - cold_read))
    return Start(rank, idle_hot + idle_cold, held)


def among(rows: np.ndarray, hot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `rows` (both ascending): how many hot rows are smaller, and whether it is a hot one."""
    smaller = np.searchsorted(hot, rows)
    found = np.zeros(len(rows), np.bool_)
    inside = smaller < len(hot)
    found[inside] = hot[smaller[inside]] == rows[inside]
    return smaller, found


def price_rows(
    reads: RowReads,
    begin: Start,
    row_bytes: int,
    between_steps: int = 0,
    keep_depths: bool = False,
    definition: str = "lru",
) -> Priced:
    """Price a stream of row reads.

    Args:
        begin: where the rows lie before the first read.
        row_bytes: of one row.
        between_steps: bytes read between two steps and live throughout; above every row that was not read since.
        keep_depths: return the depth of every read, too.
        definition: one of `engram_toy.definitions.DEFINITIONS`.

    Raises:
        ValueError: fewer than one byte a row, a stack deeper than 2^51 bytes, an unknown definition, or steps that read
            something in between under "opt", where the depth of a row depends on when that is read.
    """
    check_definition(definition)
    check_depth(reads, row_bytes, between_steps)
    count = len(reads.links)
    if definition == "opt" and between_steps and reads.step_reads < count:
        raise ValueError(f'{between_steps:,} bytes between steps under "opt": leave them out, or take one step')
    place = addresses(begin) if definition != "lru" else np.empty(0, np.int64)
    known = np.empty(0, np.int64)
    if definition == "stationary":
        known = place[place_of_each(reads.links)]
    elif definition == "opt":
        known = _fullest_waits(reads.links, place, *full_axis(count))
    if begin.held if definition == "lru" else definition == "classic":
        words, above = full_axis(count)
        ahead = 64 * len(words)  # slots behind the last read count as taken, too
    else:
        words, above = axis_of(_read_again(reads.links))
        ahead = count - len(reads.rows)  # every read but the first ones was promised by the one before
    untouched, untouched_above = axis_of(np.full(len(reads.rows), True))
    steps = np.zeros(-(-count // max(1, reads.step_reads)), np.int64)
    tallies = np.zeros((2, BINS), np.int64), np.zeros((2, BINS), np.int64)
    depths = np.empty(count if keep_depths else 0, np.int64)
    by_value = _price(
        reads.links, begin.rank, begin.buried, place, known, words, above, ahead, untouched, untouched_above,
        reads.step_reads, row_bytes, between_steps, *tallies, steps, depths, definition == "stationary",
    )  # fmt: skip
    return Priced(sum(steps.tolist()), by_value, *tallies, steps, depths)


def price_starts(reads: RowReads, begins: Iterable[Start], row_bytes: int) -> Iterator[Priced]:
    """Price a stream as `price_rows` does from each of several starts, held live all of them or none; without steps.

    How deep a row lies that was read before does not depend on where it started: such reads are priced once.

    Raises:
        ValueError: as `price_rows`; starts of which some are held and some are not.
    """
    later: Priced | None = None
    by_value, held = 0, False
    for begin in begins:
        first, counts, costs = _first(reads, begin, row_bytes)
        if later is None:
            later, held = price_rows(reads, begin, row_bytes), begin.held
            by_value = later.by_value - first
        if begin.held != held:
            raise ValueError(f"held is {begin.held} here, {held} before: price either kind of start by itself")
        tallies = np.stack([counts, later.reads[1]]), np.stack([costs, later.cost[1]])
        yield Priced(int(tallies[1].sum()), by_value + first, *tallies, later.steps[:0], later.depths)


def _first(reads: RowReads, begin: Start, row_bytes: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The first reads alone: their price value by value, how many there are by depth, and their price."""
    check_depth(reads, row_bytes, 0)
    stays = np.full(len(reads.links), True) if begin.held else _read_again(reads.links)
    counts, costs = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    axis = axis_of(np.full(len(reads.rows), True))
    by_value = _price_first(reads.links, begin.rank, begin.buried, stays, *axis, row_bytes, counts, costs)
    return by_value, counts, costs


def check_depth(reads: RowReads, row_bytes: int, above: int) -> None:
    """Raise ValueError for rows of no byte or over a MiB, or a stack too deep for prices to be exact in 64 bits."""
    deepest = 2 * reads.table_rows * row_bytes + above  # of every row a copy at most
    if row_bytes < 1 or above < 0 or deepest > MOST_BYTES:
        raise ValueError(f"a stack of {deepest:,} bytes, {row_bytes} a row: give 1 byte or more, up to 2^51 in all")
    dearest = len(reads.links) * row_bytes * (math.isqrt(deepest) + 1)
    if row_bytes > MOST_ROW_BYTES or dearest >= 1 << 63:
        raise ValueError(
            f"{len(reads.links):,} reads of {row_bytes:,} bytes from a stack of {deepest:,}: give rows of at most 2^20 "
            "bytes, and so few that their price is below 2^63"
        )


def addresses(begin: Start) -> np.ndarray:
    """Place of each distinct row from the top of a start, int64 from 1: its address where arguments have one."""
    return begin.buried + len(begin.rank) - begin.rank


def row_depths(links: np.ndarray, begin: Start, stays: np.ndarray) -> np.ndarray:
    """Depth in blocks of every event of a stream, int64; of a STORE, which reads nothing, 0.

    Args:
        links: int32 [events], as those of `RowReads`, but they may link to a STORE, too.
        stays: bool [events]; whether the block of an event lies on the stack after it.
    """
    words, above = axis_of(stays)
    untouched, untouched_above = axis_of(np.full(len(begin.rank), True))
    tallies, none = np.zeros((4, BINS), np.int64), np.empty(0, np.int64)
    depths = np.zeros(len(links), np.int64)
    _price(
        # Rows of one byte, all in one step: a depth in bytes is one in blocks.
        links, begin.rank, begin.buried, none, none, words, above, int(np.count_nonzero(stays)), untouched,
        untouched_above, len(links), 1, 0, tallies[:2], tallies[2:], np.zeros(1, np.int64), depths, False,
    )  # fmt: skip
    return depths


@compiled(nogil=True)
def place_of_each(links):
    """The row of every read, int32, as its place among the distinct rows."""
    places = np.empty(len(links), np.int32)
    for read in range(len(links)):
        link = links[read]
        places[read] = -1 - link if link < 0 else places[link]
    return places


@compiled()
def _fullest_waits(links, address, words, above):
    """The depths of `engram_toy.definitions._fullest_waits`, where every moment is the read of an argument."""
    again = np.cumsum(links >= 0)  # marks made up to and with each read
    nearest = np.arange(len(links) + 1).astype(np.int32)
    found, marks = np.empty(len(links), np.int64), 0
    for read in range(len(links)):
        link = links[read]
        if link < 0:
            found[read] = address[-1 - link]
            continue
        found[read] = 1
        if again[link + 1] < marks:
            found[read] += count_from(words, above, again[link + 1]) - (64 * len(words) - marks)
        mark = find(nearest, again[link])
        if mark:
            give_up(words, above, mark - 1)
            nearest[mark] = mark - 1
        marks += 1
    return found


@compiled()
def _read_again(links):
    """Whether the row of each read is read once more later."""
    again = np.zeros(len(links), np.bool_)
    for link in links:
        if link >= 0:
            again[link] = True
    return again


@compiled()
def cumulative_price(n):
    """Sum of ceil(sqrt(i)) over i = 1 .. n; `engram_toy.tracer.stack.cumulative_price`."""
    m = _ceil_root(n)
    return m * (6 * n - 2 * m * m + 3 * m - 1) // 6


@compiled()
def row_price(deepest, row_bytes):
    """Sum of ceil(sqrt(i)) over the bytes i of a row whose last one lies at `deepest`."""
    root = _ceil_root(deepest)
    shallower = (root - 1) * (root - 1) - (deepest - row_bytes)  # bytes that cost less than the last one
    if shallower <= 0:
        return row_bytes * root
    if shallower <= 2 * root - 3:  # by one: the closed form would leave 64 bits at 10^12 bytes
        return row_bytes * root - shallower
    return cumulative_price(deepest) - cumulative_price(deepest - row_bytes)


@compiled()
def _ceil_root(n):
    """The least m with m*m >= n; the floating-point root is at most one off below 2^52."""
    m = np.int64(np.sqrt(np.float64(n)))
    if m * m < n:
        m += 1
    elif (m - 1) * (m - 1) >= n > 0:
        m -= 1
    return m


@compiled()
def _bin(n):
    """Position of the highest set bit."""
    b = 0
    for half in (32, 16, 8, 4, 2, 1):
        if n >> half:
            n, b = n >> half, b + half
    return b


@compiled(nogil=True)
def _price_first(links, rank, buried, stays, untouched, untouched_above, row_bytes, reads, cost):
    """What `_price` finds of the first reads, without a time axis: it counts what is live, and asks not how deep."""
    by_value, live = 0, 0
    for read in range(len(links)):
        if read + _AHEAD < len(links) and links[read + _AHEAD] < 0:
            prefetch(rank, -1 - links[read + _AHEAD])
            prefetch(buried, -1 - links[read + _AHEAD])
        link = links[read]
        if link < 0:
            place = -1 - link
            deepest = row_bytes * (live + buried[place] + count_from(untouched, untouched_above, rank[place]))
            give_up(untouched, untouched_above, rank[place])
            by_value += row_bytes * _ceil_root(deepest)
            b = _bin(deepest)
            reads[b] += 1
            cost[b] += row_price(deepest, row_bytes)
        live += np.int64(stays[read]) - np.int64(link >= 0)
    return by_value


@compiled(nogil=True)
def _price(
    links, rank, buried, address, known, words, above, ahead, untouched, untouched_above,
    step_reads, row_bytes, between_steps, reads, cost, steps, depths, fixed,
):  # fmt: skip
    """Price every read into the tallies. `address`, of each distinct row, and `known`, the depth of each read in rows,
    are empty where the stack says them. `ahead` counts the taken slots from the read in hand on, which is to come.
    """
    # A slot of the time axis is a read. From the start it counts as taken if its row stays on the stack after that
    # read: nothing is written when the read comes, only when the row leaves.
    by_value, live, step, step_begins = 0, 0, 0, 0
    run, taken, word, given_up = -2, 0, 0, 0  # -2: no link goes on from it
    one = np.uint64(1)
    for read in range(len(links)):
        if read + _AHEAD < len(links):
            soon = links[read + _AHEAD]
            if soon >= 0:
                prefetch(words, soon >> 6)
            elif soon != STORE:
                prefetch(rank, -1 - soon)
                prefetch(buried, -1 - soon)
        if read - step_begins == step_reads:
            step, step_begins = step + 1, read
        link = links[read]
        if link == STORE:
            live, ahead = live + 1, ahead - 1
            continue
        if link < 0:
            place = -1 - link
            if len(address):
                rows = address[place]
            else:
                rows = live + buried[place] + count_from(untouched, untouched_above, rank[place])
            give_up(untouched, untouched_above, rank[place])
        else:
            # The heads of an n-gram that is seen again were read one after the other before, too: along such a run the
            # count goes down by one, and the tree is told of what left a word at once.
            if link == run + 1:
                taken -= 1
            else:
                settle(above, word, given_up)
                given_up = 0
                taken = count_from(words, above, link)
            if link >> 6 != word:
                settle(above, word, given_up)
                word, given_up = link >> 6, 0
            words[word] ^= one << np.uint64(link & 63)
            run, given_up, live = link, given_up + 1, live - 1
            rows = taken - ahead
        if len(known):
            rows = known[read]
        stays = np.int64((words[read >> 6] >> np.uint64(read & 63)) & one)
        live, ahead = live + stays, ahead - stays
        deepest = rows * row_bytes
        below = (link < 0 or fixed) if len(known) else link < step_begins  # known: fixed places, or a single step
        if below:
            deepest += between_steps
        by_value += row_bytes * _ceil_root(deepest)
        price = row_price(deepest, row_bytes)
        steps[step] += price
        later, b = np.int64(link >= 0), _bin(deepest)
        reads[later, b] += 1
        cost[later, b] += price
        if len(depths):
            depths[read] = deepest
    return by_value
