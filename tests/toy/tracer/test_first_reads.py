"""A recorded run whose inputs lie otherwise has the trace of the run that really starts so.

Random logs are laid down anew and replayed in full; the programs of the experiment are run in every layout.
"""

import dataclasses
import functools
import importlib.util
import random
import sys
from array import array
from itertools import chain

import numpy as np
import pytest

from bench.price.models import make_workload, toy_config
from bench.sweeps.points import FLOOR
from bench.sweeps.pricing import Relaid
from bench.sweeps.readdressed import Readdressed, TableInputs
from engram_ref.hashing import HashPlan
from engram_toy import definitions
from engram_toy.bytedmd import record
from engram_toy.fast import first_reads as fast_first_reads
from engram_toy.fast import floor as fast_floor
from engram_toy.models.layouts import VARIANTS, Layout, most_frequent
from engram_toy.models.programs import BOUNDARIES, build
from engram_toy.tracer import first_reads as relaying
from engram_toy.tracer.first_reads import first_reads
from engram_toy.tracer.stack import DEFINITIONS, Log, read_price, stack_depths

PADDINGS = (0, 777)
TEXT = [7, 8, 7]


# --- random logs ------------------------------------------------------------------------------------


def random_log(generator, inputs):
    """Some inputs never read, some read twice at once, some returned unread, some instructions without operands."""
    left, right, third = array("i"), array("i"), {}
    for k in range(generator.randrange(40)):
        operands = [generator.randrange(inputs + k) for _ in range(generator.randrange(4))] if inputs + k else []
        if generator.random() < 0.2 and operands:
            operands = [operands[0]] * len(operands)
        left.append(operands[0] if operands else -1)
        right.append(operands[1] if len(operands) > 1 else -1)
        if len(operands) > 2:
            third[k] = operands[2]
    values = inputs + len(left)
    returned = generator.sample(range(values), generator.randrange(values + 1))
    return Log(inputs, left, right, third, returned, array("i"))


def as_arguments(log, arguments, pad, padding, held):
    """The same log, its inputs numbered as these arguments lie, with padding: what the full replay takes."""
    laid = [list(argument) for argument in arguments]
    fresh = range(-1 - padding, -1)  # stand for the padding
    laid[pad] = list(fresh)
    number = {value: n for n, value in enumerate(chain.from_iterable(reversed(laid)))}
    position = {value: n for n, value in enumerate(chain.from_iterable(laid), start=1)}
    inputs = log.inputs + padding

    def new(value):
        return value if value == -1 else number[value] if value in number else value + padding

    depth = array("i", [0]) * inputs
    for value, n in number.items():
        depth[n] = position[value]
    returned = [new(value) for value in log.returned] + ([number[value] for value in fresh] if held else [])
    columns = (array("i", map(new, log.left)), array("i", map(new, log.right)))
    return Log(inputs, *columns, {k: new(v) for k, v in log.third.items()}, returned, depth)


def same(first, compiled, arguments, pad):
    """Whether both forms found the same reads, and the same depths of them, laid so."""
    for name in ("places", "inputs", "instructions", "touched", "unread"):
        if list(getattr(first, name)) != getattr(compiled, name).tolist():
            return False
    starts = first.lay(arguments, pad), compiled.lay(arguments, pad)
    return all(starts[0].depths(padding) == starts[1].depths(padding).tolist() for padding in PADDINGS)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("seed", range(60))
def test_a_random_log_laid_otherwise(seed, definition, monkeypatch):
    monkeypatch.setattr(relaying, "_STRETCH", 3)
    generator = random.Random(seed)
    inputs = generator.randrange(12)
    log = random_log(generator, inputs)
    order = generator.sample(range(inputs), inputs)
    cut, pad = sorted(generator.randrange(inputs + 1) for _ in range(2)), generator.randrange(3)
    arguments = [order[: cut[0]], order[cut[0] : cut[1]], order[cut[1] :]]
    arguments.insert(pad, [])
    log.argument_depth = array("i", range(1, inputs + 1))
    depths = stack_depths(log, definition)
    first = first_reads(log, depths, definition)
    assert definition == "lru" or not any(first.touched)  # places alone decide
    compiled = fast_first_reads.first_reads(log, depths, definition)
    assert same(first, compiled, arguments, pad)
    start = first.lay(arguments, pad)
    for padding in (0, 1, 9):
        relaid = depths[:]
        for place, depth in zip(first.places, start.depths(padding)):
            relaid[place] = depth
        direct = as_arguments(log, arguments, pad, padding, held=definition == "lru")
        assert relaid == stack_depths(direct, definition)[: len(depths)]


