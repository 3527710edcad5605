"""Sweeps: the same integers as direct runs, the same file however often a run is killed, and what tables make of it."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import jsonschema
import pytest

from bench import bytedmd_toy
from bench.instruments.code_digest import code_files
from bench.price import models
from bench.price.job import Job, price_job
from bench.price.models import make_workload, toy_config
from bench.schemas.sweeps import Results
from bench.setup.streams import random_source
from bench.sweeps import command as sweep_command
from bench.sweeps import run as sweep_run
from bench.sweeps import table
from bench.sweeps.figures import draw_all
from bench.sweeps.points import HOT_PREFETCH, NAMES, SWEEPS, Case, Settings, points_of
from bench.sweeps.pricing import Layouts
from bench.sweeps.table import Crossing, crossing_text, crossings, ratios, report
from engram_ref import cli
from engram_ref.hashing import HashPlan
from engram_toy.bytedmd import record
from engram_toy.models.layouts import VARIANTS
from engram_toy.models.programs import BOUNDARIES, build
from tests.schemas import validator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SCHEMA = validator(Results)
COMMITTED = ROOT / "bench/results"
TINY = ["--quick", "--seq_len", "4", "--d_model", "4"]
SMALL = [*TINY, "--model", "kv-bank", "--tokenizer", str(ROOT / "tests/golden/tokenizer_small")]
SMALL += ["--text", str(ROOT / "LICENSE")]
UNIFORM_START, ZIPF_START = [633, 426, 901, 824, 133], [275, 968, 42, 3, 4]
BASE = Settings("tiny", "text", 4, 4, 0, 10_000, 1.0, 0.1, 1, "lru", 0.0)


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def patch(kept_maps):
    """Recordings one after the other in this process, a smaller table for Engram, no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CUTS, "tiny", {"table_size_per_order": (50, 50)})
        patch.setattr(sweep_run, "in_parallel", lambda function, jobs, _: enumerate(map(function, jobs)))
        patch.setattr(sweep_command, "draw_where_possible", lambda *_: None)
        yield patch


def command(*options):
    """Run the command; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["bytedmd_toy", *map(str, options)])
        cli.run(bytedmd_toy.main, bytedmd_toy.PROG)
    return stopped.value.code


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a sweep of the bank; how many recordings were made, the exit code, and what was said."""

    def counted(*options, stop_after=None):
        done = []

        def serial(function, jobs, processes):
            for place, job in enumerate(jobs):
                if place == stop_after:
                    raise KeyboardInterrupt
                done.append(job)
                yield place, function(job)

        monkeypatch.setattr(sweep_run, "in_parallel", serial)
        code = command(*SMALL, *options)
        return len(done), code, capsys.readouterr()

    return counted


