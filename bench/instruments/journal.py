"""What an earlier run has finished: a run that is killed at any moment goes on where it stopped.

    found = earlier(path, head, fresh=False)    the results file of another run of the same, or None

    with Journal(path) as journal:              many small pieces of work, a line each
        journal.found.get(key)                  what an earlier run finished under this key
        journal.add({key: record})              on disk when this returns

A key says everything that the record depends on, so a line of other code, text or settings is never found again.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from bench.instruments.reading import set_aside
from engram_ref.files.small_files import read_small

MOST_BYTES = 1 << 30  # a full run of every sweep leaves some megabytes
_START = b'["'  # of every line: [key, record], and a key is text


class Journal:
    """Lines of [key, record], appended only.

    Attributes:
        found: record by key; of a key that stands there twice, the later one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        content = read_small(path, MOST_BYTES, "name another folder") if path.exists() else b""
        lines = content.splitlines()
        self.found: dict[str, dict[str, Any]] = dict(filter(None, map(_entry, lines)))
        # A killed run leaves a torn line, which begins as a whole one does. A file with others is not its: it is set
        # aside, and what can be read of it goes on in a new one.
        if foreign := sum(line[: len(_START)] != _START[: len(line)] for line in lines):
            set_aside(path, f"{path} has {foreign} lines that no run has written")
            self.add(self.found)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, records: dict[str, dict[str, Any]]) -> None:
        """Append records; they are on disk when this returns."""
        file = self._file = self._file or self._open()
        lines = [json.dumps([key, record], separators=(",", ":")) + "\n" for key, record in records.items()]
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())
        self.found |= records

    def _open(self) -> BinaryIO:
        """The file, at the start of a line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("ab+")  # +: its last byte is read
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # torn: it is ignored, and the next one starts on a line of its own
                file.write(b"\n")
        return file


def _entry(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """What a line holds; None of a torn one."""
    try:
        key, record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return (key, record) if isinstance(key, str) and isinstance(record, dict) else None


_SAME = ("benchmark", "device", "device_name", "configuration", "code_sha256")
_OF_NO_SAMPLE = ("out", "fresh", "profile")  # options: where results are written changes none


def earlier(path: Path, head: dict[str, Any], fresh: bool) -> dict[str, Any] | None:
    """The results that an earlier run of the same left there; None to begin anew.

    A file that holds no results is set aside.

    Args:
        head: how a new file begins: machine, configuration, code.
        fresh: begin anew, whatever is there.

    Raises:
        ValueError: it is of another configuration, machine or code; names the first difference. Or it is no file.
    """
    if fresh or not path.exists():
        return None
    content = read_small(path, MOST_BYTES, "name another folder")
    try:
        # As it stands there, not made harmless by `read_results`: all of it is written again.
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        set_aside(path, f"{path} cannot be continued ({error})")
        return None
    for key in _SAME:
        there, here = found.get(key), head.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            for name in [name for name in {**there, **here} if name not in _OF_NO_SAMPLE]:
                _require_same(path, f"option {name}", there.get(name), here.get(name))
        else:
            _require_same(path, key, there, here)
    return found


def note_process(results: dict[str, Any], kept: int, dropped: int = 0) -> int:
    """Note in a results file that this process writes into it; its number among those that did.

    Args:
        kept: passes of whole rounds that are there already.
        dropped: passes of unfinished rounds, which are measured again.
    """
    results["processes"].append({"started": now(), "kept": kept, "dropped": dropped})
    return len(results["processes"]) - 1


def _require_same(path: Path, what: str, there: Any, here: Any) -> None:
    if there != here:
        raise ValueError(
            f"{path} holds rows with another {what} ({_brief(there)}, now {_brief(here)}): "
            "continue with the same, give another --out, or start anew with --fresh"
        )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
