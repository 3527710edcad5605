"""The parts of the end-to-end benchmark by themselves: bus, clock, workload, memory, a file that survives, graphs."""

import contextlib
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.evidence.committed import Evidence
from bench.served import graphs, memory, run
from bench.served.memory import Plan, estimate, largest_batch
from bench.served.record import Record, rounds_done
from bench.served.requests import Decode, Lengths, Prefill, TokenSource, schedule
from bench.served.variants import Choice
from bench.setup.backbones import BlockShape, measure_backbone
from bench.setup.sizes import table_config
from bench.setup.slow_bus import Bus, ThrottledTable, rest
from engram_ref.calling.call import CallError
from engram_ref.config import EngramConfig
from engram_ref.tables.device import DeviceTable
from tests.bench.served.example import example
from tests.bench.served.test_numbers import SCHEMA

CPU = torch.device("cpu")


class Time:
    """A clock that stands still unless somebody sleeps."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def table():
    return DeviceTable(torch.arange(4000, dtype=torch.float32).view(1000, 4))  # rows of 16 B


def test_a_slowed_bus_really_limits(table):
    clock = Time()
    slow = ThrottledTable(table, Bus(1600.0, 0.25), clock, clock.sleep)
    rows = torch.tensor([5, 5, 7, 999])
    pending = slow.start(rows)
    clock.now += 0.1  # the first block computes
    assert torch.equal(pending.wait(), table.start(rows).wait())
    assert clock.now == pytest.approx(100 + 0.25 + 4 * 16 / 1600)
    assert clock.slept == [pytest.approx(0.19)]


def test_a_bus_that_was_fast_enough_is_not_waited_for(table):
    clock = Time()
    pending = ThrottledTable(table, Bus(1600.0), clock, clock.sleep).start(torch.tensor([1]))
    clock.now += 1
    pending.wait()
    assert clock.slept == []


def test_fetches_share_the_bus(table):
    clock = Time()
    slow = ThrottledTable(table, Bus(16.0, 0.5), clock, clock.sleep)  # a row a second
    first, second = slow.start(torch.tensor([1, 2])), slow.start(torch.tensor([3]))
    first.wait()
    assert clock.now == pytest.approx(102.5)
    second.wait()
    assert clock.now == pytest.approx(103.5)


def test_rest_is_exact():
    begin = time.perf_counter()
    rest(0.002)
    took = time.perf_counter() - begin
    assert took >= 0.002


@pytest.mark.parametrize(
    ("text", "bus", "shown"),
    [("4", Bus(4e9), "4 GB/s"), ("0.5:20", Bus(0.5e9, 2e-5), "0.5 GB/s + 20 us"), ("inf:56", None, "56 us")],
)
def test_a_bus_is_spelt(text, bus, shown):
    found = Bus.parse(text)
    assert str(found) == shown and found.seconds(0) == pytest.approx(found.latency_s)
    assert bus is None or (found.bytes_per_s, found.latency_s) == pytest.approx((bus.bytes_per_s, bus.latency_s))


@pytest.mark.parametrize("text", ["0", "-1", "fast", "4:x", "4:-1", "nan", ""])
def test_no_bus(text):
    with pytest.raises(ValueError, match="must be GB/s or GB/s:us"):
        Bus.parse(text)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_the_schedule_serves_every_token_once(slots):
    lengths = [Lengths(3, 1), Lengths(4, 5), Lengths(4, 2), Lengths(9, 3), Lengths(9, 4)]
    given, places = [0] * len(lengths), {}
    for step in schedule(lengths, slots, most_tokens=10):
        if isinstance(step, Prefill):
            longest = max(lengths[sequence].prompt for sequence in step.sequences)
            assert len(step.sequences) == 1 or longest * len(step.sequences) <= 10
            for sequence, slot in zip(step.sequences, step.slots):
                busy = places.get(slot)
                assert busy is None or given[busy] == lengths[busy].output  # nobody is pushed out
                assert given[sequence] == 0
                places[slot], given[sequence] = sequence, 1
        else:
            assert len({slot for slot, _, _ in step.running}) == len(step.running) <= slots
            for slot, sequence, so_far in step.running:
                assert places[slot] == sequence and given[sequence] == so_far < lengths[sequence].output
                given[sequence] += 1
    assert given == [length.output for length in lengths]


def test_a_place_that_is_free_is_filled_before_the_next_token():
    steps = schedule([Lengths(2, 2), Lengths(2, 4), Lengths(2, 3)], 2, most_tokens=100)
    kinds = ["prefill" if isinstance(step, Prefill) else "decode" for step in steps]
    assert kinds == ["prefill", "decode", "prefill", "decode", "decode"]
    assert steps[2] == Prefill((2,), (0,)) and steps[3] == Decode(((0, 2, 1), (1, 1, 2)))


def test_rounds_are_the_same_whoever_asks_and_differ_from_each_other():
    text = np.arange(1000)
    for source in (TokenSource(text, 0, 7), TokenSource(None, 50, 7)):
        first, again = (source.round(3, 4, (5, 9), (2, 6)) for _ in range(2))
        assert first.lengths == again.lengths == sorted(first.lengths)
        assert all((a == b).all() and len(a) == sum(n) for a, b, n in zip(first.tokens, again.tokens, first.lengths))
        other = source.round(4, 4, (5, 9), (2, 6))
        assert [list(tokens) for tokens in other.tokens] != [list(tokens) for tokens in first.tokens]
        assert {tuple(source.round(-1, 4, (5, 9), (2, 6)).tokens[0])} != {tuple(first.tokens[0])}
        assert all(5 <= p <= 9 and 2 <= o <= 6 for p, o in first.lengths)


def test_lengths_follow_the_seed_and_those_of_seed_0_are_the_committed_runs():
    for text in (None, np.arange(20_000)):

        def drawn(seed, number, text=text):
            return TokenSource(text, 50, seed).round(number, 4, (100, 1024), (10, 99)).lengths

        assert all(drawn(0, number) != drawn(1, number) for number in (-1, 0, 1))
    # Rounds of the committed runs, drawn by their seed, 0, have as many tokens as their files say.
    for path in ("end_to_end_cpu", "end_to_end_h200", "end_to_end_h200_100b"):
        for case in Evidence()[path]["cases"]:
            bounds = tuple(case["prompt_tokens"]), tuple(case["output_tokens"])
            for found in case["rounds"]:
                lengths = TokenSource(None, 50, 0).round(found["round"], case["sequences"], *bounds).lengths
                told = (found["prompt_tokens"], found["output_tokens"])
                assert (sum(n.prompt for n in lengths), sum(n.output for n in lengths)) == told


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="the text has 20 tokens, a round needs 28"):
        TokenSource(np.arange(20), 0, 0).round(0, 4, (5, 5), (2, 2))


def test_prompts_are_padded_on_the_right():
    work = TokenSource(np.arange(1, 100), 0, 0).round(0, 3, (2, 5), (1, 1))
    ids, lengths = work.prompts(Prefill((0, 2), (1, 0)))
    assert ids.shape == (2, lengths.max())
    for row, sequence, length in zip(ids, (0, 2), lengths):
        assert (row[:length] == work.tokens[sequence][:length]).all() and (row[length:] == 0).all()


def plan(slots=4, names=("no_engram", "own_compute", "resident", "offload_hot")):
    config = EngramConfig.preset("tiny").replace(hidden=256)
    shape = BlockShape(256, 768, 4, 2, 64)
    return Plan(shape, 6, 1000, 2560, 4, config, 1 << 20, slots, 100, 100, 8, 400, Choice(names, (0.01, 0.1)))


def test_memory_is_counted_part_by_part():
    needs = estimate(plan(), CPU).device
    assert needs["table"] == (1 << 20) * 16 and needs["weights"] == (3560 + 2 * 256 * 64) * 4
    assert needs["keys and values"] == 2 * 6 * 4 * 2 * 256 * 64 * 4  # rounded up to a span of 256 positions
    assert needs["hot rows"] == int(0.01 * 2**20) * 16 + int(0.1 * 2**20) * 16 + 2 * 4 * 2**20
    on_gpu = estimate(plan(), torch.device("cuda"))
    assert on_gpu.device["resident table"] == on_gpu.host["table"] == 2**24
    without = estimate(plan(names=("no_engram", "offload_naive")), torch.device("cuda"))
    assert without.device["resident table"] == without.device["hot rows"] == without.device["rows on hand"] == 0
    assert without.host["staging"] > 0


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 10 << 20)
    with pytest.raises(ValueError) as refused:
        estimate(plan(), CPU).require(CPU)
    text = str(refused.value)
    assert "\n" not in text and "GiB of host memory are needed" in text and "0.01 GiB are free" in text
    assert f"{estimate(plan(), CPU).total / 2**30:.2f} GiB" in text and "weights" in text and "--batches" in text


@pytest.mark.parametrize(("card", "fits"), [(139, True), (78, False)])
def test_a_hundred_billion_parameters_are_resident_where_the_card_holds_them(card, fits, monkeypatch):
    """96 GiB of fp8 rows beside a model of 8 B class at batch 64: an H200 holds them, an H100 does not."""
    vocabulary, names = 151_936, ("no_engram", "resident", "offload_prefetch", "offload_uva")
    shape, blocks, parameters = measure_backbone("qwen3-8b", None, vocabulary)
    config = table_config("v41-flash", 1e11, shape.hidden, "bfloat16")
    rows = sum(size * config.heads for size in config.table_size_per_order)
    head = vocabulary * shape.hidden
    wanted = Plan(shape, blocks, parameters, head, 2, config, rows, 64, 256, 64, 64, 16384, Choice(names))
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: card << 30)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 120 << 30)
    needs = estimate(wanted, torch.device("cuda"))
    assert needs.device["resident table"] / 2**30 == pytest.approx(96.0, abs=0.1)
    if fits:
        needs.require(torch.device("cuda"))
        return
    with pytest.raises(ValueError, match=rf"{needs.total / 2**30:.2f} GiB of cuda memory .* {card}.00 GiB are free"):
        needs.require(torch.device("cuda"))


def test_the_largest_batch_that_fits(monkeypatch):
    free = 2 * estimate(plan(slots=16), CPU).total
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: free)
    slots = largest_batch(plan(), CPU)
    assert 16 <= slots < 256
    estimate(plan(slots=slots), CPU).require(CPU)
    with pytest.raises(ValueError, match="are needed"):
        estimate(plan(slots=2 * slots), CPU).require(CPU)
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 1)
    with pytest.raises(ValueError, match="are needed"):
        largest_batch(plan(), CPU)


# --- a file that survives ------------------------------------------------------------------------------

DESCRIPTION = {"backbone": "b", "batch": 1, "stream": {"name": "s"}}
HEAD = {
    "benchmark": "end_to_end", "device": "cpu", "device_name": "x", "configuration": {"seed": 0}, "code_sha256": "0"
}  # fmt: skip
WRITER = """
import sys
from pathlib import Path
from bench.served.record import Record, rounds_done
head, description = eval(sys.argv[2]), eval(sys.argv[3])
case = Record.open(Path(sys.argv[1]), head, fresh=False).case(description, ["a", "b", "c"])
number = 0
while True:
    for label in ("b", "c", "a"):
        case.add({"label": label}, {"round": number, "value": [number] * 2000})
    number += 1
