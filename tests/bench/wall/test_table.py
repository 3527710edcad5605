"""Numbers, tables and schema of wall-time results, on a file whose numbers are known by hand."""

import copy

import jsonschema
import pytest

from bench.instruments import timing
from bench.instruments.timing import NotMeasured, quantile
from bench.instruments.words import fraction, gib, measured_on, short, signed_percent
from bench.schemas.wall import Results
from bench.wall.numbers import (
    bytes_agree,
    exposed,
    fetch_rates,
    floor_ratio,
    hidden_share,
    median_bytes,
    noise_floor,
    over_control,
    overhead,
    predicted_floor,
    rows_agree,
    run_of,
    synchronous_run,
)
from bench.wall.table import prediction, run_label, scale_label, step_label, step_table, wall_table
from tests.bench.wall.example import COPY, DRIFT, UNIQUE_BYTES, example, older
from tests.schemas import validator

SCHEMA = validator(Results)


@pytest.fixture
def results():
    return example("cuda")


@pytest.fixture
def step(results):
    return results["steps"][0]


def line_of(text, *words):
    """The one line of a table that begins with these words, whatever lies between them."""
    found = [line for line in text.splitlines() if line.split()[: len(words)] == list(words)]
    assert len(found) == 1, (words, found)
    return found[0]


# The numbers: those of the runs as they are stand in `RUN_LINES`


def test_a_wide_noise_floor_resolves_nothing_below_it(step):
    again = run_of(step, "resident", repeat=1)
    again["step_s"] = [s * (1 + 0.05 * (-1) ** i) for i, s in enumerate(run_of(step, "resident")["step_s"])]
    assert not overhead(step, run_of(step, "offload_naive")).resolved
    assert overhead(step, run_of(step, "offload_disk", "prefetched", "cold")).resolved


def test_two_samples_or_no_second_resident_resolve_nothing(step):
    naive = run_of(step, "offload_naive")
    once = {**step, "runs": [run for run in step["runs"] if not run["repeat"]]}
    assert not overhead(once, naive).resolved
    assert "not resolved [+4.0, +4.0]" in step_table(example(), once)
    few = copy.deepcopy(step)
    for run in few["runs"]:
        run["step_s"] = run["step_s"][:2]
    assert not overhead(few, run_of(few, "offload_naive")).resolved


def test_without_resident_there_is_no_overhead(step):
    step["runs"] = [run for run in step["runs"] if run["variant"] != "resident"]
    with pytest.raises(NotMeasured, match="resident was not measured"):
        overhead(step, run_of(step, "offload_naive"))
    with pytest.raises(NotMeasured, match=r"resident \(again\) was not measured"):
        noise_floor(step)


def test_a_run_that_waits_longer_hides_less_than_nothing(step):
    prefetch = run_of(step, "offload_prefetch")
    prefetch["exposed_s"] = [0.0006 * drift for drift in DRIFT]
    assert hidden_share(step, prefetch) == pytest.approx(-0.5)


def test_a_placement_with_a_synchronous_run_of_its_own_is_held_against_it(step):
    own = {**copy.deepcopy(run_of(step, "offload_hot")), "schedule": "synchronous"}
    own["exposed_s"] = [0.0002 * drift for drift in DRIFT]
    step["runs"].append(own)
    assert synchronous_run(step, run_of(step, "offload_hot")) is own
    assert hidden_share(step, run_of(step, "offload_hot", "prefetched")) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("no_engram",), "no rows are fetched"),
        (("offload_disk", "prefetched", "cold"), "offload_disk was not fetched alone"),
    ],
)
def test_what_cannot_be_hidden_says_why(step, names, reason):
    step["runs"].remove(run_of(step, "offload_disk", "synchronous", "cold"))
    with pytest.raises(NotMeasured, match=reason):
        hidden_share(step, run_of(step, *names))


def test_a_synchronous_run_that_did_not_wait_hides_nothing(step):
    run_of(step, "offload_naive")["exposed_s"][3] = 0.0
    with pytest.raises(NotMeasured, match="did not wait in every round"):
        hidden_share(step, run_of(step, "offload_prefetch"))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("no_engram",), "no rows are fetched"),
        (("offload_uva",), "offload_uva was not fetched alone"),
        (("offload_disk", "synchronous", "warm"), "page cache has no known limit"),
    ],
)
def test_a_missing_floor_says_why(step, names, reason):
    with pytest.raises(NotMeasured, match=reason):
        floor_ratio(step, run_of(step, *names))


