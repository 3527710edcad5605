"""Files that are complete or absent: written beside their name, renamed to it when all is on the disk.

    with replacing(path) as file:
        file.write(content)

A write that fails leaves nothing behind, and an older file under that name stays.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, which takes its place when the block ends well and is removed when it does not."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(part)):  # a write does not know what it writes to
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)  # gone already if all went well


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
