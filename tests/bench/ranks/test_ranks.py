"""Ranks that share tables: the run counts what the plan says, the model agrees, and who waits for whom."""

import argparse
import io
import json
import os
import socket
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from bench import fill_docs, gpu_wall
from bench.instruments.claim import PUBLISHED_WINDOW_S
from bench.ranks import run, schedule
from bench.ranks.model import layer_bytes, model_table
from bench.ranks.schedule import simulate
from bench.ranks.table import bytes_table, formula_holds, measured_table, most_hidden
from bench.schemas import ranks
from bench.setup import table_content
from bench.wall.step import Shape
from engram_ref.config import EngramConfig
from engram_ref.sharding.on_paper import LINKS
from tests.ref.ranks import Rank, run_ranks
from tests.schemas import validator

pytestmark = pytest.mark.slow

V41 = EngramConfig.preset("v41-flash")


# --- real processes --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_simulated_steps(monkeypatch):
    """Each run ends with the simulation: of 1,000 steps it takes most of the time."""
    monkeypatch.setattr(schedule, "STEPS", 10)


def options_for(out):
    shapes = [Shape("decode", 3, 1), Shape("prefill", 1, 5)]
    return argparse.Namespace(
        **dict(preset="v41-flash", table_params=[2e5], dtype="bfloat16", seed=1, steps=shapes, rounds=2),
        **dict(out=out, fresh=False, device="cpu"),
    )


def measured(rank, out):
    """What a rank does after torchrun has started it: the group is made already, here."""
    options, said = options_for(out), list[str]()
    results = run.begun(options, run.pick_device("cpu"))
    found = run._measure(options, run.pick_device("cpu"), said.append)
    assert [" s left" in line for line in said] == [False] + 5 * [True], said
    return run._written(options, results, found) if rank == 0 else None


