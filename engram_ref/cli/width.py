"""Text in the width of whoever reads it: long lines folded, wide tables cut into narrower ones."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap

_LEAST_COLUMNS = 40  # nothing is folded to less
_RULE = re.compile(r"-+(  -+)+")


def folded(line: str, width: int) -> list[str]:
    """A line in parts of at most `width` characters, indented as it is; as it is if it has room."""
    if len(line) <= max(width, _LEAST_COLUMNS):
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, max(width, _LEAST_COLUMNS), subsequent_indent=indent, drop_whitespace=True) or [line]


def fitted(text: str, width: int | None = None) -> str:
    """Printed text in the width of the reader: long lines folded, wide tables cut into narrower ones.

    Args:
        width: characters; None for COLUMNS or a terminal's, and no limit where there is neither.
    """
    if width is None:
        if not os.environ.get("COLUMNS", "").isdigit() and not sys.stdout.isatty():
            return text
        width = shutil.get_terminal_size().columns
    width = max(width, _LEAST_COLUMNS)
    lines, found, at = text.split("\n"), list[str](), 0
    while at < len(lines):
        if at + 1 < len(lines) and _RULE.fullmatch(lines[at + 1]) and len(lines[at + 1]) > width:
            end = next((n for n in range(at + 2, len(lines)) if not lines[n].strip()), len(lines))
            found += _narrow(lines[at:end], width)
            at = end
        else:
            found += folded(lines[at], width)
            at += 1
    return "\n".join(found)


def _narrow(table: list[str], width: int) -> list[str]:
    """A ruled table as several of at most `width` characters, each with its first column."""
    spans = [match.span() for match in re.finditer("-+", table[1])]
    first, rest = spans[0], spans[1:]
    parts: list[list[tuple[int, int]]] = []
    used = width + 1
    for span in rest:
        room = span[1] - span[0] + 2
        if used + room > width:
            parts.append([])
            used = first[1] - first[0]
        parts[-1].append(span)
        used += room
    found: list[str] = []
    for part in parts:
        found += ["  ".join(line[a:b].ljust(b - a) for a, b in (first, *part)).rstrip() for line in table] + [""]
    return found[:-1] if found else table
