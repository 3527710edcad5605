"""Who owns which rows, how requests are sorted, and the bytes that follow; no process but this one."""

import itertools

import numpy as np
import pytest

from engram_ref.config import EngramConfig
from engram_ref.hashing.plan import HashPlan, LayerPlan
from engram_ref.sharding.plan import ShardPlan, Traffic
from engram_ref.sharding.routing import route_rows

PUBLISHED = ("demo", "paper-27b", "paper-40b", "v41-flash")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 24])
def test_whole_columns_where_they_divide(plans, ranks):
    layer = plans["v41-flash"].layers[0]
    plan = ShardPlan.of_layer(layer, ranks)
    assert plan.columns == 24 // ranks and plan.ranks == ranks and plan.rows == layer.rows
    for rank in range(ranks):
        owned = layer.primes[rank * plan.columns : (rank + 1) * plan.columns]
        assert plan.size(rank) == sum(owned) and plan.first(rank) == layer.offsets[rank * plan.columns]


@pytest.mark.parametrize("ranks", [5, 7, 9, 16, 25, 48])
def test_row_ranges_where_columns_do_not_divide(plans, ranks):
    plan = ShardPlan.of_layer(plans["v41-flash"].layers[0], ranks)
    sizes = [plan.size(rank) for rank in range(ranks)]
    assert plan.columns == 0 and sum(sizes) == plan.rows and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
def test_rows_that_fill_a_table_up_belong_to_the_last_rank(ranks):
    """Of Qwen's form; no token reads them, but they are in the checkpoint, and so in the table."""
    layer = HashPlan.build(EngramConfig.preset("qwen38-flash-next"), 248_320, 248_044).layers[0]
    assert layer.rows > sum(layer.primes)
    plan = ShardPlan.of_layer(layer, ranks)
    assert plan.rows == layer.rows and plan.columns == (0 if 16 % ranks else 16 // ranks)
    if plan.columns:
        assert plan.bounds[:-1] == layer.offsets[:: plan.columns]


def test_row_numbers_of_every_published_table_travel_in_four_bytes(plans):
    for name in PUBLISHED:
        for layer in plans[name].layers:
            assert layer.rows < 2**31 and ShardPlan.of_layer(layer, 2).id_bytes == 4
    assert ShardPlan.even(2**31 - 1, 2).id_bytes == 4 and ShardPlan.even(2**31, 2).id_bytes == 8
    assert route_rows(np.array([2**31 - 1, 2**32]), ShardPlan.even(2**33, 3)).ids.tolist() == [2**31 - 1, 2**32]


def test_some_shards_are_empty():
    plan = ShardPlan.even(2, 4)
    assert [plan.size(rank) for rank in range(4)] == [0, 1, 0, 1] and plan.bounds == (0, 0, 1, 1, 2)
    assert route_rows(np.array([1, 0, 1]), plan).counts == [0, 1, 0, 2]


def test_a_token_asks_every_owner_for_as_many_rows():
    config = EngramConfig.preset("tiny")
    layer = HashPlan.build(config, 97, 2).layers[0]
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, layer.primes) + layer.offsets for _ in range(50)]
    for ranks in (divisor for divisor in (1, 2, 4, 8) if len(layer.primes) % divisor == 0):
        plan = ShardPlan.of_layer(layer, ranks)
        assert route_rows(np.concatenate(tokens), plan).counts == [50 * plan.columns] * ranks


@pytest.mark.parametrize("unique", [False, True])
def test_answers_come_back_in_the_order_that_was_asked_for(unique):
    rng = np.random.default_rng(1)
    for ranks, rows in itertools.product((1, 2, 3, 7), (1, 5, 1009)):
        plan = ShardPlan.even(rows, ranks)
        for dtype, count in itertools.product((np.int32, np.int64), (0, 1, 300)):
            numbers = rng.integers(0, rows, count).astype(dtype)
            route = route_rows(numbers, plan, unique)
            assert np.array_equal(route.ids[route.places], numbers) and route.ids.dtype == np.int32
            ends = np.cumsum([0, *route.counts])
            for rank in range(ranks):
                asked = route.ids[ends[rank] : ends[rank + 1]]
                assert ((asked >= plan.first(rank)) & (asked < plan.first(rank + 1))).all()
            assert len(route.ids) == (len(np.unique(numbers)) if unique else count)


def test_the_order_is_the_same_on_every_machine():
    """Equal owners in the order of the request: nothing but a stable sort gives it."""
    numbers = np.array([7, 1, 6, 0, 5, 1, 9, 6])
    assert route_rows(numbers, ShardPlan.even(10, 2)).ids.tolist() == [1, 0, 1, 7, 6, 5, 9, 6]


def test_bytes_of_the_published_model(plans):
    """Both layers, 64 tokens a rank: (P-1)/P x 64 x (192 + 12,672) bytes received."""
    for ranks in (2, 4, 8):
        layers = [ShardPlan.of_layer(layer, ranks) for layer in plans["v41-flash"].layers]
        moved = sum((plan.bytes_received(0, [64] * ranks, 264) for plan in layers), Traffic())
        assert moved.payload * ranks == (ranks - 1) * 64 * (192 + 12672)
    assert moved.payload == 720384  # 0.72 MB


def test_bytes_where_ranks_have_different_numbers_of_tokens():
    plan = ShardPlan((0, 10, 20, 30), columns=2)
    assert plan.bytes_received(1, [5, 0, 1], 100) == Traffic(1, ids=6 * 2 * 4, rows=0)
    assert plan.bytes_received(0, [5, 0, 1], 100) == Traffic(1, ids=1 * 2 * 4, rows=5 * 2 * 2 * 100)
    with pytest.raises(ValueError, match="where each owns whole columns"):
        ShardPlan.even(30, 3).bytes_received(0, [1, 1, 1], 100)


def test_the_checksum_tells_plans_apart(plans):
    layer, other = plans["v41-flash"].layers
    made = [
        ShardPlan.of_layer(layer, 2),
        ShardPlan.of_layer(layer, 3),
        ShardPlan.of_layer(other, 2),
        ShardPlan.even(layer.rows, 2, layer.to_json()),
        ShardPlan.even(layer.rows, 2),
        ShardPlan.of_layer(LayerPlan(layer.layer_id, (3, 5, 7, 9), layer.primes, layer.offsets), 2),
    ]
    assert len({plan.checksum for plan in made}) == len(made)
    assert ShardPlan.of_layer(layer, 2).checksum == made[0].checksum


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShardPlan((0,)), "bounds of 0 ranks"),
        (lambda: ShardPlan((1, 2)), "give rising row numbers, from 0"),
        (lambda: ShardPlan((0, 5, 4)), "give rising row numbers"),
        (lambda: ShardPlan.even(5, 0), "ranks=0"),
        (lambda: ShardPlan.of_layer(LayerPlan(1, (3,), (5, 7), (0, 6)), 2), "do not lie one behind the other"),
    ],
)
def test_what_is_no_plan_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
