"""The script for CUDA machines, as far as it can be read: its calls, limits and order; tests/rehearsal runs it."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.gpu import evidence as gpu_evidence
from bench.instruments.results import git_commit

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "bench/gpu_checks.sh"
TEXT = SCRIPT.read_text(encoding="utf-8")
LINES = TEXT.replace("\\\n", " ").splitlines()
STEPS = [
    (("tests_" if kind == "tests" else "") + name, int(seconds), rest)
    for line in LINES
    for kind, seconds, name, rest in re.findall(r"^ *(step|tests|served|prefill) (\d+) (\w+) (.*)", line)
]
LIMITS = {name: seconds for name, seconds, _ in STEPS}
# What was not measured yet comes first; of 100 B and steps that ask, the latter two only where the first is not there.
INSTEAD = ["hundred_billion", "served_asking"]
MEASURED = ["reads", "lookup", "hundred_asking", *INSTEAD]
IN_WHAT_IS_LEFT = ["served_8b", "prefill", "served_many", "served_4b"]  # or in the next call
ENDING = 10  # seconds that a call keeps for packing
# Seconds on an H200 on 2026-11-27. Of `served_8b` the batches 64, 1 and 16, whose last round was cut and is counted as
# the four before it; of `prefill` the first shape in one call, and 51 s for the second in another. Of `lookup`
# before the parts of staged rows were timed, too. `hundred_asking` is `hundred_billion` and ten seconds, by arithmetic.
SEEN = {"preflight": 22, "hundred_billion": 147, "hundred_asking": 157, "served_8b": 228, "lookup": 40, "prefill": 101}


def test_it_is_a_script_that_bash_understands():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_calls_and_what_each_runs():
    names, measured = [name for name, _, _ in STEPS], [*MEASURED, *IN_WHAT_IS_LEFT]
    assert names[-len(measured) :] == measured
    checked = names[: -len(measured)]
    assert checked[:2] == ["preflight", "tests_controls"] and checked[-3:] == [
        "short_served",
        "short_asking",
        "short_prefill",
    ]
    assert all(name.startswith("tests_") for name in checked[1:-3])
    assert {"170", "580"} == set(re.findall(r"LIMIT=\$\{LIMIT:-(\d+)\}", TEXT))


def test_the_limits_of_both_calls():
    """Each holds by itself, and what is left holds for all: a step that the latter cuts was promised too much."""
    at_a_time = [name for name in LIMITS if name.startswith(("tests_", "short_"))]
    assert all(SEEN["preflight"] + LIMITS[name] <= 170 - ENDING for name in at_a_time)
    limits = [LIMITS[name] for name in MEASURED if name != "hundred_asking"]
    assert SEEN["preflight"] + sum(limits) <= 580 - ENDING
    assert LIMITS["hundred_asking"] < sum(LIMITS[name] for name in INSTEAD)


@pytest.mark.parametrize("name", list(SEEN))
def test_no_limit_is_below_what_was_seen(name):
    assert SEEN[name] < LIMITS[name]


@pytest.fixture
def call(tmp_path):
    """Calls the script for two steps that only say what they would run; how often each has run so far."""

    def start(code, ends=0, **settings):
        environment = {**os.environ, "RUN": "echo", "ONLY": "reads lookup", "PYTHON": f"{sys.executable} -I -S",
                       "WORK": str(tmp_path / "work"), "GIT_COMMIT": code, **settings}  # fmt: skip
        command = ["bash", str(SCRIPT), "measure", str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == ends and done.stdout.endswith((tmp_path / "out/summary.txt").read_text()), done.stderr
        return [(tmp_path / f"work/{name}.log").read_text().count("lookup_speed") for name in ("reads", "lookup")]

    return start


def test_what_a_rehearsal_did_or_unknown_code_is_done_again(call):
    rehearsed = [call("one", REHEARSE="1") for _ in range(2)]
    assert rehearsed == [[1, 1], [1, 1]] and call("one") == [2, 2] and call("one", REHEARSE="1") == [2, 2]
    # Where the code is read from git, what has not been committed may be another thing each time.
    assert call("", GIT_DIR="/nowhere") == [3, 3] and call("", GIT_DIR="/nowhere") == [4, 4]


def test_called_again_it_leaves_out_what_ended_well_with_the_same_code(tmp_path, call):
    assert [call("one"), call("one"), call("another")] == [[1, 1], [1, 1], [2, 2]]
    steps = tmp_path / "work/steps.txt"
    steps.write_text(steps.read_text().replace("reads ended with 0,", "reads ended with 124,"))
    assert call("another") == [3, 2]


ASKS, ALONE, PLAIN = "hundred_asking", "served_asking", "hundred_billion"


@pytest.mark.parametrize(
    ("ended", "begun"),
    [
        ({}, [PLAIN, ALONE]),
        ({"short_asking": 2}, [PLAIN]),
        ({"short_asking": 1}, [PLAIN]),
        ({"short_asking": 124}, [PLAIN, ALONE]),  # it was slow beside a dozen others
        ({"short_asking": 0}, [ASKS]),
        ({"short_served": 2}, [ALONE]),  # of the other kind
        ({"short_served": 2, "short_asking": 0}, [ALONE]),
    ],
)
def test_what_a_short_run_has_refused_is_not_begun_at_length(ended, begun, tmp_path, call):
    (tmp_path / "work").mkdir()
    lines = ["check call, today, code one", *(f"{name} ended with {code}, 9 s after" for name, code in ended.items())]
    (tmp_path / "work/steps.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    call("one", ends=int(begun in ([PLAIN], [ALONE])), ONLY=f"reads lookup {ASKS} {PLAIN} {ALONE}")
    logs = {name: tmp_path / f"work/{name}.log" for name in (ASKS, PLAIN, ALONE)}
    assert [name for name, log in logs.items() if log.exists()] == begun
    assert all(("--asking" in logs[name].read_text()) == (name != PLAIN) for name in begun)


def test_steps_that_ask_for_the_first_time_take_nothing_with_them(tmp_path, call):
    """They break at 100 B, which is then measured without them; they are not tried there again with the same code."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/steps.txt").write_text("check call, today, code one\nshort_asking ended with 0, 9 s after\n")
    run = tmp_path / "run.sh"
    run.write_text(f'echo "$@"; case "$*" in *{ASKS}*) exit 1 ;; esac\n', encoding="utf-8")
    for ends in (1, 0):
        call("one", ends=ends, ONLY=f"reads lookup {ASKS} {PLAIN} {ALONE}", RUN=f"bash {run}")
    steps = (tmp_path / "work/steps.txt").read_text()
    assert [steps.count(f"{name} ended with") for name in (ASKS, PLAIN, ALONE)] == [1, 1, 1]


