"""The finding's blocks: computed from committed files, and a sentence where there are none."""

import copy
import json
import re
import shutil

import pytest

from bench.evidence import wall_time
from bench.evidence.committed import RESULTS
from bench.instruments.reading import read_results
from bench.served.classes import classify, offloaded_labels
from bench.served.doubts import reading
from bench.served.numbers import row_of
from bench.served.table import report
from tests.bench.served.example import WINDOW, case, example


@pytest.fixture
def folder(tmp_path):
    """With a CPU's run only."""
    (tmp_path / "end_to_end_cpu.json").write_text(json.dumps(example("cpu")), encoding="utf-8")
    (tmp_path / "gpu_wall_cpu.json").write_text("{}", encoding="utf-8")
    shutil.copy(RESULTS / "lookup_speed_h200.json", tmp_path)
    return tmp_path


def test_without_a_gpus_run_no_number_stands_for_one(folder):
    texts = {name: fill() for name, fill in wall_time.blocks(folder).items()}
    assert texts["wall_time_gpu"] == wall_time.NO_RUN
    assert texts["wall_time_class"] == "**INCONCLUSIVE**, no run on a CUDA machine is committed yet."
    lines = texts["wall_time_story"].splitlines()
    assert lines[0] == wall_time.NO_RUN and lines[2] == "<details markdown>" and lines[-1] == "</details>"
    assert lines[7].startswith("| CPU ")
    for name in ("story", "setup", "sensitivity", "reading", "cpu"):  # whatever a CPU says is folded away
        outside = re.sub("<details.*?</details>", "", texts[f"wall_time_{name}"], flags=re.DOTALL)
        assert "CPU" not in outside and (wall_time.NO_RUN in outside or name == "cpu")
    assert "Measured on the CPU" in texts["wall_time_cpu"] and "CPU Example" in texts["wall_time_setup"]


def test_a_gpus_run_is_shown_when_it_is_there(folder):
    (folder / "end_to_end_h100.json").write_text(json.dumps(example("cuda")), encoding="utf-8")
    texts = {name: fill() for name, fill in wall_time.blocks(folder).items()}
    assert "Measured on the GPU Example" in texts["wall_time_gpu"] and "CPU" not in texts["wall_time_gpu"][:60]
    _, _, naive, prefetch = texts["wall_time_class"].splitlines()
    assert naive.startswith("| `offload_naive` | +20000 to +20000 | **LOSS** +20.0 ")
    assert prefetch == (
        "| `offload_prefetch` | +3500 to +3500 | **LOSS** +3.5 | **LOSS** +3.5 | **WIN** +0.5 | **WIN** +0.5 |"
    )  # us; 3.5 % of the model without Engram, in steps and passes, and 0.5 / 1.03 % of the resident table
    lines = texts["wall_time_story"].splitlines()
    assert lines[2].endswith("| +3.5 [+3.5, +3.5] | +0.5 [+0.5, +0.5] |")
    assert lines[2].startswith(
        "| GPU Example | qwen3-8b, 4, 2.56e-05 B, python-stdlib | +2.0 [+2.0, +2.0] | +1.0"
    ) and (lines[4] == "<details markdown>" and wall_time.NO_RUN not in texts["wall_time_story"])


def test_how_late_rows_may_come(folder):
    lines = wall_time.wall_time_sensitivity(folder).splitlines()
    measured = next(line for line in lines if line.startswith("| CPU"))
    cells = [cell.strip() for cell in measured.strip("|").split("|")]
    # 4 x 24 rows of 264 B; a window of 300 us and 3 % of 100 ms; buses that hold at 2 ms and break at 5.
    assert cells[:2] == ["CPU Example", "qwen3-8b, 4, 2.56e-05 B, python-stdlib"]
    assert cells[2:] == ["25.3 kB", "300 us", "3300 us", "0.00768 GB/s", "2000 us", "5000 us"]
    published = [cell.strip() for cell in lines[2].strip("|").split("|")]
    # 24 x 264 B in 56 us and 3 % of 3.6 ms; what the lookup itself takes is the run's on the H200.
    assert published[2:] == ["6.34 kB", "56 us", "164 us", "0.0386 GB/s", "8.38 us", "542 us"]
    assert sum(line.startswith("| arithmetic") for line in lines) == 4


def slower(factor):
    """The example with a prefetched table that takes `factor` times as long."""
    one = case()
    for sample in row_of(one, "offload_prefetch")["rounds"]:
        sample["decode_s"] = [factor * seconds for seconds in sample["decode_s"]]
    return one


def ours(cases, baseline="resident", phase="decode"):
    return classify(cases, "offload_prefetch", baseline, phase)[0]


def test_classes_follow_from_the_interval_of_what_is_lost():
    assert ours([case()]) == "WIN"
    assert ours([case(), slower(1.1)]) == "LOSS"
    between = copy.deepcopy(case())
    for sample in row_of(between, "offload_prefetch")["rounds"][::2]:
        sample["decode_s"] = [1.1 * seconds for seconds in sample["decode_s"]]
    assert ours([between]) == "INCONCLUSIVE"
    other = case()
    row_of(other, "resident")["rounds"][0]["tokens_sha256"] = "0" * 64
    assert ours([other]) == "INVALID"
    alone = case()
    alone["rows"] = alone["rows"][:3]
    assert ours([alone]) == "INCONCLUSIVE"


