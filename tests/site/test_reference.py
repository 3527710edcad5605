"""The reference pages have every class and function that users are told of, or could import by a package's name."""

import ast
import re
from collections.abc import Iterator

from tests.site.conftest import ROOT

# Modules at the root of a package that are there for its other modules.
PLUMBING = {
    "cli",
    "compiled",
    "devices",
    "free_memory",
    "gpu",
    "loops",
    "needs_torch",
    "quoting",
    "recording",
    "starting",
}
COMMANDS = {"main", "parse", "run"}  # of modules that are commands: `--help` is their reference


def public(text: str) -> Iterator[str]:
    """Names of public classes and functions of a module."""
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node.name


def listed(text: str) -> Iterator[str]:
    """Names in a module's `__all__`, constants left out."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            yield from (name for name in ast.literal_eval(node.value) if not name.isupper())


def imported(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of our packages that the Python blocks of a document import."""
    for block in re.findall(r"^```py(?:thon)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("engram_ref", "engram_toy")):
                yield from ((node.module or "", alias.name) for alias in node.names)


def required() -> set[tuple[str, str]]:
    """(package, name) of all that a reference page must have."""
    found = set()
    for package in ("engram_ref", "engram_toy"):
        for path in (ROOT / package).rglob("__init__.py"):
            if path.parent.name in PLUMBING:
                continue
            found |= {(package, name) for name in listed(path.read_text(encoding="utf-8"))}
        for path in (ROOT / package).glob("*.py"):
            if path.stem not in PLUMBING:
                found |= {(package, name) for name in public(path.read_text(encoding="utf-8"))}
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        found |= {(module.partition(".")[0], name) for module, name in imported(text) if not name.isupper()}
    return {(package, name) for package, name in found if name not in COMMANDS}


def shown(pages: list[str]) -> set[tuple[str, str]]:
    """(package, name) of all that pages have an entry of."""
    anchors = {anchor for page in pages for anchor in re.findall(r'\bid="?((?:engram_ref|engram_toy)[\w.]+)', page)}
    return {(anchor.partition(".")[0], anchor.rpartition(".")[2]) for anchor in anchors}


def test_every_name_has_an_entry(site):
    pages = [path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")]
    needed = required()
    assert len(needed) > 70
    assert sorted(needed - shown(pages)) == []


def test_a_missing_entry_would_be_noticed():
    assert shown(['<h3 id="engram_ref.layer.Engram">']) == {("engram_ref", "Engram")}
    assert list(imported("```python\nfrom engram_ref.layer import Engram\n```")) == [("engram_ref.layer", "Engram")]
    assert list(public("def _own(): ...\ndef a(): ...\nclass B: ...")) == ["a", "B"]
    assert list(listed("__all__ = ['attach', 'Table', 'DEAD']")) == ["attach", "Table"]