BY_HAND = {  # inputs, left, right, third, returned
    "nothing at all": (0, [], [], {}, []),
    "nothing is read": (3, [], [], {}, [2, 0]),
    "third operands": (4, [0, 4], [1, 3], {0: 2, 1: 0}, [5]),
    "one input, twice and three times": (2, [1, 0], [1, 0], {1: 0}, []),
    "again as the last of three": (3, [2], [1], {0: 2}, [0]),
    "no operand": (2, [-1, 1], [-1, 2], {}, [0, 3]),
    "returned unread, and read": (5, [3, 1], [-1, 3], {}, [4, 3, 0, 5]),
}


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND)
def test_both_forms_agree_by_hand(case, definition):
    inputs, left, right, third, returned = case
    log = Log(inputs, array("i", left), array("i", right), third, returned, array("i", range(1, inputs + 1)))
    depths = stack_depths(log, definition)
    forms = [engine.first_reads(log, depths, definition) for engine in (relaying, fast_first_reads)]
    for pad in range(3):
        assert same(*forms, [range(inputs)[::-1], [], []], pad)


@pytest.mark.parametrize("name", ["places", "inputs", "instructions", "touched", "unread"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_another_form_would_be_seen(definition, name):
    log = Log(4, array("i", [0, 1]), array("i", [1, 2]), {}, [3, 5], array("i", [4, 3, 2, 1]))
    depths = stack_depths(log, definition)
    first, right = (engine.first_reads(log, depths, definition) for engine in (relaying, fast_first_reads))
    arguments = [[3], [2, 1], [0]]
    assert same(first, right, arguments, 1)
    found = getattr(right, name)
    wrong = np.append(found, 0) if not len(found) else np.r_[found[:-1], found[-1] ^ 1]
    assert not same(first, dataclasses.replace(right, **{name: wrong}), arguments, 1)


# --- the experiment ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("engram", "tiny"), ("kv-bank", "tiny"), ("engram", "v41-flash")], ids="-".join)
def workload(request):
    model, preset = request.param
    config = toy_config(model, 4, preset)
    config = config.replace(table_size_per_order=(20,) * (config.max_ngram - 1), compressed_size=None)
    config = config.replace(heads=1) if preset == "v41-flash" else config
    return make_workload(model, config, HashPlan.build(config, compressed_size=50, pad_compressed=2), TEXT, seed=5)


def starts(workload):
    rows = len(workload.table)
    hot = most_frequent(workload.row_indices(), 3)
    named = [Layout.variant(name, rows, hot) for name in VARIANTS]
    half = Layout("half above, prefetched", rows, frozenset(range(0, rows, 2)), prefetch=True)
    wrong = Layout("mispredicted", rows, frozenset(), prefetch=True, wrong={(0, 0): 5, (2, 1): 0})
    return [*named, half, wrong]


@pytest.fixture(scope="module")
def recorded(workload):
    """What a program does and how it is laid down, by boundary, name of a layout, padding, and `hold`.

    No definition of the depth has a part in it, so that all of them price the same few recordings.
    """
    layouts = {layout.name: layout for layout in starts(workload)}

    @functools.cache
    def found(boundary, name, padding, hold):
        program = build(workload, boundary, layouts[name], padding, hold=hold)
        return program, record(program.function, program.arguments, program.kinds)

    return found


def cost_of(reads, size):
    return sum(count * read_price(depth, size) for depth, count in reads.items())


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_variant_is_the_direct_run(workload, recorded, boundary, definition):
    """Variants without copies come from one recording, those with copies from their own at another padding."""
    by_schedule = {}
    for layout in starts(workload):
        schedule = layout.name if layout.prefetch else ""
        if schedule not in by_schedule:
            program, recording = recorded(boundary, layout.name, 0, True)
            table = TableInputs(recording, program, layout)
            by_schedule[schedule] = (recording.trace(definition).depths, Relaid(recording, table, definition))
        depths, relaid = by_schedule[schedule]
        start = relaid.lay(layout)
        for padding in PADDINGS:
            for place, depth in zip(relaid.first.places, start.depths(padding)):
                depths[place] = depth
            direct = recorded(boundary, layout.name, padding, definition == "lru")[1]
            want = direct.trace(definition, compiled=True)
            assert depths == want.depths
            counts = want.tally()
            assert relaid.reads_by_kind == {kind: reads.total() for kind, reads in counts.items()}
            for size in (1, 4):
                costs = {kind: cost_of(reads, size) for kind, reads in counts.items()}
                assert relaid.cost_by_kind(start, padding, size) == costs


@pytest.mark.parametrize("definition", [*definitions.DEFINITIONS[2:], FLOOR])
@pytest.mark.parametrize("boundary", BOUNDARIES[::2])  # a block has the layer in it
def test_every_variant_of_other_definitions_is_the_direct_run(workload, recorded, boundary, definition):
    """Arguments with addresses of their own, and the floor; rows below the padding are dearer under all of them."""
    priced_by_schedule = {}
    totals = {}
    for layout in starts(workload):
        schedule = layout.name if layout.prefetch else ""
        if schedule not in priced_by_schedule:
            program, recording = recorded(boundary, layout.name, 0, True)
            inputs = TableInputs(recording, program, layout)
            priced_by_schedule[schedule] = Readdressed(recording, inputs, definition)
        priced = priced_by_schedule[schedule]
        for padding in PADDINGS:
            costs = priced.cost_by_kind(priced.lay(layout), padding, 1)
            totals[layout.name, padding] = sum(costs.values())
            direct = recorded(boundary, layout.name, padding, False)[1]
            if definition == FLOOR:
                wanted = fast_floor.floor(*fast_floor.waits(direct.log))
                assert wanted * (1 - 1e-4) <= costs[FLOOR] <= wanted
            else:
                want = direct.trace(definition, compiled=True).tally()
                assert costs == {kind: cost_of(reads, 1) for kind, reads in want.items()}
                assert priced.reads_by_kind == {kind: reads.total() for kind, reads in want.items()}
    if boundary == "lookup":  # else a small table above pushes everything else down, and that weighs as much
        assert totals["offload_naive", PADDINGS[1]] > totals["resident", PADDINGS[1]]


@pytest.mark.parametrize("definition", [*definitions.DEFINITIONS, FLOOR])
def test_without_numba_prices_are_the_same(workload, recorded, definition, monkeypatch):
    """Every price that a sweep finds; of layouts with a hot tier, so that rows lie on both sides of the padding."""
    layout = starts(workload)[3]
    program, recording = recorded("lookup", layout.name, 0, True)
    table = TableInputs(recording, program, layout)

    def prices():
        priced = (Relaid if definition in DEFINITIONS else Readdressed)(recording, table, definition)
        start = priced.lay(layout)
        costs = [priced.cost_by_kind(start, padding, size) for padding in PADDINGS for size in (1, 3)]
        return costs, priced.reads_by_kind, priced.working_set

    compiled = prices()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "engram_toy.fast.definitions")
    assert prices() == compiled


def test_another_place_gives_another_trace(workload):
    """The comparison above would tell: rows in the wrong order are charged otherwise."""
    naive = Layout.variant("offload_naive", len(workload.table))
    program = build(workload, "lookup", naive, padding=0)
    recording = record(program.function, program.arguments, program.kinds)
    first = first_reads(recording.log, recording.trace().depths)
    rows = range(recording.log.inputs)
    right = first.lay([[], [], rows], pad=1).depths(10)
    assert max(right) < min(first.lay([[], [], rows], pad=1).depths(10_000))
    assert first.lay([[], [], rows[::-1]], pad=1).depths(10) != right
    assert first.lay([rows, [], []], pad=1).depths(10) == [depth - 10 for depth in right]


def test_an_unknown_definition_is_refused():
    with pytest.raises(ValueError, match="unknown definition"):
        first_reads(Log(0, array("i"), array("i")), [], "fifo")


def test_what_was_found_does_not_change_and_is_small():
    """There is one for every layout of a sweep: no dictionary in any."""
    first = first_reads(Log(2, array("i", [0]), array("i", [1])), [2, 1])
    for found, name in ((first, "touched"), (first.lay([[0, 1]], 0), "buried")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(found, name, [])
        assert not hasattr(found, "__dict__")
