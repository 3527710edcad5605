"""What ranks exchange: bytes by formula, the twin's index stream; and mistakes in it, which the comparison sees."""

import itertools
import json
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engram_ref.hashing import NgramHasher
from engram_ref.sharding import agreement as agreement_module
from engram_ref.sharding import exchange as exchange_module
from engram_ref.sharding.plan import ShardPlan
from engram_ref.tables import make_table
from engram_ref.tables import sharded as sharded_module
from engram_toy import hashing as twin
from tests.ref.ranks import run_ranks
from tests.ref.sharding.shards import LAYERS, PLAN, D, R, same, values_of

# --- columns: bytes by formula, the twin's index stream -------------------------------------------


def columns_of(rank, ranks, same_tokens):
    tokens = [4] * ranks if same_tokens else [(5 * r) % 7 for r in range(ranks)]
    asked, good, moved, served = [], [], [], []
    for layer in PLAN.layers:
        plan = ShardPlan.of_layer(layer, ranks)
        values = values_of(layer.rows)
        with make_table("sharded", values, plan=plan, same_tokens=same_tokens) as table:
            rng = np.random.default_rng(0 if same_tokens else rank)
            ids = rng.integers(0, 97, (1, tokens[rank])) if tokens[rank] else None
            rows = np.empty(0, np.int32) if ids is None else NgramHasher(PLAN)(ids, layer.layer_id).reshape(-1)
            with mock.patch.object(table, "_own", wraps=table._own) as own:
                good.append(same(table.start(torch.from_numpy(rows)).wait(), values, torch.from_numpy(rows)))
            served.append(own.call_args.args[0].tolist())
            moved.append((table.report(), plan.bytes_received(rank, tokens, D * 4)))
        asked.append((None if ids is None else ids.tolist(), rows.tolist()))
    return asked, all(good), moved, served


@pytest.mark.parametrize("ranks", [2, 4])
def test_counted_bytes_are_the_formulas_and_all_streams_are_the_twins(ranks):
    found = run_ranks(ranks, columns_of, ranks, False)
    stream = twin.NgramHasher(json.loads(PLAN.to_json()))
    for asked, good, moved, _ in found:
        assert good
        for (ids, rows), layer_id in zip(asked, LAYERS):
            expected = [] if ids is None else [row for token in stream(ids[0], layer_id) for row in token]
            assert rows == expected
        for counted, formula in moved:
            assert (counted.ids, counted.rows) == (formula.ids, formula.rows)
    assert any(counted.payload for _, _, moved, _ in found for counted, _ in moved)
    for layer in range(len(LAYERS)):  # what all owners together were asked for is what all ranks together wanted
        wanted = sorted(row for asked, *_ in found for row in asked[layer][1])
        assert sorted(row for *_, served in found for row in served[layer]) == wanted


def test_bytes_where_all_ranks_have_the_same_tokens():
    for _, good, moved, _ in run_ranks(2, columns_of, 2, True):
        assert good and all((counted.ids, counted.rows) == (0, formula.rows) for counted, formula in moved)


def asked_after_it_was_made(rank, options):
    """A fetch by a table that may not ask for its group's device again."""
    values, rows = values_of(), torch.arange(R)
    with make_table("sharded", values, **options) as table:
        again = AssertionError("whoever fetches has another current GPU")
        with mock.patch.object(agreement_module, "group_device", side_effect=again):
            return same(table.start(rows).wait(), values, rows)


@pytest.mark.parametrize("options", [{}, {"same_tokens": True}], ids=["own tokens", "same tokens"])
def test_the_thread_that_fetches_is_not_asked_for_its_gpu(options):
    """It may be a prefetcher's, to which CUDA gives the first GPU: the device is the one of the thread that made it."""
    assert run_ranks(2, asked_after_it_was_made, options) == [True, True]


# --- negative controls: each of these makes wrong rows, or an error, and the comparison sees it ---


def no_offset():
    return mock.patch.object(sharded_module.ShardPlan, "first", lambda plan, rank: 0)


def swapped_splits():
    whole = dist.all_to_all_single

    def swapped(output, given, out_splits=None, in_splits=None, **options):
        if out_splits is not None and output.dtype == torch.uint8:
            out_splits, in_splits = in_splits, out_splits
            output = torch.empty((sum(out_splits), *output.shape[1:]), dtype=output.dtype)
            given = given.new_zeros((sum(in_splits), *given.shape[1:]))
        return whole(output, given, out_splits, in_splits, **options)

    return mock.patch.object(exchange_module.dist, "all_to_all_single", swapped)


def unstable_order():
    route = sharded_module.route_rows

    def unstable(*arguments):
        found = route(*arguments)
        ends = np.cumsum([0, *found.counts])
        for low, high in itertools.pairwise(ends):
            found.ids[low:high] = found.ids[low:high][::-1].copy()
        return found

    return mock.patch.object(sharded_module, "route_rows", unstable)


def another_plan():
    """Behind the back of the comparison: requests go by bounds that are not those of the rows."""
    route = sharded_module.route_rows
    return mock.patch.object(
        sharded_module, "route_rows", lambda numbers, plan, unique: route(numbers, ShardPlan((0, 300, R)), unique)
    )


WRONG = {
    "no shard offset": no_offset,
    "splits swapped": swapped_splits,
    "unstable": unstable_order,
    "plan": another_plan,
}


def broken(rank, wrong):
    values = values_of()
    numbers = torch.from_numpy(np.random.default_rng(rank).integers(0, R, 100 + 50 * rank))
    with make_table("sharded", values, timeout=5) as table, WRONG[wrong]():
        try:
            return same(table.start(numbers).wait(), values, numbers)
        except (ValueError, RuntimeError) as error:
            return str(error)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_built_wrong_is_seen(wrong):
    found = run_ranks(2, broken, wrong)
    assert True not in found, found
    if wrong in ("no shard offset", "plan"):
        assert any("does not exist" in str(what) or what is False for what in found)