@pytest.fixture(scope="module")
def quick(tmp_path_factory, patch):
    """A folder with the results of one small run, and what it printed."""
    out = tmp_path_factory.mktemp("sweeps")
    names = ["padding", "share", "hot", "wrong", "definition", "bytes", "grid"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert command(*TINY, "--model", "engram", "--sweep", *names, "--out", out) == 0
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def results(quick):
    return load(quick[0] / "sweeps.json")


# --- exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), [("bytedmd_toy", "tiny"), ("bytedmd_toy_v41", "v41-flash")])
def test_committed_sweeps_agree_with_the_committed_runs(name, preset):
    """Integer by integer, wherever a sweep passes the configuration that was run by itself."""
    sweeps, toy = load(COMMITTED / "bytedmd_sweeps.json"), load(COMMITTED / f"{name}.json")
    same = ("cost", "cost_by_kind", "reads", "reads_by_kind", "escapes", "untracked_outputs", "output_sha256")
    compared = 0
    for run in toy["runs"]:
        for sweep, about in sweeps["sweeps"].items():
            settings = {**sweeps["configuration"], "preset": "tiny"}
            value = preset if sweep == "preset" else settings[about["setting"]]
            where = (run["model"], run["boundary"], run["variant"], value)
            point = table.points_at(sweeps, sweep).get(where)
            if point and (sweep == "preset" or preset == "tiny"):
                assert {key: point[key] for key in same} == {key: run[key] for key in same}, (sweep, where)
                compared += 1
    assert compared == (24 * 10 + 12 if preset == "tiny" else 12)


def test_what_the_log_says_of_the_committed_sweeps():
    """docs/log.md, `one setting at a time`."""
    sweeps = load(COMMITTED / "bytedmd_sweeps.json")

    def of(sweep, model="engram", boundary="lookup", variant="offload_prefetch"):
        return dict(zip(sweeps["sweeps"][sweep]["values"], ratios(sweeps, sweep, model, boundary, variant)))

    def labels(sweep, model, boundary):
        return [verdict.label for verdict in table.verdicts(sweeps, sweep, model, boundary)]

    pairs = [(model, boundary) for model in ("engram", "kv-bank") for boundary in ("lookup", "layer", "block")]
    assert round(of("padding")[10**7], 1) == 39.2
    assert max(ratio for boundary in ("layer", "block") for ratio in of("padding", boundary=boundary).values()) < 2
    for sweep in ("padding", "tokens"):
        for value, ratio in of(sweep, variant="offload_naive").items():
            live = table.points_at(sweeps, sweep)["engram", "lookup", "resident", value]["working_set"]
            padding = value if sweep == "padding" else 10**6
            assert padding < 10 * live or abs(ratio / (padding / live) ** 0.5 - 1) < 0.15
    assert labels("tokens", "engram", "lookup") == ["LOSS"] * 2 + ["INCONCLUSIVE"] * 3
    bank = {v: table.points_at(sweeps, "tokens")["kv-bank", "lookup", "resident", v] for v in (128, 256)}
    assert [round(p["lookups"] / p["distinct_rows"], 1) for p in bank.values()] == [2.0, 3.3]
    naive = of("tokens", "kv-bank", variant="offload_naive")[256]
    assert 0.45 < naive / (10**6 / bank[256]["working_set"]) ** 0.5 < 0.55
    assert [round(ratio, 1) for ratio in of("definition").values()] == [12.6, 4.5, 4.0, 4.5, 4.9, 4.5, 4.5]
    assert round(of("definition", boundary="block", variant="offload_naive")["two-stack"], 3) == 0.999
    assert [round(of("wrong")[value], 1) for value in (0.0, 0.5)] == [12.6, 18.5]
    for pair in pairs:
        assert len(set(labels("wrong", *pair))) == 1
        assert min(of("wrong", *pair).values()) > of("wrong", *pair, "offload_naive")[0.0]
    assert [round(of("hot", variant="offload_hot")[m], 1) for m in (0.0, 0.1)] == [12.4, 10.7]
    hot = table.points_at(sweeps, "hot")["engram", "lookup", "offload_hot", 0.1]
    assert round(1 - hot["share_below"], 2) == 0.16
    excess = [ratio - 1 for ratio in of("compute", boundary="layer").values()]
    assert (round(excess[0], 2), round(excess[-1], 3)) == (0.91, 0.02)
    assert all(2.4 <= round(a / b, 1) <= 2.9 for a, b in pairwise(excess))
    assert [round(ratio, 1) for ratio in of("reuse").values()] == [12.7, 12.6, 12.6, 10.9]
    for sweep, most in (("bytes", 0.004), ("seed", 0.03)):
        found = [list(of(sweep, *pair, variant).values()) for pair in pairs for variant in VARIANTS[1:]]
        assert max(abs(ratio / some[0] - 1) for some in found for ratio in some) < most
    flat = [of("padding", *pair, "offload_naive")[0] for pair in pairs]
    assert (round(min(flat), 3), round(max(flat), 3)) == (0.994, 1.002)
    copies = [round(of("padding", *pair)[0], 2) for pair in pairs]
    assert (copies[0], copies[3]) == (1.2, 1.28) and max(copies[1:3] + copies[4:]) < 1.14


def test_a_point_is_the_price_of_a_direct_run(results, vocab_v4):
    """Layouts are re-made here from what the points say, and every case runs by itself with its padding."""
    stream = sweep_run.Texts(None, None).window(BASE)
    config = toy_config("engram", 4)
    plan = HashPlan.build(config, len(vocab_v4), vocab_v4.pad(config.pad_id))
    workload = make_workload("engram", config, plan, stream.measured, 0)
    calibration = replace_ids(workload, stream.calibration).row_indices()
    layouts = Layouts(workload, workload.row_indices(), calibration)
    compared = 0
    for point in points_of("share", BASE, ["engram"], quick=True):
        case = point.case
        if case.boundary == "block":
            continue
        direct = price_job(Job(workload, case.boundary, layouts.of(case), case.settings.padding))
        where = (case.model, case.boundary, case.variant, point.value)
        assert table.points_at(results, "share")[where]["cost_by_kind"] == direct["cost_by_kind"]
        compared += 1
    assert compared == 2 * 2 * 4


def replace_ids(workload, ids):
    return replace(workload, compressed_ids=ids)


def test_the_same_case_has_the_same_price_in_every_sweep(results):
    base = {"padding": 10_000, "share": 1.0, "hot": 0.1, "wrong": 0.0, "definition": "lru", "bytes": 1}
    for place in [("engram", boundary, variant) for boundary in ("lookup", "block") for variant in VARIANTS]:
        found = {table.points_at(results, name)[(*place, value)]["cost"] for name, value in base.items()}
        assert len(found) == 1


def test_the_ends_of_the_scales(results):
    """No hot rows is naive, all rows hot is resident; whatever is mispredicted, a copy costs."""
    hot, wrong = (table.points_at(results, name) for name in ("hot", "wrong"))
    for boundary in ("lookup", "layer", "block"):
        cost = {(variant, m): hot["engram", boundary, variant, m]["cost"] for variant in VARIANTS for m in (0.0, 1.0)}
        assert cost["offload_hot", 0.0] == cost["offload_naive", 0.0] > cost["resident", 0.0]
        assert cost["offload_hot", 1.0] == cost["resident", 1.0]
        naive = wrong["engram", boundary, "offload_naive", 0.0]["cost"]
        right, missed = (wrong["engram", boundary, "offload_prefetch", w] for w in (0.0, 0.2))
        assert naive < right["cost"] < missed["cost"]
        assert missed["output_sha256"] == right["output_sha256"] and missed["escapes"] == right["escapes"]
        assert missed["share_wrong"] == round(0.2 * 64) / 64


def test_every_point_is_valid(results):
    for sweep, about in results["sweeps"].items():
        for boundary in ("lookup", "layer", "block"):
            assert all(table.is_valid(results, sweep, "engram", boundary, v) for v in about["values"])


def test_another_output_is_invalid(results):
    broken = json.loads(json.dumps(results))
    point = next(p for p in broken["points"] if (p["sweep"], p["variant"]) == ("bytes", "offload_prefetch"))
    point["output_sha256"] = "0" * 64
    labels = [verdict.label for verdict in table.verdicts(broken, "bytes", "engram", "lookup")]
    assert labels[0] == "INVALID" and "INVALID" not in labels[1:]
    assert " x" in report(broken, "bytes")


def test_the_grid(quick, results):
    grid = load(quick[0] / "grid.json")
    axes, prices = grid["axes"], grid["prices"]
    lengths = [len(axes[name]) for name in ("padding", "share", "hot", "compute")]
    for nested in prices.values():
        assert [len(nested), len(nested[0]), len(nested[0][0]), len(nested[0][0][0])] == lengths
    assert axes["compute"][0] == 0 and axes["padding"] == [0, 1000, 1_000_000]
    lookups = table.points_at(results, "padding")
    for p, padding in enumerate(axes["padding"]):
        for c, boundary in enumerate(("lookup", "layer")):  # the base width is the grid's only one
            for variant, nested in prices.items():
                assert nested[p][-1][0][c] == lookups["engram", boundary, variant, padding]["cost"]
            resident = {prices["resident"][p][s][h][c] for s in range(lengths[1]) for h in range(lengths[2])}
            # All rows are hot. A prefetch without copies still reads its indices early: in the layer, that shows.
            same = prices if boundary == "lookup" else ("resident", "offload_naive")
            assert {prices[v][p][-1][-1][c] for v in same} == resident and len(resident) == 1
    assert grid["share_below"][-1][0] == 1 and grid["share_below"][-1][-1] == 0


# --- which rows -------------------------------------------------------------------------------------


class Table:
    """Stands for a workload: only its number of rows is asked for."""

    def __init__(self, rows):
        self.table = [[0.0]] * rows


def test_rows_of_a_share_take_that_share_of_the_lookups():
    indices = [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9], [0, 10, 11, 12], [0, 13, 14, 15]]  # row 0: a quarter of all
    layouts = Layouts(Table(20), indices, [[3, 3, 5]])
    before = set()
    for share in (0.05, 0.1, 0.5, 1.0):
        case = Case(replace(BASE, share=share), "engram", "lookup", "offload_naive")
        assert layouts.share_below(layouts.of(case)) == share
        below = layouts.below(share, seed=0)
        assert below >= {16, 17, 18, 19}  # what nobody reads lies below
        assert before - {0} <= below
        before = below
    assert layouts.below(1.0, seed=0) == set(range(20))
    assert layouts.below(0.5, seed=0) != layouts.below(0.5, seed=1)


