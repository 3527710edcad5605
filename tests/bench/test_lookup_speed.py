"""The lookup alone: what is timed on a CPU, how the device's clock is used on CUDA, and what the table says."""

import copy
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import lookup_speed
from bench.evidence.lookup_table import handover_table, report
from bench.instruments import bandwidth
from bench.instruments.clocks import EventClock
from bench.reads.table import report as reads_report
from bench.schemas.lookup_speed import Results
from bench.setup.sizes import table_config
from bench.setup.staged_parts import SharedGather, StagedParts
from engram_ref.hashing import HashPlan
from engram_ref.lookup.device import DeviceLookup
from engram_ref.rows.rows import Rows
from engram_ref.tables.device import DeviceTable
from engram_ref.vocab import CompressedVocab
from tests.bench.wall.example import environment
from tests.schemas import validator

SCHEMA = validator(Results)
SMALL = ["--device", "cpu", "--preset", "v41-flash", "--table_params", "3e5", "--tokens", "1", "5", "--repeats", "6"]
pytestmark = pytest.mark.usefixtures("kept_maps")
SMALL += ["--threads", "1", "3"]
ON_CPU = Path(__file__).parents[2] / "bench/results/lookup_speed_cpu.json"
COMMITTED = Path(__file__).parents[2] / "bench/results/lookup_speed_h200.json"  # of before there were parts


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lookup_speed", *map(str, arguments)])
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 1 << 20)
    lookup_speed.main()


@pytest.fixture
def results(tmp_path, monkeypatch, capsys):
    """One small run on a CPU, and what it printed."""
    run_main(monkeypatch, *SMALL, "--out", tmp_path)
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8")), capsys.readouterr().out, tmp_path


def test_a_cpu_is_timed_by_the_hosts_clock_and_says_so(results):
    found, text, out = results
    SCHEMA.validate(found)
    assert text.startswith("Measured on the CPU ") and "no GPU figure follows" in text.splitlines()[0]
    *_, written, last = text.splitlines()
    assert written == json.loads(last)["results"] == str(out / "results.json")
    assert found["clock"] == "host clock" and found["environment"]["accelerator"] is None
    assert [case["tokens"] for case in found["cases"]] == [1, 5]
    for case in found["cases"]:
        assert set(case["samples_s"]) == {"resident", "resident again", "staged"}
        assert all(len(samples) == 6 and min(samples) > 0 for samples in case["samples_s"].values())
        assert (case["rows"], case["bytes"]) == (24 * case["tokens"], 264 * 24 * case["tokens"])
        parts = case["parts_s"]
        assert set(parts) == {"hash", "start", "join", "whole", "arrive", "handed over"}
        assert set(case["gather_s"]) == {"1", "3"}
        assert all(len(one) == 6 and min(one) > 0 for one in (*parts.values(), *case["gather_s"].values()))
        assert all(
            sum(inside) < whole for *inside, whole in zip(*(parts[p] for p in ("hash", "start", "join", "whole")))
        )
    (left_out,) = found["skipped"]
    assert left_out["way"] == "uva" and "it needs a CUDA device" in left_out["why"] and left_out["why"] in text


def test_the_table_says_where_the_time_of_staged_goes_and_reads_runs_that_did_not_ask(results):
    found = results[0]
    found["cases"][1]["parts_s"]["start"] = [3e-6, 123.4e-6, 4e-3]
    found["cases"][1]["gather_s"]["3"] = [56.7e-6]
    assert set(found["cases"][1]["disturbed"]) == {"stolen_s", "switched_away", "page_faults"}
    found["cases"][1]["disturbed"] |= {"stolen_s": 0.25, "switched_away": 17}
    head, _, _, _, five = next(part for part in report(found).split("where the time")[1:]).splitlines()[1:6]
    assert head.split()[:3] == ["tokens", "hash", "start"] and "1 thread  3 threads  stolen" in head
    assert five.split()[0] == "5" and five.split()[2] == "123.4" and five.split()[-3:] == ["56.7", "250", "17"]
    older = json.loads(COMMITTED.read_text(encoding="utf-8"))
    SCHEMA.validate(older)
    assert "staged" in report(older) and "where the time" not in report(older)


