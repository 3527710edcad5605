"""Writing safetensors files that a table can be read from in place: complete or not at all, rows on whole pages.

    with replacing(path) as file:
        file.write(make_header({"weight": (torch.bfloat16, (rows, width))}))
        for piece in pieces:
            file.write(piece)

The safetensors library writes what is in memory; tables are written as they are made, and their rows must begin at
a multiple of a page, so that no row of 128 or 256 bytes lies on two. Spaces at the end of the header see to that.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engram_ref.tables.read_plan import BLOCK

LENGTH_BYTES = 8  # in front of the header: its length
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and header of a file with these tensors, in this order; the last one begins on a page of its own.

    Args:
        tensors: dtype and shape, by name.
        metadata: text that goes into the header.

    Raises:
        ValueError: a name or a dtype that such a file cannot have.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = end = 0
    for name, (dtype, shape) in tensors.items():
        if name in ("", "__metadata__"):
            raise ValueError(f"name={name!r}: a tensor needs another name")
        if dtype not in _NAMES:
            raise ValueError(f"{name} of {dtype}: use one of {', '.join(map(str, _NAMES))}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(LENGTH_BYTES + len(text) + start) % BLOCK)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


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
        if error.filename is None:  # a write does not know what it writes to
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
