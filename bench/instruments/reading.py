"""Results files as they are read back: named when they are not what they should be, harmless wherever they are shown.

    results = read_results(Path("bench/results/production.json"), "production")

What a results file says of a machine, a text or a model was written somewhere else, by somebody else; so every string
of a file loses, where it is read, what a page or a terminal would take for an instruction. Numbers are untouched, and a
file without such characters is read as it is: every committed one.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.schemas.plausible import check
from engram_ref.files.small_files import read_small

_MOST_BYTES = 1 << 28  # the largest committed file has less than a megabyte
MOST_CHARACTERS = 300  # of a string; a digest has 64, a description of a platform some 80
# Strings end in terminals, in Markdown, in HTML and in scripts: look-alikes of what opens a tag, an attribute list, a
# link, code or a table's cell.
_LOOK_ALIKES = str.maketrans(
    {"<": "‹", ">": "›", "[": "(", "]": ")", "{": "(", "}": ")", "`": "'", "|": "¦", "\\": "/"}
)
_HOLD_TEXT = {str, dict, list}  # of the types that JSON is read as
# What is not plain ASCII is looked at, too: most of it stays, some moves a cursor or is not seen.
_MEANS_SOMETHING = re.compile(r"[<>\[\]{}`|\\]|[^\x20-\x7e]")


def read_results(path: Path, benchmark: str | None = None) -> dict[str, Any]:
    """The content of a results file, with harmless strings.

    Args:
        benchmark: whose results they must be.

    Raises:
        ValueError: no such file, not a results file, one that contradicts itself, or one of another benchmark.
    """
    found = read_small(path, _MOST_BYTES, "name a results file")
    try:
        content = json.loads(found.decode("utf-8"), parse_constant=_refuse)
        check(content)  # before its strings become harmless: a checksum is of what was written
        content = harmless(content)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets without end
        raise ValueError(f"{path} is not a results file: {harmless(str(error))}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a results file: it holds a {type(content).__name__}, not an object")
    if benchmark is not None and content.get("benchmark") != benchmark:
        raise ValueError(
            f"{path} holds results of {content.get('benchmark')!r}; those of {benchmark!r} are wanted here"
        )
    return content


def _refuse(constant: str) -> None:
    """No measurement is NaN or infinite, and what is computed from one compares with nothing."""
    raise ValueError(f"it holds {constant}, which is no number")


def harmless(value: Any) -> Any:
    """A value of JSON whose strings, keys included, are short, printable, and mean nothing to a page or a terminal."""
    if isinstance(value, str):
        return _harmless_text(value)
    # Most of a file is numbers, and a call for each is most of the time.
    if isinstance(value, dict):
        return {
            _harmless_text(key): harmless(inner) if type(inner) in _HOLD_TEXT else inner for key, inner in value.items()
        }
    if isinstance(value, list):
        return [harmless(inner) if type(inner) in _HOLD_TEXT else inner for inner in value]
    return value


@functools.lru_cache(maxsize=1 << 12)  # a file says the same few hundred things over and over
def _harmless_text(text: str) -> str:
    if len(text) > MOST_CHARACTERS:  # no honest name is as long
        text = f"{text[:MOST_CHARACTERS]}..."
    if _MEANS_SOMETHING.search(text) is None:
        return text
    printable = "".join(c if c.isprintable() else f"%{ord(c):02x}" for c in text)
    return printable.translate(_LOOK_ALIKES)


@contextmanager
def as_this_version(path: Path) -> Iterator[None]:
    """Around showing a file: what another version wrote, or nobody did, ends in a line that names it.

    Raises:
        ValueError: something that this version writes is not there, or nothing, where it divides by what there is.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        why = harmless(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} is not as this version writes it ({why}): measure again") from error


def set_aside(path: Path, why: str) -> Path:
    """Rename a file that cannot be used, and say so: nothing that somebody may want is overwritten."""
    names = (path.with_name(f"{path.name}.broken{number or ''}") for number in itertools.count())
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    print(f"{why}; it is kept as {kept}", file=sys.stderr, flush=True)
    return kept