def test_what_a_hand_over_costs_is_paired(results):
    found = results[0]
    found["cases"][1]["parts_s"] |= {"whole": [1e-4, 2e-4, 4e-4], "handed over": [2e-4, 2.5e-4, 9e-4]}
    five = handover_table(found).splitlines()[-1].split()
    assert five == ["5", "120", "30.94", "200", "250", "100", "2", "[1.25,", "2.25]"]
    committed = json.loads(ON_CPU.read_text(encoding="utf-8"))
    SCHEMA.validate(committed)
    assert [case["tokens"] for case in committed["cases"]] == [1, 2, 4, 8, 16, 32, 64]
    assert all(len(case["parts_s"]["handed over"]) == 400 for case in committed["cases"])


def test_a_hand_over_is_one_however_few_its_rows_are():
    draw, asked = np.random.default_rng(0), []
    config = table_config("tiny", 1e4, 1, "bfloat16")
    plan, vocab = HashPlan.build(config, 50, 2), CompressedVocab.from_map(np.arange(50))

    class Table(DeviceTable):
        def start(self, rows, out=None):
            asked.append(threading.current_thread().name)
            return super().start(rows, out)

    rows = torch.zeros(plan.layers[0].rows, config.row_width, dtype=torch.bfloat16)
    with Table(rows) as table, StagedParts(plan, vocab, table, 1) as parts:
        before = draw.integers(0, 50, (1, plan.max_ngram - 1))
        parts.fetch(draw.integers(0, 50, (1, 1)), before)
        parts.hand_over(draw.integers(0, 50, (1, 1)), before)
    assert asked[0] == threading.current_thread().name and asked[1].startswith("engram-prefetch")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_a_shared_gather_is_a_gather(threads, count):
    raw = torch.arange(100 * 6, dtype=torch.int16).view(torch.uint8).view(100, 12)
    rows = Rows.of(raw.view(torch.int16))
    numbers = torch.from_numpy(np.random.default_rng(count).integers(0, 100, count))
    with SharedGather(rows, 60, threads, pinned=False) as shared:
        for _ in range(2):
            assert torch.equal(shared.gather(numbers), raw[numbers])
            numbers = numbers.flip(0)


