"""Which code a result depends on, as one digest.

code_sha256("bench.sweeps.pricing", "bench.setup.streams")      # these modules and all of the project they import
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PROJECT = ("bench", "engram_ref", "engram_toy")


def code_sha256(*modules: str, root: Path = _ROOT) -> str:
    """Digest of the modules, by their dotted names, and of every module of the project that they import.

    Raises:
        ValueError: no module, or one that is not of the project.
    """
    found = hashlib.sha256()
    for path in code_files(*modules, root=root):
        # No name has a zero byte: where it ends cannot be mistaken.
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def code_files(*modules: str, root: Path = _ROOT) -> list[Path]:
    """The files of the modules and of all that they import, sorted."""
    if not modules:
        raise ValueError("a digest of no code: name the modules that a result depends on")
    for name in modules:
        if _file(name, root) is None:
            raise ValueError(f"no module {name} below {root}: it was moved, or is not of this project")
    # A list of files would go blind when one is moved, and a stale result would count as finished: so imports are
    # followed.
    found: set[Path] = set()
    seen: set[str] = set()  # a name is met in dozens of files, and looked for once
    # To import a module runs the `__init__` of every package above it.
    waiting = [part for name in modules for part in _with_packages(name)]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _file(name, root)
        if path is not None:
            found.add(path)
            waiting += imported_modules(path)
    return sorted(found)


def _file(name: str, root: Path) -> Path | None:
    """Where a module of the project is; None for what is none."""
    if name.split(".")[0] not in _PROJECT:
        return None
    place = root / name.replace(".", "/")
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@functools.cache
def imported_modules(path: Path) -> tuple[str, ...]:
    """What a file imports by name, packages included, wherever it stands; not what only a type checker sees."""
    return tuple(_named(ast.parse(path.read_text(encoding="utf-8"))))


def _named(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            names = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
        else:
            names = []
        for name in names:
            yield from _with_packages(name)
        yield from _named(child)  # inside functions, too: what is loaded on demand counts


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
