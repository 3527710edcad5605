"""The other definitions and the floor: golden programs, brute force on tiny ones, order relations, wrong candidates."""

import json
import operator
import random
from array import array
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="both implementations are compared: pip install numba")

from engram_toy import definitions, floor
from engram_toy.bytedmd import bytedmd, record, trace
from engram_toy.fast import definitions as fast_definitions
from engram_toy.fast import floor as fast_floor
from engram_toy.fast.rows import price_rows, start
from engram_toy.tracer import stack
from engram_toy.tracer.stack import Log, price
from tests.toy.fast.test_rows import Stream
from tests.toy.tracer.test_stack import random_log

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "definitions.json").read_text())
TRACES = json.loads((GOLDEN / "floor.json").read_text())
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ENGINES = pytest.mark.parametrize("engine", [definitions, fast_definitions], ids=["python", "numba"])
FLOORS = pytest.mark.parametrize("engine", [floor, fast_floor], ids=["python", "numba"])


def program(case):
    def function(*values):
        values = list(values)
        for sign, a, b in case["ops"]:
            values.append(SIGNS[sign](values[a], values[b]))
        return [values[place] for place in case["returns"]]

    return function, [1] * case["inputs"]


@ENGINES
def test_golden_programs(engine):
    for case in CASES:
        log = record(*program(case)).log
        for name in ("classic", "live", "opt", "stationary"):
            assert price(engine.depths(log, name)) == case[name]
        assert engine.depths(log, "opt").tolist() == case["opt_depths"]
        assert engine.depths(log, "stationary").tolist() == case["stationary_addresses"]
    assert len(CASES) == 120 and sum(case["opt"] > case["live"] for case in CASES) == 92


def of_trace(case):
    before, first, intervals = {}, [], []
    for moment, (what, value) in enumerate(case["events"]):
        if what == "read" and value not in before:
            first.append(case["inputs"][str(value)])
        elif what == "read":
            intervals.append((before[value], moment))
        before[value] = moment
    return first, intervals


@FLOORS
def test_golden_floors(engine):
    for case in TRACES:
        first, intervals = of_trace(case)
        assert len(intervals) == case["reuses"]
        found = [engine.misses(intervals, capacity) for capacity in range(1, 17)]
        assert found == case["misses_at_capacity_1_to_16"]
        assert engine.floor(first, intervals) == case["floor"]
        low, high = engine.bracket(first, intervals[::-1], within=0.2)
        assert low <= case["floor"] <= high <= 1.2 * low
    assert len(TRACES) == 80


def fewest_missed(intervals, capacity):
    """Every subset of what is kept, the largest first."""
    for kept in range(len(intervals), -1, -1):
        for chosen in combinations(intervals, kept):
            moments = {begin + 0.5 for begin, _ in chosen}
            if all(sum(begin < m < end for begin, end in chosen) <= capacity for m in moments):
                return len(intervals) - kept
    raise AssertionError


@FLOORS
def test_floor_against_every_subset_and_bytes_as_values(engine):
    draw = random.Random(3)
    for _ in range(40):
        pairs = [sorted(draw.sample(range(12), 2)) for _ in range(draw.randrange(7))]
        for capacity in range(1, 4):
            assert engine.misses(pairs, capacity) == fewest_missed(pairs, capacity)
        assert engine.misses(pairs, 0) == len(pairs)
        for width in (1, 2, 3, 7):  # an element of many bytes is as many values
            first = [3 * width - byte for byte in range(width)]
            assert engine.floor([3], pairs, width) == engine.floor(first, pairs * width)


@FLOORS
def test_impossible_floors_are_refused(engine):
    with pytest.raises(ValueError, match="capacity is -1"):
        engine.misses([], -1)
    with pytest.raises(ValueError, match="ends before it begins"):
        engine.floor([], [(3, 2)])
    with pytest.raises(ValueError, match="depth 0"):
        engine.floor([0], [])
    with pytest.raises(ValueError, match="0 bytes an element"):
        engine.floor([], [], 0)
    assert engine.floor([], []) == 0


def keeps_the_first_free_place(ends_before, capacity):
    free, missed = [0] * capacity, 0
    for mark, begin in enumerate(ends_before, start=1):
        fit = min((place for place in free if place <= begin), default=None)
        if fit is None:
            missed += 1
        else:
            free[free.index(fit)] = mark
    return missed


