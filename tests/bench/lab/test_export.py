"""The answer in the lab's form: it runs from its folder on any `bytedmd`; the original's prices are our tracer's."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.evidence.committed import Evidence
from bench.lab import export, finding, model
from bench.schemas import lab
from engram_toy import bytedmd as ours
from engram_toy.tracer.stack import read_price
from tests.schemas import validator

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(monkeypatch):
    """The program, with our tracer where the original would stand."""
    monkeypatch.setitem(sys.modules, "bytedmd", ours)
    monkeypatch.delitem(sys.modules, "bench.lab.run", raising=False)
    from bench.lab import run

    yield run
    sys.modules.pop("bench.lab.run", None)


def test_the_document_that_is_exported_is_not_replaced(tmp_path):
    export.export(tmp_path)
    export.export(tmp_path)
    source = (ROOT / "docs/findings" / export.PAPER).read_bytes()
    target = tmp_path / "docs/findings" / export.PAPER
    target.write_bytes(source)  # as in a clone of this project
    with pytest.raises(ValueError, match="name a folder of its own"):
        export.export(tmp_path)
    assert target.read_bytes() == source


def test_the_folder_runs_by_itself_and_its_finding_holds_only_its_numbers(tmp_path):
    written = export.export(tmp_path / "tree")
    experiment = tmp_path / "tree/experiments/engram-offload"
    assert {path.name for path in written if path.parent == experiment} == {"model.py", "run.py", "finding.py"}
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert "<!--" not in text and "engram_toy.bytedmd import" not in text
        if path.suffix == ".py":
            modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
            assert not any(str(name).startswith(("bench", "engram")) for name in modules)
    vendored = tmp_path / "tree/src/bytedmd"
    vendored.mkdir(parents=True)
    (vendored / "__init__.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\nfrom engram_toy.bytedmd import bytedmd, traced_eval\n", "utf-8"
    )
    environment = {"PYTHONPATH": str(tmp_path / "tree/src"), "PATH": ""}
    command = [sys.executable, str(experiment / "run.py"), "--quick"]
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    results = json.loads((experiment / "results.json").read_text(encoding="utf-8"))
    subprocess.run(
        [sys.executable, str(experiment / "finding.py"), "--date", "D", "--author", "A"],
        check=True, capture_output=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    page = (tmp_path / "tree/docs/findings/engram-offload-bytedmd.md").read_text(encoding="utf-8")
    for r in results["records"]:
        assert f"{r['cost']:,}" in page
    for heading in ("Hypothesis", "Config", "Results", "Key Table", "Analysis", "Open Questions", "Files"):
        assert f"\n## {heading}\n" in page
    assert "Geometric LB (0.3849×)" in page and re.search(r"Classification: \w+ at the lookup", page)


def test_the_originals_prices_are_ours(run):
    """Every committed record was priced by the original tracer in a tree of its own."""
    results = Evidence()["lab"]
    validator(lab.Results).validate(results)
    c = results["configuration"]
    assert max(c["paddings"]) == 10_000 and results["not_served"][-1]["padding"] == 10**6
    committed = {
        tuple(r[name] for name in ("boundary", "seed", "padding", "offloaded_share", "variant")): r
        for r in results["records"]
    }
    priced = 0
    for boundary, seed, padding, share in dict.fromkeys(key[:4] for key in committed):
        for r in run.measure({**c, "timed_calls": 1}, boundary, seed, padding, share):
            there = committed[boundary, seed, padding, share, r["variant"]]
            for name in ("cost", "reads", "reads_by_depth", "output_sha256"):
                assert there[name] == r[name]
            priced += 1
    assert priced == len(committed) == len(results["records"])


def test_one_position_by_hand(run):
    """Two rows of two values, both named once by one position; each value is read once from where it starts.

    Of an argument the last value lies on top: d, c, b, a, and then the padding, or the padding above them all. What was
    read is gone. The running sum lies on top, and is read with each of the others; unread arguments occupy nothing.
    """
    named, bank = [[0, 1]], [[1.0, 2.0], [3.0, 4.0]]
    for variant, padding in (("resident", 5), ("offload_naive", 5)):
        forward = model.program("lookup", variant, named, frozenset({0, 1}), 2)
        given = model.arguments(variant, frozenset({0, 1}), bank, [[0.0]], [[], []], padding)
        depths, result = ours.traced_eval(forward, given)
        assert result[0] == [[10.0]]
        before = 0 if variant == "resident" else padding
        # a + b; the sum, and c below d and the sum; the sum, and d below it
        assert depths == [4 + before, 3 + before, 1, 3 + before, 1, 2 + before]
        assert ours.bytedmd(forward, given) == sum(map(read_price, depths))


def test_only_rows_that_lie_below_are_copied(run):
    """Row 1 stays above: its two values are read once, those of row 0 copied and read."""
    named, bank = [[0, 1]], [[1.0, 2.0], [3.0, 4.0]]
    forward = model.program("lookup", "offload_prefetch", named, frozenset({0}), 2)
    given = model.arguments("offload_prefetch", frozenset({0}), bank, [[0.0]], [[], []], 0)
    depths, result = ours.traced_eval(forward, given)
    assert result[0] == [[10.0]] and len(depths) == 2 + 6  # two copies, three sums of two


@pytest.mark.parametrize(
    ("told", "shown"),
    [("processor\t: 0\nmodel name\t: Xeon: 3 GHz\n", "Xeon: 3 GHz"), ("hart\t: 0\n", "riscv"), (None, "riscv")],
)
def test_the_processor_has_a_name_or_an_architecture(run, monkeypatch, tmp_path, told, shown):
    cpuinfo = tmp_path / "cpuinfo"
    if told is not None:
        cpuinfo.write_text(told, "utf-8")
    monkeypatch.setattr(run, "open", lambda path, **how: cpuinfo.open(**how), raising=False)
    monkeypatch.setattr(run.platform, "machine", lambda: "riscv")
    assert run._processor() == shown


@pytest.mark.parametrize(("ratio", "label"), [(1.0, "WIN"), (5.0, "WIN"), (5.1, "INCONCLUSIVE"), (20.1, "LOSS")])
def test_classes(ratio, label):
    assert finding.classify(ratio) == label