def test_hot_rows_are_the_calibrations_and_then_the_unseen():
    layouts = Layouts(Table(10), [[0, 1, 2]], [[3, 3, 5]])
    for share, above in ((0.1, {3}), (0.3, {3, 5, 0}), (1.0, set(range(10)))):
        assert layouts.of(Case(replace(BASE, hot=share), "engram", "lookup", HOT_PREFETCH)).above == above
        assert layouts.of(Case(replace(BASE, hot=share), "engram", "lookup", "offload_prefetch")).above == set()


def test_mispredicted_copies_are_of_another_row():
    indices = [[i % 3, i % 5] for i in range(50)]
    layouts = Layouts(Table(5), indices, [[0]])
    before = {}
    for share in (0.0, 0.1, 0.5, 1.0):
        wrong = layouts.of(Case(replace(BASE, wrong=share), "engram", "lookup", "offload_prefetch")).wrong
        assert len(wrong) == share * 100 and before.items() <= wrong.items()
        assert all(row != indices[t][c] and 0 <= row < 5 for (t, c), row in wrong.items())
        before = wrong
    assert set(before.values()) == {0, 1, 2, 3, 4}


def test_random_texts_are_the_same_everywhere_and_what_they_are_called():
    uniform, zipf = random_source("uniform", 1000), random_source("zipf", 1000)
    ids = {source.name: source.ids.tolist() for source in (uniform, zipf)}
    assert ids["uniform"][:5] == UNIFORM_START and ids["zipf"][:5] == ZIPF_START
    assert len(ids["zipf"]) == len(ids["uniform"]) == 65_536 and max(ids["zipf"] + ids["uniform"]) == 999
    weight = sum(1 / (i + 1) for i in range(1000))
    for i in (0, 1, 9):  # five standard deviations of a count
        assert abs(ids["zipf"].count(i) - 65_536 / (i + 1) / weight) < 5 * (65_536 / (i + 1) / weight) ** 0.5
        assert abs(ids["uniform"].count(i) - 65.5) < 5 * 65.5**0.5
    assert uniform.sha256 != zipf.sha256


