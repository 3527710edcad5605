"""The script for CUDA machines, as far as it can be read: its calls, limits and order; tests/rehearsal runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.gpu import evidence as gpu_evidence
from bench.instruments.results import git_commit

SCRIPT = Path(__file__).parents[2] / "bench/gpu_checks.sh"
TEXT = SCRIPT.read_text(encoding="utf-8")
LINES = TEXT.replace("\\\n", " ").splitlines()
STEPS = [
    (("tests_" if kind == "tests" else "") + name, int(seconds), rest)
    for line in LINES
    for kind, seconds, name, rest in re.findall(r"^ *(step|tests) (\d+) (\w+) (.*)", line)
]
SECOND = "hundred_billion"


def test_it_is_a_script_that_bash_understands():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_limits_of_both_calls():
    first = sum(seconds for name, seconds, _ in STEPS if name not in (SECOND, "tests_compiled"))
    assert first <= 580 + 12  # each limit holds by itself, and what is left holds for all: the last gets less
    assert {"580", "185"} == set(re.findall(r"LIMIT=(\d+)", TEXT))
    assert next(seconds for name, seconds, _ in STEPS if name == SECOND) <= 185 - 10


def test_what_tells_most_comes_first():
    names = [name for name, _, _ in STEPS if name != SECOND]
    assert names[:4] == ["preflight", "tests_controls", "tests_tables", "served_8b"]
    assert names[-1] == "tests_compiled" and names.index("prefill") < names.index("served_4b")
    assert 'BATCHES="64 1 16 256"' in TEXT and "HUGE=1e11" in TEXT


def test_the_call_lines_are_short_and_complete():
    calls = [line[1:].strip() for line in LINES if "bash bench/gpu_checks.sh" in line]
    assert [re.search(r"gpu_checks.sh (\w+)", line)[1] for line in calls] == ["first", "second"]
    assert all(len(line) < 2000 and "GIT_COMMIT" in line and "WHEELS" in line for line in calls)


def test_the_tests_that_it_runs_exist():
    paths = {word for _, _, rest in STEPS for word in rest.split() if word.startswith("tests/")}
    assert len(paths) > 9 and all((SCRIPT.parents[1] / path).exists() for path in paths)
    assert {f"tests/cuda/{path.name}" for path in SCRIPT.parents[1].glob("tests/cuda/test_*.py")} <= paths


@pytest.mark.parametrize("arguments", [[], ["third", "x"]])
def test_another_call_is_refused_in_one_line(arguments):
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("gpu_checks: error: say first or second")


def evidence(tmp_path, **files):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    for name, content in files.items():
        (work / name.replace("__", ".")).write_bytes(content)
    gpu_evidence.pack(work, out, "first")
    return out


def test_a_file_that_is_too_large_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_evidence, "LARGEST", 50_000)
    out = evidence(tmp_path, big__log=os.urandom(60_000), small__log=b"kept", table__safetensors=b"x")
    with tarfile.open(out / "evidence.tar.gz") as archive:
        assert archive.getnames() == ["small.log"]
    assert "big.log is too large" in capsys.readouterr().err


def test_the_summary_is_short_and_names_what_failed(tmp_path):
    steps = b"".join(b"step%d ended with 124 after 9 s of 9\n" % number for number in range(40))
    logs = {f"step{number}__log": b"line\n" * 5000 for number in range(40)}
    text = (evidence(tmp_path, steps__txt=steps, **logs) / "summary.txt").read_text()
    assert len(text) <= 12_000 and text.startswith("step0 ended with 124") and "the end of step0.log" in text


def test_a_suite_that_is_being_written_is_left_out(tmp_path):
    whole = b"<testsuites><testsuite name='a' tests='2'><testcase name='t'/></testsuite></testsuites>"
    out = evidence(tmp_path, tests_a__xml=whole, tests_b__xml=whole[:40])
    assert (out / "tests.xml").read_text().count("<testsuite ") == 1


def test_the_commit_is_what_the_environment_says_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.instruments.results._ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("ENGRAM_GIT_COMMIT", "abc123")
    assert git_commit() == {"commit": "abc123", "dirty": None}
    monkeypatch.delenv("ENGRAM_GIT_COMMIT")
    assert git_commit() == {"commit": None, "dirty": None}


@pytest.mark.parametrize("said", ["0", "-3", "many"])
def test_steps_of_stress_tests_are_refused_by_name(said, monkeypatch):
    from tests.cuda.stress import steps

    monkeypatch.setenv("ENGRAM_STRESS_STEPS", said)
    with pytest.raises(ValueError, match=f"ENGRAM_STRESS_STEPS='{said}'"):
        steps(10)
    monkeypatch.setenv("ENGRAM_STRESS_STEPS", "1000")
    assert (steps(10_000), steps(200)) == (1000, 200)
    monkeypatch.delenv("ENGRAM_STRESS_STEPS")
    assert steps(10_000) == 10_000


def test_evidence_needs_nothing_but_the_standard_library():
    command = [sys.executable, "-S", "-I", str(SCRIPT.with_name("gpu") / "evidence.py")]
    assert "usage:" in subprocess.run(command, capture_output=True, text=True).stderr