"""


def write_until_killed(path):
    """Another process adds passes until it is killed without warning."""
    command = [sys.executable, "-c", WRITER, str(path), repr(HEAD), repr(DESCRIPTION)]
    writer = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and path.stat().st_size > 60_000):
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()


def test_a_run_that_is_killed_leaves_whole_rounds_to_continue(tmp_path):
    path = tmp_path / "results.json"
    write_until_killed(path)
    left = json.loads(path.read_text())["cases"][0]["rows"]
    whole = set.intersection(*({sample["round"] for sample in row["rounds"]} for row in left))
    assert [row["label"] for row in left] == ["a", "b", "c"] and whole
    record = Record.open(path, HEAD, fresh=False)
    case = record.case(DESCRIPTION, ["a", "b", "c"])
    assert rounds_done(case.content) == whole and record.kept == 3 * len(whole)
    assert record.kept + record.dropped == sum(len(row["rounds"]) for row in left)
    for row, before in zip(case.content["rows"], left):
        assert row["rounds"] == [sample for sample in before["rounds"] if sample["round"] in whole]
    case.add({"label": "a"}, {"round": max(whole) + 1})
    assert case.content["rows"][0]["rounds"][-1]["process"] == record.process == 1
    assert len(record.results["cases"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"configuration": {"seed": 1}}, "another option seed (0, now 1)"),
        ({"code_sha256": "f" * 64}, "another code_sha256 (0, now ffffffffffff...)"),
        ({"device_name": "y"}, "another device_name (x, now y)"),
    ],
)
def test_another_configuration_is_refused_unless_it_is_to_begin_anew(tmp_path, change, said):
    path = tmp_path / "results.json"
    Record.open(path, HEAD, fresh=False).case(DESCRIPTION, ["a"]).add({"label": "a"}, {"round": 0})
    with pytest.raises(ValueError, match="--fresh") as refused:
        Record.open(path, {**HEAD, **change}, fresh=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert Record.open(path, {**HEAD, **change}, fresh=True).results["cases"] == []


def test_a_pass_is_a_line_and_stays_what_it_was(tmp_path):
    results = example()
    record = Record(tmp_path / "results.json", results)
    record.save()
    text = record.path.read_text(encoding="utf-8")
    assert json.loads(text) == results and '"decode_s": [0.1, 0.1,' in text
    SCHEMA.validate(json.loads(text))


# --- graphs, on a stand-in -----------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """What the capture uses of CUDA; everything is noted."""
    calls = []

    class Graph:
        def __init__(self):
            self.name = f"graph{sum(call.startswith('new') for call in calls)}"
            calls.append(f"new {self.name}")

        def capture_begin(self, pool=None, capture_error_mode=None):
            calls.append(f"begin {self.name} in {pool}")

        def capture_end(self):
            calls.append(f"end {self.name}")

        def replay(self):
            calls.append(f"replay {self.name}")

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            calls.append("wait")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool", raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return calls


def test_a_step_is_captured_in_pieces_with_the_join_between(cuda):
    pieces = graphs.Pieces(CPU)

    def step():
        cuda.append("block 1")
        pieces.cut()
        cuda.append("other blocks")
        return torch.zeros(1)

    for key in ("first", "second"):
        pieces.prepare(key, step)
    pieces.prepare("whole", lambda: torch.ones(1))
    assert cuda[cuda.index("new graph0") : cuda.index("new graph2")][:8] == [
        "new graph0", "begin graph0 in the pool", "block 1", "end graph0",
        "new graph1", "begin graph1 in the pool", "other blocks", "end graph1",
    ]  # fmt: skip
    assert "begin graph2 in the pool" in cuda
    cuda.clear()
    pieces.replay("first", lambda: cuda.append("join"))
    assert cuda == ["replay graph0", "join", "replay graph1"]
    cuda.clear()
    assert pieces.replay("whole", lambda: cuda.append("join")) == 1 and cuda == ["replay graph4"]


@pytest.mark.parametrize(
    "error", [RuntimeError("not permitted when stream is capturing\nmore"), CallError("no answer")]
)
def test_a_capture_that_fails_ends_the_run_in_one_line(error, cuda):
    """Rather than times of another step under the name of this one; whatever is open of the capture is ended."""
    pieces = graphs.Pieces(CPU)
    pieces.prepare("good", lambda: torch.zeros(1))

    def step():
        pieces.cut()
        if pieces._recording:
            raise error
        return torch.zeros(1)

    with pytest.raises(
        ValueError, match=f"step failed: {str(error)[:9]}[a-z ]*; --eager decodes without graphs"
    ) as told:
        pieces.prepare("key", step)
    assert told.value.__cause__ is error and cuda[-1] == "end graph2" and not pieces._recording


def test_a_file_of_another_benchmark_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text('{"benchmark": "gpu_wall"}', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bench.served.run", str(path)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "holds results of 'gpu_wall'" in error


def test_a_file_is_shown_again_as_a_module(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(example()), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bench.served.run", str(path)])
    monkeypatch.delitem(sys.modules, "bench.served.run")
    runpy.run_module("bench.served.run", run_name="__main__")
    said = capsys.readouterr().out
    assert "== qwen3-8b, 36 blocks" in said and said.endswith(f"{tmp_path / 'slower_bus.svg'}\n")
