"""Where results go: found unusable before the work, printed even if they cannot be written, beside no stale figure.

require_writable(folder)                                        before the work
with printed_anyway(lambda: table(results)): write(results)     after it
forget_figures(path, results)                                   before a results file takes another's place
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.instruments.quantities import last_line
from engram_ref import cli
from engram_ref.files.small_files import read_small

_ORIGIN = re.compile(r"results sha256 [0-9a-f]{64}")
_PROBE_BYTES = 1 << 16  # a full disk has room for a name, and none for bytes


def require_writable(folder: Path) -> None:
    """Make a folder for results, and find out now what would else be found after hours.

    Raises:
        ValueError: no files can be made there, or a folder stands in the place of one.
    """
    _require_room(folder)
    results = folder / "results.json"
    if results.is_dir():
        raise ValueError(f"{results} is a folder in the place of results: move it, or name another --out")


def _require_room(folder: Path) -> None:
    if os.path.exists(folder) and not folder.is_dir():  # as a method, it raises on a name that is too long
        raise ValueError(f"--out {folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written ({error.strerror}): name another folder") from None


def require_writable_file(path: Path | None) -> None:
    """The same for the file that --out names, if it names one.

    Raises:
        ValueError: the file cannot be written.
    """
    if path is None:
        return
    if os.path.isdir(path):
        raise ValueError(f"--out {path} is a folder: name a file in it")
    _require_room(path.parent)


@contextmanager
def printed_anyway(report: Callable[[], str]) -> Iterator[None]:
    """Around writing results: their table is printed after it, also when writing fails, or else they would be lost."""
    try:
        yield
    finally:  # hours of numbers are not lost to a full disk
        print(cli.fitted(report()), flush=True)


def draw_where_possible(module: str, results: Mapping[str, Any], out: Path) -> None:
    """Draw the figures of a module, where matplotlib is installed."""
    try:
        drawn = importlib.import_module(module).draw_all(results, out)
    except ImportError:
        drawn = []
        say("no figures: pip install matplotlib draws them")
    for path in drawn:
        say(f"wrote {path}")


def finish(results: Mapping[str, Any], path: Path | None) -> None:
    """End a benchmark's stdout: where its results lie, and, as the last line, its result as one JSON object."""
    if path is not None:
        print(f"\n{path}")
    print(last_line(results, path), flush=True)


def source(results: Mapping[str, Any]) -> str:
    """What a figure says of its origin: the digest of the results that it was drawn from."""
    canonical = json.dumps(results, sort_keys=True, separators=(",", ":"))
    return f"results sha256 {hashlib.sha256(canonical.encode()).hexdigest()}"


def forget_figures(path: Path, results: Mapping[str, Any]) -> None:
    """Remove figures beside `path` that show neither these results, which it is to hold, nor another file's there."""
    drawn = {figure: match[0] for figure in path.parent.glob("*.svg") if (match := _origin(figure))}
    if not drawn:
        return
    others = (other for other in path.parent.glob("*.json") if other != path)
    valid = {source(results), *filter(None, map(_source_of, others))}
    for figure, origin in drawn.items():
        if origin not in valid:
            figure.unlink(missing_ok=True)


def _origin(figure: Path) -> re.Match[str] | None:
    """What a figure of ours says that it was drawn from; None of a stranger's."""
    try:
        return _ORIGIN.search(read_small(figure).decode("utf-8", errors="replace"))
    except ValueError:
        return None  # no file, or too large for one of ours


def _source_of(path: Path) -> str | None:
    try:
        return source(json.loads(read_small(path)))
    except (ValueError, RecursionError):
        return None  # no results: no figure shows it


def say(message: str) -> None:
    """Progress: a line on stderr."""
    print(message, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Progress that is told often: on a terminal one line, overwritten each time."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)  # \033[K: what a longer line has left
    else:
        say(text)
