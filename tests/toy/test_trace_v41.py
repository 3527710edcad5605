"""The V4.1 layer under the tracer: nothing escapes, every code and scale is seen, and the price is the definition's."""

import random

import pytest

from engram_toy.bytedmd import trace, traced_eval
from engram_toy.fp8 import SCALE_BLOCK, numbers
from engram_toy.fusion.v41 import V41Weights, embed, engram_v41, signed_sqrt
from tests.toy.oracle import oracle_trace

TOKENS, COLUMNS, BLOCKS, COPIES, HIDDEN = 5, 3, 2, 2, 4
WIDTH = BLOCKS * SCALE_BLOCK
DEAD = [False, True, False, False, True]


@pytest.fixture(scope="module")
def layer():
    """Codes, scales, stream and weights of a small layer: rows are not shared between positions."""
    draw = random.Random(3)

    def matrix(rows, width):
        return [[draw.gauss(0, 1) for _ in range(width)] for _ in range(rows)]

    def stored_row():
        codes = [draw.randrange(0x7F) | draw.choice([0, 0x80]) for _ in range(WIDTH)]
        return codes + [draw.randrange(118, 122) for _ in range(BLOCKS)]

    rows = [numbers(stored_row()) for _ in range(TOKENS * COLUMNS)]
    weights = (matrix((COPIES + 1) * HIDDEN, COLUMNS * WIDTH), matrix(COPIES, HIDDEN), matrix(COPIES, HIDDEN))
    hidden = [matrix(COPIES, HIDDEN) for _ in range(TOKENS)]
    return [row[:WIDTH] for row in rows], [row[WIDTH:] for row in rows], hidden, weights


def lookups_of(codes, scales):
    rows = [c + s for c, s in zip(codes, scales)]  # lists are joined, values are not read
    return [rows[start : start + COLUMNS] for start in range(0, len(rows), COLUMNS)]


def run(codes, scales, hidden, weights):
    return engram_v41(hidden, lookups_of(codes, scales), V41Weights(*weights), DEAD)


def reads(traced):
    return {kind: sum(counts.values()) for kind, counts in traced.tally().items()}


def test_a_lookup_reads_each_code_once_and_each_scale_32_times(layer):
    codes, scales, _, _ = layer
    traced = trace(lambda c, s: embed(lookups_of(c, s)[0]), (codes, scales), ("code", "scale"))
    assert reads(traced) == {"code": COLUMNS * WIDTH, "scale": SCALE_BLOCK * COLUMNS * BLOCKS, "activation": 0}
    assert traced.escapes == {} and traced.untracked == 0
    assert traced.instructions == COLUMNS * WIDTH == len(traced.result)


def test_the_layer_reads_rows_and_projection_once_per_living_position(layer):
    traced = trace(run, layer, ("code", "scale", "stream", "weight"))
    alive = DEAD.count(False)
    gains = 2 * COPIES * HIDDEN
    counted = reads(traced)
    assert counted["code"] == counted["scale"] == alive * COLUMNS * WIDTH
    assert counted["weight"] == alive * (COPIES + 1) * HIDDEN * COLUMNS * WIDTH + gains
    assert counted["stream"] == alive * COPIES * HIDDEN * 4  # its square, the comparison, the sum at the end


def test_traced_and_untraced_are_the_same_and_nothing_escapes(layer):
    traced = trace(run, layer)
    assert traced.result == run(*layer)
    assert traced.untracked == 0
    assert set(traced.escapes) == {"bool"}  # floor and sign, per gate


def test_a_dead_position_passes_through_unread(layer):
    codes, scales, hidden, weights = layer
    without = [None if dead else rows for dead, rows in zip(DEAD, lookups_of(codes, scales))]
    traced = trace(lambda h, w: engram_v41(h, without, V41Weights(*w), DEAD), (hidden, weights))
    dead = [position for position in range(TOKENS) if DEAD[position]]
    assert [traced.result[position] for position in dead] == [hidden[position] for position in dead]
    assert traced.untracked == 0


def test_the_literal_oracle_reads_the_same(layer):
    assert traced_eval(run, layer)[0] == oracle_trace(run, layer)


@pytest.mark.parametrize(
    ("x", "root", "escapes"),
    [
        (4.0, 2.0, {"bool": 3}),
        (-4.0, -2.0, {"bool": 2}),
        (-1e-9, -1e-3, {"bool": 2}),
        (0.0, 1e-3, {"bool": 3, "float": 1}),
        (-0.0, -1e-3, {"bool": 3, "float": 1}),
    ],
)
def test_only_the_sign_of_a_zero_leaves_the_tracer(x, root, escapes):
    traced = trace(signed_sqrt, (x,))
    assert traced.result == pytest.approx(root, rel=1e-15)
    assert traced.escapes == escapes and traced.untracked == 0
    assert traced.depths.tolist() == oracle_trace(signed_sqrt, (x,))
