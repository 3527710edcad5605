"""The overhead taken apart, percentiles, slowed buses, tables and figures: from samples whose answer is known."""

import json
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import same_color

from bench.instruments.output import source
from bench.instruments.quantities import quantities
from bench.instruments.timing import NotMeasured, Overhead
from bench.schemas.served import Results
from bench.served import numbers
from bench.served.classes import added_s, classify
from bench.served.doubts import reading
from bench.served.figures import PART_COLOURS, baselines, draw_all, overhead_parts
from bench.served.table import report
from bench.setup.variants import ASKING
from tests.bench.served.example import LOOKUP, NOT_HIDDEN, OWN, STEPS, WINDOW, case, example
from tests.schemas import validator

ROOT = Path(__file__).parents[3]
SCHEMA = validator(Results)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_example_fits_the_schema(device):
    SCHEMA.validate(example(device))


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("end_to_end_*.json")), ids=lambda path: path.stem)
def test_committed_results_stay_valid_and_are_reported(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    SCHEMA.validate(results)
    text = report({**results, "cases": results["cases"][:1]})
    assert "of resident" in text and ("WIN" in text or "LOSS" in text or results["device"] == "cpu")
    assert (results["device"] == "cpu") == ("no class: a CPU has no bus" in text)


@pytest.mark.parametrize("phase", numbers.PHASES)
def test_the_parts_are_what_was_added(phase):
    parts = numbers.decomposition(case(), phase)
    found = {name: part.median for name, part in parts.items()}
    assert found["own compute"] == pytest.approx(OWN)
    assert found["lookup"] == pytest.approx(LOOKUP)
    assert found["not hidden"] == pytest.approx(NOT_HIDDEN)
    assert found[numbers.WHOLE] == pytest.approx(OWN + LOOKUP + NOT_HIDDEN)
    assert all(part.resolved for part in parts.values())


def test_a_part_within_the_noise_is_not_resolved():
    one = case()
    for row in one["rows"]:
        if row["label"] == "resident again":  # 1 % apart from itself in every second round
            for sample in row["rounds"][::2]:
                sample["decode_s"] = [1.01 * s for s in sample["decode_s"]]
    parts = numbers.decomposition(one, "decode")
    assert not parts["not hidden"].resolved and not parts["lookup"].resolved and parts["own compute"].resolved


def test_a_part_of_either_sign_is_not_resolved():
    one = case()
    for number, sample in enumerate(numbers.row_of(one, "offload_prefetch")["rounds"]):
        factor = 1.02 if number % 2 else 0.98
        sample["decode_s"] = [factor * s for s in numbers.row_of(one, "resident")["rounds"][number]["decode_s"]]
    part = numbers.decomposition(one, "decode")["not hidden"]
    assert part.low < 0 < part.high and not part.resolved


def test_without_a_noise_floor_nothing_is_resolved():
    one = case()
    one["rows"] = [row for row in one["rows"] if row["label"] != "resident again"]
    assert not any(part.resolved for part in numbers.decomposition(one, "decode").values())
    assert not any(part.resolved for part in numbers.decomposition(case(rounds=2), "decode").values())


def test_a_missing_row_is_named():
    one = case()
    one["rows"] = [row for row in one["rows"] if row["label"] != "own_compute"]
    with pytest.raises(NotMeasured, match="own_compute was not measured"):
        numbers.decomposition(one, "decode")


def test_only_passes_of_one_process_are_paired():
    one = case()
    for sample in numbers.row_of(one, "resident")["rounds"][:3]:
        sample["process"] = 1
    assert len(numbers.paired([numbers.row_of(one, "resident"), numbers.row_of(one, "no_engram")], "decode")[0]) == 2
    for sample in numbers.row_of(one, "resident")["rounds"]:
        sample["process"] = 1
    with pytest.raises(NotMeasured, match="no round in common"):
        numbers.decomposition(one, "decode")


def test_percentiles_come_from_all_raw_samples():
    row = case()["rows"][0]
    row["rounds"] = row["rounds"][:2]
    row["rounds"][0]["decode_s"] = [float(value) for value in range(100)]
    row["rounds"][1]["decode_s"] = [float(value) for value in range(100, 201)]
    assert numbers.token_times(row) == {"median": 100.0, "p99": 198.0}


def test_tokens_per_second_count_what_was_made():
    one = case()
    row = numbers.row_of(one, "no_engram")
    assert numbers.tokens_per_second(one, row)[0] == pytest.approx(408 / 11)


def test_copies_are_held_against_the_ids():
    one = example()
    row = numbers.row_of(one["cases"][0], "offload_prefetch")
    assert numbers.round_bytes(one["cases"][0]) == (264_000, 132_000) and numbers.copies_agree(one["cases"][0], row)
    assert "0.264 MB asked for, 0.132 MB if each step" in report(one)
    row["rounds"][2]["copied"] -= 264
    assert "warning: offload_prefetch did not copy the bytes that the ids ask for" in report(one)


def test_overheads_are_shares_of_their_baseline():
    """Against no Engram all of it; against the resident table what is not hidden, of that table's time."""
    one = case()
    row = numbers.row_of(one, "offload_prefetch")
    assert numbers.against(one, row, "no_engram", "together").median == pytest.approx(OWN + LOOKUP + NOT_HIDDEN)
    part = numbers.against(one, row, "resident", "together")
    assert part.median == pytest.approx(NOT_HIDDEN / (1 + OWN + LOOKUP)) and part.resolved
    lines = [line.split() for line in report(example()).splitlines() if line.startswith("offload_prefetch")]
    of_steps, of_pass = "+3.5 [+3.5, +3.5] LOSS +0.5 [+0.5, +0.5] WIN", "+3.5 [+3.5, +3.5] LOSS +0.5 [+0.5, +0.5] WIN"
    assert " ".join(lines[1]) == f"offload_prefetch +3500 {of_steps} {of_pass}"
    on_cpu = [line.split() for line in report(example("cpu")).splitlines() if line.startswith("offload_prefetch")]
    assert not {"LOSS", "WIN"} & set(on_cpu[1])


@pytest.mark.parametrize(("gather", "bound"), [(0.4e12, True), (0.3e12, False), (0.2e12, False)])
def test_a_step_that_takes_over_twice_as_long_as_its_weights_is_launch_bound(gather, bound):
    """A step of 100 ms and 15 GB: 0.15 TB/s, against half of 0.4 TB/s, of 0.3, which is just twice, and of 0.2."""
    one, limits = case(), {"gather": {"bytes_per_s": gather}}
    found = numbers.weight_reading(limits, one, numbers.row_of(one, "no_engram"))["value"]
    assert found["launch_bound"] is bound and found["bytes_per_s"] == pytest.approx(15e9 / 0.1)
    with_engram = numbers.weight_reading(limits, one, numbers.row_of(one, "resident"))["value"]
    assert with_engram["bytes"] == 15_050_000_000
    on_cpu = numbers.weight_reading({"gather": None}, one, one["rows"][0])
    assert on_cpu["value"] is None and "a CPU" in on_cpu["why"]
    idle = {**numbers.row_of(one, "resident"), "rounds": []}
    assert numbers.weight_reading(limits, one, idle) == {"value": None, "why": "no decode step was measured"}


def test_the_weights_column_is_marked():
    one = example()
    for row in one["cases"][0]["rows"]:
        row["weights"] = numbers.weight_reading({"gather": {"bytes_per_s": 0.4e12}}, one["cases"][0], row)
    SCHEMA.validate(one)
    text = report(one)
    assert text.count("slow 1") == 9 and "is marked slow" in text and "400 GB/s were measured" in text


def test_what_the_control_received_is_taken_off():
    one = example()
    rows = {row["label"]: row for row in one["cases"][0]["rows"]}
    counted = {"why": None, "passes": 3, "seconds": 1.0, "row_bytes": 0, "fallback": None}
    rows["no_engram"]["pcie"] = {"value": 2_000_000, **counted}
    rows["offload_prefetch"]["pcie"] = {"value": 5_000_000, **counted}
    SCHEMA.validate(one)
    assert numbers.over_control(one["cases"][0], rows["offload_prefetch"]) == 3_000_000
    assert numbers.over_control(one["cases"][0], rows["resident"]) is None
    line = next(line for line in report(one).splitlines() if line.startswith("offload_prefetch"))
    assert line.split()[-5:-2] == ["5", "3", "-"]


def test_what_was_counted_twice_is_said():
    one = example()
    row = next(row for row in one["cases"][0]["rows"] if row["label"] == "offload_prefetch")
    counted = {"why": None, "passes": 1, "seconds": 1.0, "row_bytes": 129_000_000, "fallback": None}
    row["pcie"] = {"value": 160_000_000, "first": 3_740_000_000, **counted}
    SCHEMA.validate(one)
    assert "PCIe, offload_prefetch: 3740 MB counted first; shown is the second count" in report(one)


def test_a_sampled_throughput_is_a_note_and_no_number_of_the_table():
    one = example()
    rows = {row["label"]: row for row in one["cases"][0]["rows"]}
    for label, rate in (("no_engram", 1e6), ("offload_prefetch", 4e6)):
        value = {"bytes_per_s": rate, "samples_bytes_per_s": [rate], "seconds": 1.0}
        fallback = {"what": "sampled", "value": value, "why": None}
        rows[label]["pcie"] = {
            "value": None, "why": "no counter", "passes": 2, "seconds": 1.0, "row_bytes": 0, "fallback": fallback
        }  # fmt: skip
    SCHEMA.validate(one)
    text = report(one)
    assert "PCIe sampled instead (sampled): no_engram 1 MB/s, offload_prefetch 4 MB/s (3 more)" in text
    assert "no PCIe counter: no counter" in text


def test_a_pass_has_the_energy_of_the_whole_board():
    one = example()
    for sample in one["cases"][0]["rows"][0]["rounds"]:
        joules = 100.0 * sample["round"]
        sample["board"] = {
            "value": {
                "joules_before": 1000.0, "joules_after": 1000.0 + joules, "sm_mhz": 1980, "power_w": 650.5,
                "throttled": [], "unknown": {},
            },
            "why": None,
        }  # fmt: skip
    SCHEMA.validate(one)
    assert numbers.pass_joules(one["cases"][0]["rows"][0]) == 200.0
    assert numbers.pass_joules(one["cases"][0]["rows"][1]) is None
    assert "1980 to 1980 MHz, 650.5 to 650.5 W, slowed by nothing" in report(one)


def test_freed_memory_and_energy():
    one = case()
    row = numbers.row_of(one, "offload_prefetch")
    assert numbers.freed_bytes(one, row) == 26_400 and numbers.freed_bytes(one, one["rows"][0]) is None
    one["rows"] = [row for row in one["rows"] if row["variant"] != "resident"]  # it need not fit to be known
    assert numbers.freed_bytes(one, row) == 26_400
    assert numbers.joules_per_token(row) is None
    row["energy"] = {"value": {"joules_per_step": 816.0, "output_tokens_per_step": 408}, "why": None}
    assert numbers.joules_per_token(row) == 2.0


def test_a_bus_that_breaks_three_per_cent():
    one = case()
    buses = numbers.slowed(one)
    assert [(bus.delay_s, bus.breaks) for bus in buses] == [(56e-6, False), (2e-3, False), (5e-3, True)]
    found = numbers.breaking_bus(one)
    assert (found.holds_s, found.breaks_s) == (2e-3, 5e-3)
    assert found.predicted_s == pytest.approx(WINDOW + 0.03 * 0.1)
    breaks, holds = found.bandwidths(numbers.step_bytes(one))
    assert numbers.step_bytes(one) == 4 * 24 * 264
    assert breaks == pytest.approx(numbers.step_bytes(one) / 5e-3) and holds == pytest.approx(4 * 24 * 264 / 2e-3)


def test_a_bus_in_the_noise_breaks_nothing():
    one = case()
    for sample in numbers.row_of(one, "resident again")["rounds"][::2]:
        sample["decode_s"] = [1.2 * s for s in sample["decode_s"]]
    assert [bus.breaks for bus in numbers.slowed(one)] == [None, None, None]
    assert numbers.breaking_bus(one).breaks_s is None


def bus(delay_s, breaks, window_s=WINDOW):
    """A slowed bus that costs 3 % or not, or of which that is open."""
    low, high = {True: (0.04, 0.05), False: (0.01, 0.02), None: (0.02, 0.04)}[breaks]
    part = Overhead((low + high) / 2, low, high, True)
    return numbers.Slowed("a bus", delay_s, window_s, 0.0, part, part, 0.001, 3)


@pytest.mark.parametrize(
    ("low", "high", "resolved", "noise", "breaks"),
    [
        (0.031, 0.04, True, 0.0, True),
        (0.031, 0.04, False, 0.0, None),
        (0.03, 0.04, True, 0.0, None),  # 3 % themselves are not more than 3 %
        (0.01, 0.03, True, 0.03, False),
        (0.01, 0.02, True, 0.04, None),
        (0.02, 0.04, True, 0.0, None),
    ],
)
def test_a_bus_breaks_three_per_cent_or_holds_or_that_is_open(low, high, resolved, noise, breaks):
    part = Overhead((low + high) / 2, low, high, resolved)
    assert numbers.Slowed("a bus", 1e-3, WINDOW, 0.0, part, part, noise, 3).breaks is breaks
    assert numbers.Slowed("a bus", 1e-3, WINDOW, 0.0, part, part, noise, 2).breaks is (breaks or None)


def test_what_a_row_adds_is_by_the_steps_of_each_round():
    """Rounds of 100 and of 10 steps, each a millisecond slower than without Engram, in all of them."""
    one = case()
    for label, step_s in (("no_engram", 0.1), ("offload_naive", 0.101)):
        for sample in numbers.row_of(one, label)["rounds"]:
            sample["decode_s"] = [step_s] * (10 if sample["round"] % 2 else 100)
    assert added_s(one, "offload_naive") == pytest.approx(1e-3)


def test_a_class_needs_three_rounds():
    """Two have a narrow interval by chance; the noise floor may have been measured more often."""
    one = case("cuda")
    assert classify([one], "offload_prefetch", "resident", "decode")[0] == "WIN"
    row = numbers.row_of(one, "offload_prefetch")
    row["rounds"] = row["rounds"][:2]
    assert classify([one], "offload_prefetch", "resident", "decode") == ("INCONCLUSIVE", "2 rounds: a class needs 3")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_that_cross_no_bus_are_not_held_against_its_floor(device):
    """Without graphs a resident table is read in place, at the speed of the device's memory."""
    one = example(device)
    for label in ("resident", "resident again", "offload_naive"):
        row = numbers.row_of(one["cases"][0], label)
        row["schedule"] = "synchronous" if label == "offload_naive" else "in place"
        for sample in row["rounds"]:
            sample["decode_exposed_s"] = [1.0 if label == "offload_naive" else 1e-12] * STEPS
    line = next(line for line in reading(one).splitlines() if "above the floor" in line)
    assert ("no, resident, resident again" in line) == (device == "cpu") and ("yes" in line) == (device == "cuda")
    for row in one["cases"][0]["rows"]:  # continued, and cut before its first pass
        row["rounds"] = []
    assert "nothing was fetched alone" in reading(one)


def test_what_holds_lies_below_what_breaks(monkeypatch):
    """A delay beyond the first that breaks holds nothing, nor does one that is as long."""
    delays = [(1e-3, False), (2e-3, True), (2e-3, False), (3e-3, False), (4e-3, True)]
    for given, holds, breaks in (
        (delays, 1e-3, 2e-3),
        ([(1e-3, False), (2e-3, None), (3e-3, False)], 3e-3, None),
        (delays[1:], None, 2e-3),
        ([(1e-3, None)], None, None),
    ):
        monkeypatch.setattr(numbers, "slowed", lambda case, given=given: [bus(*one) for one in given])
        found = numbers.breaking_bus(case())
        assert (found.holds_s, found.breaks_s) == (holds, breaks)
        assert found.bandwidths(6000) == (breaks and 6000 / breaks, holds and 6000 / holds)
    monkeypatch.setattr(numbers, "slowed", lambda case: [])
    with pytest.raises(NotMeasured, match="no bus was slowed"):
        numbers.breaking_bus(case())


def test_a_slower_bus_delays_by_its_latency_and_its_bytes():
    one = case()
    rate = numbers.step_bytes(one) / 1e-3  # a millisecond for the rows of a step
    numbers.row_of(one, "throttled 56 us")["bus"]["bytes_per_s"] = rate
    numbers.row_of(one, "throttled 2000 us")["rounds"] = []
    assert [found.delay_s for found in numbers.slowed(one)] == pytest.approx([1.056e-3, 5e-3])
    numbers.row_of(one, "throttled 5000 us")["bus"]["latency_s"] = 0.0  # the fastest first, wherever it stands
    assert [found.delay_s for found in numbers.slowed(one)] == pytest.approx([0, 1.056e-3])


def test_rows_without_samples_were_not_measured():
    one = case()
    numbers.row_of(one, "offload_prefetch")["rounds"] = []
    with pytest.raises(NotMeasured, match="offload_prefetch was not measured"):
        numbers.row_of(one, "offload_prefetch")
    with pytest.raises(NotMeasured, match="offload_prefetch or offload_disk prefetched was not measured"):
        numbers.prefetched_row(one)
    one["rows"].append({**numbers.row_of(one, "offload_naive"), "label": "offload_disk prefetched"})
    assert numbers.prefetched_row(one) is one["rows"][-1]


def test_a_noise_floor_needs_three_rounds():
    assert numbers.noise_floor(case(rounds=3), "decode")["median"] == pytest.approx(1, abs=2e-3)
    with pytest.raises(NotMeasured, match="2 rounds: a noise floor needs 3"):
        numbers.noise_floor(case(rounds=2), "decode")


def test_what_is_not_there_is_none():
    """No counter, no energy, one of two readings, no lookups."""
    one = case()
    resident, no_engram = numbers.row_of(one, "resident"), numbers.row_of(one, "no_engram")
    no_engram["pcie"] = resident["energy"] = None
    resident["pcie"] = {"value": 5}
    assert numbers.over_control(one, resident) is None and numbers.joules_per_token(resident) is None
    no_engram["pcie"] = {"value": 2}
    assert numbers.over_control(one, resident) == 3
    no_engram["rounds"] = []
    assert numbers.over_control(one, resident) is None
    for sample, (before, after) in zip(resident["rounds"], [(1, None), (None, 2), (3, 7), (5, 11)]):
        sample["board"] = {"value": {"joules_before": before, "joules_after": after}}
    assert numbers.pass_joules(resident) == 5
    assert numbers.hit_rate(resident) is None
    for sample, lookups in zip(resident["rounds"], (10, 30)):
        sample.update(lookups=lookups, hits=5)
    assert numbers.hit_rate(resident) == 0.25
    assert numbers.freed_bytes(one, resident) == 0
    assert numbers.freed(one, "own_compute", 0)["why"] == "no table is looked up"


def test_times_and_floors_of_a_round():
    one = example()
    first = one["cases"][0]
    assert numbers.fetch_floor(one, first) == pytest.approx(132_000 / one["limits"]["copy"]["bytes_per_s"])
    row = numbers.row_of(first, "offload_prefetch")
    for sample in row["rounds"]:
        sample["prefill_exposed_s"] = [0.25, 0.5]
    assert numbers.exposed_in_round(row) == pytest.approx(0.75 + 100 * 1e-5)


def test_only_what_is_staged_on_an_accelerator_must_copy_what_was_asked_for():
    for device, label, agree in (
        ("cuda", "offload_naive", False),
        ("cuda", "throttled 56 us", False),
        ("cuda", "resident", True),
        ("cpu", "offload_naive", True),
    ):
        one = case(device)
        row = numbers.row_of(one, label)
        row["rounds"][-1]["copied"] += 1
        assert numbers.copies_agree(one, row) is agree
        row["schedule"] = ASKING
        assert numbers.copies_agree(one, row), "what a graph takes for itself, no CPU copies"


def test_different_tokens_are_noticed():
    one = example()
    assert numbers.same_tokens(one["cases"][0]) and "warning" not in report(one)
    numbers.row_of(one["cases"][0], "no_engram")["rounds"][0]["tokens_sha256"] = "1" * 64  # another model: it may
    assert numbers.same_tokens(one["cases"][0])
    numbers.row_of(one["cases"][0], "offload_prefetch")["rounds"][1]["tokens_sha256"] = "0" * 64
    assert not numbers.same_tokens(one["cases"][0])
    assert "warning: variants chose different tokens: no time here counts" in report(one)


def test_the_report_says_what_it_is_of():
    cpu = report(example("cpu"))
    assert cpu.startswith("Measured on the CPU Example. These are CPU times; no GPU figure follows.")
    text = report(example())
    assert "Measured on the GPU Example" in text.splitlines()[0]
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert lines["own compute: own_compute - no_engram"].count("+2.0 [+2.0, +2.0]") == 4
    assert lines["not hidden: offload_prefetch - resident"].count("+0.5 [+0.5, +0.5]") == 4
    assert lines["all of it, measured by itself"].count("+3.5 [+3.5, +3.5]") == 4
    assert "between 2000 and 5000 us" in text and "56 us (arXiv 2603.10087)" in text
    assert "no energy: not asked for: --energy" in text


def test_a_wait_that_no_clock_saw_is_shown_alike_whether_null_or_zero():
    """Older results have 0 there: neither is a number that was measured, and neither is missing in the other."""
    old, new = example(), example()
    for results, nothing in ((old, [0.0] * 100), (new, None)):
        for row in results["cases"][0]["rows"]:
            if row["schedule"] == "in graph":
                for sample in row["rounds"]:
                    sample["decode_exposed_s"] = nothing and nothing[: len(sample["decode_s"])]
        SCHEMA.validate(results)
    assert report(old) == report(new)
    assert list(quantities(old)) == list(quantities(new))
    waits = [name for name in quantities(new) if name.endswith("decode_exposed_s")]
    assert any("offload_prefetch" in name for name in waits) and not any("resident" in name for name in waits)


def test_an_unfinished_run_is_reported_as_far_as_it_goes():
    one = example(rounds=2)
    one["cases"][0]["rows"] = one["cases"][0]["rows"][:2]
    text = report(one)
    assert "the overhead is not taken apart: resident was not measured" in text


def test_figures_are_drawn_and_name_their_results(tmp_path):
    results = example()
    paths = draw_all(results, tmp_path)
    assert [path.name for path in paths] == ["baselines.svg", "overhead_parts.svg", "slower_bus.svg"]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert source(results) in text and text.count("<path") > 10


def test_the_legend_names_both_baselines_whichever_row_is_first_and_fills_its_points():
    one = example()
    one["cases"][0]["rows"].sort(key=lambda row: row["label"] != "resident")
    (legend,) = baselines(one).legends
    assert [text.get_text() for text in legend.get_texts()] == ["3 %", "against no_engram", "against resident"]
    assert "white" not in [handle.get_markerfacecolor() for handle in legend.legend_handles]


def test_the_legend_of_the_parts_is_the_same_whatever_the_first_bar_says():
    """Colours are neutral keys, hatching has one of its own; in the bars it stands for what is not resolved."""
    resolved, open_ = example(), example()
    open_["cases"][0]["rows"] = [row for row in open_["cases"][0]["rows"] if row["label"] != "resident again"]
    for results, hatches in ((resolved, {None}), (open_, {"////"})):
        figure = overhead_parts(results)
        (legend,), (axis,) = figure.legends, figure.axes
        keys = {text.get_text(): key for text, key in zip(legend.get_texts(), legend.legend_handles)}
        assert list(keys) == ["3 %", *PART_COLOURS, "hatched: not resolved", "the whole, 95 %"]
        assert all(same_color(keys[name].get_facecolor(), colour) for name, colour in PART_COLOURS.items())
        assert [bool(keys[name].get_hatch()) for name in list(keys)[1:5]] == [False, False, False, True]
        assert {bar.get_hatch() or None for bar in axis.patches} == hatches and len(axis.patches) == 12
        plt.close(figure)