def test_the_rates_of_a_fetch_are_unique_bytes_over_its_wait(step):
    naive = run_of(step, "offload_naive")
    assert fetch_rates(naive) == pytest.approx([2.5e9 / drift for drift in DRIFT])  # 1 MB in 0.4 ms
    for variant, reason in (("offload_prefetch", "overlaps"), ("no_engram", "no rows are fetched")):
        with pytest.raises(NotMeasured, match=reason):
            fetch_rates(run_of(step, variant))
    naive["exposed_s"][0] = 0.0
    with pytest.raises(NotMeasured, match="without a wait"):
        fetch_rates(naive)


def test_the_floor_is_predicted_from_unique_bytes(step):
    assert predicted_floor(step, COPY) == pytest.approx(100e-6)


def test_waits_of_a_second_are_waits(step):
    naive = run_of(step, "offload_naive")
    naive["exposed_s"] = [1.0] * len(DRIFT)
    assert hidden_share(step, naive) == hidden_share(step, run_of(step, "resident")) == 0
    assert fetch_rates(naive) == [UNIQUE_BYTES] * len(DRIFT)


def test_what_the_control_received_is_taken_off(step):
    naive, control = run_of(step, "offload_naive"), run_of(step, "no_engram")
    for run, counted in ((naive, [70, 50, 60]), (control, [9, 7, 8])):
        run["bytes"].update(counter=counted, counter_what="a counter")
    assert over_control(step, naive) == 60 - 8
    control["bytes"]["counter_what"] = "another"
    with pytest.raises(NotMeasured, match="was not counted, or by another counter"):
        over_control(step, naive)


def test_bytes_must_agree_exactly_in_every_step(step):
    naive = run_of(step, "offload_naive")
    assert bytes_agree(naive) is True
    assert bytes_agree(run_of(step, "resident")) is None
    naive["bytes"]["copied"][4] += 1
    assert bytes_agree(naive) is False


def test_a_median_of_bytes_or_the_reason_for_none(step):
    naive = run_of(step, "offload_naive")
    naive["bytes"]["counter"] = [7, 5, 6]
    assert median_bytes(naive, "counter") == 6
    assert median_bytes(naive, "from_ids") == UNIQUE_BYTES
    with pytest.raises(NotMeasured, match="no counter sees this traffic"):
        median_bytes(run_of(step, "resident"), "counter")
    with pytest.raises(NotMeasured, match="nothing is copied explicitly"):
        median_bytes(run_of(step, "offload_uva"), "copied")
    with pytest.raises(NotMeasured, match="no rows are fetched"):
        median_bytes(run_of(step, "no_engram"), "from_ids")


def test_other_rows_are_noticed(step):
    assert rows_agree(step)
    run_of(step, "offload_hot")["rows_sha256"] = "cd" * 32
    assert not rows_agree(step)
    assert "warning: the rows of the fixed batch differ" in step_table(example(), step)


def test_a_run_is_found_by_its_names(step):
    assert run_of(step, "offload_disk", page_cache="warm")["page_cache"] == "warm"
    assert run_of(step, "offload_disk", "prefetched")["schedule"] == "prefetched"
    with pytest.raises(NotMeasured, match=r"offload_uva \(synchronous\) was not measured"):
        run_of(step, "offload_uva", "synchronous")


def test_a_wait_that_was_not_timed_is_not_a_wait_of_zero(step):
    run_of(step, "resident")["exposed_s"] = [0.0, 0.0]
    assert exposed(run_of(step, "resident")) == 0
    for run, ask in (
        (run_of(step, "resident"), exposed),
        (run_of(step, "offload_prefetch"), lambda run: hidden_share(step, run)),
    ):
        run["exposed_s"] = []  # that of offload_naive was: it alone says nothing
        with pytest.raises(NotMeasured, match="the wait was not timed"):
            ask(run)


@pytest.mark.parametrize(
    ("low", "high", "samples", "resolved"),
    [
        (1.02, 1.04, 3, True),
        (1.02, 1.04, 2, False),
        (1.01, 1.04, 3, False),  # touches the noise
        (0.9, 0.98, 3, True),
        (0.9, 0.99, 3, False),
        (0.9, 1.1, 3, False),
    ],
)
def test_resolved_is_apart_from_1_and_from_the_noise(low, high, samples, resolved):
    found = timing.overhead({"median": 1.0, "low": low, "high": high}, lambda: {"low": 0.99, "high": 1.01}, samples)
    assert found.resolved is resolved


