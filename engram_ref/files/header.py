"""What a safetensors file says that it holds, read from its header alone and believed only where it adds up.

    entry = read_header("model-00047-of-00048.safetensors")["layers.1.engram.embed.weight"]
    print(entry.dtype, entry.shape, entry.offset)       # F8_E4M3 (384006168, 256) ...
    entry.stamp                                         # the state of the file in which it said so

A file begins with the length of its header (eight bytes, little-endian) and the header, a JSON object that gives every
tensor a dtype, a shape and a stretch of the data that follow. The stretches must have the bytes that dtype and shape
make, and lie side by side from the first byte of the data to the last of the file. So a file of 95 GiB is known to be
whole as soon as its header has been read, but for one thing: a download may reserve the size and never fill it.
`require_written` asks the file system for such holes. Whatever a header holds, reading it takes bounded work: numbers
and ranks are limited before anything is computed from them. Torch is not imported here.

    python -m pytest tests/ref/files/test_header.py
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from engram_ref.files.small_files import open_regular, read_small
from engram_ref.quoting import one_line, quoted

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # bytes; what the safetensors library accepts
LARGEST_COUNT = 2**63 - 1  # bytes of a file, or elements along a dimension
LARGEST_RANK = 64  # dimensions; torch has no more
_LONGEST_NUMBER = 1000  # digits; of a longer one Python takes ever longer to make an integer
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Stamp(NamedTuple):
    """What tells a file, and its state, from others."""

    device: int
    inode: int
    nbytes: int
    changed: int  # nanoseconds

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp of what `os.stat` found."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        path: the file.
        name: of the tensor.
        dtype: as safetensors calls it, for instance F8_E4M3.
        shape: as in the header.
        offset: byte of the file at which it begins.
        nbytes: how many it has; always what dtype and shape make.
        stamp: of the file when its header was read: an equal entry is in the same file, unchanged.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: Stamp = field(repr=False)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of a file, by name.

    Raises:
        ValueError: not a safetensors file, one that is cut off, or a header that contradicts itself or the file.
        OSError: it cannot be read.
    """
    header, _, data, stamp = _read(path)
    entries = {name: _entry(path, name, given, data, stamp) for name, given in header.items()}
    _require_side_by_side(path, entries, data, stamp.nbytes)
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that the header of a file holds beside its tensors, by name; errors as `read_header`."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str], int, Stamp]:
    """Tensors and texts of a header, the byte at which the data begin, and the file's stamp from before it was read."""
    with open_regular(path, "give a safetensors file") as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        size = stamp.nbytes
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        data = LENGTH_BYTES + length
        if length > LARGEST_HEADER or data > size:
            raise ValueError(
                f"{path} claims a header of {length} bytes; the file has {size} and a header at most "
                f"{LARGEST_HEADER}: it is cut off or no safetensors file, download it again"
            )
        header = parse_json(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"the header of {path} is damaged: its __metadata__ are not texts; download it again")
    return header, metadata, data, stamp


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file, of at most as many bytes as a header may have.

    Raises:
        ValueError: something else.
        OSError: it cannot be read.
    """
    return parse_json(read_small(path, LARGEST_HEADER, "give a JSON file"), str(path))


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice.

    Raises:
        ValueError: something else; the message begins with `what` it was.
    """
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_int=_bounded_int)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is damaged: {one_line(error)}; download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is damaged: it holds a {type(found).__name__}, not a JSON object; download it again")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {quoted(name)} stands there twice")
    return found


def _bounded_int(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _entry(path: Path, name: str, given: Any, data: int, stamp: Stamp) -> TensorEntry:
    """One tensor of the header; the data begin at byte `data` of the file."""
    damaged = f"{path}, tensor {quoted(name)}:"
    mend = "the header is damaged, download the file again"
    if not isinstance(given, dict) or not given.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{damaged} described by something else than dtype, shape and data_offsets, {quoted(given)}: {mend}"
        )
    dtype, shape, span = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{damaged} dtype={quoted(dtype)} is none that safetensors has: {mend}")
    if not _are_counts(shape) or not _are_counts(span) or len(span) != 2 or span[0] > span[1]:
        raise ValueError(
            f"{damaged} shape={quoted(shape)}, data_offsets={quoted(span)} are not counts in order, at most "
            f"{LARGEST_RANK} of them and each below 2^63: {mend}"
        )
    nbytes, spare_bits = divmod(DTYPE_BITS[dtype] * math.prod(shape), 8)
    if spare_bits or nbytes != span[1] - span[0]:
        raise ValueError(
            f"{damaged} {dtype} of shape {quoted(shape)} has {quoted(nbytes)} bytes, data_offsets={span} span "
            f"{span[1] - span[0]}: {mend}"
        )
    return TensorEntry(path, name, dtype, tuple(shape), data + span[0], nbytes, stamp)


def _are_counts(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > LARGEST_RANK:
        return False
    return all(type(value) is int and 0 <= value <= LARGEST_COUNT for value in values)


def _require_side_by_side(path: Path, entries: dict[str, TensorEntry], data: int, size: int) -> None:
    """Refuse tensors that overlap or leave a gap, and data that are not what the file holds."""
    end = data
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise ValueError(
                f"{path}, tensor {quoted(entry.name)}: begins at byte {entry.offset} of the file, the one before it "
                f"ends at {end}, so they {'overlap' if entry.offset < end else 'leave a gap'}: "
                "the header is damaged, download the file again"
            )
        end += entry.nbytes
    if end != size:
        raise ValueError(
            f"{path} has {size} bytes, its header describes {end}: the file "
            f"{'is cut off' if size < end else 'has bytes that belong to no tensor'}, download it again"
        )


def require_written(entries: Iterable[TensorEntry]) -> None:
    """Refuse tensors in whose place nothing was ever written: holes in the file, which would be read as zeros.

    Files that this project writes have none, whatever their numbers. Where the file system does not know of holes,
    nothing is refused.

    Raises:
        ValueError: the first hole.
        OSError: the file cannot be opened.
    """
    for path, inside in groupby(entries, lambda entry: entry.path):
        with open_regular(path) as file:
            for entry in inside:
                _refuse_hole(file.fileno(), entry)


def _refuse_hole(fd: int, entry: TensorEntry) -> None:
    end = entry.offset + entry.nbytes
    try:
        hole = os.lseek(fd, entry.offset, os.SEEK_HOLE)
    except (AttributeError, OSError):  # neither every system nor every file system can say
        return
    if hole < end:
        raise ValueError(
            f"{entry.path}, tensor {quoted(entry.name)}: byte {hole} of the file was never written (it is a hole, and "
            "would be read as zeros): the file was reserved and not filled, download it again; or, where a copy left "
            "out blocks of zeros that are meant, say sparse=True or fill it with cp --sparse=never"
        )
