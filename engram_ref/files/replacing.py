"""Files that are complete or absent: written beside their name, renamed to it when all is on the disk.

    with replacing(path) as file:
        file.write(content)

    with replacing_path(path) as part:      # for what opens its file by name
        figure.savefig(part)

A write that fails leaves nothing behind, and an older file under that name stays. A process that is killed in between
leaves its part; nobody holds its lock any more, by which the next one that writes the same file knows and removes it. A
part has a name that cannot be guessed, follows no link and has the mode that the umask gives. Where `path` is a link,
the link is replaced and what it points to stays: whoever could plant one would choose a file to be overwritten.

    python -m pytest tests/ref/files/test_replacing.py
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_BYTES = 200  # of the name of a file in that of its part, which has 255 in all
_LONGEST_ENDING = 20
_RANDOM_BYTES = 8  # in the name of a part, which nobody can guess


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, which takes its place when the block ends well and is removed when it does not.

    Raises:
        ValueError: what stands there is no regular file, a device for instance.
        OSError: it cannot be written.
    """
    with _part(path, "") as (_, file):
        yield file


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """The same, by name, with the ending of `path`; for what opens the file itself. Errors as `replacing`."""
    with _part(path, _ending(path)) as (part, _):
        yield part


@contextmanager
def _part(path: Path, ending: str) -> Iterator[tuple[Path, BinaryIO]]:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file, and would be replaced by one: name another")
    remove_abandoned(path)
    part = path
    try:
        part, file = _create(path, ending)
        with file:
            yield part, file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)  # with the lock held: until it has its name, nobody takes it for abandoned
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None or Path(error.filename).name.startswith(_beginning(path)):
            error.filename = str(path)  # a write does not know what it writes to, and a part means nothing to anybody
        raise
    finally:
        if part != path:
            part.unlink(missing_ok=True)  # gone already if all went well


def _create(path: Path, ending: str) -> tuple[Path, BinaryIO]:
    """A new file that is locked, so that others see that somebody is writing it."""
    while True:
        part = path.with_name(f"{_beginning(path)}{secrets.token_hex(_RANDOM_BYTES)}.part{ending}")
        try:
            file = open(os.open(part, _NEW, 0o666), "w+b")  # noqa: SIM115  the caller closes it
            with suppress(OSError):  # a file system without locks; there nothing is ever taken for abandoned
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return part, file
            file.close()  # it was removed before it was locked
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM: nobody else knows its name
            part.unlink(missing_ok=True)
            raise


def _beginning(path: Path) -> str:
    """Of the name of a part: of a name so long that there is no room for the rest, as much as there is room for."""
    return "." + os.fsdecode(os.fsencode(path.name)[:_MOST_BYTES]) + "-"


def _ending(path: Path) -> str:
    """Of `path`, by which others know what is in the file; one that is long says nothing of that."""
    return path.suffix if len(path.suffix) <= _LONGEST_ENDING else ""


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of their attempts to write `path`."""
    name = re.compile(
        rf"{re.escape(_beginning(path))}[0-9a-f]{{{2 * _RANDOM_BYTES}}}\.part({re.escape(_ending(path))})?"
    )
    with suppress(OSError):  # no such folder, or one that is not ours to read
        for found in [entry for entry in os.listdir(path.parent) if name.fullmatch(entry)]:
            with suppress(OSError):  # locked, gone, or not ours
                _remove_unlocked(path.with_name(found))


def _remove_unlocked(part: Path) -> None:
    handle = os.open(part, _OLD)
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the folder may be read."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written to, and the file has its name all the same
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
