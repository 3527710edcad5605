"""Rows as they are laid down in host memory, and whether what another process has laid down there is the same.

lay(rows, memory.bytes, packed)             # parts one behind the other, packed or split
found = laid(rows, memory.bytes, packed)    # `Rows` that look at this memory
first_other_row(rows, fd, packed)           # None: that memory holds just these rows

python -m pytest tests/ref/tables/test_shared.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.validated import read_whole
from engram_ref.rows.rows import Rows

_PIECE = 16 << 20  # bytes that are laid, and compared, at a time; more of them take no less time


def len_of(rows: Tensor | Rows | StoredRows) -> int:
    """How many rows there are."""
    return rows.rows if isinstance(rows, StoredRows) else len(rows)


def widths_of(rows: Tensor | Rows | StoredRows, packed: bool | None) -> list[int]:
    """Bytes of a row in each part, as they are to be laid."""
    if isinstance(rows, Tensor):
        return [rows.shape[1] * rows.element_size()]
    if packed is None:
        return list(rows.widths) if isinstance(rows, StoredRows) else [part.shape[1] for part in rows.parts]
    return [rows.format.row_bytes] if packed else list(rows.format.split_bytes)


def laid(rows: Tensor | Rows | StoredRows, memory: Tensor, packed: bool | None) -> Rows:
    """The place of these rows in memory that holds them, or will: parts one behind the other.

    Args:
        memory: uint8, as many bytes as the rows have.
    """
    if isinstance(rows, Tensor):
        return Rows.of(memory.view(rows.dtype).view(rows.shape))
    widths, count = widths_of(rows, packed), len_of(rows)
    pieces = memory.split([count * width for width in widths])
    return Rows(rows.format, tuple(piece.view(count, width) for piece, width in zip(pieces, widths)))


def lay(rows: Tensor | Rows | StoredRows, memory: Tensor, packed: bool | None) -> None:
    """Lay the rows down in new memory as wanted."""
    found = laid(rows, memory, packed)
    if isinstance(rows, Tensor):
        found.values().copy_(rows.detach())
    elif isinstance(rows, StoredRows):
        rows.read_into(found.parts)
    else:
        for part, given in zip(found.parts, in_parts(rows, packed).parts):
            part.copy_(given)


def in_parts(rows: Rows, packed: bool | None) -> Rows:
    """The rows packed, or split, or as they are."""
    if packed is None:
        return rows
    return rows.packed() if packed else rows.split()


def first_other_row(rows: Tensor | Rows | StoredRows, fd: int, packed: bool | None) -> int | None:
    """The first row that has other bytes in memory where rows were laid down; None if all are the same.

    Pieces of these rows are laid as the whole would be, and held against the memory: 0.7 to 1.1 s for each GiB of a
    tensor, or of a file in the page cache; up to 1.5 s where fp8 rows are packed or split on the way (one thread).

    Args:
        rows: as many as were laid down, of the same format.
        fd: of the memory. It is read, not mapped: whoever is interrupted, and keeps the exception, keeps no memory.
        packed: as for `lay`.
    """
    widths, count = widths_of(rows, packed), len_of(rows)
    step = min(count, max(1, _PIECE // sum(widths)))
    own = torch.empty(step * sum(widths), dtype=torch.uint8, device="cpu")
    theirs = np.empty(step * max(widths), dtype=np.uint8)
    for first in range(0, count, max(1, step)):
        piece = _between(rows, first, min(first + step, count))
        memory = own[: piece.nbytes]
        lay(piece, memory, packed)
        others, begin = [], 0  # rows of this piece; the byte at which a part begins
        for part, width in zip(laid(piece, memory, packed).parts, widths):
            there = theirs[: part.numel()].reshape(part.shape)
            read_whole(fd, there.data.cast("B"), begin + first * width)
            same = there == part.numpy()
            if not same.all():
                others.append(int(same.all(axis=1).argmin()))
            begin += count * width
        if others:
            return (0 if isinstance(rows, Tensor) else rows.first) + first + min(others)
    return None


def _between(rows: Tensor | Rows | StoredRows, first: int, last: int) -> Tensor | Rows | StoredRows:
    return rows[first:last] if isinstance(rows, Tensor) else rows.between(first, last)