def test_wrong_rows_are_never_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lookup_speed.Lookups, "measure", None)
    real = lookup_speed.TableSet.check

    def damaged(tables, ids):
        tables.in_host.parts[0].zero_()
        return real(tables, ids)

    monkeypatch.setattr(lookup_speed.TableSet, "check", damaged)
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *SMALL, "--out", tmp_path)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "returned other rows than were written" in error[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "0"], "'0' must be an integer of at least 1"),
        (["--table_params", "max"], "--table_params max: give a number"),
        (["--table_params", "1e12"], "GiB do not fit into host memory, of which"),
        (["--preset", "gpt"], "invalid choice: 'gpt'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, said, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *SMALL, "--out", tmp_path, *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("fused", [False, True])
def test_both_ways_to_look_up_find_the_rows_of_a_samples_ids(fused, tmp_path, monkeypatch):
    """The kernels, in Triton's interpreter, on fresh ids and histories, against hash and gather by the CPU."""
    options = lookup_speed.parse_arguments([*SMALL, "--out", str(tmp_path)])
    with lookup_speed.ExitStack() as stack:
        lookups = lookup_speed.Lookups(options, stack)
        by_cpu = lookups._way("resident", 5, 0, 3)
        table = lookups.variants["resident"].table
        kernels = DeviceLookup(lookups.plan, {lookup_speed.LAYER: table}, lookups.vocab, fused=fused)
        ids, before = torch.from_numpy(by_cpu._ids), torch.from_numpy(by_cpu._before)
        by_kernels = lookup_speed.ByKernels(kernels, ids, before)
        found = [by_kernels.run(number).clone() for number in range(3)]
        assert all(torch.equal(rows, by_cpu.run(number)) for number, rows in enumerate(found))
        assert not torch.equal(found[0], found[1])
        assert (by_cpu._ids != lookups._way("resident again", 5, 1, 3)._ids).any()  # no way warms another's rows


class Stream:
    """A device that works through what it was given; the host's launches take time, too."""

    def __init__(self, launch_s):
        self.device_s, self.host_s, self.launch_s = 0.0, 0.0, launch_s

    def give(self, seconds):
        self.host_s += self.launch_s
        self.device_s = max(self.device_s, self.host_s) + seconds

    def event(self):
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.at = max(self.stream.device_s, self.stream.host_s)

    def query(self):
        return self.stream.host_s >= self.at

    def synchronize(self):
        self.stream.host_s = max(self.stream.host_s, self.at)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize(("launch_s", "seconds", "late"), [(10e-6, 8e-6, 0), (400e-6, 404e-6, 1)])
def test_launching_is_not_in_the_time_of_kernels_or_they_are_called_late(launch_s, seconds, late):
    """Two kernels of 4 us behind a delay of 500 us: launched in 20 us or in 800."""
    stream = Stream(launch_s)

    def delay():
        stream.device_s = max(stream.device_s, stream.host_s) + 500e-6

    def two() -> None:
        stream.give(4e-6)
        stream.give(4e-6)

    clock = EventClock(stream.event)
    took, came_late = lookup_speed.timed(clock, two, delay)
    assert took == pytest.approx(seconds, abs=200e-6 if late else 1e-9) and came_late == bool(late)
    took, came_late = lookup_speed.timed(clock, two, None)
    assert took == pytest.approx(2 * launch_s + (4e-6 if launch_s > 4e-6 else 8e-6), abs=1e-7) and not came_late


def test_the_table_holds_uva_against_what_was_published(results):
    """With what differs; other numbers of tokens and other ways have nothing to be held against."""
    gpu = copy.deepcopy(results[0])
    gpu.update(device="cuda", device_name="H100", skipped=[], clock="device events")
    gpu["environment"]["accelerator"] = environment(cpu=False)["accelerator"]
    gpu["ways"]["uva"] = "in place"
    for case in gpu["cases"]:
        case["samples_s"] = {name: [1e-6] * 6 for name in ("resident", "resident again")}
        case["samples_s"]["uva"] = [5e-6] * 6
        case["launched_late"] = {"resident": 0, "resident again": 0, "uva": 2}
    SCHEMA.validate(gpu)
    text = report(gpu)
    lines = [line.split() for line in text.splitlines() if "uva" in line.split()[:2]]
    one, five = (line for line in lines if line[1] == "uva")
    assert one[0] == "1" and one[-1] == "3.94" and one[3] == "5" and one[-2] == "2"
    assert " ".join(one[5:8]) == "5 [5, 5]" and five[-1] == "2"
    assert "GB300" in text and "not like for like" in text


def test_other_ways_to_read_need_the_rows_of_uva_and_say_so(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, *SMALL, "--out", tmp_path, "--reads", "padded")
    found, text = json.loads((tmp_path / "results.json").read_text(encoding="utf-8")), capsys.readouterr().out
    SCHEMA.validate(found)
    assert {"way": "reads", "why": "they read the rows of uva, which is left out"} in found["skipped"]
    assert "reads: left out, they read the rows of uva" in text and "asked" not in found["cases"][0]


def test_ways_to_read_are_told_with_what_they_asked_for(results):
    gpu = copy.deepcopy(results[0])
    for case in gpu["cases"]:
        case["samples_s"] |= {"as_is": [2e-6] * 6, "padded": [1e-6] * 6, "stream": [1e-6] * 6}
        lines = {"as_is": 3.9375, "padded": 3.0, "stream": 3.0}
        case["asked"] = {name: {"lines": case["rows"] * n, "sectors": case["rows"] * 9.0} for name, n in lines.items()}
    SCHEMA.validate(gpu)
    lines = {(line[0], line[1]): line[2:] for line in map(str.split, reads_report(gpu).splitlines()) if line}
    # 24 rows of 264 B in 1 us: 24 M rows/s, 6.336 GB/s of them, 6.912 of nine sectors each
    assert lines["1", "padded"] == ["1", "24", "6.336", "6.912", "3", "9", "0.5", "[0.5,", "0.5]"]
    assert lines["1", "as_is"] == ["2", "12", "3.168", "3.456", "3.938", "9"]
    assert lines["5", "stream"][:3] == ["1", "34.56", "3"]  # of no rows
    assert reads_report(results[0]) == ""
