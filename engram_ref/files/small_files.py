"""Files of other people's making, read whole only if they are what they should be: regular, and not too large.

    content = read_small(path, most=100_000_000)

A pipe would wait for ever for its writer, a device may have no end, and a sparse file of 60 GB takes no disk, and then
all of memory; each is refused before its first byte is read. Torch is not imported here.

    python -m pytest tests/ref/files/test_small_files.py
"""

from __future__ import annotations

import io
import os
import stat
from typing import BinaryIO

MOST_JSON = 100_000_000  # bytes of a JSON file or a tokenizer.json; the largest published ones have some 35 MB


def open_regular(path: str | os.PathLike[str], mend: str = "name a regular file") -> BinaryIO:
    """A regular file, open for reading; links are followed.

    Raises:
        ValueError: a folder, a pipe, a device or a socket; the message ends with `mend`.
        OSError: it cannot be opened.
    """
    mode = os.stat(path).st_mode  # asked before it is opened: opening alone can wind a tape
    if not stat.S_ISREG(mode):
        what = " but a directory" if stat.S_ISDIR(mode) else ""
        raise ValueError(f"{os.fspath(path)} is not a regular file{what}: {mend}")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # and it may be another by now
    file = io.FileIO(handle)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise ValueError(f"{os.fspath(path)} is not a regular file: {mend}")
    return io.BufferedReader(file)


def read_small(path: str | os.PathLike[str], most: int = MOST_JSON, mend: str = "name a regular file") -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        ValueError: it is no such file; the message ends with `mend`.
        OSError: it cannot be read.
    """
    refused = f"{os.fspath(path)} is not a regular file of at most {most} bytes: {mend}"
    with open_regular(path, mend) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(refused)
        content = file.read(most + 1)  # one that still grows is not read to its end
    if len(content) > most:
        raise ValueError(refused)
    return content
