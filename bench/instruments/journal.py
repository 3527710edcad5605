"""Finished work on disk, one line each: a run that is killed at any moment goes on where it stopped.

    with Journal(path) as journal:
        journal.found.get(key)          what an earlier run finished under this key
        journal.add({key: record})      on disk when this returns

A key says everything that the record depends on, so a line of other code, text or settings is never found again. The
last line may be torn; it is ignored, and the next one starts on a line of its own. A file with lines that are not even
the beginning of one is not what a killed run leaves: it is set aside, and what can be read of it goes on in a new one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from bench.instruments.reading import set_aside
from engram_ref.files.small_files import read_small

MOST_BYTES = 1 << 30  # a full run of every sweep leaves some megabytes
_START = b'["'


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
        if foreign := sum(not _begins_as_ours(line) for line in lines):
            set_aside(path, f"{path} has {foreign} lines that no run has written")
            self.add(self.found)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        file = self._path.open("ab+")
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file


def _begins_as_ours(line: bytes) -> bool:
    """Whether it is a line of ours, whole or torn."""
    return line[: len(_START)] == _START[: len(line)]


def _entry(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """What a line holds; None of a torn one."""
    try:
        key, record = json.loads(line)
    except ValueError:
        return None
    return (key, record) if isinstance(key, str) and isinstance(record, dict) else None