def test_quantiles_do_not_want_sorted_samples():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([4.0, 0.0], 0.2) == pytest.approx(0.8)


# The tables


def test_the_first_line_names_the_device():
    results = example("cuda")
    first = wall_table(results).splitlines()[0]
    assert first == "Measured on the GPU Example GPU 100, PCIe generation 5 width 16, driver 570.1, CUDA 12.8."
    results["environment"]["accelerator"]["pcie_width"] = None
    assert "PCIe generation 5 width unknown, driver" in measured_on(results)


def test_cpu_times_are_never_passed_off_as_gpu_times():
    text = wall_table(example("cpu", steps=2))
    assert text.splitlines()[0] == ("Measured on the CPU Example CPU 9000. These are CPU times; no GPU figure follows.")
    assert "cuda" not in text and text.count(", on cpu") == 2
    assert all(" cpu " in line for line in text.splitlines() if line.startswith(("resident", "offload", "hash")))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lines_fit_a_terminal(device):
    lines = wall_table(example(device, steps=4)).splitlines()
    assert max(len(line) for line in lines) <= 168
    assert max(len(line) for line in wall_table(older(example(device, steps=4))).splitlines()) <= 152


def test_the_prediction_stands_before_the_measurement(results, step):
    text = step_table(results, step)
    lines = text.splitlines()
    assert lines[0] == "== prefill, 1 x 4096 tokens, context 0, stream python-stdlib, bfloat16, on cuda"
    assert "1e9 parameters, 1 GiB, 10,737,418 rows of 100 B, 16 columns, layers 1; backbone none" in lines[1]
    assert " ".join(prediction(results, step).split()) == (
        "predicted per step: 16,000 rows, 10,000 unique; 1.6 MB requested, 1 MB after deduplication, "
        "40.96 MB in pages of a file; at 10 GB/s (pinned host to device) no less than 100 us"
    )
    assert lines[1] in text.split(prediction(results, step))[0]
    assert "\nresident " in text.split(prediction(results, step))[1]


RUN_LINES = {
    "no_engram in place": "9 8.46-9.54 -10.0 [-10.0, -10.0] - - - - - -",
    "resident in place": "10 9.4-10.6 baseline 10 2 5 1 - -",
    "resident again in place": "10 9.31-10.7 noise floor [-1.0, +1.0] 10 2 5 1 - -",
    "offload_naive synchronous": "10.4 9.78-11 +4.0 [+4.0, +4.0] 400 100 4 1 1 1.05",
    "offload_prefetch prefetched": "10.05 9.45-10.7 not resolved [+0.5, +0.5] 40 90.0 100 4 1 1 1.05",
    "offload_uva prefetched": "10.2 9.59-10.8 +2.0 [+2.0, +2.0] 200 50.0 100 - 1 - 1.05",
    "offload_hot prefetched": "10.3 9.68-10.9 +3.0 [+3.0, +3.0] 100 75.0 100 - 1 1 1.05 75.0",
    "offload_disk synchronous cold": "15 14.1-15.9 +50.0 [+50.0, +50.0] 5000 2500 2 1 1 1.05",
    "offload_disk prefetched cold": "11 10.3-11.7 +10.0 [+10.0, +10.0] 500 90.0 2500 2 1 1 1.05",
    "offload_disk prefetched warm": "10.2 9.59-10.8 +2.0 [+2.0, +2.0] 500 75.0 - - 1 1 1.05",
}


@pytest.mark.parametrize("names", RUN_LINES)
def test_a_run_is_one_line(results, step, names):
    words = names.split()
    line = line_of(step_table(results, step).split("\n   noise floor")[0], *words)
    assert line.split()[len(words) :] == ["cuda", "1/640", *RUN_LINES[names].split()]


def test_every_row_says_how_much_of_the_published_table_it_is(results, step):
    text = step_table(results, step)
    assert "1/640 of v41-flash's table, of which one layer has 6,871,947,520 rows;" in text
    assert "rows stored as float8_e4m3fn, scales beside their codes" in text
    lines = [line for line in text.splitlines() if line.startswith(("no_engram ", "resident ", "offload_"))]
    lines = [line for line in lines if " cuda " in line]
    assert len(lines) == len(step["runs"]) and all(" 1/640 " in line for line in lines)
    assert " of v41-flash " in text
    for layout, words in (("split", "scales apart from their codes"), ("plain", "bfloat16\n")):
        step["table"].update(layout=layout, row_dtype="bfloat16" if layout == "plain" else "float8_e4m3fn")
        assert words in step_table(results, step)


