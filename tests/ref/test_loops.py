"""numba's cache of loops: which sources count for it, and that it is done without where there can be none."""

import ast
import os
import shutil
import subprocess
import sys
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


# A package of `loops.py` and two loops, one within the other: machine code in a tenth of the time of the real ones.
INNER = """
from small.loops import compiled
def _add(x): return x + 1
add = compiled(_add, ["int64(int64)"])
"""
OUTER = """
from small.inner import add
from small.loops import compiled
def _twice(x): return add(add(x))
twice = compiled(_twice, ["int64(int64)"])
"""


@pytest.fixture
def small(tmp_path):
    package = tmp_path / "small"
    package.mkdir()
    for name, text in {"__init__": "", "inner": INNER, "outer": OUTER}.items():
        (package / f"{name}.py").write_text(text)
    shutil.copy(loops.__file__, package)
    return package


def result_of(package, **environment):
    """What the outer loop of the package makes of 3, in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-B", "-c", "from small.outer import twice; print(twice(3))"],
        env=kept | {"PYTHONPATH": str(package.parent)} | environment,
        cwd=package.parent, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize("cache", ["user folder", "nowhere"])
def test_a_read_only_checkout(cache, small, tmp_path):
    """Numba cannot write beside the module: it falls back to the user's cache folder, else to no cache."""
    (small / "__pycache__").write_text("a file where a folder should go")
    home = tmp_path / "home"
    home.mkdir() if cache == "user folder" else home.write_text("no folder either")
    assert result_of(small, HOME=str(home), XDG_CACHE_HOME=str(home / "cache")) == "5\n"
    if cache == "user folder":
        assert {path.name.partition(".")[0] for path in home.rglob("*.nbi")} == {"inner", "outer"}


@pytest.mark.slow
def test_machine_code_of_other_sources_is_not_used(small):
    """A loop holds the code that it calls, of other files too; a release may come with their old times and sizes."""
    assert result_of(small) == "5\n" and list(small.rglob("outer*.nbi"))
    path = small / "inner.py"
    was = path.stat()
    path.write_text(INNER.replace("x + 1", "x + 2"))  # the same size
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert result_of(small) == "7\n"
