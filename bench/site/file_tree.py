"""The project's files as a tree, each with the first line of its docstring: the map that cannot fall behind."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_SAID = re.compile(r'(?:#.*\n)*r?"""(.*?)(?:"""|\n|$)')
_SHOWN = ("engram_ref", "engram_toy", "engram_price", "bench", "tests", "examples")


def file_tree() -> str:
    """The tree as a block of text."""
    lines: list[str] = []
    for name in _SHOWN:
        lines += _folder(_ROOT / name, 0)
    return "```text\n" + "\n".join(lines) + "\n```"


def _folder(folder: Path, depth: int) -> list[str]:
    lines = [_line(f"{folder.name}/", folder / "__init__.py", depth)]
    below = [path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py" and not path.name.startswith("test_")]
    lines += [_line(path.name, path, depth + 1) for path in sorted(files) if "tests" not in path.parts or depth == 0]
    for path in sorted(below):
        lines += _folder(path, depth + 1)
    return lines


def _line(name: str, path: Path, depth: int) -> str:
    indented = "  " * depth + name
    first = first_line(path).rstrip(".:") if path.exists() else ""
    return f"{indented:<28} {first}".rstrip()


def first_line(path: Path) -> str:
    """Of a module's docstring, by its text: to parse all of every file takes half a second."""
    said = _SAID.match(path.read_text(encoding="utf-8"))
    return said[1] if said else ""