def test_the_share_of_the_published_table_is_that_of_its_rows(step):
    shown = {1 / 640: "1/640", 0.05: "1/20", 0.42: "42 %", 1: "all", 4.5: "4.5 x", 1 / 4776.2: "1/4,776"}
    assert {share: fraction(share) for share in shown} == shown
    assert step_label(step) == "prefill 1 x 4096, 1e9 parameters (1/640 of v41-flash's table), backbone none"
    step["table"].update(published_rows=step["table"]["rows"])
    assert scale_label(step["table"]) == "all of v41-flash's table"
    step["table"].update(rows=9, published_rows=2)
    assert scale_label(step["table"]) == "4.5 x v41-flash's table"


def test_older_results_say_nothing_of_a_published_table():
    results = older(example("cuda"))
    text = wall_table(results)
    assert "published" not in text and "v41-flash" not in text and "1/640" not in text
    assert step_label(results["steps"][0]) == "prefill 1 x 4096, 1e9 parameters, backbone none"


def test_every_missing_number_has_a_reason(results, step):
    text = step_table(results, step)
    assert "- in exposed, floor, ratio, from ids, copied: no rows are fetched (no_engram in place)" in text
    assert "- in ratio: offload_uva was not fetched alone (offload_uva prefetched)" in text
    warm = "offload_disk synchronous warm, offload_disk prefetched warm"
    assert f"- in floor, ratio: the page cache has no known limit ({warm})" in text
    assert "- in copied: nothing is copied explicitly (resident in place, resident again in place, offload_uva" in text
    assert "energy per step: unknown, the window is shorter than 10 s (no_engram, resident, " in text


def test_notes_name_counter_memory_hot_rows_and_noise(results, step):
    text = step_table(results, step)
    assert "noise floor: resident against itself [-1.0, +1.0] %" in text
    assert "floor: unique bytes / copy bandwidth (resident, offload_naive, offload_prefetch, offload_uva" in text
    assert "counter: NVML PCIe receive (offload_naive, offload_prefetch, offload_uva, offload_hot);" in text
    assert "1 GiB host (offload_naive, offload_prefetch, offload_uva, offload_hot); 1 GiB disk" in text
    assert "offload_hot prefetched keeps 100,000 rows on the device; 2 % of the table's rows were read at all" in text
    run_of(step, "resident")["energy"] = {"joules_per_step": 1.25}
    assert "1.25 J (resident)" in step_table(results, step)


def test_an_expected_file_warns_of_nothing(results):
    assert "warning" not in wall_table(results)


def test_faster_than_the_limit_is_a_warning(results, step):
    naive = run_of(step, "offload_naive")
    naive["limit_s"] = 401e-6
    warning = "warning: offload_naive synchronous fetched faster than its floor allows (unique bytes / copy bandwidth)"
    assert wall_table(results).count(warning) == 1
    results["components"][0]["limit_s"] = 1.1e-3
    assert "warning: hash was faster than its floor (bytes / copy)" in wall_table(results)


def test_other_bytes_than_predicted_are_a_warning(results, step):
    run_of(step, "offload_hot")["bytes"]["predicted"][0] -= 100
    assert "warning: offload_hot prefetched did not copy the bytes that were predicted" in wall_table(results)


def test_components_show_rate_and_floor(results):
    text = wall_table(results)
    rate = "cuda 64 x 4096 bfloat16 1000 940-1060 5 GB/s 500 2"
    assert line_of(text, "hash").split()[1:] == rate.split()
    rate = "cuda 64 x 4096 bfloat16 2000 1880-2120 4000 GFLOP/s - -"
    assert line_of(text, "compute").split()[1:] == rate.split()
    assert "   compute: keys, values and the gate; no floor: peak unknown" in text
    assert "   up_embed: skipped, no CUDA device" in wall_table(example("cpu"))


def test_limits_and_their_absence_are_shown(results):
    text = " ".join(wall_table(results).split())
    assert (
        "copy 10 GB/s (pinned host to device, 1 GiB a time); gather 1000 GB/s (device to device, 1 GiB a time)" in text
    )
    results["limits"]["disk"] = {"reads_per_s": None, "why": "fio is not installed"}
    assert "disk unknown (fio is not installed)" in " ".join(wall_table(results).split())