def test_a_step_that_was_not_captured_says_why(tmp_path):
    (tmp_path / "work/served_asking").mkdir(parents=True)
    rows = [{"label": "no_engram", "rounds": [], "graphs": {"used": False, "why": "CallError: waited in vain"}}]
    case = {"backbone": "qwen3-8b", "batch": 64, "table": {"parameters": 1e9}, "rows": rows}
    (tmp_path / "work/served_asking/results.json").write_text(json.dumps({"cases": [case]}), encoding="utf-8")
    assert "  no graphs: CallError: waited in vain\n" in gpu_evidence.summary(tmp_path / "work")


def test_the_most_tokens_come_first():
    counts = [list(map(int, found.split())) for found in re.findall(r'(?:TOKENS|FEW)="([\d ]+)"', TEXT)]
    assert [numbers[0] == max(numbers) for numbers in counts] == [True, True, False], "the last one is the rehearsal's"


def test_the_sizes_are_those_of_the_question():
    assert 'BATCHES="64 1 16" MANY=256' in TEXT and "HUGE=1e11" in TEXT and "LARGE=qwen3-8b" in TEXT


def test_the_call_lines_are_short_and_complete():
    calls = [line[1:].strip() for line in LINES if "bash bench/gpu_checks.sh" in line]
    assert [re.search(r"gpu_checks.sh (\w+)", line)[1] for line in calls] == ["check", "measure"]
    assert all(len(line) < 2000 and "GIT_COMMIT" in line and "WHEELS" in line for line in calls)


