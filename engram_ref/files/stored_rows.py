"""Rows that lie in safetensors files: found and validated, and read whole.

    stored = StoredRows.find("table.safetensors")       # reads the header only
    rows = stored.read()                                # `Rows`; rows.values(): [R, D]
    table = make_table("file", stored, device="cuda")   # or leave them where they are

    stored = StoredRows.find("model-00001.safetensors", "layers.1.engram.embed.weight")     # fp8, and its scales

Plain rows are one tensor. fp8 rows are two, the codes `weight` and the scales `scale`, which may lie in different
files, or one tensor of bytes that the file's metadata mark as packed rows. fp8 rows with a NaN are refused while they
are read. `writing` makes such files.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import engram_ref.needs_torch  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from engram_ref.config import SCALE_BLOCK
from engram_ref.files.conventions import DTYPES, ROW_DTYPES, packed_mark, scale_name
from engram_ref.files.header import require_written
from engram_ref.files.validated import Header, StoredPart, read_whole
from engram_ref.quoting import quoted
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import require_host_bytes
from engram_ref.rows.nan_check import refuse_nan
from engram_ref.rows.rows import Rows

_ROW_NAMES = [name for name, dtype in DTYPES.items() if dtype in ROW_DTYPES]
_CODES, _SCALES, _PACKED = "F8_E4M3", "F8_E8M0", "U8"
_PIECE = 8 << 20  # bytes of one read
_READERS = 4


@dataclass(frozen=True)
class StoredRows:
    """Rows [R, D] in one tensor or, fp8 rows, in two; or some in each of several.

    Attributes:
        format: what a row's bytes mean.
        parts: where they lie; a row's bytes are its parts side by side. Rows in several tensors have those of the first
            rows first.
        first: number of the first of them in the file's table, for messages; not 0 where they are some of its rows.
    """

    format: RowFormat
    parts: tuple[StoredPart, ...]
    first: int = 0

    @classmethod
    def find(
        cls,
        path: str | Path,
        name: str | None = None,
        *,
        scale: str | None = None,
        scale_path: str | Path | None = None,
        sparse: bool = False,
    ) -> StoredRows:
        """Find the rows of a table in a file.

        Args:
            path: a safetensors file.
            name: of the tensor, of fp8 rows that of the codes; may be left out where the file has only one tensor
                with two dimensions, scales not counted.
            scale: name of the scales; None takes `name` with `scale` in place of `weight`.
            scale_path: the file that has the scales; None takes `path`.
            sparse: take holes in the file, where nothing was ever written, for zeros that are meant.

        Raises:
            ValueError: not a whole safetensors file, no such tensor, rows that were never written, not rows of
                floating-point numbers, or scales that do not fit.
            OSError: a file cannot be opened.
        """
        header = Header.read(path)
        name = _only_table(header) if name is None else name
        dtype, (_, width) = header.matrix(name)
        if dtype == _CODES:
            there = header if scale_path is None else Header.read(scale_path)
            scale = _scale_of(header, name) if scale is None else scale
            _check_scales(header, name, there, scale)
            row_format = RowFormat(torch.bfloat16, width, scaled=True)
            return cls(row_format, tuple(_parts(row_format.split_bytes, sparse, (header, name), (there, scale))))
        if scale is not None or scale_path is not None:
            raise ValueError(f"{header.what(name)} is {dtype}: only codes, {_CODES}, have scales")
        row_format = _packed_format(header, name) if dtype == _PACKED else _plain_format(header, name)
        return cls(row_format, tuple(_parts((row_format.row_bytes,), sparse, (header, name))))

    @classmethod
    def find_shards(cls, places: Sequence[tuple[str | Path, str]], *, sparse: bool = False) -> StoredRows:
        """Find plain rows that lie in several tensors, given by file and name in the order of their rows.

        Raises:
            ValueError, OSError: as `find`, or tensors that are not stored alike.
        """
        headers = {path: Header.read(path) for path in dict.fromkeys(path for path, _ in places)}
        shards = []
        for path, name in places:
            row_format = _plain_format(headers[path], name)
            parts = tuple(_parts((row_format.row_bytes,), True, (headers[path], name)))
            shards.append(cls(row_format, parts))
        if not sparse:
            require_written(headers[path].tensors[name] for path, name in places)
        return cls.together(shards)

    @classmethod
    def together(cls, shards: Sequence[StoredRows]) -> StoredRows:
        """The rows of several tensors as one table, one behind the other; nothing is read or copied.

        Raises:
            ValueError: none, or rows that are not stored alike.
        """
        if not shards:
            raise ValueError("no rows: give those of one tensor at least")
        parts: list[StoredPart] = []
        first = 0
        for shard in shards:
            alike = shard.format == shards[0].format and len(shard.parts) == len(shards[0].parts)
            if not alike or any(part.first for part in shard.parts):
                raise ValueError(
                    f"{shard.path}, tensor {quoted(shard.name)}: {shard.format}, in {len(shard.parts)} parts; the rows "
                    f"before are {shards[0].format}, in {len(shards[0].parts)}: put together what is stored alike"
                )
            parts += [replace(part, first=first) for part in shard.parts]
            first += shard.rows
        there = [part for part in parts if part.rows] or parts[: len(shards[0].parts)]
        return cls(shards[0].format, tuple(there))

    @property
    def path(self) -> Path:
        """The file; of fp8 rows in two parts, that of the codes."""
        return self.parts[0].path

    @property
    def name(self) -> str:
        """Of the tensor, or of the codes."""
        return self.parts[0].name

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.parts[-1].first + self.parts[-1].rows

    @property
    def widths(self) -> list[int]:
        """Bytes of a row in each of its parts: one, or those of its codes and its scales."""
        return [part.row_bytes for part in self.parts if not part.first]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)

    def between(self, first: int, last: int) -> StoredRows:
        """The rows from `first` on and before `last`, as rows of their own: nothing else of the file is read.

        Raises:
            ValueError: there are no such rows.
        """
        if not 0 <= first <= last <= self.rows:
            raise ValueError(f"rows {first} .. {last - 1} of {self.path}: it has rows 0 .. {self.rows - 1}")
        parts = [part.between(first, last) for part in self.parts]
        there = [part for part in parts if part.rows] or parts[: len(self.widths)]
        return StoredRows(self.format, tuple(there), self.first + first)

    def read(self) -> Rows:
        """All rows, in memory as in the file.

        Raises:
            ValueError: they do not fit into memory, a file was changed, or fp8 rows hold NaN.
        """
        require_host_bytes(self.nbytes)
        parts = tuple(torch.empty((self.rows, width), dtype=torch.uint8, device="cpu") for width in self.widths)
        self.read_into(parts)
        return Rows(self.format, parts)

    def read_into(self, parts: Sequence[Tensor]) -> None:
        """Read all rows into memory, in large pieces, several at a time.

        Args:
            parts: uint8 [R, w] each, contiguous, on the CPU: as the rows lie in the file, or packed, or split.

        Raises:
            ValueError: memory of another shape, a file that was changed, or fp8 rows that hold NaN.
        """
        self._check_memory(parts)
        targets = dict(zip(_columns([part.shape[1] for part in parts]), [part.numpy() for part in parts]))
        with ExitStack() as undo:
            pieces: list[tuple[StoredPart, int, slice]] = []
            for part in self.parts:
                fd = part.open()
                undo.callback(os.close, fd)
                step = max(1, _PIECE // part.row_bytes)
                stops = part.first + part.rows
                pieces += [(part, fd, slice(row, min(row + step, stops))) for row in range(part.first, stops, step)]
            with ThreadPoolExecutor(_READERS) as pool:
                for _ in pool.map(lambda piece: self._read_piece(targets, *piece), pieces):
                    pass
            for part, fd, _ in pieces:
                part.require_same(fd)

    def _read_piece(
        self, targets: Mapping[tuple[int, int], np.ndarray], part: StoredPart, fd: int, rows: slice
    ) -> None:
        """Read some rows of a part: straight to their place if a target [R, w] has just its columns, or copy them."""
        straight = targets.get(part.columns)
        count = rows.stop - rows.start
        raw = np.empty((count, part.row_bytes), dtype=np.uint8) if straight is None else straight[rows]
        read_whole(fd, raw.data.cast("B"), part.offset + (rows.start - part.first) * part.row_bytes)
        low, high = part.columns
        if self.format.scaled:
            codes = max(0, min(self.format.width, high) - low)
            refuse_nan(part.path, raw, codes, lambda at: self.first + rows.start + at)
        if straight is None:
            for (left, right), target in targets.items():
                first, last = max(low, left), min(high, right)
                target[rows, first - left : last - left] = raw[:, first - low : last - low]

    def _check_memory(self, parts: Sequence[Tensor]) -> None:
        widths = dict.fromkeys([(self.format.row_bytes,), self.format.split_bytes])
        wanted = [[[self.rows, width] for width in layout] for layout in widths]
        fits = [list(part.shape) for part in parts] in wanted
        if not fits or any(part.dtype != torch.uint8 or part.is_cuda for part in parts):
            given = " and ".join(f"{list(part.shape)}, {part.dtype}, {part.device}" for part in parts)
            needed = " or ".join(" and ".join(map(str, layout)) for layout in wanted)
            raise ValueError(f"memory of {given}: the rows of {self.path} need {needed}, uint8, on the CPU")
        if not all(part.is_contiguous() for part in parts):
            raise ValueError("memory for rows must be contiguous: they are read one after the other")


def _columns(widths: Sequence[int]) -> list[tuple[int, int]]:
    """First and last byte of each part in a row, of parts with these widths."""
    return list(itertools.pairwise([0, *itertools.accumulate(widths)]))


def _parts(widths: Sequence[int], sparse: bool, *tensors: tuple[Header, str]) -> Iterator[StoredPart]:
    if not sparse:
        require_written(header.tensors[name] for header, name in tensors)
    for (header, name), columns in zip(tensors, _columns(widths)):
        tensor = header.tensors[name]
        yield StoredPart(header.path, name, tensor.shape[0], columns, tensor.offset, header.stamp)


def _only_table(header: Header) -> str:
    tensors = header.tensors.values()
    tables = [tensor.name for tensor in tensors if len(tensor.shape) == 2 and tensor.dtype != _SCALES]
    if len(tables) != 1:
        raise ValueError(f"{header.path} has {len(tables)} tensors with two dimensions: give the name of one")
    return tables[0]


def _plain_format(header: Header, name: str) -> RowFormat:
    dtype, (_, width) = header.matrix(name)
    if dtype not in _ROW_NAMES:
        raise ValueError(f"{header.what(name)} is {dtype}: rows are one of {', '.join(_ROW_NAMES)}, {_CODES}")
    return RowFormat(DTYPES[dtype], width)


def _packed_format(header: Header, name: str) -> RowFormat:
    _, (_, row_bytes) = header.matrix(name)
    if not packed_mark(name).items() <= header.metadata.items():
        raise ValueError(
            f"{header.what(name)} is {_PACKED}, and the file's metadata do not say that it has packed fp8 rows: "
            "write them with save_rows"
        )
    blocks, rest = divmod(row_bytes, SCALE_BLOCK + 1)
    if rest:
        raise ValueError(f"{header.what(name)} has rows of {row_bytes} B: packed ones have 33 B for every 32 values")
    return RowFormat(torch.bfloat16, blocks * SCALE_BLOCK, scaled=True)


def _scale_of(header: Header, name: str) -> str:
    scale = scale_name(name)
    if scale is None:
        raise ValueError(f"{header.what(name)} is {_CODES} and is not called 'weight': name its scales, with scale=")
    return scale


def _check_scales(header: Header, name: str, there: Header, scale: str) -> None:
    """Refuse scales that are not those of these codes: other ones give wrong rows and no error."""
    _, (rows, width) = header.matrix(name)
    if width % SCALE_BLOCK:
        raise ValueError(f"{header.what(name)} has {width} codes a row: {SCALE_BLOCK} of them share a scale")
    dtype, shape = there.matrix(scale, mend="; codes need their scales: give scale= or scale_path=")
    if dtype != _SCALES:
        raise ValueError(f"{there.what(scale)} is {dtype}: the scales of rows are {_SCALES}")
    if shape != (rows, width // SCALE_BLOCK):
        raise ValueError(
            f"{there.what(scale)} has shape {shape} for codes of shape {(rows, width)}: "
            f"there is one scale for every {SCALE_BLOCK} codes of a row"
        )
