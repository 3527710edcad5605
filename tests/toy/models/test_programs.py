"""The experiment's rules: equal outputs, padding that buries only while it is held, nothing escapes."""

import dataclasses
import json
import math
import random

import pytest

from bench.price.job import output_digest
from bench.price.models import make_workload, toy_config
from engram_ref.hashing import HashPlan
from engram_toy.bytedmd import record, trace, traced_eval
from engram_toy.fp8 import dequantise
from engram_toy.models.attention import attention
from engram_toy.models.layouts import VARIANTS, Layout, most_frequent
from engram_toy.models.programs import BOUNDARIES, build
from tests.toy.oracle import oracle_trace

TOKENS, WIDTH, PADDING = 6, 4, 5000


CASES = [("engram", "tiny"), ("kv-bank", "tiny"), ("engram", "v41-flash")]
# ByteDMD prices of the variants, in their order: they do not depend on the machine, and are not to move.
PRICES = {
    ("engram", "tiny", "lookup"): [6443, 24955, 30430, 24219],
    ("engram", "tiny", "layer"): [140822, 154975, 168323, 154385],
    ("engram", "tiny", "block"): [150458, 164709, 178437, 164109],
    ("kv-bank", "tiny", "lookup"): [6571, 25704, 31097, 24203],
    ("kv-bank", "tiny", "layer"): [12568, 32456, 38070, 31022],
    ("kv-bank", "tiny", "block"): [22058, 41958, 47567, 40503],
}


def make_config(model, preset):
    """The toy's geometry with a smaller table, for any vocabulary; of the many wide rows of V4.1, one per order."""
    config = toy_config(model, WIDTH, preset)
    config = config.replace(table_size_per_order=(20,) * (config.max_ngram - 1), compressed_size=None)
    return config.replace(heads=1) if preset == "v41-flash" else config


def workload_of(model, preset, seed=5):
    config = make_config(model, preset)
    plan = HashPlan.build(config, compressed_size=50, pad_compressed=2)
    return make_workload(model, config, plan, [7, 8, 7, 8, 49, 0], seed)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """Model and preset."""
    return request.param


@pytest.fixture(scope="module")
def workload(case):
    return workload_of(*case)


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
    assert prefetch.pop("staged row") == resident["row"]  # a scale is copied once and read with each of its codes
    assert prefetch == {**resident, "row": copies}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_literal_oracle_reads_the_same(workload, boundary):
    """The oracle runs every loop value by value; the tracer logs inner products at once."""
    short = dataclasses.replace(workload, compressed_ids=workload.compressed_ids[:3], hidden=workload.hidden[:3])
    for layout in layouts(short):
        program = build(short, boundary, layout, padding=7)
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


@pytest.mark.parametrize(("model", "preset", "boundary"), PRICES)
def test_prices_do_not_move(model, preset, boundary):
    workload = workload_of(model, preset)
    prices = [run(workload, boundary, layout).cost() for layout in layouts(workload)]
    assert prices == PRICES[model, preset, boundary]


def test_scaled_rows_are_read_byte_by_byte():
    """In the V4.1 form a row has as many numbers as bytes; each code is read once, each scale with 32 codes."""
    workload, config = workload_of("engram", "v41-flash"), make_config("engram", "v41-flash")
    assert {len(row) for row in workload.table} == {config.row_bytes()} == {33}
    traced = run(workload, "lookup", layouts(workload)[0])
    assert sum(traced.tally()["row"].values()) == TOKENS * config.columns * 2 * config.row_width
    values = [value for row in workload.table for value in dequantise(row)]
    assert max(map(abs, values)) <= 7 and len(set(values)) > 200 and min(values) < 0 < max(values)


def test_the_block_of_v41_attends_over_the_stream_after_the_layer():
    """It adds the stream itself, so that the block must not add it again."""
    workload = workload_of("engram", "v41-flash")
    layer, block = (build(workload, boundary, layouts(workload)[0], 0) for boundary in ("layer", "block"))
    (stream, _), (out, _) = (program.function(*program.arguments) for program in (layer, block))
    assert out == attention(stream, workload.attention)
    assert stream != workload.hidden


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
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.rows = 11


def staged_reads(layout, indices):
    """Which kind of row each read of a two-column lookup is of, by the row's number: values are told by their size."""
    table = [[10 * n, 10 * n + 1] for n in range(6)]

    def function(above, below):
        return [[[+x for x in row] for row in rows] for rows in layout.lookups(layout.join(above, below), indices)]

    above, below = layout.split(table)
    recording = record(function, (above, below), ["row", "row"])
    order = [row[0] // 10 for row in (*below, *above) for _ in row]  # of the inputs' numbers: the last argument first
    reads = [order[v] if v < recording.log.inputs else "staged" for v in recording.log.left]
    assert recording.result == [[table[row] for row in position] for position in indices]
    return reads[::2], recording


def test_a_misprediction_copies_the_row_that_it_names_and_reads_the_right_one_late():
    """Position by position: the copies of the next one come before the reads of this one."""
    indices = [[0, 1], [2, 3], [4, 0]]
    right = Layout("prefetched", 6, frozenset([3]), prefetch=True)
    copies = [0, 1, 2, "staged", "staged", 4, 0, "staged", 3, "staged", "staged"]
    assert staged_reads(right, indices)[0] == copies  # row 3 lies above: not copied
    wrong = Layout("mispredicted", 6, frozenset([3]), prefetch=True, wrong={(0, 1): 5, (1, 1): 2, (2, 0): 3})
    reads, recording = staged_reads(wrong, indices)
    assert reads == [0, 5, 2, 2, "staged", 1, 3, 0, "staged", 3, 4, "staged"]
    assert recording.kind_names == ("row", "activation", "staged row")
    labelled = [kind for kind in recording.kind_of_value if kind == 2]
    assert len(labelled) == 2 * 3  # rows 0, 2 and 0 again; what is copied in vain has no use to be named after


def test_naive_lookups_copy_nothing_and_one_position_needs_no_next():
    indices = [[0, 1], [2, 3]]
    assert staged_reads(Layout("naive", 6, frozenset()), indices)[0] == [0, 1, 2, 3]
    assert staged_reads(Layout("one", 6, frozenset(), prefetch=True), [[4, 5]])[0] == [4, 5, "staged", "staged"]


def test_a_model_that_the_preset_does_not_have_is_refused():
    with pytest.raises(ValueError, match="model kv-bank has no form of preset v41-flash: use engram"):
        toy_config("kv-bank", WIDTH, "v41-flash")


def test_unknown_names_are_refused(workload):
    with pytest.raises(ValueError, match="use one of resident"):
        Layout.variant("offload", 3)
    with pytest.raises(ValueError, match="use one of lookup"):
        build(workload, "model", Layout.variant("resident", len(workload.table)), 0)


def test_most_frequent_breaks_ties_by_number():
    assert most_frequent([[5, 2], [2, 9], [9, 5], [1, 2]], 3) == [2, 5, 9]


def test_a_workload_is_the_same_every_time(case, workload):
    assert workload_of(*case) == workload != workload_of(*case, seed=6)
    plan = HashPlan.build(make_config(*case), 50, 2)
    assert json.loads(plan.to_json()) == workload.plan
    assert random.Random(5).random() == 0.6229016948897019  # the generator that Python promises to keep
