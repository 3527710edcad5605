"""`bench/compare.py` on committed files of every kind, and each verdict by a case of its own."""

import copy
import csv
import io
import json
from pathlib import Path

import pytest

from bench import compare
from bench.instruments.output import finish
from bench.instruments.quantities import quantities
from bench.instruments.reading import read_results

RESULTS = Path(compare.__file__).parent / "results"
FILES = sorted(RESULTS.glob("*.json"))
HEAD = {"benchmark": "x", "environment": {"cpu": "c", "packages": {"numpy": "1"}}, "git": {"commit": "abc"}}


def run(capsys, *argv):
    code = 0
    try:
        compare.main([str(word) for word in argv])
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def timed(samples, configuration="same", **more):
    return {
        **HEAD,
        "configuration": {"c": configuration},
        "cases": [{"case": "a", "samples_s": {"ours": samples}}],
        **more,
    }


def verdict(a, b, tolerance=0.0):
    (line,) = compare.compare(timed(a), timed(b), tolerance)
    return line


def test_two_committed_files_of_one_benchmark(capsys):
    """The same benchmark on one machine, twice: the second run is the better one in some, and no price is involved."""
    a, b = RESULTS / "layer_speed_first_run.json", RESULTS / "layer_speed.json"
    code, said, _ = run(capsys, a, b)
    lines = compare.compare(read_results(a), read_results(b))
    assert len(lines) > 50 and {line.how for line in lines} <= {"paired", "unpaired"}
    assert code == int(any(line.verdict == "worse" for line in lines))
    assert said.count("\n| ") >= len(lines) and "| cpu |" in said and "not resolved" in said
    _, as_json, _ = run(capsys, a, b, "--format", "json")
    assert [line["quantity"] for line in json.loads(as_json)["quantities"]] == [line.quantity for line in lines]
    _, as_csv, _ = run(capsys, a, b, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(as_csv)))
    assert [row["verdict"] for row in rows] == [line.verdict for line in lines]