def test_the_standard_library_is_a_text(vocab_v4):
    source = sweep_run.Texts(None, None).source("python-stdlib")
    assert source.name == "python-stdlib, first 1 MiB" and len(source.ids) > 100_000


@pytest.mark.parametrize("model", ["engram", "kv-bank"])
def test_a_job_is_estimated_by_the_operations_of_its_recording(model):
    """Within an eighth, and exactly by what prefetching adds: the jobs of one program are in the right order."""
    texts, found = sweep_run.Texts(None, SMALL[SMALL.index("--tokenizer") + 1]), {}
    for boundary, variant in product(BOUNDARIES, ("offload_naive", "offload_prefetch")):
        case = Case(replace(BASE, stream="uniform", d_model=8), model, boundary, variant)
        (job,) = sweep_run.make_jobs([case], texts)
        workload = make_workload(model, job.config, job.plan, job.stream.measured, 0)
        layout = Layouts(workload, workload.row_indices(), []).of(case)
        program = build(workload, boundary, layout, padding=0)
        done = len(record(program.function, program.arguments, program.kinds).log.left)
        table = job.plan.layer(job.config.layer_ids[0]).rows * job.config.row_width
        estimated = sweep_run.operations(job) - sweep_run._OF_ANY_RECORDING - table // 4
        assert abs(estimated - done) <= done / 8
        found[boundary, variant] = estimated - done
    for boundary in BOUNDARIES:
        assert found[boundary, "offload_naive"] == found[boundary, "offload_prefetch"]


