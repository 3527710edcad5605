"""What a safetensors file says that it has, and the state in which it said so.

    header = Header.read("model.safetensors")
    dtype, (rows, width) = header.matrix("weight")
    fd = open_same(header.path, header.stamp)           # refused if the file was changed since

`engram_ref.files.header` validates what is read: a truncated file, one that lies about its sizes and one that is
something else are refused. The file is not mapped, so that it may be larger than all memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.files.conventions import DTYPES
from engram_ref.files.header import Stamp, TensorEntry, read_header, read_metadata, require_written
from engram_ref.quoting import listed, quoted


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        path: the file.
        stamp: what the file was when it was validated.
        tensors: what it has, by name.
        metadata: text.
        sparse: whether holes are meant as zeros.
    """

    path: Path
    stamp: Stamp
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    sparse: bool = False

    @classmethod
    def read(cls, path: str | Path, sparse: bool = False) -> Header:
        """Read and validate it.

        Raises:
            ValueError: not a whole safetensors file, or one that is being changed.
            OSError: the file cannot be opened.
        """
        path = Path(path)
        stamp = Stamp.of(os.stat(path))
        header = cls(path, stamp, read_header(path), read_metadata(path), sparse)
        os.close(open_same(path, stamp))
        return header

    def what(self, name: str) -> str:
        """A tensor, as a message names it."""
        return f"{self.path}, tensor {quoted(name)}"

    def matrix(self, name: str, mend: str = "") -> tuple[str, tuple[int, int]]:
        """Dtype, as the file names it, and shape of a tensor that may be a table's.

        Args:
            name: of the tensor.
            mend: what to say if there is none.

        Raises:
            ValueError: no such tensor, or not one with two dimensions and one element at least.
        """
        if name not in self.tensors:
            there = listed(list(self.tensors)) or "none"
            raise ValueError(f"{self.path} has no tensor {quoted(name)}: it has {there}{mend}")
        shape = self.tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"{self.what(name)} has shape {quoted(shape)}: a table is [rows, width], with one row at least"
            )
        return self.tensors[name].dtype, (shape[0], shape[1])

    def read_tensor(self, name: str) -> Tensor:
        """One tensor of the file, in memory of its own.

        Raises:
            ValueError: a dtype that is not used here, a tensor that was never written, or a file that was changed.
            OSError: it cannot be read.
        """
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.what(name)} is {entry.dtype}: known are {', '.join(DTYPES)}")
        if not self.sparse:
            require_written([entry])
        raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        fd = open_same(self.path, self.stamp)
        try:
            read_whole(fd, raw.numpy().data, entry.offset)
            require_same(self.path, fd, self.stamp)
        finally:
            os.close(fd)
        return raw.view(DTYPES[entry.dtype]).view(entry.shape)


def open_same(path: Path, stamp: Stamp, flags: int = 0) -> int:
    """A descriptor of a file, for reading.

    Raises:
        ValueError: it is not the file any more that has this stamp.
        OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)  # a pipe in its place would wait for its writer
    try:
        require_same(path, fd, stamp)
    except ValueError:
        os.close(fd)
        raise
    return fd


def require_same(path: Path, fd: int, stamp: Stamp) -> None:
    """Refuse an open file that is not any more, or no longer in the state, that has this stamp; a microsecond.

    `write` gives a file a new time, before it gives it new bytes: what was read before this call is what was
    validated. Two writes within one tick of the system's clock (up to 10 ms) have the same time, and who sets the time
    back is not found out. Nor is who stores through a mapping into a page that the disk does not have yet: only the
    first store into a page after it was written there gives the file a new time.

    Raises:
        ValueError: it was written to, or it is another file.
    """
    if Stamp.of(os.fstat(fd)) != stamp:
        raise ValueError(f"{path} was changed after it was validated: call StoredRows.find again")


@dataclass(frozen=True)
class StoredPart:
    """One tensor of a safetensors file: the rows, some of them, or the codes or the scales of them.

    Attributes:
        path: the file.
        name: of the tensor.
        rows: how many there are.
        columns: first and last (excluded) byte of a row that lie here.
        offset: byte of the file at which the first row begins.
        stamp: of the file when it was validated.
        first: number of the first row that lies here; others lie in other tensors.
    """

    path: Path
    name: str
    rows: int
    columns: tuple[int, int]
    offset: int
    stamp: Stamp = field(repr=False)
    first: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of each row, in this part."""
        return self.columns[1] - self.columns[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, in this part."""
        return self.rows * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.stamp.nbytes

    def between(self, first: int, last: int) -> StoredPart:
        """Those of the table's rows from `first` on and before `last` that lie here, perhaps none."""
        low = max(first, self.first)
        count = max(min(last, self.first + self.rows) - low, 0)
        skipped = (low - self.first) * self.row_bytes if count else 0
        return replace(self, rows=count, offset=self.offset + skipped, first=low - first if count else 0)

    def open(self, flags: int = 0) -> int:
        """A descriptor of the file, for reading.

        Raises:
            ValueError: it is not the file any more that was validated.
        """
        return open_same(self.path, self.stamp, flags)

    def require_same(self, fd: int) -> None:
        """Refuse what was read from the open file if it was written to since it was validated (`require_same`)."""
        require_same(self.path, fd, self.stamp)


def read_whole(fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from byte `offset` of a file; how many bytes that were.

    Raises:
        ValueError: the file ends before.
    """
    done = 0
    while done < len(target):
        got = os.preadv(fd, [target[done:]], offset + done)
        if not got:
            raise ended_early(offset + done)
        done += got
    return done


def ended_early(position: int) -> ValueError:
    """The error of a file that is shorter than it was when it was opened."""
    return ValueError(f"the file ends at byte {position}, where it had rows when it was opened: write it anew")