def test_the_run_counts_what_the_plan_says_and_keeps_other_numbers_of_ranks(tmp_path):
    first, *_ = run_ranks(2, measured, tmp_path)
    results, *_ = run_ranks(3, measured, tmp_path)
    assert [entry["ranks"] for entry in results["runs"]] == [2, 3] and results["runs"][0] == first["runs"][0]
    for entry in results["runs"]:
        assert [case["way"] for case in entry["cases"]] == [way for way in run.WAYS for _ in range(2)]
        for case in entry["cases"]:
            assert formula_holds(case) and len(case["by_rank"]) == entry["ranks"]
            assert (case["by_rank"][0]["formula"] is None) == (case["way"] == "unique")
    assert results["schedule"] == schedule.schedule_table(results["model"]) != []
    validator(ranks.Results).validate(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    other = options_for(tmp_path)
    other.seed += 1
    with pytest.raises(ValueError, match="holds rows with another option seed"):
        run.begun(other, run.pick_device("cpu"))
    assert "these times mean nothing elsewhere" in measured_table(results) and "DIFFERS" not in measured_table(results)


def wrong_bytes(rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_formula", lambda *_: {"ids": 1, "rows": 0})
        with pytest.raises(ValueError, match=r"owners: rank 0 received .* B, the plan says"):
            run._measure(options_for(None), run.pick_device("cpu"), lambda text: None)
        patch.undo()
        patch.setattr(table_content, "expected_values", lambda numbers, row_format, seed: numbers[:, None].float())
        with pytest.raises(ValueError, match=f"rank {rank}, layer .*, returned other rows than were written"):
            run._measure(options_for(None), run.pick_device("cpu"), lambda text: None)
    return True


def test_wrong_bytes_and_wrong_rows_end_the_run():
    assert run_ranks(2, wrong_bytes) == [True, True]


def command(rank, port, *arguments):
    """What torchrun starts, in a process that has its modules already."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    sys.argv = ["gpu_wall.py", "--sharded", *arguments]
    with redirect_stdout(io.StringIO()) as said:
        gpu_wall.main()
    return said.getvalue()


def test_the_command_runs_as_it_says(tmp_path):
    small = ("--table_params", "2e5", "--steps", "decode:3", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said, silent = (rank.result() for rank in [Rank(command, rank, port, *small) for rank in range(2)])
    assert "sharded tables" in said and "DIFFERS" not in said and silent == ""
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    validator(ranks.Results).validate(results)
    assert [(run["ranks"], run["backend"]) for run in results["runs"]] == [(2, "gloo")]
    assert results["device_name"] == results["environment"]["cpu"]


class Stopped(Exception):
    """The group would be made now."""


def test_each_rank_has_a_gpu_of_its_own_and_nccl_is_told(monkeypatch, tmp_path):
    """Two GPUs that are not there: what is said to CUDA and to torch.distributed, up to the group."""
    told = {}

    def group(backend, **options):
        told.update(options, backend=backend)
        raise Stopped

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.update(current=device))
    monkeypatch.setattr(run.dist, "init_process_group", group)
    options = options_for(tmp_path)
    options.device = "cuda"
    for name, value in {"RANK": "3", "LOCAL_RANK": "1"}.items():  # of a second machine
        monkeypatch.setenv(name, value)
    with pytest.raises(Stopped):
        run.measure(options, print)
    own = torch.device("cuda", 1)
    assert (told["backend"], told["device_id"], told["current"]) == ("nccl", own, own)
    options.device = "cpu"
    with pytest.raises(Stopped):
        run.measure(options, print)
    assert (told["backend"], told["device_id"]) == ("gloo", None)
    options.device = "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="rank 2 of this machine has no GPU of its own of 2: start 2, or"):
        run.measure(options, print)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sharded is run by several processes: torchrun --standalone --nproc-per-node 4 bench/gpu_wall.py"),
        (["--hot_share", "0.5"], "--hot_share does nothing with --sharded: leave it out"),
        (["--table_params", "1e6", "2e6"], "--sharded takes one number"),
    ],
)
def test_the_command_ends_in_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["gpu_wall.py", "--sharded", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_wall.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


# --- the committed run, and the model ---------------------------------------------------------------------------


def test_the_models_bytes_are_the_counted_ones():
    """Of 2, 3 and 4 real processes, to the byte."""
    results = fill_docs.load("sharded_cpu")
    assert [entry["ranks"] for entry in results["runs"]] == [2, 3, 4]
    for entry in results["runs"]:
        for case in entry["cases"]:
            assert formula_holds(case)
            if case["way"] == "owners":
                told = layer_bytes(case["tokens"], entry["ranks"], V41)
                both = tuple(len(V41.layer_ids) * part for part in told)
                assert all((rank["ids"], rank["rows"], rank["control"]) == both for rank in case["by_rank"])
    assert results["model"] == model_table()


def test_a_wrong_count_is_seen():
    case = {"by_rank": [{"ids": 5, "rows": 7, "formula": {"ids": 5, "rows": 8}}]}
    assert not formula_holds(case)


def test_the_page_shows_every_run_and_every_link():
    results = fill_docs.load("sharded_cpu")
    assert len(bytes_table(results).splitlines()) == 2 + sum(len(entry["cases"]) for entry in results["runs"])
    assert all(link.name in most_hidden(results) for link in LINKS.values())


# --- who waits for whom -----------------------------------------------------------------------------------------


def times(**changes):
    base = dict(ranks=8, steps=200, jitter=0.0, exchange_s=1e-4, window_s=2e-4, rest_s=2e-3)
    return simulate(**{**base, **changes})


def test_an_exchange_in_the_window_costs_equal_ranks_nothing():
    found = times()
    assert found["waited_s"] == 0 and found["step_s"] == pytest.approx(found["alone_s"], rel=1e-12)


def test_what_does_not_fit_into_the_window_is_waited_for():
    found = times(exchange_s=5e-4)
    assert found["waited_s"] == pytest.approx(3e-4, rel=1e-9) and found["waited_for_s"] == pytest.approx(0, abs=1e-12)
    assert found["step_s"] == pytest.approx(2.2e-3 + 3e-4, rel=1e-9)


def test_one_slow_rank_sets_the_pace():
    found = times(slower=0.5)
    assert found["step_s"] == pytest.approx(found["slowest_s"], rel=0.01)
    assert found["step_s"] > 1.35 * found["alone_s"] and found["waited_for_s"] == pytest.approx(found["waited_s"])


def test_noise_costs_more_among_more_ranks():
    over = [(t := times(ranks=ranks, jitter=0.05))["step_s"] / t["alone_s"] for ranks in (1, 4, 64)]
    assert over[0] == pytest.approx(1) and over[0] < over[1] < over[2]


def test_the_simulation_is_the_same_again():
    assert times(jitter=0.1) == times(jitter=0.1) != times(jitter=0.1, seed=1)
    assert PUBLISHED_WINDOW_S == 56e-6 and np.isfinite(list(times().values())).all() and "RANK" not in os.environ
