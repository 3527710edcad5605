"""Tables that several processes hold together: the bits of the whole table, whatever is underneath or in front.

What goes wrong on one rank is tested in tests/ref/sharding/test_agreement.py, what is exchanged in test_exchange.py.
"""

import os
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.checkpoint.v41 import load_layer_v41
from engram_ref.files import stored_rows as stored_rows_module
from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_rows
from engram_ref.hashing import DEAD, NgramHasher
from engram_ref.prefetch import FetchError, Prefetcher
from engram_ref.rows.rows import Rows
from engram_ref.sharding.plan import COUNT_BYTES, NOTICE_BYTES, ShardPlan
from engram_ref.tables import make_table
from engram_ref.tables.hot import HotTable
from engram_ref.tables.sharded import serve_others
from tests.ref.ranks import run_ranks
from tests.ref.sharding.shards import FP8, LAYERS, PLAN, D, R, numbers_for, said, same, values_of

pytestmark = pytest.mark.slow

# --- the same bits --------------------------------------------------------------------------------


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


def counted(rank, path):
    values, numbers, found = values_of(), torch.tensor([1, 2, 2, R - 1] if rank else [5]), []
    for owned in ("host", "device", "file", "hot"):
        rows = StoredRows.find(path) if owned == "file" else values
        options = {"hot": torch.tensor([1, R - 1])} if owned == "hot" else {}
        with make_table("sharded", rows, owned=owned, **options) as table:
            for _ in range(5):
                table.start(numbers).wait()
            said(lambda table=table: table.start(numbers + R * rank).wait())  # refused on rank 1
            counts = {name: count for name, count in table.counters().items() if count}
            read_from = table.local.behind if owned == "hot" else table.local
            found.append((counts, read_from.counters()["rows"]))
    return found


def test_rows_are_counted_where_they_are_asked_for_and_bytes_where_they_are_read(tmp_path):
    save_rows(tmp_path / "rows.safetensors", values_of())
    read = [5 * (1 + 3) + 1, 5]  # rank 0 owns 1, 2 and 5
    for rank, found in enumerate(run_ranks(2, counted, tmp_path / "rows.safetensors")):
        rows = 5 * 4 if rank else 5 + 1
        once = 5 * (1 + 2) + 1 if rank == 0 else 5  # of a file, a row that is there twice is read once
        for place, (counts, local) in zip(
            ("bytes_host", "bytes_device", "bytes_disk", "bytes_host"), found, strict=True
        ):
            nbytes = (once if place == "bytes_disk" else read[rank]) * D * 4
            assert (counts, local) == ({"rows": rows, place: nbytes}, read[rank])


def test_without_a_group_there_is_a_sentence():
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"needs torch\.distributed: call dist\.init_process_group, or run torchrun"):
        make_table("sharded", values_of())


# --- with the prefetcher --------------------------------------------------------------------------


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


def serves_the_same_tokens(rank):
    with make_table("sharded", values_of(), same_tokens=True) as table:
        return said(lambda: serve_others([table]))


def test_ranks_of_the_same_tokens_serve_nobody_alone():
    refused = ("ValueError", "serve_others: with same_tokens all ranks have tokens in every step")
    assert run_ranks(2, serves_the_same_tokens) == [refused] * 2


# --- loading --------------------------------------------------------------------------------------


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