def test_the_two_baselines_have_classes_of_their_own():
    """3.5 % against no Engram, of which the layer's own compute and lookup are 3; cheap ones turn the paper's class."""
    assert ours([case()], "no_engram") == "LOSS" and ours([case()]) == "WIN"
    cheap = case()
    for label in ("resident", "resident again", "offload_prefetch"):
        for sample in row_of(cheap, label)["rounds"]:
            sample["decode_s"] = [seconds / 1.02 for seconds in sample["decode_s"]]
    assert ours([cheap], "no_engram") == ours([cheap]) == "WIN"
    slow = slower(1.1)
    slow["rows"] = [row for row in slow["rows"] if row["label"] != "no_engram"]
    assert ours([slow], "no_engram") == "INCONCLUSIVE" and ours([slow]) == "LOSS"


def test_phases_and_places_have_classes_of_their_own():
    """A prompt that hides nothing loses the pass alone; what is not offloaded, or on a slow bus, has no class."""
    one = case()
    for sample in row_of(one, "offload_prefetch")["rounds"]:
        sample["prefill_s"] = [2 * seconds for seconds in sample["prefill_s"]]
    assert ours([one]) == "WIN" and ours([one], phase="together") == "LOSS"
    assert offloaded_labels(one) == ["offload_naive", "offload_prefetch"]
    assert classify([one], "offload_naive", "resident", "decode")[0] == "LOSS"
    assert classify([one], "offload_uva", "resident", "decode") == ("INCONCLUSIVE", "not measured")
    row_of(one, "offload_prefetch")["rounds"] = []
    assert ours([one, case()]) == "WIN", "cases without it say nothing of it"


def test_noise_that_reaches_three_per_cent_wins_nothing():
    one = case()
    for sample in row_of(one, "resident again")["rounds"]:
        sample["decode_s"] = [1.05 * seconds for seconds in sample["decode_s"]]
    assert ours([one]) == "INCONCLUSIVE"


def test_a_sceptics_questions_are_answered_from_the_samples():
    text = reading(example())
    assert "  above the floor: yes, at least" in text and "  resident is itself: yes, [-0.1, +0.1] %" in text
    assert "  order: nothing resolved is against it (no_engram < own_compute < resident < offload_naive)" in text
    assert "  same tokens: yes, in 5 rounds" in text and "no hot rows were measured" in text
    assert "  class against no_engram: offload_naive LOSS / LOSS, offload_prefetch LOSS / LOSS (decode steps" in text
    assert "  class against resident: offload_naive LOSS / LOSS, offload_prefetch WIN / WIN (decode steps" in text
    assert "  slow for its weights: a CPU" in text and "  board slowed: unknown" in text


def test_a_sceptic_is_told_what_held_the_device_back():
    one = example()
    weights = {"bytes": 15, "bytes_per_s": 1.0, "limit_bytes_per_s": 3.0, "launch_bound": True}
    board = {"joules_before": 1.0, "joules_after": 2.0, "sm_mhz": 1, "power_w": 1.0, "unknown": {}}
    for row in one["cases"][0]["rows"]:
        row["weights"] = {"value": {**weights, "launch_bound": row["label"] == "no_engram"}, "why": None}
        for sample in row["rounds"]:
            reasons = ["idle", "software power cap"] if sample["round"] == 2 else ["idle"]
            sample["board"] = {"value": {**board, "throttled": reasons}, "why": None}
    text = reading(one)
    assert "  slow for its weights: YES, no_engram" in text and "  board slowed: YES, software power cap" in text
    assert "slow <0.0001" in report(one) and "slowed by idle, software power cap" in report(one)


def test_a_sceptic_is_told_what_is_wrong():
    one = example()
    rows = {row["label"]: row for row in one["cases"][0]["rows"]}
    for sample in rows["offload_naive"]["rounds"]:
        sample["decode_s"] = [0.5 * seconds for seconds in sample["decode_s"]]
        sample["prefill_exposed_s"], sample["decode_exposed_s"] = [0.0], [0.0]
    for sample in rows["resident again"]["rounds"]:
        sample["decode_s"] = [1.004 * seconds for seconds in sample["decode_s"]]
    for row, hits in (("throttled 2000 us", 9), ("throttled 5000 us", 3)):
        rows[row]["hot_share"] = 0.1 if hits == 3 else 0.01
        for sample in rows[row]["rounds"]:
            sample["lookups"], sample["hits"] = 10, hits
    text = reading(one)
    assert "above the floor: no, offload_naive: floor or time is wrong" in text
    assert "resident is itself: NO, [" in text
    assert "order: NO, offload_naive is faster than no_engram; offload_naive is faster than own_compute" in text
    assert "more hot rows, more hits: NO" in text
    one["cases"][0]["rows"] = one["cases"][0]["rows"][:1]
    assert "resident is itself: unknown, resident again was not measured" in reading(one)


def test_what_a_slow_bus_exposes_is_held_against_its_delay():
    one = example()
    for row in one["cases"][0]["rows"]:
        if row["bus"]:
            delay = row["bus"]["latency_s"]
            for sample in row["rounds"]:
                sample["decode_exposed_s"] = [max(0.0, 1.1 * (delay - WINDOW))]
    assert "slow bus, delay less window: measured over expected 1.1, 1.1" in reading(one)
    assert "slow bus, delay less window: no bus was slowed" in reading(read_results(RESULTS / "end_to_end_h200.json"))
