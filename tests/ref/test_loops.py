"""numba's cache of loops: whose sources a loop is compiled from. What it does with them: hashing/test_fused.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from engram_ref import loops

PACKAGE = Path(loops.__file__).parent
COMPILED = [path for path in PACKAGE.rglob("*.py") if "loops import compiled" in path.read_text(encoding="utf-8")]


def imported(path):
    """By Python's own parser; packages on the way are left out, as there is no code in them."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: say where it is imported from"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def sources(path):
    found, waiting = set(), [path]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        places = [PACKAGE.parent.joinpath(*name.split(".")) for name in imported(path) if name.startswith("engram_ref")]
        waiting += [p for place in places for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()]
    return found


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.stem)
def test_a_loops_sources_are_all_that_its_file_imports(path, monkeypatch):
    read = []
    monkeypatch.setattr(loops.hashlib, "sha256", lambda: Digest(read))
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    assert loops._sources.__wrapped__(module) == "digest"
    assert read == [path.read_bytes() for path in sorted(sources(path))]
    assert len(read) > 1  # this file, at least


def test_there_are_loops():
    assert {path.stem for path in COMPILED} >= {"fused", "gather_fused", "decoding_fused", "row_reader_fused"}


class Digest:
    def __init__(self, read):
        self.update = read.append

    def hexdigest(self):
        return "digest"
