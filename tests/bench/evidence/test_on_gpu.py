"""What the pages say of the runs on a GPU, computed once more from the samples, by other words."""

import copy
import json
import statistics
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from bench.evidence import gpu_figures, on_gpu
from bench.evidence.on_gpu import HUNDRED, LOOKUP, PREFILL, SERVED, OnGpu

RESULTS = Path(on_gpu.__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def committed():
    return {name: json.loads((RESULTS / f"{name}.json").read_bytes()) for name in (HUNDRED, SERVED, LOOKUP, PREFILL)}


@pytest.fixture
def values(monkeypatch):
    """The values that given results make."""

    def of(results):
        monkeypatch.setattr(OnGpu, "__getitem__", lambda self, name: results[name])
        return OnGpu(RESULTS).values()

    return of


def mean_steps(case, label):
    """Mean seconds of a decode step, by round."""
    (row,) = (row for row in case["rows"] if row["label"] == label)
    return {sample["round"]: statistics.mean(sample["decode_s"]) for sample in row["rounds"]}


def test_microseconds_are_differences_of_mean_steps_round_by_round(committed, values):
    found, (case,) = values(committed), committed[HUNDRED]["cases"]
    control = mean_steps(case, "no_engram")
    for name, label in (("graph", "offload_uva in graph"), ("staged", "offload_prefetch"), ("resident", "resident")):
        own = mean_steps(case, label)
        added = statistics.median(own[number] - control[number] for number in control)
        lost = statistics.median(own[number] / control[number] - 1 for number in control)
        assert found[f"gpu.{name}.us"] == f"{1e6 * added:.0f}"
        assert found[f"gpu.{name}.percent"] == f"{100 * lost:.1f}"
    weights = case["weight_bytes"]["model"] / committed[HUNDRED]["limits"]["gather"]["bytes_per_s"]
    assert found["gpu.least_ms"] == f"{1e3 * weights:.1f}"


def test_energies_are_powers_of_whole_passes_times_seconds_of_steps(committed, values):
    found, (case,) = values(committed), committed[HUNDRED]["cases"]
    rows = {row["label"]: row for row in case["rows"]}
    watts = []
    for sample in rows["resident"]["rounds"]:
        board = sample["board"]["value"]
        spent = board["joules_after"] - board["joules_before"]
        watts.append(spent / (sum(sample["prefill_s"]) + sum(sample["decode_s"])))
    watt = statistics.median(watts)
    step = statistics.median(s for sample in rows["no_engram"]["rounds"] for s in sample["decode_s"])
    assert found["gpu.step_joules"] == f"{watt * step:.1f}"
    # 15.1 GB of weights at 3.44 to 4.3 pJ a bit of HBM; 1,536 rows of 264 B at 57 pJ of DDR and PCIe at the most.
    low, high = (8 * case["weight_bytes"]["model"] * pico * 1e-12 for pico in (3.44, 4.3))
    assert found["gpu.step_over_hbm"] == f"{watt * step / high:.0f} to {watt * step / low:.0f}"
    assert float(found["gpu.rows_mj"]) == pytest.approx(1e3 * 64 * 24 * 264 * 8 * 57e-12, rel=0.3)
    added = [mean_steps(case, "offload_uva in graph")[n] - s for n, s in mean_steps(case, "no_engram").items()]
    assert found["gpu.graph.wait_mj"] == f"{1e3 * watt * statistics.median(added):.0f}"
    assert found["gpu.graph.token_us"] == f"{1e6 * statistics.median(added) / 64:.1f}"


def test_whole_passes_against_the_resident_table(committed, values):
    found, (case,) = values(committed), committed[HUNDRED]["cases"]
    passes = {
        row["label"]: {s["round"]: sum(s["prefill_s"]) + sum(s["decode_s"]) for s in row["rounds"]}
        for row in case["rows"]
    }
    graph, resident = passes["offload_uva in graph"], passes["resident"]
    lost = sorted(100 * (graph[number] / resident[number] - 1) for number in resident)
    said = f"{statistics.median(lost):+.1f} [{lost[0]:+.1f}, {lost[-1]:+.1f}]"
    assert found["gpu.graph.whole_over_resident"] == said
    (step,) = committed[PREFILL]["steps"]
    prompt = {run["variant"]: run["step_s"] for run in step["runs"] if not run["repeat"]}
    longer = statistics.median(a - b for a, b in zip(prompt["offload_uva"], prompt["resident"]))
    assert found["gpu.prompt.token_us"] == f"{1e6 * longer / 4096:.1f}"


def test_a_prompts_token_through_the_whole_model(committed, values):
    """In place at batch 64, both ways, beside both tables."""
    found, took = values(committed), []
    for case in (*committed[HUNDRED]["cases"], next(c for c in committed[SERVED]["cases"] if c["batch"] == 64)):
        rows = {row["label"]: [sum(one["prefill_s"]) for one in row["rounds"]] for row in case["rows"]}
        tokens = statistics.median(entry["prompt_tokens"] for entry in case["rounds"])
        for label in ("offload_uva", "offload_uva in graph"):
            took.append(1e6 * statistics.median(a - b for a, b in zip(rows[label], rows["resident"])) / tokens)
    assert found["gpu.prompts.token_us"] == f"{min(took):.1f} to {max(took):.1f}"


def test_rows_in_place_follow_from_the_first_and_the_last_number_of_tokens(committed, values):
    found, cases = values(committed), committed[LOOKUP]["cases"]
    one, many = (statistics.median(cases[place]["samples_s"]["uva"]) for place in (0, -1))
    assert found["gpu.ns_a_row"] == f"{1e9 * (many - one) / (24 * 255):.0f}"
    slower = copy.deepcopy(committed)
    for case in slower[LOOKUP]["cases"]:
        case["samples_s"]["uva"] = [2 * seconds for seconds in case["samples_s"]["uva"]]
    assert values(slower)["gpu.ns_a_row"] == f"{2e9 * (many - one) / (24 * 255):.0f}"


def test_every_case_has_a_line_and_a_class(committed):
    lines = OnGpu(RESULTS).table().splitlines()[2:]
    cases = committed[HUNDRED]["cases"] + committed[SERVED]["cases"]
    assert len(lines) == len(cases)
    assert all(line.count("WIN") == 2 and line.count("LOSS") == 1 for line in lines)


def test_the_figures_are_drawn_from_the_samples(committed, tmp_path):
    first = gpu_figures.draw_lookup(committed[LOOKUP], tmp_path)[0].read_bytes()
    other = copy.deepcopy(committed[LOOKUP])
    other["cases"][0]["samples_s"]["uva"] = [1e-3]
    assert gpu_figures.draw_lookup(other, tmp_path)[0].read_bytes() != first
    case = committed[HUNDRED]
    assert [path.name for path in gpu_figures.draw_hundred(case, tmp_path)] == ["decode_gpu_100b.svg"]


def test_decode_figures_draw_what_they_are_labelled(committed):
    """Least, median and most of the rounds that a row has in common with no Engram, and how many rounds those are."""
    results = copy.deepcopy(committed[SERVED])
    labels = []
    for axis, case in zip(gpu_figures.decode(results).axes, results["cases"]):
        control = mean_steps(case, "no_engram")
        for place, tick in enumerate(axis.get_yticklabels()):
            own = mean_steps(case, tick.get_text())
            added = [1e6 * (own[number] - control[number]) for number in own.keys() & control.keys()]
            line, dot = (found for found in axis.lines if {*found.get_ydata()} == {place})
            assert [*line.get_xdata()] == pytest.approx([min(added), max(added)])
            assert [*dot.get_xdata()] == pytest.approx([statistics.median(added)])
        labels.append(axis.get_xlabel().partition(": ")[2])
    assert labels == [f"median, least to most of {rounds} rounds" for rounds in (5, 5, 3)]
    results["cases"][0]["rows"][1]["rounds"].pop()
    assert gpu_figures.decode(results).axes[0].get_xlabel().endswith("of 4 or 5 rounds")
    plt.close("all")


def test_prefetching_is_held_against_waiting_in_the_rounds_that_both_have(committed, values):
    found = values(committed)
    for case in committed[SERVED]["cases"]:
        thread, waited = (mean_steps(case, label) for label in ("offload_prefetch", "offload_naive"))
        more = [1e6 * (thread[number] - waited[number]) for number in thread.keys() & waited.keys()]
        assert found[f"gpu.prefetch_over_naive.{case['batch']}"] == f"{min(more):+.0f} to {max(more):+.0f}"
    changed = copy.deepcopy(committed)
    (row,) = (row for row in changed[SERVED]["cases"][0]["rows"] if row["label"] == "offload_naive")
    row["rounds"][0]["decode_s"] = [2 * seconds for seconds in row["rounds"][0]["decode_s"]]
    assert values(changed)["gpu.prefetch_over_naive.64"] != found["gpu.prefetch_over_naive.64"]


def test_what_lookup_and_window_leave_unexplained(committed, values):
    """Of batches that fetch for longer than their window, and of all rows that cross, by both counts."""
    found, medians = values(committed), {c["tokens"]: c["samples_s"]["staged"] for c in committed[LOOKUP]["cases"]}
    left = []
    for case in [*committed[HUNDRED]["cases"], *committed[SERVED]["cases"]]:
        rows = {row["label"]: row["rounds"] for row in case["rows"]}
        window = statistics.median(w for sample in rows["offload_prefetch"] for w in sample["window_s"])
        own, none = (mean_steps(case, label) for label in ("offload_prefetch", "no_engram"))
        added = statistics.median(own[number] - none[number] for number in own.keys() & none.keys())
        if case["batch"] > 1:
            left.append(1e3 * (added - (statistics.median(medians[case["batch"]]) - window)))
    assert found["gpu.staged.unexplained_ms"] == f"{min(left):.1f} to {max(left):.1f}" == "0.8 to 1.7"
    low, high = map(float, found["gpu.crossed_share"].split(" to "))
    crossed = [float(found[f"gpu.prompt.{name}"]) for name in ("crossed", "crossed_distinct")]
    assert high / low == pytest.approx(crossed[1] / crossed[0], rel=0.03)  # both are rounded