def test_units_are_named_and_numbers_short():
    assert gib(3 << 29) == "1.5 GiB" and gib(None) == "unknown"
    shown = {
        0: "0",
        0.00001: "<0.0001",
        0.12345: "0.1235",
        12.3456: "12.35",
        999.9: "999.9",
        1234.5: "1234",
        1e6: "1000000",
    }
    assert {number: short(number) for number in shown} == shown
    assert [signed_percent(x) for x in (0.0312, -0.5, 12.345)] == ["+3.1", "-50.0", "+1234"]


def test_labels(step):
    assert run_label(run_of(step, "resident", repeat=1)) == "resident again in place"
    assert run_label(run_of(step, "offload_disk", "prefetched", "cold")) == "offload_disk prefetched cold"


# The schema


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_example_fits_the_schema(device):
    SCHEMA.validate(example(device, steps=2))
    SCHEMA.validate(older(example(device, steps=2)))


DAMAGES = {
    "a conclusion": lambda r, run: r.update(verdict="WIN"),
    "no limits": lambda r, run: r.pop("limits"),
    "another benchmark": lambda r, run: r.update(benchmark="bytedmd_toy"),
    "an unknown device": lambda r, run: r.update(device="tpu"),
    "CPU times under a GPU's name": lambda r, run: r.update(device="cpu"),
    "a GPU without a card": lambda r, run: r["environment"].update(accelerator=None),
    "a limit of zero": lambda r, run: r["limits"]["copy"].update(bytes_per_s=0),
    "a limit without samples": lambda r, run: r["limits"]["copy"].pop("samples_s"),
    "an unmeasured disk without a reason": lambda r, run: r["limits"].update(disk={"reads_per_s": None}),
    "a short digest": lambda r, run: r["stream"].update(sha256="abc"),
    "no samples": lambda r, run: run.update(step_s=[]),
    "a time of zero": lambda r, run: run["step_s"].append(0.0),
    "a negative wait": lambda r, run: run["exposed_s"].append(-1e-6),
    "an unknown variant": lambda r, run: run.update(variant="offload_cxl"),
    "an unknown schedule": lambda r, run: run.update(schedule="later"),
    "a third repeat": lambda r, run: run.update(repeat=2),
    "a noise floor of another variant": lambda r, run: run.update(repeat=1),
    "a page cache in memory": lambda r, run: run.update(page_cache="warm"),
    "a disk without a page cache": lambda r, run: r["steps"][0]["runs"][-1].update(page_cache=None),
    "hot rows without a cache": lambda r, run: run.update(hot={"hit_rate": 1, "used_share": 1, "hot_rows": 1}),
    "a cache without hot rows": lambda r, run: run.update(variant="offload_hot"),
    "no floor and no reason": lambda r, run: run.update(limit_s=None, limit_why=""),
    "no energy and no reason": lambda r, run: run.update(energy=None, energy_why=""),
    "bytes by halves": lambda r, run: run["bytes"]["copied"].append(0.5),
    "a counter without a name": lambda r, run: run["bytes"].update(counter_what=None),
    "a span of an unknown kind": lambda r, run: run["spans"].append(["sleep", "main", 0, 1]),
    "a span without an end": lambda r, run: run["spans"].append(["wait", "main", 0]),
    "a case that nobody knows": lambda r, run: r["components"][0].update(case="gather"),
    "an average": lambda r, run: run.update(step_mean_s=0.01),
    "memory held nowhere": lambda r, run: run["held"].pop("disk"),
    "an unknown phase": lambda r, run: r["steps"][0]["shape"].update(phase="training"),
    "a step without runs": lambda r, run: r["steps"][0].update(runs=[]),
    "a component without a floor's reason": lambda r, run: r["components"][0].pop("limit_why"),
    "a preset without its rows": lambda r, run: r["steps"][0]["table"].pop("published_rows"),
    "a preset without a layout": lambda r, run: r["steps"][0]["table"].pop("layout"),
    "rows that lie some other way": lambda r, run: run["table"].update(layout="interleaved"),
    "rows of an unknown dtype": lambda r, run: run["table"].update(row_dtype="int8"),
    "a run of no share": lambda r, run: run["table"].update(share=0),
    "a run without a preset": lambda r, run: run["table"].pop("preset"),
    "a skip without a reason": lambda r, run: r["components_skipped"].append({"case": "hash"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_results_do_not_fit_the_schema(results, step, damage):
    SCHEMA.validate(results)
    DAMAGES[damage](results, run_of(step, "offload_naive"))
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(results)
