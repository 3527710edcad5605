"""Files are complete or absent, and say where they come from."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bench.instruments import results as module
from bench.instruments.results import (
    conclude,
    environment,
    git_commit,
    priced_head,
    results_head,
    write_json,
    write_rows,
)
from engram_ref.files import replacing


def test_write_json(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"a": [1, 2]})
    write_json(path, {"a": [1, 3]})
    assert path.read_text() == '{\n "a": [\n  1,\n  3\n ]\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_of_a_long_list_every_entry_gets_a_line(tmp_path):
    path = tmp_path / "new" / "folder" / "results.json"
    content = {"a": [1, 2], "git": {"commit": "x"}, "rows": [{"price": 1}, {"price": 2}], "b": (3,)}
    text = '{\n"a": [1,2],\n"git": {"commit":"x"},\n"rows": [\n{"price":1},\n{"price":2}\n],\n"b": [3]\n}\n'
    write_rows(path, content, "rows")
    assert path.read_text() == text
    write_rows(path, {**content, "rows": []}, "rows")
    assert json.loads(path.read_text()) == {**content, "b": [3], "rows": []}
    assert list(path.parent.iterdir()) == [path]


def test_figures_of_what_a_file_held_before_are_forgotten_when_it_is_written(tmp_path, monkeypatch):
    forgotten, path = [], tmp_path / "results.json"
    monkeypatch.setattr(module, "forget_figures", lambda *given: forgotten.append((*given, path.exists())))
    write_rows(path, {"a": 1}, "rows")
    assert forgotten == [(path, {"a": 1}, False)]  # before: a run that is killed in between leaves no stale figure
    write_json(path, {"a": 2})
    assert forgotten[1:] == [(path, {"a": 2}, True)]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")
    monkeypatch.setattr(replacing.os, "fsync", lambda handle: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_head_says_where_results_come_from():
    assert results_head("speed") == {"benchmark": "speed", "environment": environment(), "git": git_commit()}


def test_a_head_of_what_every_machine_finds_names_the_code():
    head = priced_head("x", "bench.instruments.words")
    assert head["schema_version"] == 1 and head["benchmark"] == "x" and len(head["code_sha256"]) == 64


@pytest.mark.parametrize("rows", [None, "rows"])
@pytest.mark.parametrize("report", [None, lambda results: f"{len(results['rows'])} rows"])
def test_a_run_ends_with_its_table_and_its_results(report, rows, tmp_path, capsys):
    path, results = tmp_path / "results.json", {"rows": [1, 2]}
    conclude(results, path, report, rows)
    said = capsys.readouterr()
    *table, last = [line for line in said.out.splitlines() if line]
    assert table == [*([] if report is None else ["2 rows"]), str(path)] and json.loads(last)
    assert said.err.startswith(f"wrote {path}") and json.loads(path.read_text()) == results
    assert ("[\n1,\n2\n]" in path.read_text()) == (rows is not None)  # a line for each
    conclude(results, None, report)
    assert "wrote" not in capsys.readouterr().err


def test_environment_names_the_machine():
    found = environment()
    assert found["python"].count(".") == 2
    assert found["cpu"] and found["cpu_count"] >= 1
    assert found["packages"]["numpy"]


def test_the_processor_has_the_name_that_the_system_gives_it(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    told = "processor\t: 0\nmodel\t\t: 8\nmodel name\t: Xeon: 3 GHz\nmodel name\t: another\n"
    monkeypatch.setattr(Path, "read_text", lambda path: told if str(path) == "/proc/cpuinfo" else "")
    assert module._cpu_model() == "Xeon: 3 GHz"
    monkeypatch.setattr(Path, "read_text", lambda path: "processor\t: 0\n")
    monkeypatch.setattr(platform, "machine", lambda: "riscv")
    for named, shown in (("", "riscv"), ("a RISC", "a RISC")):
        monkeypatch.setattr(platform, "processor", lambda named=named: named)
        assert module._cpu_model() == shown
    monkeypatch.setattr(sys, "platform", "darwin")  # has no such file
    monkeypatch.delattr(Path, "read_text")
    assert module._cpu_model() == "a RISC"


def test_memory_is_pages_of_the_systems_size(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert environment()["memory_bytes"] == 4_096_000
    monkeypatch.delattr(os, "sysconf")
    assert environment()["memory_bytes"] is None


def test_git_commit_is_the_checkout():
    root = Path(__file__).parents[3]
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    expected = done.stdout.strip() if done.returncode == 0 else None
    assert git_commit()["commit"] == (expected or None)
    assert root == module._ROOT


def test_only_code_makes_a_checkout_dirty(tmp_path, monkeypatch):
    """Outside a checkout the commit is what it was said to be, and nobody knows of changes."""
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for said, commit in (("abc", "abc"), ("", None), (None, None)):
        monkeypatch.setenv("ENGRAM_GIT_COMMIT", said) if said is not None else monkeypatch.delenv("ENGRAM_GIT_COMMIT")
        assert git_commit() == {"commit": commit, "dirty": None}
    for name in ("engram_ref/a", "bench/b", "bench/results/c", "docs/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")

    def git(*arguments):
        name = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *name, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)

    git("init"), git("add", "."), git("commit", "-m", "first")
    head = git("rev-parse", "HEAD").stdout.strip()
    (tmp_path / "docs/d").write_text("2"), (tmp_path / "bench/results/c").write_text("2")
    assert git_commit() == {"commit": head, "dirty": False}
    (tmp_path / "bench/b").write_text("2")
    assert git_commit() == {"commit": head, "dirty": True}
    monkeypatch.setenv("ENGRAM_GIT_COMMIT", "abc")  # files of another commit, laid over this checkout
    assert git_commit() == {"commit": "abc", "dirty": None}
    monkeypatch.setenv("PATH", "")  # no git at all
    assert git_commit() == {"commit": "abc", "dirty": None}
