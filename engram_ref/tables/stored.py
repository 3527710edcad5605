"""Rows that lie in a safetensors file: found and validated, read whole, and written.

    save_rows("table.safetensors", values)              # values: [R, D]
    stored = StoredRows.find("table.safetensors")       # reads the header only
    values = stored.read()                              # [R, D]
    table = make_table("file", stored, device="cuda")   # or leave them where they are

The header is validated by the safetensors library before a row is read: a truncated file, one that lies about its
sizes and one that is something else are refused. Files written here begin their rows at a multiple of 4096 bytes,
so that no row of 128 or 256 bytes lies on two pages.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram_ref.tables.base import RowFormat
from engram_ref.tables.memory import require_host_bytes
from engram_ref.tables.reading import read_whole
from engram_ref.tables.writing import DTYPES, LENGTH_BYTES, make_header, replacing

ROW_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ROW_NAMES = [name for name, dtype in DTYPES.items() if dtype in ROW_DTYPES]
_PIECE = 8 << 20  # bytes of one read or write
_READERS = 4
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class StoredRows:
    """One tensor [R, D] of a safetensors file.

    Attributes:
        path: the file.
        name: of the tensor.
        rows: how many there are.
        format: what a row's bytes mean.
        offset: byte of the file at which the first row begins.
        file_bytes: size of the whole file.
    """

    path: Path
    name: str
    rows: int
    format: RowFormat
    offset: int
    file_bytes: int
    _stamp: _Stamp = field(repr=False)

    @classmethod
    def find(cls, path: str | Path, name: str | None = None) -> StoredRows:
        """Find the rows of a table in a file.

        Args:
            path: a safetensors file.
            name: of the tensor; may be left out where the file has only one tensor with two dimensions.

        Raises:
            ValueError: not a whole safetensors file, no such tensor, or not rows of floating-point numbers.
            OSError: the file cannot be opened.
        """
        path = Path(path)
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a regular file: give a safetensors file")
        _require_safetensors(path)
        data, header = _read_header(path, _stamp(found))
        name = _only_matrix(path, header) if name is None else name
        if name not in header:
            raise ValueError(f"{path} has no tensor {name!r}: it has {', '.join(header) or 'none'}")
        entry = header[name]
        rows, row_format = _rows_and_format(f"{path}, tensor {name!r}", entry)
        return cls(path, name, rows, row_format, data + entry["data_offsets"][0], found.st_size, _stamp(found))

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.format.row_bytes

    def open(self, flags: int = 0) -> int:
        """A descriptor of the file, for reading.

        Raises:
            ValueError: it is not the file any more that was validated.
        """
        return _open_same(self.path, self._stamp, flags)

    def read(self) -> Tensor:
        """All rows, [R, D].

        Raises:
            ValueError: they do not fit into memory, or the file was changed.
        """
        require_host_bytes(self.nbytes)
        values = torch.empty((self.rows, self.format.width), dtype=self.format.dtype)
        self.read_into(values.view(torch.uint8))
        return values

    def read_into(self, raw: Tensor) -> None:
        """Read all rows into uint8 [R, row_bytes] on the CPU, in large pieces, several at a time.

        Raises:
            ValueError: memory of another shape, or the file was changed.
        """
        if tuple(raw.shape) != (self.rows, self.format.row_bytes) or raw.dtype != torch.uint8 or raw.is_cuda:
            raise ValueError(
                f"memory of shape {tuple(raw.shape)}, {raw.dtype}, {raw.device}: "
                f"the rows of {self.path} need [{self.rows}, {self.format.row_bytes}], uint8, on the CPU"
            )
        if not raw.is_contiguous():
            raise ValueError("memory for rows must be contiguous: they are read one after the other")
        target = raw.numpy().data.cast("B")
        fd = self.open()

        def read_piece(start: int) -> None:
            piece = target[start : start + _PIECE]
            read_whole(fd, piece, self.offset + start)

        try:
            with ThreadPoolExecutor(_READERS) as pool:
                for _ in pool.map(read_piece, range(0, self.nbytes, _PIECE)):
                    pass
        finally:
            os.close(fd)


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _open_same(path: Path, stamp: _Stamp, flags: int = 0) -> int:
    fd = os.open(path, os.O_RDONLY | flags)
    if _stamp(os.fstat(fd)) != stamp:
        os.close(fd)
        raise ValueError(f"{path} was changed after it was validated: call StoredRows.find again")
    return fd


def _require_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _read_header(path: Path, stamp: _Stamp) -> tuple[int, dict[str, Any]]:
    """The byte at which the data begin, and the entries of the tensors, of a validated file."""
    with open(_open_same(path, stamp), "rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return LENGTH_BYTES + length, header


def _only_matrix(path: Path, header: dict[str, Any]) -> str:
    matrices = [name for name, entry in header.items() if len(entry["shape"]) == 2]
    if len(matrices) != 1:
        raise ValueError(f"{path} has {len(matrices)} tensors with two dimensions: give the name of one")
    return matrices[0]


def _rows_and_format(what: str, entry: dict[str, Any]) -> tuple[int, RowFormat]:
    shape = entry["shape"]
    dtype = DTYPES.get(entry["dtype"])
    if dtype not in ROW_DTYPES:
        raise ValueError(f"{what} is {entry['dtype']}: rows are one of {', '.join(_ROW_NAMES)}")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{what} has shape {tuple(shape)}: a table is [rows, width], with one row at least")
    return shape[0], RowFormat(dtype, shape[1])


def save_rows(path: str | Path, values: Tensor, name: str = "weight") -> None:
    """Write a table [R, D] to a safetensors file, complete or not at all.

    Raises:
        ValueError: not two-dimensional, empty, or not a floating-point dtype.
        OSError: it cannot be written (a full disk); then nothing is left behind, and an older file stays.
    """
    if values.ndim != 2:
        raise ValueError(f"values of shape {tuple(values.shape)}: a table is [rows, width]")
    row_format = RowFormat(values.dtype, values.shape[1])
    step = max(1, _PIECE // max(1, row_format.row_bytes))
    save_pieces(path, len(values), row_format, values.split(step), name)


def save_pieces(
    path: str | Path, rows: int, row_format: RowFormat, pieces: Iterable[Tensor], name: str = "weight"
) -> None:
    """The same for a table that is made piece by piece, and so may be larger than memory.

    Args:
        path: the file to write.
        rows: how many rows the pieces have together.
        row_format: of every piece.
        pieces: [n, D] each, on any device.
        name: of the tensor.

    Raises:
        ValueError: a piece of another format, or not `rows` rows.
        OSError: it cannot be written.
    """
    if row_format.dtype not in ROW_DTYPES:
        raise ValueError(f"rows of {row_format.dtype}: a table's are one of {', '.join(map(str, ROW_DTYPES))}")
    if rows < 1 or row_format.width < 1:
        raise ValueError(f"a table of {rows} rows of {row_format.width} values: it needs one of each at least")
    header = make_header({name: (row_format.dtype, (rows, row_format.width))})
    written = 0
    with replacing(Path(path)) as file:
        file.write(header)
        for piece in pieces:
            file.write(row_format.encode(piece.detach().cpu().contiguous()).numpy().data)
            written += len(piece)
        if written != rows:
            raise ValueError(f"the pieces have {written} rows together: {rows} were announced")
