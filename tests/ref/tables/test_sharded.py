"""Tables that several processes hold together: the bits of the whole table, one error for all, bytes by formula."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.checkpoint.v41 import load_layer_v41
from engram_ref.config import EngramConfig
from engram_ref.files import stored_rows as stored_rows_module
from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_rows
from engram_ref.hashing import DEAD, HashPlan, NgramHasher
from engram_ref.prefetch import FetchError, Prefetcher
from engram_ref.rows.rows import Rows
from engram_ref.sharding import exchange as exchange_module
from engram_ref.sharding.agreement import RankLost
from engram_ref.sharding.plan import COUNT_BYTES, NOTICE_BYTES, ShardPlan
from engram_ref.tables import hot as hot_module
from engram_ref.tables import make_table
from engram_ref.tables import sharded as sharded_module
from engram_ref.tables.hot import HotTable
from engram_ref.tables.sharded import serve_others
from engram_toy import hashing as twin
from tests.ref.ranks import run_ranks, start_ranks
from tests.ref.rows.fp8_pairs import random_rows as random_fp8_rows

R, D = 1009, 12
FP8 = random_fp8_rows(R, 64)
PLAN = HashPlan.build(EngramConfig.preset("tiny"), 97, 2)
LAYERS = [layer.layer_id for layer in PLAN.layers]


def values_of(rows=R, width=D, dtype=torch.float32):
    """Random bytes as values, NaN and -0.0 among them; the same in every process."""
    generator = torch.Generator().manual_seed(rows)
    raw = torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def numbers_for(rank, step=0, most=200, rows=R):
    """Any row numbers, more for a higher rank; none on rank 0 in every third step, none anywhere in every seventh."""
    rng = np.random.default_rng([rank, step])
    count = 0 if step % 7 == 6 or (rank == 0 and step % 3 == 2) else int(rng.integers(0, most * (rank + 1)))
    dtype = (np.int32, np.int64)[step % 2]
    return torch.from_numpy(rng.integers(0, rows, count).astype(dtype))


def same(got, values, numbers):
    """Whether these are the rows, byte by byte."""
    expected = values[numbers.long()].contiguous()
    return got.dtype == values.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def said(work):
    """The error of something: its class and its words."""
    try:
        work()
    except (ValueError, OSError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return None


# --- the same bits ------------------------------------------------------------------------------------------


def equal_bits(rank, bounds, options):
    plan = ShardPlan(tuple(bounds))
    values = values_of(plan.rows)
    with make_table("sharded", values, plan=plan, **options) as table:
        good = []
        for step in range(9):
            step_rank = 0 if options.get("same_tokens") else rank
            numbers = numbers_for(step_rank, step, rows=plan.rows)
            out = torch.full((len(numbers), D), float("nan")) if step % 2 else None
            pending = table.start(numbers, out)
            got = pending.wait()
            good.append(same(got, values, numbers) and (out is None or got.data_ptr() == out.data_ptr()))
            good[-1] &= pending.wait() is got  # no rows are written that somebody may be reading
            good.append(torch.equal(table.stored(numbers), values.view(torch.uint8)[numbers.long()]))
        return good, table.report(), table.bytes_held()["host"]


SHARDS = {
    "1": [0, R],
    "2": [0, 504, R],
    "3, uneven": [0, 1, 900, R],
    "3, an empty one": [0, 500, 500, R],
    "4, empty ones at the ends": [0, 0, 17, R, R],
}


def equal_bits_of_both(rank, bounds):
    return [equal_bits(rank, bounds, {"unique": unique}) for unique in (False, True)]


@pytest.mark.parametrize("shards", SHARDS)
def test_the_bits_of_the_whole_table(shards):
    """Each row asked for as often as it is wanted, and once."""
    bounds = SHARDS[shards]
    for rank, both in enumerate(run_ranks(len(bounds) - 1, equal_bits_of_both, bounds)):
        for good, traffic, held in both:
            assert all(good) and len(good) == 18 and traffic.fetches == 18
            assert held == (bounds[rank + 1] - bounds[rank]) * D * 4
            assert traffic.control == 18 * (len(bounds) - 2) * (NOTICE_BYTES + COUNT_BYTES)


@pytest.mark.parametrize("shards", ["2", "3, an empty one"])
def test_ranks_with_the_same_tokens_bring_their_share_to_all(shards):
    bounds = SHARDS[shards]
    found = run_ranks(len(bounds) - 1, equal_bits, bounds, {"same_tokens": True})
    assert all(all(good) and traffic.ids == 0 for good, traffic, _ in found)


def asked_bytes(rank, bounds, unique):
    plan = ShardPlan(tuple(bounds))
    with make_table("sharded", values_of(plan.rows), plan=plan, unique=unique) as table:
        numbers = torch.from_numpy(np.random.default_rng(rank).integers(0, 40, 500))
        good = same(table.start(numbers).wait(), values_of(plan.rows), numbers)
        return good, table.report().payload


def test_asking_for_each_row_once_moves_fewer_bytes():
    plain, unique = (run_ranks(2, asked_bytes, [0, 20, R], unique) for unique in (False, True))
    assert all(good for good, _ in [*plain, *unique])
    assert all(few[1] * 5 < many[1] for few, many in zip(unique, plain))


def placed(rank, path):
    """Every placement underneath, fp8 rows in one part and in two, in memory and in files."""
    packed, split = Rows.from_packed(FP8), Rows.from_packed(FP8).split()
    hot = torch.arange(rank, R, 5)
    cases = {
        "device": (split, {"owned": "device", "packed": True}),
        "host": (packed, {"owned": "host"}),
        "host, split": (StoredRows.find(path), {"packed": False}),
        "file": (StoredRows.find(path), {"owned": "file", "threads": 2}),
        "hot": (split, {"owned": "hot", "hot": torch.arange(0, R, 3), "behind": "device"}),
    }
    good = {}
    for name, (rows, options) in cases.items():
        with make_table("sharded", rows, **options) as table:
            numbers = numbers_for(rank, 1)
            arrived = table.start(numbers).wait()
            good[name] = torch.equal(arrived.view(torch.int16), packed.values()[numbers].view(torch.int16))
            good[name, "behind"] = name != "hot" or table.local.behind.placement == "device"
            good[name, "held"] = sum(table.local.bytes_held().values()) >= table.plan.size(rank) * 66
    with make_table("hot", StoredRows.find(path), hot=hot[:190], behind="sharded", owned="file") as table:
        before = table._behind.report()
        table.start(hot[:50]).wait()
        good["hits stay local"] = table._behind.report().payload == before.payload
        numbers = numbers_for(rank, 1)
        arrived = table.start(numbers).wait()
        good["in front"] = torch.equal(arrived.view(torch.int16), packed.values()[numbers].view(torch.int16))
        good["bad"] = said(lambda: table.start(torch.tensor([R + 5 if rank == 1 else 0])).wait())
    good["counts"] = said(lambda: make_table("hot", packed, hot=hot[: 10 + rank], behind="sharded"))
    return good


def test_every_placement_underneath_and_a_hot_tier_in_front(tmp_path):
    save_rows(tmp_path / "rows.safetensors", Rows.from_packed(FP8).split())
    first, second = run_ranks(2, placed, tmp_path / "rows.safetensors")
    for found in (first, second):
        bad, counts = found.pop("bad"), found.pop("counts")
        assert bad == ("ValueError", f"row {R + 5} does not exist; the table has rows 0 .. {R - 1} (on rank 1 of 2)")
        assert counts[1].startswith("rank 1 has another number of hot rows (11) than rank 0 (10)")
        assert all(found.values()), found
    assert first.keys() == second.keys()


def counted(rank):
    values, numbers, found = values_of(), torch.tensor([1, 2, 2, R - 1] if rank else [5]), []
    for owned in ({"owned": "host"}, {"owned": "device"}, {"owned": "hot", "hot": torch.tensor([1, R - 1])}):
        with make_table("sharded", values, **owned) as table:
            for _ in range(5):
                table.start(numbers).wait()
            said(lambda table=table: table.start(numbers + R * rank).wait())  # refused on rank 1
            found.append({name: count for name, count in table.counters().items() if count})
    return found


def test_rows_are_counted_where_they_are_asked_for_and_bytes_where_they_are_read():
    read = [(5 * (1 + 3) + 1) * D * 4, 5 * D * 4]  # rank 0 owns 1, 2 and 5
    for rank, found in enumerate(run_ranks(2, counted)):
        rows = 5 * 4 if rank else 5 + 1
        assert found == [{"rows": rows, place: read[rank]} for place in ("bytes_host", "bytes_device", "bytes_host")]


# --- columns: bytes by formula, the twin's index stream ------------------------------------------------------


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


def steadily(rank):
    layer = PLAN.layers[0]
    values, plan = values_of(layer.rows), ShardPlan.of_layer(layer, 2)
    count = 3 * len(layer.primes)
    with make_table("sharded", values, plan=plan, steady=count) as table:
        rows = torch.from_numpy(NgramHasher(PLAN)(np.full((1, 3), 5 + rank), layer.layer_id).reshape(-1))
        good = [same(table.start(rows).wait(), values, rows)]
        before = table.report()
        wrong = said(lambda: table.start(rows[:-1] if rank else rows).wait())
        apart = said(lambda: table.start(rows * 0 if rank else rows).wait())
        good.append(same(table.start(rows).wait(), values, rows))
        return good, before, wrong, apart, said(lambda: serve_others([table]))


def test_where_every_fetch_is_alike_no_counts_are_exchanged():
    for good, traffic, wrong, apart, serving in run_ranks(2, steadily):
        assert all(good) and traffic.control == NOTICE_BYTES
        assert "rows in a fetch of a table that was made with steady=" in wrong[1] and "rank 1 of 2" in wrong[1]
        assert "no whole tokens" in apart[1] and "all ranks have tokens" in serving[1]


# --- what is wrong on one rank -------------------------------------------------------------------------------


def wrong_rows(rank):
    """Bad requests on the last rank alone, then good ones by all."""
    values = values_of()
    bad = {
        "beyond": torch.tensor([1, R]),
        "negative": torch.tensor([-1], dtype=torch.int32),
        "DEAD is no row": torch.tensor([3, DEAD]),
        "float": torch.tensor([1.0]),
        "matrix": torch.tensor([[1]]),
        "no tensor": [1, 2],
    }
    found = {}
    with make_table("sharded", values) as table:
        for name, rows in bad.items():
            found[name] = said(lambda rows=rows: table.start(rows if rank == 2 else torch.tensor([5])).wait())
        short = torch.empty(3, D)
        found["out"] = said(lambda: table.start(torch.tensor([5]), short if rank == 2 else None).wait())
        found["read"] = said(lambda: failing_read(table, rank).wait())
        numbers = numbers_for(rank, 1)
        return found, same(table.start(numbers).wait(), values, numbers)


def failing_read(table, rank):
    failing = mock.patch.object(table._local, "stored", side_effect=OSError(5, "the disk failed"))
    with failing if rank == 1 else nullcontext():
        return table.start(torch.arange(R))


def test_what_is_wrong_on_one_rank_is_raised_on_all_and_nobody_hangs():
    found = run_ranks(3, wrong_rows)
    assert all(good for _, good in found)
    errors = [errors for errors, _ in found]
    assert errors[0] == errors[1] == errors[2]
    for name, (kind, words) in errors[0].items():
        assert words.endswith(f"(on rank {1 if name == 'read' else 2} of 3)") and "\n" not in words
        assert kind == {"read": "OSError", "no tensor": "RuntimeError"}.get(name, "ValueError")
    assert errors[0]["beyond"][1].startswith(f"row {R} does not exist; the table has rows 0 .. {R - 1}")
    assert "give a vector of int32 or int64" in errors[0]["float"][1]


def wrong_in_front(rank):
    values, numbers = values_of(), torch.tensor([1, 700])
    with make_table("hot", values, hot=torch.arange(10), behind="sharded", timeout=5) as table:
        found = [said(lambda: HotTable(table.behind, torch.tensor([R if rank else 1])))]
        full = mock.patch.object(hot_module, "require_bytes", side_effect=RuntimeError("out of memory"))
        with full if rank else nullcontext():
            found.append(said(lambda: HotTable(table, torch.tensor([1]))))
        found.append(said(lambda: table.start([1, 2] if rank else numbers).wait()))
        full = mock.patch.object(table, "_send", side_effect=RuntimeError("out of memory"))
        with full if rank else nullcontext():
            found.append(said(lambda: table.start(numbers).wait()))
        return found, same(table.start(numbers).wait(), values, numbers)


def test_whatever_is_wrong_on_one_rank_with_hot_rows_in_front_is_raised_on_all():
    (first, good), (second, fine) = run_ranks(2, wrong_in_front)
    assert good and fine and first == second
    assert f"row {R} does not exist" in first[0][1] and "'list' object has no attribute" in first[2][1]
    assert first[1] == first[3] == ("RuntimeError", "out of memory (on rank 1 of 2)")


def strangers(rank):
    """Tables that do not belong together, and options that only one rank has wrong."""
    values, packed = values_of(), FP8.clone()
    packed[700, 3] = 0xFF  # in the second shard of two
    nan = Rows(Rows.from_packed(FP8).format, (packed,))
    first = rank == 0
    layers = [ShardPlan.even(R, 2, f"layer {rank}"), ShardPlan((0, 500 + rank, R))]
    cases = {
        "table": lambda: make_table("sharded", values, plan=layers[0]),
        "bounds": lambda: make_table("sharded", values, plan=layers[1]),
        "dtype": lambda: make_table("sharded", values if first else values.double()),
        "mode": lambda: make_table("sharded", values, same_tokens=first),
        "count": lambda: make_table("sharded", values if first else values[:-1], plan=ShardPlan.even(R, 2)),
        "option": lambda: make_table("sharded", values, **({} if first else {"direct": True})),
        "NaN": lambda: make_table("sharded", nan),
        "trained": lambda: make_table("sharded", values.clone().requires_grad_(not first)),
        "ranks": lambda: make_table("sharded", values, plan=ShardPlan.even(R, 3)),
        "placement": lambda: make_table("sharded", values, owned="tape" if first else "host"),
        "no table": lambda: make_table("sharded", values if first else None),
        "hot": lambda: make_table("hot", values, hot=torch.tensor([R if rank else 1]), behind="sharded"),
        "hot type": lambda: make_table("hot", values, hot=torch.tensor([1]) if first else [1], behind="sharded"),
        "hot left out": lambda: make_table("hot", values, hot=torch.tensor([1]) if first else None, behind="sharded"),
        "hot, no table": lambda: make_table("hot", None if first else values, hot=torch.tensor([1]), behind="sharded"),
        "own hot": lambda: make_table("sharded", values, owned="hot", hot=torch.tensor([5, 900, R])),
        "hot twice": lambda: make_table("sharded", values, owned="hot", hot=torch.tensor([5, 900, 900])),
    }
    found = {name: said(case) for name, case in cases.items()}
    with make_table("sharded", values) as table:  # the ranks are still in step
        return found, same(table.start(torch.arange(R)).wait(), values, torch.arange(R))


def test_strangers_are_refused_by_all():
    (first, good), (second, fine) = run_ranks(2, strangers)
    assert good and fine and first == second and all(first.values())
    words = {name: text for name, (_, text) in first.items()}
    assert "rank 1 has another plan of shards" in words["table"] and "than rank 0" in words["bounds"]
    assert "row format or way to exchange" in words["dtype"] and "way to exchange" in words["mode"]
    assert words["NaN"].startswith("these rows: row 700 has a code or a scale that is NaN")
    assert "gradients do not travel back" in words["trained"] and "a group of 2" in words["ranks"]
    assert "no placement 'tape'" in words["placement"] and "option direct" in words["option"]
    assert "give all 1009 of the table, or its own 505" in words["count"] and f"row {R} does not exist" in words["hot"]
    assert words["hot type"].startswith("hot is a list") and "needs hot=row numbers" in words["hot left out"]
    assert words["hot, no table"].startswith("rows is a NoneType")
    assert f"row {R} does not exist" in words["own hot"] and words["hot twice"].startswith(
        "hot row 900 is given 2 times"
    )
    assert all(("\n" not in text and "on rank" in text) or "than rank 0" in text for text in words.values())


def test_without_a_group_there_is_a_sentence():
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"needs torch\.distributed: call dist\.init_process_group, or run torchrun"):
        make_table("sharded", values_of())


# --- with the prefetcher -------------------------------------------------------------------------------------


def sharded_layers(values, **options):
    return {
        layer.layer_id: make_table(
            "sharded", values[layer.layer_id], plan=ShardPlan.of_layer(layer, dist.get_world_size()), **options
        )
        for layer in PLAN.layers
    }


def many_steps(rank, steps):
    """Two fetches in flight, small ones and large ones, DEAD among the ids; every one is compared."""
    values = {layer.layer_id: values_of(layer.rows) for layer in PLAN.layers}
    tables = sharded_layers(values)
    hasher, good, in_flight = NgramHasher(PLAN), 0, []
    with Prefetcher(hasher, tables) as prefetcher:
        for step in range(steps):
            rng = np.random.default_rng([rank, step])
            ids = rng.integers(DEAD, 97, (1 + rank, int(rng.integers(1, 9))))
            in_flight.append((ids, prefetcher.start(ids)))
            if len(in_flight) == 2:
                good += compare(hasher, values, *in_flight.pop(0))
        good += compare(hasher, values, *in_flight.pop(0))
        serve_others(tables.values())
        stream = sum(table.report().fetches for table in tables.values())
    for table in tables.values():
        table.close()
    return good, stream


def compare(hasher, values, ids, fetch):
    with fetch:
        rows = {layer_id: torch.from_numpy(hasher(ids, layer_id).reshape(-1)) for layer_id in values}
        return all(same(fetch[layer_id].wait(), values[layer_id], rows[layer_id]) for layer_id in values)


def test_many_steps_with_two_in_flight():
    steps = 250  # the two ranks' lengths, 8 of either, meet in all ways
    for good, fetches in run_ranks(2, many_steps, steps):
        assert good == steps and fetches == (steps + 1) * len(LAYERS)


def bad_ids(rank):
    values = {layer.layer_id: values_of(layer.rows) for layer in PLAN.layers}
    found = []
    with Prefetcher(NgramHasher(PLAN), sharded_layers(values)) as prefetcher:
        for wrong in (np.array([[3, 97]]), np.array([[0.5, 1.0]])):
            ids = wrong if rank == 1 else np.array([[1, 2, 3]])
            with pytest.raises((FetchError, ValueError)) as caught, prefetcher.start(ids) as fetch:
                fetch[LAYERS[0]].wait()
            found.append(str(caught.value).partition("failed: ")[2] or str(caught.value))
            with pytest.raises((FetchError, ValueError)), prefetcher.start(ids) as fetch:
                fetch[LAYERS[-1]].wait()
        ids = np.array([[4, 5]])
        return found, compare(NgramHasher(PLAN), values, ids, prefetcher.start(ids))


def test_ids_that_are_wrong_on_one_rank_fail_on_all():
    first, second = run_ranks(2, bad_ids)
    assert first == second and first[1]
    assert first[0][0] == "compressed ids contain 97; the vocabulary has -1 .. 96 (on rank 1 of 2)"
    assert "of dtype float64: give integers (on rank 1 of 2)" in first[0][1]


def unequal(rank):
    """Rank 1 has more steps than rank 0, which serves it meanwhile."""
    values = {layer.layer_id: values_of(layer.rows) for layer in PLAN.layers}
    tables, good = sharded_layers(values), True
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        for step in range(3 + 4 * rank):
            ids = np.array([[step, rank]])
            good &= compare(NgramHasher(PLAN), values, ids, prefetcher.start(ids))
        serve_others(tables.values())
    return good, [table.report().fetches for table in tables.values()]


def test_a_rank_that_is_done_serves_the_others():
    assert run_ranks(2, unequal) == [(True, [8] * len(LAYERS))] * 2


def serves_behind_hot_rows(rank):
    """Rank 0 has no tokens: hot tiers in front of its rows, and a table beside them that asks nobody."""
    values, numbers = values_of(), torch.tensor([3, 700])
    front = make_table("hot", values, hot=torch.arange(10), behind="sharded", timeout=5)
    with make_table("host", values) as alone, HotTable(front, torch.tensor([5])) as table:
        refused = [said(lambda what=what: serve_others([what])) for what in (1, None, {})]
        good = [same(table.start(numbers).wait(), values, numbers) for _ in range(2 * rank)]
        serve_others([alone, table])
        return good, refused, front.behind.report().fetches


def test_a_rank_that_is_done_serves_the_others_behind_hot_rows():
    (idle, refused, served), (good, same_words, fetches) = run_ranks(2, serves_behind_hot_rows)
    assert (idle, good) == ([], [True, True]) and refused == same_words
    assert served == fetches == 2 + 2 + 1  # hot rows of two tiers, two fetches, and one that nobody wants
    for (kind, words), name in zip(refused, ("int", "NoneType", "dict")):
        assert kind == "ValueError" and words.startswith(f"serve_others: a {name} is no table")


# --- ends ----------------------------------------------------------------------------------------------------


def ends_early(rank, how):
    values = values_of()
    table = make_table("sharded", values, timeout=3)
    assert same(table.start(torch.arange(R)).wait(), values, torch.arange(R))
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # does not come any more
    begin = time.monotonic()
    with pytest.raises(RankLost) as caught:
        for _ in range(3):
            table.start(torch.arange(R)).wait()
    return str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize("how", ["killed", "late"])
def test_a_rank_that_ends_or_is_late_ends_the_others_with_one_line(how):
    ranks = start_ranks(3, ends_early, how)
    for rank in (ranks[0], ranks[2]):
        words, seconds = rank.result()
        assert "another rank ended, was killed or did not come in time" in words and "\n" not in words
        assert words.startswith(("rank 0 of 3: ", "rank 2 of 3: ")) and seconds < 30
        assert len(words) < 260 and "third_party" not in words
    ranks[1].process.kill()


def stopped(rank, same_tokens):
    """Ctrl-C on rank 1 while it looks its rows up, then between two messages; the caller catches it, and goes on."""
    values, found = values_of(), []
    with make_table("sharded", values, timeout=5, same_tokens=same_tokens) as table:
        place = (exchange_module, "gather") if same_tokens else (table.exchange, "_exchange_counts")
        whole = getattr(*place)

        def late(*arguments):
            whole(*arguments)
            raise KeyboardInterrupt

        stops = mock.patch.object(table, "_own", side_effect=KeyboardInterrupt), mock.patch.object(*place, late)
        for stop in (*stops, nullcontext()):
            with stop if rank == 1 else nullcontext():
                try:
                    found.append(said(lambda: table.start(torch.arange(R)).wait()))
                except KeyboardInterrupt:
                    found.append("stopped")
            if stop is stops[0]:
                assert same(table.start(torch.arange(R)).wait(), values, torch.arange(R))
        return found


@pytest.mark.parametrize("same_tokens", [False, True])
def test_a_rank_that_is_stopped_answers_first_or_is_lost(same_tokens):
    first, second = run_ranks(2, stopped, same_tokens)
    assert first[0] == ("RuntimeError", "KeyboardInterrupt (on rank 1 of 2)")
    assert [kind for kind, _ in first[1:]] == ["RankLost"] * 2 and second[:2] == ["stopped"] * 2
    assert second[2][0] == "RankLost" and "an earlier exchange of rows broke off on this rank" in second[2][1]


def no_room(rank, same_tokens):
    """On rank 1 alone there is no memory for the rows that it wants, before it has asked for them."""
    values, numbers = values_of(), torch.arange(R)
    with make_table("sharded", values, timeout=5, same_tokens=same_tokens) as table:
        memory = [RuntimeError("not enough memory"), table.exchange.room([0, 0])]
        full = mock.patch.object(table.exchange, "room", side_effect=memory)
        with full if rank == 1 else nullcontext():
            error = said(lambda: table.start(numbers).wait())
        return error, same(table.start(numbers).wait(), values, numbers)


@pytest.mark.parametrize("same_tokens", [False, True])
def test_rows_for_which_one_rank_has_no_memory_are_refused_on_all(same_tokens):
    error = ("RuntimeError", "not enough memory (on rank 1 of 2)")
    assert run_ranks(2, no_room, same_tokens) == [(error, True)] * 2


def out_of_memory(rank, same_tokens):
    """On rank 1 alone there is no memory between two messages; the caller catches that, and goes on."""
    numbers = torch.arange(R)
    with make_table("sharded", values_of(), timeout=5, same_tokens=same_tokens) as table:
        name = "equal" if same_tokens else "empty"
        full = mock.patch.object(exchange_module.torch, name, side_effect=RuntimeError("not enough memory"))
        with full if rank == 1 else nullcontext():
            first = said(lambda: table.start(numbers).wait())
        return first, said(lambda: table.start(numbers).wait())


@pytest.mark.parametrize("same_tokens", [False, True])
def test_a_rank_with_an_error_of_its_own_between_two_messages_is_lost(same_tokens):
    others, (first, second) = run_ranks(2, out_of_memory, same_tokens)
    assert [kind for kind, _ in others] == ["RankLost"] * 2
    assert first == ("RuntimeError", "not enough memory") and second[0] == "RankLost"
    assert "an earlier exchange of rows broke off on this rank" in second[1]


# --- negative controls: each of these makes wrong rows, or an error, and the comparison sees it ---------------


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


# --- loading ---------------------------------------------------------------------------------------------------


def loading(rank, folder):
    """What a rank reads of the tables of a checkpoint, byte ranges and all."""
    checkpoint = ModelFolder.open(folder)
    read, whole = [], stored_rows_module.read_whole

    def counted(fd, target, offset):
        read.append((os.readlink(f"/proc/self/fd/{fd}"), offset, offset + len(target)))
        return whole(fd, target, offset)

    found = {}
    for layer in checkpoint.plan.layers:
        read.clear()
        with mock.patch.object(stored_rows_module, "read_whole", counted):
            engram = load_layer_v41(checkpoint, layer.layer_id, "sharded", packed=True)
        with engram.table as table:
            plan, parts = table.plan, checkpoint.stored_rows(layer.layer_id).parts
            own = [
                (str(p.path), p.offset + plan.first(rank) * p.row_bytes, p.offset + plan.first(rank + 1) * p.row_bytes)
                for p in parts
            ]
            numbers = torch.arange(rank, layer.rows, 3)
            good = torch.equal(table.stored(numbers), checkpoint.stored_rows(layer.layer_id).read().take(numbers))
            found[layer.layer_id] = sorted(read) == sorted(own), plan.columns, good
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_reads_its_own_bytes_of_a_checkpoint_and_no_others(sample_folder, ranks):
    for found in run_ranks(ranks, loading, sample_folder):
        assert all(what == (True, 24 // ranks, True) for what in found.values()) and len(found) == 2


def from_pieces(rank, folder):
    rows = StoredRows.find(folder / f"{rank}.safetensors")
    with make_table("sharded", rows, plan=ShardPlan.even(R, 3), owned="file") as table:
        return torch.equal(table.stored(torch.arange(R)), FP8)


def test_a_checkpoint_that_was_cut_up_for_the_ranks(tmp_path):
    for rank in range(3):
        plan = ShardPlan.even(R, 3)
        piece = Rows.from_packed(FP8).between(plan.first(rank), plan.first(rank + 1))
        save_rows(tmp_path / f"{rank}.safetensors", piece.split())
    assert run_ranks(3, from_pieces, tmp_path) == [True] * 3
