"""Prices of whole rows equal, integer by integer, what the value-level tracer says of the same reads."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

pytest.importorskip("numba", reason="row prices are compiled: pip install numba")

from engram_toy.bytedmd import bytedmd, trace, traced_eval
from engram_toy.fast import rows as rows_module
from engram_toy.fast.last_reads import Linker
from engram_toy.fast.rows import price_rows, price_starts, start
from engram_toy.tracer.stack import cumulative_price, read_price


class Stream:
    """Random reads of a small table with several layers, columns and steps."""

    def __init__(self, seed: int, layers: int | None = None) -> None:
        draw = random.Random(seed)
        self.layers, self.columns, self.step = layers or draw.choice([1, 2]), draw.randint(1, 3), draw.choice([1, 2, 4])
        self.tokens = self.step * draw.randint(1, 9)
        sizes = [[draw.randint(1, 40) for _ in range(self.columns)] for _ in range(self.layers)]
        self.bounds = [np.cumsum([0, *layer]).tolist() for layer in sizes]
        self.tables = [
            np.array(
                [[draw.randrange(b[c], b[c + 1]) for c in range(self.columns)] for _ in range(self.tokens)], np.int32
            )
            for b in self.bounds
        ]
        self.before = np.cumsum([0, *(b[-1] for b in self.bounds)]).tolist()
        self.rows = self.before[-1]
        self.hot = sorted(draw.sample(range(self.rows), draw.randint(0, self.rows)))

    def reads(self):
        linker = Linker(self.tokens, self.layers, self.columns, self.step)
        for table, bounds in zip(self.tables, self.bounds):
            linker.add_layer(table, bounds)
        return linker.finish()

    def order(self) -> list[list[list[int]]]:
        """Rows by step and layer, in the order of reading, numbered over all layers."""
        return [
            [
                [self.before[layer] + int(row) for row in self.tables[layer][at : at + self.step].ravel()]
                for layer in range(self.layers)
            ]
            for at in range(0, self.tokens, self.step)
        ]

    def flat(self) -> list[int]:
        return [row for step in self.order() for layer in step for row in layer]


def traced(stream: Stream, held: bool, hot=()):
    """The same reads as a plain function: each row one value, the last argument value on top."""
    laid = [row for row in range(stream.rows) if row not in hot] + list(hot)
    place = {row: at for at, row in enumerate(laid)}

    def function(table):
        for row in stream.flat():
            _ = +table[place[row]]
        return table if held else None

    return function, ([1.0] * stream.rows,)


@pytest.mark.parametrize("held", [True, False], ids=["held live", "compacted"])
def test_rows_and_values_agree(held):
    for seed in range(60):
        stream, row_bytes = Stream(seed), 1 + 131 * (seed % 3)
        for hot in ((), stream.hot):
            function, arguments = traced(stream, held, set(hot) and hot)
            reads = stream.reads()
            begin = start(reads, held, np.array(hot, np.int64))
            priced = price_rows(reads, begin, row_bytes, keep_depths=True)
            depths, _ = traced_eval(function, arguments)
            assert (priced.depths // row_bytes).tolist() == depths
            assert priced.total == bytedmd(function, arguments, row_bytes) == int(priced.cost.sum())
            assert priced.by_value == sum(row_bytes * read_price(depth * row_bytes) for depth in depths)


@pytest.mark.parametrize("held", [True, False], ids=["held live", "compacted"])
def test_many_starts_cost_what_each_costs_by_itself(held):
    for seed in range(40):
        stream, row_bytes = Stream(seed), 1 + 131 * (seed % 3)
        reads = stream.reads()
        begins = [start(reads, held, np.array(hot, np.int64)) for hot in (stream.hot, (), stream.hot[::2])]
        for begin, priced in zip(begins, price_starts(reads, begins, row_bytes), strict=True):
            alone = price_rows(reads, begin, row_bytes)
            assert (priced.total, priced.by_value) == (alone.total, alone.by_value)
            assert np.array_equal(priced.reads, alone.reads) and np.array_equal(priced.cost, alone.cost)


def test_starts_of_both_kinds_are_refused():
    reads = Stream(0).reads()
    with pytest.raises(ValueError, match="held is False here, True before"):
        list(price_starts(reads, [start(reads, True), start(reads, False)], 1))


def weighted(stream: Stream, weights: int):
    """A model of one or two layers with a table each; half of the weights are read behind each layer."""
    half = -(-weights // stream.layers)

    def function(block, table):
        for step in stream.order():
            for layer, rows in enumerate(step):
                for row in rows:
                    _ = +table[row]
                for weight in block[layer * half : (layer + 1) * half]:
                    _ = +weight
        return table, block

    return function, ([1.0] * weights, [1.0] * stream.rows)


def test_weights_between_steps():
    for seed, weights in product(range(30), (1, 2, 17)):
        stream = Stream(seed)
        reads = stream.reads()
        priced = price_rows(reads, start(reads, held=True), 8, weights * 8, keep_depths=True)
        function, arguments = weighted(stream, weights)
        run = trace(function, arguments, ["weight", "row"])
        is_row = [run.kind_names[kind] == "row" for kind in run.kinds]
        assert (priced.depths // 8).tolist() == [depth for depth, row in zip(run.depths, is_row) if row]


def test_step_prices_add_up():
    stream = Stream(5)
    reads = stream.reads()
    priced = price_rows(reads, start(reads, held=True), 264, keep_depths=True)
    prices = [cumulative_price(d) - cumulative_price(d - 264) for d in priced.depths.tolist()]
    per_step = [sum(prices[at : at + reads.step_reads]) for at in range(0, len(prices), reads.step_reads)]
    assert priced.steps.tolist() == per_step and priced.total == sum(per_step)
    assert int(priced.reads.sum()) == len(prices) and int(priced.reads[0].sum()) == len(reads.rows)


def test_frequency_and_rows():
    stream = Stream(7)
    reads, flat = stream.reads(), stream.flat()
    assert reads.rows.tolist() == sorted(set(flat))
    assert reads.frequency().tolist() == [flat.count(row) for row in reads.rows]
    assert reads.ranked().tolist() == sorted(set(flat), key=lambda row: (-flat.count(row), row))
    assert len({flat.count(row) for row in flat}) < len(reads.rows), "of equals the smaller row comes first"


def test_largest_numbers_are_exact():
    """Rows at the far end of a 2^50-byte stack: the price stays within 64 bits, the root is not rounded."""
    row_bytes = 256
    table_rows = 2**50 // row_bytes
    rows = np.array([[0], [table_rows - 1], [0], [1]], np.int64)
    linker = Linker(4, 1, 1)
    linker.add_layer(rows % 1000, [0, 1000])
    reads = rows_module.RowReads(linker.finish().links, np.array([0, 1, table_rows - 1]), table_rows, 1)
    begin = rows_module.Start(np.arange(3, dtype=np.int32), np.array([table_rows - 3, table_rows - 3, 0]), True)
    priced = price_rows(reads, begin, row_bytes, keep_depths=True)
    depths = priced.depths.tolist()
    assert max(depths) == 2**50
    assert priced.total == sum(cumulative_price(d) - cumulative_price(d - row_bytes) for d in depths)
    roots = [rows_module._ceil_root(k * k + d) for k in (1, 2**10, 2**20 + 1) for d in (-1, 0, 1)]
    assert roots == [m for k in (1, 2**10, 2**20 + 1) for m in (k if k > 1 else 0, k, k + 1)]


def test_wrong_candidates_are_seen():
    """The comparison tells layouts apart: each of these would be priced otherwise."""
    stream = Stream(3)
    reads = stream.reads()
    right = price_rows(reads, start(reads, held=True), 264).total
    reversed_rank = rows_module.Start(start(reads, True).rank[::-1].copy(), start(reads, True).buried, True)
    assert price_rows(reads, reversed_rank, 264).total != right
    assert price_rows(reads, start(reads, held=False), 264).total != right
    assert price_rows(reads, start(reads, held=True), 264, between_steps=264).total != right


def test_empty_stream():
    linker = Linker(0, 1, 2)
    linker.add_layer(np.empty((0, 2), np.int32), [0, 3, 5])
    reads = linker.finish()
    for held in (True, False):
        assert price_rows(reads, start(reads, held), 8).total == 0


def test_non_contiguous_rows():
    rows = np.arange(40).reshape(4, 10)[:, ::5] % 3 + np.array([0, 3])
    linker = Linker(4, 1, 2)
    linker.add_layer(rows, [0, 3, 6])
    assert linker.finish().rows.tolist() == sorted(set(rows.ravel().tolist()))


@pytest.mark.parametrize(
    "rows, bounds, said",
    [
        ([[0, 5], [1, 2]], [0, 3, 6], "row 2 of token 1 lies outside column 1, 3 .. 5"),
        ([[0, 5], [-1, 3]], [0, 3, 6], "row -1 of token 1"),
        ([[0, 5, 1], [1, 3, 1]], [0, 3, 6], "this stream needs"),
        ([[0, 5], [1, 3]], [0, 3], "with 2 bounds"),
    ],
)
def test_bad_rows_are_refused(rows, bounds, said):
    linker = Linker(2, 1, 2)
    with pytest.raises(ValueError, match=said):
        linker.add_layer(np.array(rows), bounds)


def test_bad_streams_are_refused():
    with pytest.raises(ValueError, match="no whole number of steps of 4"):
        Linker(6, 1, 2, tokens_per_step=4)
    with pytest.raises(ValueError, match="at most 2,147,483,647"):
        Linker(10**8, 2, 24)
    with pytest.raises(ValueError, match="0 of 1 layers"):
        Linker(2, 1, 2).finish()
    stream = Stream(1)
    reads = stream.reads()
    with pytest.raises(ValueError, match="must ascend"):
        start(reads, True, np.array([3, 3]))
    with pytest.raises(ValueError, match="must ascend"):
        start(reads, True, np.array([reads.table_rows]))
    with pytest.raises(ValueError, match="up to 2\\^51"):
        price_rows(reads, start(reads, True), 264, between_steps=2**51)
