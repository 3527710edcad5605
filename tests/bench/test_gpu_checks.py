"""The script for CUDA machines, as far as it can be read without one: its time, its commands, its one results file."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_wall
from bench.harness.end_to_end_numbers import PARTS

SCRIPT = Path(__file__).parents[2] / "bench/gpu_checks.sh"
BUDGET = 600  # seconds


def steps():
    """Name -> seconds and words of the command, with OUT for the output folder."""
    text = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ").replace("$OUT", "OUT").replace("$PYTHON", "python")
    lines = [shlex.split(line) for line in text.splitlines() if re.match(r"step \d", line)]
    return {name: (int(seconds), command) for _, seconds, name, *command in lines}


STEPS = steps()
WALLS = [name for name, (_, command) in STEPS.items() if "bench/gpu_wall.py" in command and "--steps" in command]


def test_it_is_a_script_that_bash_understands():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_limits_of_all_steps_are_within_ten_minutes():
    assert sum(seconds for seconds, _ in STEPS.values()) < BUDGET


@pytest.mark.parametrize("name", WALLS)
def test_the_options_of_every_run_are_known(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", STEPS[name][1][1:])
    options = gpu_wall.parse_arguments()
    assert str(options.out) == f"OUT/{name}" and options.fit and options.blocks == 18
    shapes = [str(shape).split()[0] for shape in options.steps]
    assert {"prefill", "decode"} == set(shapes)
    assert (options.preset, options.rows) == (("v41-flash", "packed") if name == "v41" else ("paper-27b", "plain"))


def test_what_tells_most_comes_first(monkeypatch):
    """A model of 8 B class at three batch sizes, under the variants that the overhead is taken apart with."""
    assert list(STEPS)[:2] == ["end_to_end", "parts"]
    monkeypatch.setattr(sys, "argv", STEPS["end_to_end"][1][1:])
    options = gpu_wall.parse_arguments()
    assert options.end_to_end and options.backbones == ["qwen3-8b"] and options.blocks is None
    assert options.batches == [1, 16, 64] and options.sequences == "batch" and not options.fresh
    assert {name for rows in PARTS.values() for pair in rows for name in pair[:1]} <= set(options.variants)
    assert {"offload_naive", "offload_uva"} <= set(options.variants)
    assert STEPS["parts"][1][-1] == f"{options.out}/results.json"


def test_every_run_is_in_the_summary():
    assert WALLS == ["wall", "v41", "disk"]
    assert STEPS["summary"][1] == [
        *("python", "-m", "bench.harness.merge", "OUT/results.json"),
        *(f"OUT/{name}/results.json" for name in WALLS),
    ]


def test_the_tests_that_it_runs_exist():
    paths = [word for word in STEPS["tests"][1] if word.startswith("tests/")]
    assert paths and all((SCRIPT.parents[1] / path).exists() for path in paths)
