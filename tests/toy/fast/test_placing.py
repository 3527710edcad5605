"""Rows beside the weights of a model, and prefetched rows: integer by integer what the value-level tracer says."""

from itertools import product

import numpy as np
import pytest

pytest.importorskip("numba", reason="row prices are compiled: pip install numba")

from engram_toy.bytedmd import bytedmd, trace
from engram_toy.fast import rows as rows_module
from engram_toy.fast.last_reads import RowReads
from engram_toy.fast.placing import as_read, prefetched, price_steps
from engram_toy.fast.rows import price_rows, row_price, start
from engram_toy.models.layouts import Layout
from engram_toy.tracer.stack import cumulative_price
from tests.toy.fast.test_rows import Stream

KINDS = {"none": None, "stands for its original": False, "for one use": True}


def program(stream: Stream, weights: int, held: bool, for_one_use: bool | None):
    """The same reads as a plain function of one value per row; all weights are read at the end of every step."""
    steps = [[row for layer in step for row in layer] for step in stream.order()]

    def function(block, table):
        table, staged = list(table), []

        def stage(step):
            for row in steps[step] if step < len(steps) else []:
                copy = +table[row]
                if for_one_use:
                    staged.append(copy)
                else:
                    table[row] = copy

        for number, step in enumerate(steps):
            if for_one_use is not None:
                for ahead in (0, 1) if number == 0 else (number + 1,):
                    stage(ahead)
            for row in step:
                _ = +(staged.pop(0) if for_one_use else table[row])
            for weight in block:
                _ = +weight
        return (block, table) if held else block

    return function, ([1.0] * weights, [1.0] * stream.rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [True, False], ids=["held live", "compacted"])
def test_every_schedule_is_what_the_tracer_says(held, kind):
    """Weights as bytes between the steps; of compacted rows some die in between, which no weight sees."""
    for seed, weights in product(range(25), (0, 1, 17)):
        stream, for_one_use = Stream(seed), KINDS[kind]
        reads = stream.reads()
        events = as_read(reads, held) if for_one_use is None else prefetched(reads, held, for_one_use)
        function, arguments = program(stream, weights, held, for_one_use)
        run = trace(function, arguments, ["weight", "row"])
        depths = [depth for depth, kind in zip(run.depths, run.kinds) if run.kind_names[kind] != "weight"]
        found = price_steps(events, start(reads, held), 8, [[8 * weights], [0]])
        prices = [cumulative_price(8 * depth) - cumulative_price(8 * depth - 8) for depth in depths]
        assert int(found.prices[0].sum()) == sum(prices), (seed, weights)
        assert int(found.prices[1].sum()) <= sum(prices)
        if not weights:
            assert int(found.prices[1].sum()) == bytedmd(function, arguments, 8)


@pytest.mark.parametrize("held", [True, False], ids=["held live", "compacted"])
def test_weights_that_take_turns_and_weights_that_no_step_reads(held):
    """Each step reads one of four parts: above a row of g steps ago lie g parts; above an unread one all, idle too."""
    parts, size, idle = 4, 3, 11
    for seed in range(25):
        stream = Stream(seed)
        reads = stream.reads()
        steps = [[row for layer in step for row in layer] for step in stream.order()]

        def function(weights, idle, table, steps=steps):
            for number, step in enumerate(steps):
                for row in step:
                    _ = +table[row]
                for weight in weights[number % parts]:
                    _ = +weight
            return (weights, idle, table) if held else (weights, idle)

        weights = [[1.0] * size for _ in range(parts)]
        run = trace(function, (weights, [1.0] * idle, [1.0] * stream.rows), ["weight", "idle", "row"])
        rows = [depth for depth, kind in zip(run.depths, run.kinds) if run.kind_names[kind] == "row"]
        above = [*(8 * size * n for n in range(1, parts + 1)), 8 * (size * parts + idle)]
        found = price_steps(as_read(reads, held), start(reads, held), 8, [above, [0]])
        assert int(found.prices[0].sum()) == sum(cumulative_price(8 * d) - cumulative_price(8 * d - 8) for d in rows)


def test_without_a_prefetch_it_is_the_price_of_the_rows():
    for seed, held in product(range(20), (True, False)):
        stream = Stream(seed)
        reads = stream.reads()
        found = price_steps(as_read(reads, held), start(reads, held), 264, [[0], [10**6], [10**12]])
        for prices, nbytes in zip(found.prices, (0, 10**6, 10**12)):
            assert prices.tolist() == price_rows(reads, start(reads, held), 264, nbytes).steps.tolist()
        rows = [{row for layer in step for row in layer} for step in stream.order()]
        assert found.fresh.tolist() == [len(step) for step in rows]


def test_the_toys_prefetch_is_a_copy_for_one_use():
    """The same schedule as the programs of the toy: position by position, one ahead, the original stays."""
    for seed in range(20):
        stream = Stream(seed, layers=1)
        stream.step, stream.tokens = 1, len(stream.tables[0])
        reads, indices = stream.reads(), stream.tables[0].tolist()
        layout = Layout("offload_prefetch", stream.rows, frozenset(), prefetch=True)

        def lookups(table, layout=layout, indices=indices):
            for position in layout.lookups(table, indices):
                for (value,) in position:
                    _ = +value
            return table

        price = bytedmd(lookups, ([[1.0] for _ in range(stream.rows)],), 8)
        found = price_steps(prefetched(reads, True, for_one_use=True), start(reads, True), 8, [[0]])
        assert int(found.prices.sum()) == price


def test_a_copy_that_stands_for_its_original_never_pays():
    """It costs a unit a byte and copy at least: the proposition. For one use: `test_copies`."""
    stream = Stream(4)
    for held in (True, False):
        reads = stream.reads()
        begin = start(reads, held)
        plain, copied = (
            int(price_steps(events, begin, 8, [[0]]).prices.sum())
            for events in (as_read(reads, held), prefetched(reads, held, for_one_use=False))
        )
        assert copied >= plain + 8 * len(reads.links)


def test_prices_beyond_the_closed_form_are_exact():
    """Rows that straddle a root, where a sum over all bytes would leave 64 bits, up to 2^51 bytes."""
    for root in (3, 100, 2**20 - 1, 1_300_001, 2**25):
        for over, row_bytes in product((-300, -1, 0, 1, 7, 263, 264, 300), (1, 8, 264)):
            deepest = root * root + over
            if deepest >= row_bytes:
                wanted = cumulative_price(deepest) - cumulative_price(deepest - row_bytes)
                assert row_price(np.int64(deepest), row_bytes) == wanted, (root, over, row_bytes)


def test_bad_numbers_are_refused():
    reads = Stream(1).reads()
    with pytest.raises(ValueError, match="up to 2\\^51"):
        price_steps(as_read(reads, True), start(reads, True), 8, [[0], [0, 2**51]])
    for row_bytes, table_rows in ((2**20 + 1, 1), (2**20, 2**29)):  # the latter's price is beyond 2^63
        few = RowReads(np.full(2**19, -1, np.int32), np.array([0]), table_rows, 1)
        with pytest.raises(ValueError, match="at most 2\\^20 bytes, and so few"):
            rows_module.check_depth(few, row_bytes, 0)
    many = RowReads(np.broadcast_to(np.int32(-1), 2**30), np.array([0]), 1, 1)
    with pytest.raises(ValueError, match="3,221,225,472 events"):
        prefetched(many, True, for_one_use=True)
    assert rows_module.STORE not in reads.links
