"""The text that a command is given: a UTF-8 file, standard input, or Python's own help topics where none is named."""

from __future__ import annotations

import codecs
import io
import sys
from pathlib import Path

from engram_ref.files.small_files import open_regular

STANDARD_INPUT = "-"
TEXT_CHARACTERS = 2 << 20  # of a text that a laptop traces some hundred tokens of
_BYTES_PER_CHARACTER = 4  # at most, in UTF-8


def read_text(path: str | Path | None, most: int = TEXT_CHARACTERS) -> tuple[str, str]:
    """Name and content of a text: a UTF-8 file, "-" for standard input, or (None) Python's own help topics.

    Args:
        most: characters; of a longer text no more are read, and its name says so.

    Raises:
        ValueError: not a regular file, or not UTF-8.
        OSError: it cannot be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))
    if str(path) == STANDARD_INPUT:
        if sys.stdin is None:
            raise ValueError("standard input is closed: name a text file")
        name, content = "standard input", sys.stdin.buffer.read(_BYTES_PER_CHARACTER * most + 1)
    else:
        name = Path(path).name
        with open_regular(path, "name a text file, or - for standard input") as file:
            content = file.read(_BYTES_PER_CHARACTER * most + 1)
    ends = len(content) <= _BYTES_PER_CHARACTER * most
    try:
        text = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), True).decode(content, ends)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return (name, text) if ends and len(text) <= most else (f"{name}, first {most:,} characters", text[:most])