def test_what_a_model_says_on_paper_is_not_measured():
    results = read_results(RESULTS / "sharded_cpu.json")
    assert results["model"] and results["schedule"]
    assert {name.partition(" / ")[0] for name in quantities(results)} == {"runs"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_kind_of_file_has_quantities_and_equals_itself(path):
    results = read_results(path)
    found = quantities(results)
    assert found and not any(" #" in name for name in found), [name for name in found if " #" in name][:3]
    if len(found) < 100:
        lines = compare.compare(results, copy.deepcopy(results))
        assert {line.verdict for line in lines} <= {"same", "not resolved"}
        assert all(line.ratio in (1.0, None) for line in lines)


def test_a_price_that_changed_is_noticed():
    toy = read_results(RESULTS / "bytedmd_toy.json")
    other = copy.deepcopy(toy)
    run = next(r for r in other["runs"] if r["variant"] == "offload_prefetch")
    run["cost"] += 1
    changed = [line for line in compare.compare(toy, other) if line.verdict == "worse"]
    assert [line.how for line in changed] == ["exact"] and "offload_prefetch / cost" in changed[0].quantity


def test_a_price_of_more_digits_than_a_double_has():
    """A few prices of whole tables are above 2^53."""
    large = {**HEAD, "runs": [{"model": "m", "cost": 12071253563228523}]}
    larger = {**HEAD, "runs": [{"model": "m", "cost": 12071253563228524}]}
    assert [compare.compare(large, each)[0].verdict for each in (large, larger)] == ["same", "worse"]
    assert compare.compare(larger, large)[0].verdict == "better"


def test_samples_of_no_time_at_all():
    """A baseline whose median may be 0 has no ratio; one sample of many does not matter."""
    assert verdict([0, 0, 1, 2, 3], [4.0] * 5)[3:] == (None, None, None, "unpaired", "not resolved")
    assert verdict([0, *[1.0] * 30], [4.0] * 31).verdict == "worse"


def test_verdicts():
    base = [1.0, 1.1, 0.9, 1.05, 0.95]
    slower, faster = ([factor * x for x in base] for factor in (1.5, 0.5))
    assert verdict(base, slower).verdict == "worse" and verdict(base, faster).verdict == "better"
    assert verdict(base, slower).ratio == pytest.approx(1.5) and verdict(base, slower).how == "paired"
    assert verdict(base, slower, tolerance=0.6).verdict == "within tolerance"
    assert verdict(base, [0.5, 2.0, 1.0, 0.7, 1.4]).verdict == "not resolved"
    assert verdict(base[:2], slower[:2]).verdict == "not resolved"
    assert verdict(base, [0.0] * 5)[3:] == (None, None, None, "unpaired", "better")


def test_only_the_same_inputs_on_the_same_machine_are_paired():
    """Rounds that drift together: paired, a tenth is resolved; drawn by themselves, it drowns."""
    a = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    b = [1.1 * x for x in a]
    paired = compare.compare(timed(a), timed(b))[0]
    assert paired.how == "paired" and paired.verdict == "worse" and paired.low == pytest.approx(1.1)
    for other in (timed(b, "another"), {**timed(b), "environment": {"cpu": "d"}}, timed([*b, 64.0])):
        alone = compare.compare(timed(a), other)[0]
        assert alone.how == "unpaired" and alone.verdict == "not resolved" and alone.low < 1 < alone.high
    at = [
        {"accelerator": {"name": name, "clocks_mhz": {"sm": clock}}} for name, clock in (("H", 1), ("H", 2), ("A", 1))
    ]
    one, warmer, another = ({**timed(b), "environment": environment} for environment in at)
    assert compare.compare(one, warmer)[0].how == "paired" and compare.compare(one, another)[0].how == "unpaired"


def test_of_many_samples_no_more_are_taken_than_is_said():
    assert [len(compare._some(range(count))) for count in (1999, 2001, 3999, 4001)] == [1999, 1001, 2000, 1334]


def test_what_only_one_has(capsys, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    more = {**timed([1.0] * 5), "price": 3}
    a.write_text(json.dumps(more))
    b.write_text(json.dumps(timed([1.0] * 5)))
    code, said, _ = run(capsys, a, b)
    assert code == 1 and "only in A" in said
    code, said, _ = run(capsys, b, a)
    assert code == 0 and "only in B" in said
    code, said, _ = run(capsys, a, b, "--only", "ours")
    assert code == 0 and "only in" not in said


@pytest.mark.parametrize(
    ("b", "argv", "said"),
    [
        ({**HEAD, "benchmark": "y"}, [], "compare two of one benchmark"),
        ({"benchmark": "x"}, [], "does not say where it was measured"),
        ([1], [], "not a results file"),
        (timed([1.0]), ["--only", "nothing like it"], "leave --only away"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line(b, argv, said, capsys, tmp_path):
    for name, content in (("a", timed([1.0])), ("b", b)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    code, out, err = run(capsys, tmp_path / "a.json", tmp_path / "b.json", *argv)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


def test_the_last_line_of_a_benchmark_is_its_result(capsys, tmp_path):
    results = timed([1.0, 3.0, 2.0])
    finish(results, tmp_path / "results.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == str(tmp_path / "results.json")
    last = json.loads(lines[-1])
    assert last["benchmark"] == "x" and last["results"] == lines[-2]
    assert list(last["medians"].values()) == [2.0] and next(iter(last["medians"])).endswith("ours")


def test_what_is_measured_beside_the_steps_is_compared_and_what_disturbed_them_is_not(tmp_path):
    """Parts of a fetch by name, bytes that crossed, nothing copied before; samples that the machine met late."""
    case = {
        "case": "a",
        "parts_s": {"start": [1.0, 2.0, 3.0]},
        "bytes": {"copied": [10, 10, 10], "counter": [0, 0, 1], "from_ids": [1, 1, 1]},
        "pcie": {"value": 70, "seconds": 9.0},
        "rounds": [{"round": n, "step_s": [1.0, 1.0], "copied": 0} for n in range(3)],
        "launched_late": {"resident": 2},
    }
    a = {**timed([1.0]), "cases": [case]}
    found = {name.removeprefix("cases / a / "): q for name, q in quantities(a).items()}
    assert {name: q.samples for name, q in found.items()} == {
        "parts_s / start": (1, 2, 3),
        "bytes / copied": (10, 10, 10),
        "bytes / counter": (0, 0, 1),
        "pcie": (70,),
        "rounds / step_s": (2, 2, 2),
        "rounds / copied": (0, 0, 0),
    }
    assert not any(q.exact for q in found.values())
    b = copy.deepcopy(a)
    (more,) = b["cases"]
    more["parts_s"]["start"] = [10.0, 20.0, 30.0]
    more["bytes"]["counter"] = [2, 3, 2]
    more["launched_late"]["resident"] = 200
    for entry in more["rounds"]:
        entry["copied"] = 5
    assert {line.quantity.rpartition(" / ")[2]: line.verdict for line in compare.compare(a, b)} == {
        "start": "worse", "copied": "worse", "counter": "worse", "pcie": "not resolved", "step_s": "not resolved",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([0, 0, 0], [0, 0, 0], "same"),
        ([0, 0, 0], [0, 0, 1], "not resolved"),
        ([0, 0, 1], [2, 2, 2], "worse"),
        ([2, 2, 2], [0, 0, 1], "better"),
        ([0, 0], [2, 2], "not resolved"),
        ([0, 0, 2], [1, 1, 1], "not resolved"),
    ],
)
def test_what_may_be_nothing_is_apart_or_not_resolved(a, b, said):
    line = verdict(a, b)
    assert (line.ratio, line.verdict) == (None, said)
