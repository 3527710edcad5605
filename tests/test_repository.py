"""Rules of the repository: every module says what it is, functions stay small, documents show what was measured."""

from __future__ import annotations

import ast
import json
import re
import statistics
from pathlib import Path

import jsonschema
import pytest

from bench import fill_docs
from bench.harness.figures import source
from engram_ref.hashing import HashPlan, NgramHasher
from engram_toy.bytedmd import bytedmd, traced_eval

ROOT = Path(__file__).parents[1]
FOLDERS = ("engram_ref", "engram_toy", "bench", "tests")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
CODE = [path for path in MODULES if path.relative_to(ROOT).parts[0] != "tests"]


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_functions_are_small():
    lengths = sorted(f.end_lineno - f.lineno + 1 for path in CODE for f in functions(path))
    assert statistics.median(lengths) <= 12
    assert lengths[int(0.9 * len(lengths))] <= 45
    assert lengths[-1] <= 85  # the replay of a log, spelt out for speed


def test_public_functions_have_docstrings():
    bare = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in CODE
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_nothing_imports_bench():
    packages = [path for path in CODE if path.relative_to(ROOT).parts[0] != "bench"]
    assert [path.name for path in packages if re.search(r"^\s*(from|import) bench", path.read_text(), re.M)] == []


def test_documents_show_what_was_measured():
    assert fill_docs.stale() == []


def test_a_changed_number_is_noticed(monkeypatch):
    right = fill_docs.load

    def wrong(name):
        results = right(name)
        if name == "bytedmd_toy":
            results["runs"][0]["cost"] += 1
        return results

    monkeypatch.setattr(fill_docs, "load", wrong)
    assert set(fill_docs.stale()) >= {"README.md", "docs/index.md", "docs/log.md", "docs/figures/ratios.svg"}


def test_the_figures_name_their_results():
    origin = source(fill_docs.load("bytedmd_toy"))
    figures = sorted((ROOT / "docs/figures").glob("*.svg"))
    assert [figure.name for figure in figures] == ["cost_by_kind.svg", "depths.svg", "ratios.svg"]
    assert all(origin in figure.read_text(encoding="utf-8") for figure in figures)


def test_committed_results_fit_the_schema():
    schema = json.loads((ROOT / "bench/harness/bytedmd_toy.schema.json").read_text())
    jsonschema.validate(fill_docs.load("bytedmd_toy"), schema)


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Map") : text.index("## Use it")]
    folder = ROOT
    for cell in re.findall(r"^\| (.*?) \|", table, re.M)[2:]:
        for name in re.findall(r"`([\w/.]+)`", cell):
            path = ROOT / name if (ROOT / name).exists() else folder / name
            assert path.exists(), name
            folder = path.parent if path.is_file() else ROOT


def test_the_readme_examples(vocab_v4):
    from engram_ref.config import EngramConfig

    config = EngramConfig.preset("v41-flash")
    plan = HashPlan.build(config, len(vocab_v4), vocab_v4.pad(config.pad_id))
    assert NgramHasher(plan)(vocab_v4([[22898, 19737, 270]]), layer_id=1).shape == (1, 3, 24)
    assert bytedmd(lambda a, b, c: (a + b) + c, (1, 2, 3)) == 6
    assert traced_eval(lambda a, b, c: (a + b) + c, (1, 2, 3)) == ([1, 2, 1, 2], 6)