def test_the_tests_that_it_runs_exist():
    paths = {word for _, _, rest in STEPS for word in rest.split() if word.startswith("tests/")}
    assert len(paths) > 9 and all((SCRIPT.parents[1] / path).exists() for path in paths)
    assert {f"tests/cuda/{path.name}" for path in SCRIPT.parents[1].glob("tests/cuda/test_*.py")} <= paths


@pytest.mark.parametrize("arguments", [[], ["first", "x"]])
def test_another_call_is_refused_in_one_line(arguments):
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("gpu_checks: error: say check or measure")


def evidence(tmp_path, **files):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    for name, content in files.items():
        (work / name.replace("__", ".")).write_bytes(content)
    gpu_evidence.pack(work, out)
    return out


def test_a_file_that_is_too_large_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_evidence, "LARGEST", 50_000)
    out = evidence(tmp_path, big__log=os.urandom(60_000), small__log=b"kept", table__safetensors=b"x")
    with tarfile.open(out / "evidence.tar.gz") as archive:
        assert archive.getnames() == ["small.log"]
    assert "big.log is too large" in capsys.readouterr().err


def test_a_hundred_billion_parameters_come_back_by_name_with_and_without_steps_that_ask(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()

    def came_back():
        gpu_evidence.pack(work, out)
        return json.loads((out / "hundred_billion.json").read_text())["of"]

    for name in (ASKS, PLAIN):  # the former was cut, and the latter begun
        (work / name).mkdir(parents=True)
        (work / name / "results.json").write_text(f'{{"cases": [], "of": "{name}"}}', encoding="utf-8")
        assert came_back() == name
    (work / "steps.txt").write_text(f"{ASKS} ended with 0, 120 s after its start\n", encoding="utf-8")
    assert came_back() == ASKS


def test_the_summary_is_short_and_names_what_failed(tmp_path):
    steps = b"".join(b"step%d ended with 124 after 9 s of 9\n" % number for number in range(40))
    logs = {f"step{number}__log": b"line\n" * 5000 for number in range(40)}
    text = (evidence(tmp_path, steps__txt=steps, **logs) / "summary.txt").read_text()
    assert len(text) <= 12_000 and text.startswith("step0 ended with 124") and "the end of step0.log" in text


def test_the_summary_says_what_setup_took(tmp_path):
    """From the begin to the first round, whose line stands there when the round has ended; the last begin counts."""
    progress = (
        "23:58:00 served: starting\n23:59:00 served: building old\n23:59:50 served: starting\n"
        "23:59:53 lookup: starting\n23:59:55 served: tokenizing the text\n23:59:57 served: building a table\n"
        "23:59:58 lookup: 1 tokens\n00:01:06 served: building qwen3-8b\n"
        "00:01:18 served: qwen3-8b, batch 64: round 1 of 5       8 s, about 40 s left\n"
        "00:01:26 served: qwen3-8b, batch 64: round 2 of 5      16 s, about 32 s left\n"
        "00:02:00 prefill: starting\n00:02:09 prefill: building qwen3-8b\n"
        "00:02:17 prefill: prefill 1 x 4096: warm-up       4 s, about 25 s left\n"
    )
    text = (evidence(tmp_path, progress__txt=progress.encode()) / "summary.txt").read_text()
    assert text.splitlines() == [
        "served: setup 80 s (5 s starting, 2 s tokenizing the text, 69 s building a table, 4 s building qwen3-8b)",
        "prefill: setup 13 s (9 s starting, 4 s building qwen3-8b)",
    ]


def test_the_summary_shows_a_prefill_that_was_cut(tmp_path):
    runs = [{"variant": "resident", "repeat": again, "step_s": [0.25, 0.5 + again, 9.0]} for again in (0, 1)]
    (tmp_path / "work/prefill").mkdir(parents=True)
    step = {"shape": {"batch": 8, "tokens": 4096}, "runs": runs}
    (tmp_path / "work/prefill/results.json").write_text(json.dumps({"steps": [step]}), encoding="utf-8")
    text = gpu_evidence.summary(tmp_path / "work")
    assert "prefill: 8 x 4096 tokens, 3 rounds" in text
    assert "  resident                 500.000 ms" in text and "  resident again           1500.000 ms" in text


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
