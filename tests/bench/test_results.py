"""Files are complete or absent, and say where they come from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench.instruments.results import atomic_path, environment, git_commit, write_json


def test_write_json(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_environment_names_the_machine():
    found = environment()
    assert found["python"].count(".") == 2
    assert found["cpu"] and found["cpu_count"] >= 1
    assert found["packages"]["numpy"]


def test_git_commit_is_the_checkout():
    root = Path(__file__).parents[2]
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    expected = done.stdout.strip() if done.returncode == 0 else None
    assert git_commit()["commit"] == (expected or None)