# --- resumable --------------------------------------------------------------------------------------

LESS = ["--sweep", "share", "padding"]
RECORDINGS = 3 + 2 * 3  # per boundary: without copies, and with those of two shares


KILLED = """
import os, signal, sys
from bench import bytedmd_toy
from bench.instruments.journal import Journal

add = Journal.add

def die(self, records):
    if len(self.found) > 30:
        with self._path.open("ab") as file:
            file.write(b'["torn","')  # in the middle of a write
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, records)

Journal.add = die
if __name__ == "__main__":
    bytedmd_toy.main()
"""


def test_killed_in_the_middle_it_continues_and_writes_the_same_bytes(run, tmp_path):
    """A process with workers kills itself with SIGKILL while it writes, twice; then it may finish."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    count, code, said = run(*LESS, "--out", whole)
    assert (count, code) == (RECORDINGS, 0) and "share" in said.out

    for _ in range(2):
        options = [*SMALL, *LESS, "--out", killed, "--jobs", "1"]
        died = subprocess.run([sys.executable, "-c", KILLED, *options], cwd=ROOT, capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert {path.name for path in killed.iterdir()} == {"sweeps.journal"}
    count, code, said = run(*LESS, "--out", killed)
    assert code == 0 and 0 < count < RECORDINGS and "prices are in" in said.err
    assert (killed / "sweeps.json").read_bytes() == (whole / "sweeps.json").read_bytes()


def test_nothing_is_done_twice_and_nothing_stale_is_used(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(*LESS, "--out", out)[0] == RECORDINGS
    shown = []
    with monkeypatch.context() as patch:  # at another commit
        patch.setattr("bench.instruments.results.git_commit", lambda: {"commit": "0" * 40, "dirty": False})
        patch.setattr(sweep_command, "draw_where_possible", lambda _, results, out: shown.append(results))
        again = run(*LESS, "--out", out)[0]
    assert again == 0 and load(out / "sweeps.json")["git"]["commit"] == "0" * 40
    assert shown == [load(out / "sweeps.json")]  # the figures name the file that is there

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    assert run(*LESS, "--out", out, "--text", text)[0] == RECORDINGS  # another text
    assert run(*LESS, "--out", out, "--seed", "1")[0] == RECORDINGS  # other weights
    assert run("--sweep", "padding", "--out", out)[0] == 0  # a part of what is there
    monkeypatch.setattr(sweep_command, "code_sha256", lambda *modules: "1" * 64)
    assert run("--sweep", "padding", "--out", out)[0] == 6  # other code


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(run, tmp_path):
    count, code, said = run(*LESS, "--out", tmp_path, stop_after=2)
    assert (count, code) == (2, 130)
    assert said.err.splitlines()[-1].endswith("sweeps.journal, the same command continues")
    assert [path.name for path in tmp_path.iterdir()] == ["sweeps.journal"]
    assert run(*LESS, "--out", tmp_path)[0] == RECORDINGS - 2


def test_the_key_names_all_code_that_decides_a_price():
    loads = "import sys, bench.sweeps.pricing; print(*(getattr(m, '__file__', 0) for m in sys.modules.values()))"
    loaded = subprocess.run([sys.executable, "-c", loads], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {Path(name) for name in loaded.split() if Path(name).is_relative_to(ROOT) and ".venv" not in name}
    assert ours and ours <= set(code_files(*sweep_run.PRICING_CODE))


# --- what is made of it -----------------------------------------------------------------------------


def test_results_fit_the_schema(quick, results):
    grid = load(quick[0] / "grid.json")
    for content in (results, grid):
        SCHEMA.validate(content)
        with pytest.raises(jsonschema.ValidationError):
            SCHEMA.validate({**content, "verdict": "WIN"})
    grid["prices"]["offload_hot"] = grid["prices"]["resident"]
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(grid)


KNOWN = {
    "between two points": ([1, 100], [1.0, 4.0], 2.0, [Crossing(1, 100, 10.0, True)]),
    "never": ([1, 10, 100], [1.0, 1.5, 1.9], 2.0, []),
    "never below": ([1, 10, 100], [2.1, 3.0, 4.0], 2.0, []),
    "exactly at a point": ([1, 10, 100], [1.0, 2.0, 4.0], 2.0, [Crossing(10, 10, 10, True)]),
    "exactly at the first": ([1, 10], [2.0, 4.0], 2.0, []),
    "exactly at the last": ([1, 10], [1.0, 2.0], 2.0, [Crossing(10, 10, 10, True)]),
    "from above": ([1, 100], [4.0, 1.0], 2.0, [Crossing(1, 100, 10.0, False)]),
    "from above, exactly": ([1, 10, 100], [4.0, 2.0, 1.0], 2.0, [Crossing(10, 10, 10, False)]),
    "up and down": (
        [1, 100, 10_000],
        [1.0, 4.0, 1.0],
        2.0,
        [Crossing(1, 100, 10.0, True), Crossing(100, 10_000, 1000.0, False)],
    ),
    "touched only": ([1, 10, 100], [1.0, 2.0, 1.0], 2.0, []),
    "a stretch on the level": ([1, 10, 100, 1000], [1.0, 2.0, 2.0, 3.0], 2.0, [Crossing(100, 100, 100, True)]),
    "from zero": ([0, 10], [1.0, 4.0], 2.0, [Crossing(0, 10, None, True)]),
    "one point": ([1], [5.0], 2.0, []),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_crossings_of_known_curves(case):
    values, curve, level, want = KNOWN[case]
    found = crossings(values, curve, level)
    assert [c._replace(at=c.at and pytest.approx(c.at)) for c in found] == want


def test_crossings_in_words():
    assert crossing_text([1000, 10**6], [1.0, 4.0], 2.0) == "up ~32,000 (10^3 .. 10^6)"
    assert crossing_text([0, 10**7], [1.0, 1.2], 2.0) == "not reached, 0 to 10^7"
    assert crossing_text([16, 256], [9.0, 6.0], 5.0) == "above throughout, 16 to 256"
    assert crossing_text([0.1, 0.3, 1.0], [7.0, 5.0, 2.0], 5.0) == "down at 0.3"
    assert crossing_text([0, 1000], [1.0, 9.0], 5.0) == "up in 0 .. 10^3"


def test_tables_show_every_ratio(quick, results):
    text = quick[1]
    for sweep in results["sweeps"]:
        assert report(results, sweep) in text
        for variant in VARIANTS[1:]:
            for ratio in ratios(results, sweep, "engram", "layer", variant):
                assert f"{ratio:.3f}" in report(results, sweep)
    assert table.crossing_report(results) in text


def test_figures_are_drawn_the_same_every_time(results, tmp_path):
    few = {**results, "sweeps": {name: results["sweeps"][name] for name in ("padding", "definition")}}
    first, second = draw_all(few, tmp_path / "a"), draw_all(few, tmp_path / "b")
    assert [path.name for path in first] == ["sweep_padding.svg", "sweep_definition.svg"]
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()
        assert all(words in one.read_text() for words in ("5: WIN up to here", "20: LOSS above", "engram, block"))


BAD_INPUT = {
    "unknown sweep": (["--sweep", "colour"], "invalid choice"),
    "a sweep of engram alone": (["--sweep", "preset"], "leave out --model kv-bank"),
    "the original tracer": (["--sweep", "bytes", "--tracer", "upstream"], "leave out --sweep"),
    "out is a file": (["--sweep", "bytes", "--out", "short.txt"], "name a folder"),
    "short text": (["--sweep", "bytes", "--text", "short.txt"], "at least"),
    "no such text": (["--sweep", "bytes", "--text", "none.txt"], "No such file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(case, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    options, words = BAD_INPUT[case]
    count, code, said = run("--out", "out", *options)
    assert (count, code) == (0, 2)
    assert said.err.startswith("bytedmd_toy: error: ") and said.err.count("\n") == 1 and words in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_all_means_all_that_the_model_has():
    options = bytedmd_toy.parse(["--sweep", "all"])
    assert sweep_command.chosen(options) == list(NAMES) == [*SWEEPS, "grid"]
    options.model = "kv-bank"
    assert set(NAMES) - set(sweep_command.chosen(options)) == {"preset", "grid"}
