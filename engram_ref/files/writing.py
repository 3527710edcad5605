"""Writing safetensors files that a table can be read from in place: rows on whole pages, complete or not at all.

    save_rows("table.safetensors", values)              # values: [R, D], or `Rows`
    save_pieces("table.safetensors", rows, row_format, pieces)

The safetensors library writes what is in memory; tables are written as they are made, and their rows begin on a page.

fp8 rows are written as they lie: codes and scales in two tensors, as in a checkpoint, or packed, as one tensor of bytes
that the file's metadata mark as such (`packed_mark`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.files.conventions import BLOCK, NAMES, ROW_DTYPES, packed_mark, scale_name
from engram_ref.files.header import LENGTH_BYTES
from engram_ref.files.replacing import replacing
from engram_ref.rows.format import RowFormat
from engram_ref.rows.fp8 import CODE_DTYPE, SCALE_DTYPE
from engram_ref.rows.rows import Rows

_PIECE = 8 << 20  # bytes of one write


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    on_page: str | None = None,
) -> bytes:
    """Length and header of a file with these tensors, in this order; one of them begins on a page of its own.

    Args:
        tensors: dtype and shape, by name.
        metadata: text that goes into the header.
        on_page: name of the tensor that begins on a page; None takes the last one.

    Raises:
        ValueError: a name or a dtype that such a file cannot have.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = before = 0
    for name, (dtype, shape) in tensors.items():
        if name in ("", "__metadata__"):
            raise ValueError(f"name={name!r}: a tensor needs another name")
        if dtype not in NAMES:
            raise ValueError(f"{name} of {dtype}: use one of {', '.join(map(str, NAMES))}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        before = start if on_page in (None, name) else before
    text = json.dumps(entries).encode()
    # Spaces at the end, so that no row of 128 or 256 bytes lies on two pages.
    text += b" " * (-(LENGTH_BYTES + len(text) + before) % BLOCK)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def save_rows(path: str | Path, rows: Tensor | Rows, name: str = "weight") -> None:
    """Write a table to a safetensors file, complete or not at all.

    Args:
        path: the file to write.
        rows: plain values [R, D], or `Rows`, which are written in as many tensors as they have parts.
        name: of the tensor; of split rows that of the codes.

    Raises:
        ValueError: not two-dimensional, empty, not a floating-point dtype, codes that are not called `weight`, or fp8
            rows with a code or a scale that is NaN.
        OSError: it cannot be written (a full disk); then nothing is left behind, and an older file stays.
    """
    if isinstance(rows, Tensor) and rows.ndim != 2:
        raise ValueError(f"values of shape {tuple(rows.shape)}: a table is [rows, width]")
    row_format = rows.format if isinstance(rows, Rows) else RowFormat(rows.dtype, rows.shape[1])
    step = max(1, _PIECE // max(1, row_format.row_bytes))
    split = isinstance(rows, Rows) and len(rows.parts) > 1
    save_pieces(path, len(rows), row_format, _cut(rows, step), name, split)


def save_pieces(
    path: str | Path,
    rows: int,
    row_format: RowFormat,
    pieces: Iterable[Tensor | Rows],
    name: str = "weight",
    split: bool = False,
) -> None:
    """The same for a table that is made piece by piece, and so may be larger than memory.

    Args:
        path: the file to write.
        rows: how many rows the pieces have together.
        row_format: of every piece.
        pieces: values [n, D] or `Rows`, on any device; values are quantised where the format is fp8.
        name: of the tensor; of split rows that of the codes.
        split: whether codes and scales become two tensors; plain rows always are one.

    Raises:
        ValueError: a piece of another format, fp8 rows with a code or a scale that is NaN, or not `rows` rows.
        OSError: it cannot be written.
    """
    if row_format.dtype not in ROW_DTYPES:
        raise ValueError(f"rows of {row_format.dtype}: a table's are one of {', '.join(map(str, ROW_DTYPES))}")
    if rows < 1:
        raise ValueError(f"a table of {rows} rows of {row_format.width} values: it needs one at least")
    split = split and row_format.scaled
    header = _table_header(rows, row_format, name, split)
    written = 0
    with replacing(Path(path)) as file:
        file.write(header)
        for piece in pieces:
            found = _rows_of(piece, row_format)
            if isinstance(piece, Rows):  # values that were quantised just now are numbers
                found.refuse_nan(written)
            at = len(header)
            for part in (found.split() if split else found.packed()).parts:
                width = part.shape[1]
                file.seek(at + written * width)
                file.write(part.cpu().numpy().data)
                at += rows * width
            written += len(found)
        if written != rows:
            raise ValueError(f"the pieces have {written} rows together: {rows} were announced")


def _cut(rows: Tensor | Rows, step: int) -> Iterator[Tensor | Rows]:
    for first in range(0, len(rows), step):
        piece = slice(first, first + step)
        yield rows[piece] if isinstance(rows, Tensor) else Rows(rows.format, tuple(part[piece] for part in rows.parts))


def _table_header(rows: int, row_format: RowFormat, name: str, split: bool) -> bytes:
    if not row_format.scaled:
        return make_header({name: (row_format.dtype, (rows, row_format.width))})
    if not split:
        return make_header({name: (torch.uint8, (rows, row_format.row_bytes))}, packed_mark(name))
    scale = scale_name(name)
    if scale is None:
        raise ValueError(f"codes called {name!r}: end the name in 'weight', so that that of their scales is known")
    codes, scales = row_format.split_bytes
    return make_header({name: (CODE_DTYPE, (rows, codes)), scale: (SCALE_DTYPE, (rows, scales))}, on_page=name)


def _rows_of(piece: Tensor | Rows, row_format: RowFormat) -> Rows:
    if isinstance(piece, Tensor):
        return Rows(row_format, (row_format.encode(piece.detach().cpu().contiguous()),))
    if piece.format != row_format:
        raise ValueError(f"a piece of {piece.format}: this table has {row_format}")
    return piece
