"""The command from end to end, on a small job: its evidence, its figures, its errors."""

import contextlib
import io
import json
import os
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import jsonschema
import pytest

from bench import bytedmd_toy
from bench.price import models
from bench.price.job import Job, check_against_upstream, price_job
from bench.price.table import groups, is_valid, verdict_table
from bench.schemas.toy import Results
from bench.setup.streams import text_source
from engram_ref import cli
from engram_ref.config import EngramConfig
from engram_ref.files.texts import read_text
from engram_toy import bytedmd as own
from engram_toy.models.programs import BOUNDARIES, MODELS
from tests import commands
from tests.schemas import validator

ROOT = Path(__file__).parents[2]
SCHEMA = validator(Results)
SMALL = ["--quick", "--seq_len", "6", "--d_model", "4", "--padding", "500", "--repeats", "2"]
SMALL_TOKENIZER = ROOT / "tests/golden/tokenizer_small"
TIMES = {"wall_time_s", "wall_time_summary_s"}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kept_maps")]


def serial(function, jobs, processes):
    return enumerate(map(function, jobs))


def command(*options, boundaries=BOUNDARIES[:1]):
    """In this process and no other, one boundary, without figures: `finished` has all of that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bytedmd_toy, "BOUNDARIES", boundaries)
        patch.setattr(bytedmd_toy, "draw_where_possible", lambda *_: None)
        patch.setattr(bytedmd_toy, "in_parallel", serial)
        return commands.run(bytedmd_toy, *options)


def prices(results, boundaries):
    of = [run for run in results["runs"] if run["boundary"] in boundaries]
    return [{k: v for k, v in run.items() if k not in TIMES} for run in of]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Once as its users call it: a process, and processes that it starts, where there is no torch."""
    out, shadow = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("shadow")
    (shadow / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    command = [sys.executable, ROOT / "bench/bytedmd_toy.py", *SMALL, "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(shadow)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done, out, json.loads((out / "results.json").read_text())


def test_results_fit_the_schema(finished):
    _, _, results = finished
    SCHEMA.validate(results)
    assert len(results["runs"]) == 2 * 3 * 4
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate({**results, "verdict": "WIN"})  # evidence holds no conclusions


def test_every_comparison_is_valid(finished):
    _, _, results = finished
    assert all(is_valid(results, model, boundary) for model, boundary in groups(results))


def test_stdout_is_the_table_and_stderr_the_progress(finished):
    done, out, results = finished
    assert done.stdout.startswith(f"{verdict_table(results)}\n")
    *_, where, last = done.stdout.splitlines()
    assert json.loads(last)["results"] == where and Path(where).name == "results.json"
    assert "price 24/24" in done.stderr and str(out / "results.json") in done.stderr


def test_figures_are_drawn(finished):
    _, out, _ = finished
    names = {"depths.svg", "ratios.svg", "cost_by_kind.svg", "results.json"}
    assert {path.name for path in out.iterdir()} == names
    assert all("<svg" in (out / name).read_text() for name in names - {"results.json"})


def test_numbers_of_a_run_agree_with_each_other(finished):
    _, _, results = finished
    for run in results["runs"]:
        assert run["cost"] == sum(run["cost_by_kind"].values())
        assert run["reads"] == sum(run["reads_by_kind"].values())
        for kind, reads in run["reads_by_kind"].items():
            assert reads == sum(run["depth_histogram"][kind].values())


def test_prices_are_the_same_every_time(finished, tmp_path):
    _, _, results = finished
    boundaries = BOUNDARIES[::2]  # a block has the layer in it
    again = command(*SMALL, "--out", str(tmp_path), boundaries=boundaries)
    assert again.returncode == 0, again.stderr
    found = prices(json.loads((tmp_path / "results.json").read_text()), boundaries)
    assert found == prices(results, boundaries) and len(found) == 2 * 2 * 4


def test_another_seed_reads_another_text(finished, tmp_path):
    _, _, results = finished
    done = command(*SMALL, "--seed", "1", "--model", "engram", "--out", str(tmp_path))
    other = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0
    assert other["stream"]["start"] != results["stream"]["start"]
    assert other["models"]["engram"]["row_stream_sha256"] != results["models"]["engram"]["row_stream_sha256"]


def test_the_second_definition_and_another_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "out"
    done = command(*SMALL, "--definition", "two-stack", "--model", "engram", "--text", str(text), "--out", str(out))
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    SCHEMA.validate(results)
    assert results["stream"]["name"] == "text.txt"
    assert all(is_valid(results, model, boundary) for model, boundary in groups(results))


# --- DeepSeek-V4.1-Flash's form ---------------------------------------------------------------------


V41_BOUNDARIES = BOUNDARIES[::2]  # a block has the layer in it


@pytest.fixture(scope="module")
def cut_down(tmp_path_factory):
    """A run of the preset with an even smaller table: its output, and its results."""
    out = tmp_path_factory.mktemp("v41")
    options = [*SMALL, "--preset", "v41-flash", "--out", str(out)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bytedmd_toy, "in_parallel", serial)
        patch.setitem(models.CUTS["v41-flash"], "table_size_per_order", (20, 20, 20))
        patch.setattr(bytedmd_toy, "BOUNDARIES", V41_BOUNDARIES)
        patch.setattr(sys, "argv", ["bytedmd_toy", *options])
        bytedmd_toy.main()
    return printed.getvalue(), out, json.loads((out / "results.json").read_text())


def test_v41_runs_engram_alone_and_fits_the_schema(cut_down):
    _, out, results = cut_down
    SCHEMA.validate(results)
    assert (results["configuration"]["preset"], results["configuration"]["model"]) == ("v41-flash", "engram")
    assert groups(results) == [("engram", boundary) for boundary in V41_BOUNDARIES] and len(results["runs"]) == 2 * 4
    assert all(is_valid(results, model, boundary) for model, boundary in groups(results))
    assert all((out / name).exists() for name in ("depths.svg", "ratios.svg", "cost_by_kind.svg"))


def test_v41_has_the_presets_form(cut_down):
    _, _, results = cut_down
    config, full = results["models"]["engram"]["config"], asdict(EngramConfig.preset("v41-flash"))
    cut = {"hidden", "hc_mult", "row_width", "table_size_per_order"}
    assert {name for name in full if json.loads(json.dumps(full[name])) != config[name]} == cut
    assert results["models"]["engram"]["lookups"] == 6 * 24
    layer = results["models"]["engram"]["plan"]["layers"][0]
    assert layer["multipliers"] == [76632096046245, 4839876093313, 35959672319349, 73987337458391]


def test_v41_states_its_scale_in_every_line(cut_down):
    printed, out, results = cut_down
    rows = results["models"]["engram"]["plan"]["layers"][0]["primes"]
    scale = {
        "table_rows": [sum(rows), 384_006_168],
        "row_width": [32, 256],
        "hidden": [4, 5120],
        "hc_mult": [1, 4],
        "layers": [1, 2],
    }
    assert [run["scale"] for run in results["runs"]] == [scale] * 8
    text = "row 32 of 256 values, hidden 4 of 5,120, copies 1 of 4, layers 1 of 2"
    text = f"table 1/{round(384_006_168 / sum(rows)):,}, {text}"
    assert 100_000 < 384_006_168 / sum(rows) < 300_000
    assert printed.startswith(f"{verdict_table(results)}\n")
    head, _, *lines = printed.splitlines()
    assert head.endswith("  scale") and [line.endswith(f"  {text}") for line in lines[:2]] == [True] * 2
    assert text in (out / "ratios.svg").read_text()


def test_what_is_not_cut_states_no_scale(finished):
    done, _, results = finished
    assert results["configuration"]["preset"] == "tiny"
    assert not any("scale" in record for record in [*results["runs"], *results["models"].values()])
    assert "scale" not in done.stdout and "table 1/" not in done.stdout


def test_defaults_of_the_presets():
    tiny, v41 = bytedmd_toy.parse([]), bytedmd_toy.parse(["--preset", "v41-flash"])
    assert (tiny.model, tiny.seq_len, tiny.d_model, tiny.padding) == ("both", 128, 64, 10**6)
    assert vars(v41) == {**vars(tiny), "preset": "v41-flash", "model": "engram"}
    assert bytedmd_toy.parse(["--preset", "v41-flash", "--quick"]).seq_len == 16
    assert bytedmd_toy.parse(["--preset", "v41-flash", "--seq_len", "9"]).seq_len == 9


BAD_INPUT = {
    "no such text": (["--text", "none.txt"], "No such file"),
    "short text": (["--text", "short.txt"], "at least 12"),
    "text not UTF-8": (["--text", "latin.txt"], "not UTF-8"),
    "a folder as text": (["--text", "."], "directory"),
    "no such tokenizer": (["--tokenizer", "none.json"], "no tokenizer at"),
    "foreign tokenizer": (["--tokenizer", "foreign.json"], "not a tokenizer.json"),
    "out is a file": (["--out", "short.txt"], "name a folder"),
    "unknown option": (["--colour"], "unrecognized"),
    "unknown model": (["--model", "gpt"], "invalid choice"),
    "unknown preset": (["--preset", "demo"], "invalid choice"),
    "a bank for v41": (["--preset", "v41-flash", "--model", "kv-bank"], "kv-bank has no form of preset v41-flash"),
    "both for v41": (["--preset", "v41-flash", "--model", "both"], "kv-bank has no form of preset v41-flash"),
    "v41 with a small tokenizer": (["--preset", "v41-flash", "--tokenizer", str(SMALL_TOKENIZER)], "exactly 99092"),
    "no tokens": (["--seq_len", "1"], "at least 2"),
    "negative padding": (["--padding", "-1"], "at least 0"),
    "words for numbers": (["--padding", "many"], "at least 0"),
    "share above one": (["--hot_share", "1.5"], "in 0 .. 1"),
    "no bytes": (["--bytes_per_element", "0"], "at least 1"),
    "original not installed": (["--tracer", "upstream"], "pip install"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_code_2_and_nothing_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    Path("latin.txt").write_bytes(b"caf\xe9 " * 500)
    Path("foreign.json").write_text('{"not": "a tokenizer"}')
    before = sorted(tmp_path.iterdir())
    options, words = BAD_INPUT[case]
    monkeypatch.setattr(sys, "argv", ["bytedmd_toy", *SMALL, "--out", "out", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.run(bytedmd_toy.main, bytedmd_toy.PROG)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    *progress, last = message.splitlines()  # a slow machine is told what is going on before
    assert last.startswith("bytedmd_toy: error: ") and words in last
    assert all(line.startswith("encoding ") for line in progress)
    assert sorted(tmp_path.iterdir()) == before


def test_help_teaches():
    done = command("--help")
    assert done.returncode == 0
    words = (*MODELS, "resident", "lookup", "INCONCLUSIVE", "--padding", "v41-flash")
    assert all(word in done.stdout for word in words)


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(interrupted, "bytedmd_toy")
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nbytedmd_toy: interrupted; nothing was written\n"


@pytest.fixture
def job(vocab_v4):
    options = bytedmd_toy.parse([*SMALL, "--model", "engram"])
    stream = text_source(None, vocab_v4).window(6, seed=0)
    jobs, _ = bytedmd_toy.make_jobs(options, stream, vocab_v4)
    return jobs[0]


def test_the_original_is_compared_depth_by_depth(job, monkeypatch):
    same = types.SimpleNamespace(traced_eval=own.traced_eval)
    monkeypatch.setitem(sys.modules, "bytedmd", same)
    upstream_job = Job(**{**vars(job), "tracer": "upstream"})
    assert price_job(upstream_job) == price_job(job)

    def off_by_one(func, args):
        depths, result = own.traced_eval(func, args)
        return [*depths[:-1], depths[-1] + 1], result

    monkeypatch.setitem(sys.modules, "bytedmd", types.SimpleNamespace(traced_eval=off_by_one))
    program = job.program()
    run = own.trace(program.function, program.arguments, program.kinds)
    with pytest.raises(ValueError, match=f"disagrees from read {len(run.depths) - 1} of engram/lookup/resident"):
        check_against_upstream(job, run)


def test_the_default_text_is_named():
    name, text = read_text(None)
    assert name == "pydoc_data.topics" and len(text) > 100_000


def test_every_definition_is_offered_and_a_sweep_says_which_it_takes(tmp_path):
    done = command(*SMALL, "--definition", "stationary", "--model", "engram", "--out", str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    done = command("--quick", "--definition", "live", "--sweep", "padding", "--out", str(tmp_path / "two"))
    assert done.returncode != 0 and "unknown definition 'live': use one of lru, two-stack" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sweep", "padding", "--padding", "5"], "--padding does nothing where every sweep varies it"),
        (["--sweep", "hot", "grid", "--hot-share", "0.5"], "--hot_share does nothing where every sweep varies it"),
        (["--sweep", "padding", "share", "--padding", "5"], ""),  # the other one starts from it
        (["--sweep", "seed", "--seed", "3"], ""),  # is added to the seeds
    ],
)
def test_a_setting_that_every_sweep_varies_is_refused(options, said, capsys):
    if not said:
        assert bytedmd_toy.parse(options).sweep == options[1:-2]
        return
    with pytest.raises(SystemExit) as ended:
        bytedmd_toy.parse(options)
    assert ended.value.code == 2 and said in capsys.readouterr().err