def test_a_wrong_greedy_is_seen(monkeypatch):
    monkeypatch.setattr(floor, "_misses", keeps_the_first_free_place)
    with pytest.raises(AssertionError):
        test_golden_floors(floor)


def test_order_relations():
    """What can be proved: no read is deeper than under classic, be it live or opt; and the floor is below classic."""
    for seed in range(30):
        log = random_log(seed, 12, 150)
        classic, live, opt = (definitions.depths(log, name) for name in ("classic", "live", "opt"))
        assert all(a <= b for a, b in zip(live, classic)) and all(a <= b for a, b in zip(opt, classic))
        assert floor.floor(*floor.waits(log)) <= price(classic)
        for name in definitions.DEFINITIONS:
            assert fast_definitions.depths(log, name) == definitions.depths(log, name)


@pytest.mark.parametrize("definition", ["classic", "live", "stationary", "opt"])
def test_conversions_store_nothing_and_bad_logs_are_refused(definition):
    def function(a, b):
        int(a), int(a), divmod(b, a)
        return [a, b]

    log = record(function, (3, 5)).log
    for engine in (definitions, fast_definitions):
        depths = engine.depths(log, definition)
        if definition == "classic":  # a; a again; b, a; then quotient and remainder lie above, and b under a
            assert depths.tolist() == [1, 1, 2, 2, 3, 4]
            wrong = replace(log, unstored=array("i"))
            assert engine.depths(wrong, definition) != depths
        with pytest.raises(ValueError, match="not stored yet"):
            engine.depths(Log(1, array("i", [1]), array("i", [-1]), argument_depth=array("i", [1])), definition)
        with pytest.raises(ValueError, match="returned must name"):
            engine.depths(Log(1, array("i"), array("i"), {}, [0, 0], array("i", [1])), definition)
        with pytest.raises(ValueError, match="argument_depth is None"):
            engine.depths(Log(1, array("i"), array("i")), definition)


def test_one_argument_names_each():
    case = CASES[0]
    for name in ("classic", "live", "opt", "stationary"):
        assert bytedmd(*program(case), definition=name) == case[name]
        run = trace(*program(case), definition=name, compiled=False)
        assert len(run.kinds) == len(run.depths)
    first, intervals = floor.waits(record(*program(case)).log)
    assert (
        bytedmd(*program(case), definition="floor")
        == floor.floor(first, intervals)
        == fast_floor.floor(first, np.array(intervals))
        == fast_floor.floor(*fast_floor.waits(record(*program(case)).log))
    )
    with pytest.raises(ValueError, match="unknown definition 'floor'"):
        trace(*program(case), definition="floor")


@pytest.mark.parametrize("definition", ["two-stack", "classic", "live", "stationary", "opt"])
def test_rows_and_values_agree(definition):
    for seed in range(40):
        stream, row_bytes = Stream(seed), 1 + 131 * (seed % 3)
        reads, flat = stream.reads(), stream.flat()

        def function(table, flat=flat):
            for row in flat:
                _ = int(table[-1 - row])  # the last row on top, address 1

        log = record(function, ([1] * stream.rows,)).log
        depths = definitions.depths(log, definition)
        priced = price_rows(reads, start(reads, True), row_bytes, keep_depths=True, definition=definition)
        assert (priced.depths // row_bytes).tolist() == depths.tolist()
        assert priced.total == price(depths, row_bytes)
        low, high = fast_floor.row_floor(reads, start(reads, True), row_bytes, within=0)
        assert low == high == floor.floor(*floor.waits(log), row_bytes)
        below = replace(reads, step_reads=max(1, len(flat)))
        padded = price_rows(below, start(reads, True), 1, between_steps=5, keep_depths=True, definition=definition)
        deeper = [d + 5 * (definition == "stationary" or link < 0) for d, link in zip(depths, reads.links)]
        assert padded.depths.tolist() == deeper
        assert stack.price(padded.depths.tolist()) == padded.total


def test_a_floor_asks_for_no_capacity_in_vain():
    """A question walks all intervals; between two whole numbers of elements it takes both, else the one."""
    for size, wanted in ((1, {1, 4, 16}), (4, {0, 1, 4}), (3, {0, 1, 5, 6})):
        asked = set()
        floor.enclose(lambda capacity, asked=asked: asked.add(capacity) or max(0, 5 - capacity), 9, 0, size, within=1.0)
        assert wanted <= asked
        roots = [root * root for root in range(1, 20)]
        needed = {square // size + extra for square in roots for extra in ((0, 1) if square % size else (0,))}
        assert asked <= needed
