"""What is wrong on one rank is raised on all in the same words; who ends, is late or breaks off is lost; none hangs."""

import os
import signal
import time
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from engram_ref.hashing import DEAD
from engram_ref.rows.rows import Rows
from engram_ref.sharding import exchange as exchange_module
from engram_ref.sharding.agreement import RankLost
from engram_ref.sharding.plan import ShardPlan
from engram_ref.tables import hot as hot_module
from engram_ref.tables import make_table
from engram_ref.tables.hot import HotTable
from tests.ref.ranks import run_ranks, start_ranks
from tests.ref.sharding.shards import FP8, D, R, numbers_for, said, same, values_of

pytestmark = pytest.mark.slow

# --- what is wrong on one rank --------------------------------------------------------------------


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


# --- ends -----------------------------------------------------------------------------------------


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
