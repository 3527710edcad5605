"""The experiment's rules: equal outputs, padding that buries only while it is held, nothing escapes."""

from __future__ import annotations

import json
import math
import random

import pytest

from bench.harness.pricing import output_digest
from bench.harness.workloads import make_workload, toy_config
from engram_ref.hashing import HashPlan
from engram_toy.bytedmd import trace, traced_eval
from engram_toy.layouts import VARIANTS, Layout, most_frequent
from engram_toy.programs import BOUNDARIES, MODELS, build
from tests.toy.oracle import oracle_trace

TOKENS, WIDTH, PADDING = 6, 4, 5000


@pytest.fixture(scope="module", params=MODELS)
def workload(request):
    config = toy_config(request.param, WIDTH).replace(table_size_per_order=(20, 20))
    plan = HashPlan.build(config, compressed_size=50, pad_compressed=2)
    ids = [7, 8, 7, 8, 49, 0]
    return make_workload(request.param, config, plan, ids[:TOKENS], seed=5)


def layouts(workload):
    hot = most_frequent(workload.row_indices(), 3)
    return [Layout.variant(name, len(workload.table), hot) for name in VARIANTS]


def run(workload, boundary, layout, padding=PADDING, hold=True, definition="lru"):
    program = build(workload, boundary, layout, padding, hold)
    return trace(program.function, program.arguments, program.kinds, definition)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_all_variants_give_the_same_bits_traced_and_untraced(workload, boundary):
    digests = set()
    for layout in layouts(workload):
        program = build(workload, boundary, layout, PADDING)
        digests.add(output_digest(program.function(*program.arguments)))
        digests.add(output_digest(traced_eval(program.function, program.arguments)[1]))
    assert len(digests) == 1


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_nothing_escapes_but_indices_and_branches(workload, boundary):
    escapes = []
    for layout in layouts(workload):
        traced = run(workload, boundary, layout)
        assert traced.untracked == 0  # every value of the output is still tracked
        escapes.append(traced.escapes)
    lookups = sum(map(len, workload.row_indices()))
    assert escapes[0].get("index", 0) == (0 if boundary == "lookup" else lookups)
    assert set(escapes[0]) <= {"index", "bool"}
    assert all(e == escapes[0] for e in escapes)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_reads_by_kind(workload, boundary):
    """The variants differ in reads only by the prefetch's copies; the padding is never read."""
    resident, naive, prefetch, hot = (
        {kind: sum(counts.values()) for kind, counts in run(workload, boundary, layout).tally().items()}
        for layout in layouts(workload)
    )
    assert resident == naive == hot
    assert resident["pad"] == 0
    copies = sum(map(len, workload.row_indices())) * len(workload.table[0])
    assert prefetch.pop("staged row") == copies
    assert {k: v for k, v in prefetch.items() if k != "staged row"} == resident


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_literal_oracle_reads_the_same(workload, boundary):
    """The oracle runs every loop value by value; the tracer logs inner products at once."""
    for layout in layouts(workload):
        program = build(workload, boundary, layout, padding=7)
        depths, _ = traced_eval(program.function, program.arguments)
        assert depths == oracle_trace(program.function, program.arguments)


def first_row_depth(workload, variant, padding, hold=True):
    layout = Layout.variant(variant, len(workload.table))
    traced = run(workload, "lookup", layout, padding, hold)
    return traced.depths[0]


@pytest.mark.parametrize("padding", [0, 10, 1000, 20_000])
def test_padding_buries_the_first_bank_read(workload, padding):
    shallow = first_row_depth(workload, "resident", 0)
    assert first_row_depth(workload, "resident", padding) == shallow
    assert first_row_depth(workload, "offload_naive", padding) == shallow + padding
    assert first_row_depth(workload, "offload_prefetch", padding) == shallow + padding


def test_padding_that_is_not_returned_buries_nothing(workload):
    held, dropped = (first_row_depth(workload, "offload_naive", PADDING, hold) for hold in (True, False))
    assert held == dropped + PADDING
    assert dropped == first_row_depth(workload, "resident", 0)


def test_the_second_definition_buries_by_position_alone(workload):
    layout = Layout.variant("offload_naive", len(workload.table))
    traced = run(workload, "lookup", layout, hold=False, definition="two-stack")
    first_row = workload.row_indices()[0][0]
    assert traced.depths[0] == PADDING + first_row * len(workload.table[0]) + 1


def test_prefetching_costs_more_than_it_saves(workload):
    _, naive, prefetch, _ = (run(workload, "layer", layout).cost() for layout in layouts(workload))
    assert prefetch > naive


def test_hot_rows_are_cheaper_than_none_and_dearer_than_all(workload):
    resident, naive, _, hot = (run(workload, "lookup", layout).cost() for layout in layouts(workload))
    assert resident < hot < naive


def test_rows_that_are_not_named_are_not_read(workload):
    """Poison: every other row is NaN, and no NaN comes out."""
    named = {row for position in workload.row_indices() for row in position}
    poisoned = [row if n in named else [math.nan] * len(row) for n, row in enumerate(workload.table)]
    poisoned_workload = type(workload)(**{**vars(workload), "table": poisoned})
    for layout in layouts(workload):
        clean, dirty = (build(w, "block", layout, 10) for w in (workload, poisoned_workload))
        digest = output_digest(dirty.function(*dirty.arguments))
        assert digest == output_digest(clean.function(*clean.arguments))


def test_layouts_split_and_join():
    table = [[n, n + 0.5] for n in range(10)]
    for layout in (Layout.variant(name, 10, hot=[3, 7]) for name in VARIANTS):
        above, below = layout.split(table)
        assert len(above) + len(below) == 10
        assert layout.join(above, below) == table
    assert Layout.variant("offload_hot", 10, [3, 7]).split(table)[0] == [[3, 3.5], [7, 7.5]]


def test_unknown_names_are_refused(workload):
    with pytest.raises(ValueError, match="use one of resident"):
        Layout.variant("offload", 3)
    with pytest.raises(ValueError, match="use one of lookup"):
        build(workload, "model", Layout.variant("resident", len(workload.table)), 0)


def test_most_frequent_breaks_ties_by_number():
    assert most_frequent([[5, 2], [2, 9], [9, 5], [1, 2]], 3) == [2, 5, 9]


def test_a_workload_is_the_same_every_time(workload):
    config = toy_config(workload.model, WIDTH).replace(table_size_per_order=(20, 20))
    plan = HashPlan.build(config, 50, 2)
    again = make_workload(workload.model, config, plan, workload.compressed_ids, seed=5)
    other = make_workload(workload.model, config, plan, workload.compressed_ids, seed=6)
    assert again == workload != other
    assert json.loads(plan.to_json()) == workload.plan
    assert random.Random(5).random() == 0.6229016948897019  # the generator that Python promises to keep
