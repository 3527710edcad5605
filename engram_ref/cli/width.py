"""Text in the width of whoever reads it: prose wrapped anew, long lines folded, wide tables cut into narrower ones."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap

_LEAST_COLUMNS = 40  # nothing is folded to less
_LEAST_ROOM = 40  # columns beside a list's terms; with fewer an explanation has lines of its own
_RULE = re.compile(r"-+(  -+)+")
_EXPLAINED = re.compile(r"( *\S.*  +)(\S.*)")  # a term, or several, a gap of two at least, and what is said of it


def folded(line: str, width: int) -> list[str]:
    """A line in parts of at most `width` characters, indented as it is; as it is if it has room."""
    if len(line) <= max(width, _LEAST_COLUMNS):
        return [line]
    return _wrap(line, max(width, _LEAST_COLUMNS), "", " " * (_indent(line) + 2)) or [line]


def wrapped(text: str, width: int) -> str:
    """A docstring in a reader's width: what fits is as it was written, else prose and the lists' entries flow anew.

    Prose begins at the margin. Of a list, indented, each line is an entry, such as a command, or one that is explained
    after a gap; an explanation goes on in lines that begin where it did.
    """
    width = max(width, _LEAST_COLUMNS)
    found: list[str] = []
    for block in re.split(r"(\n(?: *\n)+)", text):
        lines = block.split("\n")
        if not block.strip() or max(map(len, lines)) <= width:
            found.append(block)
        else:
            found.append("\n".join(part for run in _runs(lines) for part in _flowing(run, width)))
    return "".join(found)


def _runs(lines: list[str]) -> list[list[tuple[str, str]]]:
    """A block as runs of prose and lists; of each entry what stands before its text, and the text."""
    runs: list[list[tuple[str, str]]] = []
    for line in lines:
        before, text = m.groups() if (m := _EXPLAINED.fullmatch(line)) else ("", line.lstrip())
        column = len(line) - len(text)
        last, said = runs[-1][-1] if runs else ("", "")
        deeper = bool(last) and column > _indent(last)
        prose_goes_on = bool(runs) and not last and not column
        if m or not (deeper or prose_goes_on):
            entry = before or " " * column, text
            if last and entry[0]:
                runs[-1].append(entry)
            else:
                runs.append([entry])
        elif deeper and not last.strip():  # below a term that fills its line
            runs[-1][-1] = f"{last}{said}  ".ljust(column), text
        else:
            runs[-1][-1] = last, f"{said} {text}"
    return runs


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _flowing(entries: list[tuple[str, str]], width: int) -> list[str]:
    # One layout for all of a list: explanations beside the terms, or all below them.
    beside = width - max(len(before) for before, _ in entries) >= _LEAST_ROOM
    found: list[str] = []
    for before, text in entries:
        indent = " " * _indent(before)
        if before == indent:  # prose, or a command that nothing is said of
            found += folded(indent + text, width) if indent else _wrap(text, width, "", "")
        elif beside:
            found += _wrap(text, width, before, " " * len(before))
        else:
            found += [*folded(before.rstrip(), width), *_wrap(text, width, f"{indent}    ", f"{indent}    ")]
    return found


def _wrap(text: str, width: int, first: str, further: str) -> list[str]:
    # At hyphens nothing is broken: the names of options have them.
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)


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
    used = width + 1  # full: the first column begins a part
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
