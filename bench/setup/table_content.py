"""Table content that can be computed again for any row: what a placement fetched is checked without a second copy.

A table is made of words of eight bytes, and the words of chunks. Every chunk is the same pseudorandom pattern
times an odd number of its own. Each value is then masked to be finite, smaller than 2 and not subnormal. No row is
zero and none is a copy of another, so a row that is missing, misplaced or torn shows.

    rows = rows_in(memory, row_format, count)           # memory: uint8 [bytes of the table]
    fill(rows, seed=0)                                  # in host memory, in one part or two
    expected_rows(numbers, rows.format, seed=0)         # the same bytes, for these rows only
    expected_values(numbers, rows.format, seed=0)       # and what they stand for

fp8 rows have words of codes and, at the end, words of scales: codes of 2^-3 up to 2, scales of 2^-7 .. 2^0. Neither is
NaN, and every product is exact in bfloat16.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from engram_ref.rows import fp8
from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows

_WORD = np.dtype("<u8")
_CHUNK = 1 << 16  # words: chunk and pattern, 1 MiB together, stay in a core's cache
# Of splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_MASK64 = (1 << 64) - 1
# Of the highest byte of a value: the top exponent bit is cleared, and the next three are set. So it is neither
# infinite nor NaN, and not subnormal either, with which some CPUs are slow.
_CLEARED, _SET = 0xBF, 0x38
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of an e4m3 code the top exponent bit is cleared and the next set: exponents 4 .. 7 of 1 .. 15. Of a scale only three
# bits are drawn: bytes 120 .. 127.
_CODE_CLEARED, _CODE_SET = 0xBF, 0x20
_SCALE_CLEARED, _SCALE_SET = 0x07, 0x78
_PIECE = 64 << 20  # bytes of packed rows that are made before they are laid apart


def rows_in(memory: Tensor, row_format: RowFormat, count: int, packed: bool = True) -> Rows:
    """Rows that lie in given memory.

    Args:
        memory: uint8 [count * row_bytes], contiguous, on any device.
        row_format: of the rows.
        count: of rows.
        packed: fp8 rows in one part; False lays all scales behind all codes.
    """
    widths = [row_format.row_bytes] if packed else list(row_format.split_bytes)
    parts = memory.split([count * width for width in widths])
    return Rows(row_format, tuple(part.view(count, width) for part, width in zip(parts, widths)))


def fill(rows: Rows, seed: int, first_row: int = 0) -> None:
    """Write the content of a table, in parallel.

    Args:
        rows: in host memory, whatever they hold; the bytes of a row are the same in one part and in two.
        seed: another seed is another table.
        first_row: number of the first of `rows`, for a table that is written piece by piece.

    Raises:
        ValueError: a dtype whose values could be NaN, rows that are not whole words, or memory of another kind.
    """
    if rows.device.type != "cpu":
        raise ValueError(f"rows on {rows.device}: fill memory of the CPU, and others from there, piece by piece")
    words = _Words(rows.format)
    parts = [part.numpy().view(_WORD) for part in rows.parts]
    if len(parts) == 1:
        return _fill_packed(parts[0], words, seed, first_row)
    packed = np.empty((max(1, _PIECE // rows.format.row_bytes), words.per_row), _WORD)
    for first in range(0, len(rows), len(packed)):
        piece = packed[: len(rows) - first]
        _fill_packed(piece, words, seed, first_row + first)
        column = 0
        for part in parts:
            width = part.shape[1]
            part[first : first + len(piece)] = piece[:, column : column + width]
            column += width


def _fill_packed(rows: np.ndarray, words: _Words, seed: int, first_row: int) -> None:
    """The same for rows in one part, [R, words of a row]."""
    first = first_row * words.per_row
    table = rows.reshape(-1)  # a view
    past = first + len(table)
    chunks = np.arange(first // _CHUNK, -(-past // _CHUNK), dtype=_WORD)
    pattern, factors = _splitmix64(seed, np.arange(_CHUNK, dtype=_WORD)), _factors(seed, chunks)
    cores = _cores()

    def work(stretch: np.ndarray, of_stretch: np.ndarray) -> None:
        for chunk, factor in zip(stretch.tolist(), of_stretch):
            start = chunk * _CHUNK
            low, high = max(start, first), min(start + _CHUNK, past)
            part = table[low - first : high - first]
            # One multiplication a word, so that memory fills about as fast as it can be written.
            np.multiply(pattern[low - start : high - start], factor, out=part)
            words.mask(part, low)

    with ThreadPoolExecutor(cores) as pool:
        # A stretch for each: side by side in one huge page, several would clear it when it is touched first.
        for _ in pool.map(work, np.array_split(chunks, cores), np.array_split(factors, cores)):
            pass  # raises what a thread raised


def expected_rows(numbers: Tensor, row_format: RowFormat, seed: int) -> Tensor:
    """What `fill` writes into these rows, uint8 [N, row_bytes].

    Args:
        numbers: row numbers [N], integers, repeats allowed.
    """
    words = _Words(row_format)
    first = numbers.cpu().numpy().astype(_WORD)[:, None] * np.uint64(words.per_row)
    position = first + np.arange(words.per_row, dtype=_WORD)  # [N, words]
    chunk, at = np.divmod(position, np.uint64(_CHUNK))
    found = _splitmix64(seed, at) * _factors(seed, chunk)
    words.mask(found.reshape(-1), 0)  # a view
    return torch.from_numpy(found.view(np.uint8))


def expected_values(numbers: Tensor, row_format: RowFormat, seed: int) -> Tensor:
    """What a fetch of these rows must deliver, [N, D]; fp8 rows are decoded by the definition, not by a fast path."""
    raw = expected_rows(numbers, row_format, seed)
    if not row_format.scaled:
        return row_format.decode(raw)
    codes, scales = raw.split(list(row_format.split_bytes), dim=1)
    return fp8.dequantise(codes.view(fp8.CODE_DTYPE), scales.view(fp8.SCALE_DTYPE))


def require_written(who: str, found: Tensor, numbers: Tensor, row_format: RowFormat, seed: int) -> None:
    """Refuse rows that are not those which were written.

    Args:
        who: found them.
        found: values [N, D], or stored bytes, uint8 [N, row_bytes]; on any device.
        numbers: of the rows, [N].

    Raises:
        ValueError: nothing may be timed.
    """
    expected = expected_rows if found.dtype == torch.uint8 else expected_values
    written = expected(numbers, row_format, seed).view(torch.uint8)
    if not torch.equal(found.cpu().contiguous().view(torch.uint8), written):
        raise ValueError(f"{who} returned other rows than were written: nothing was measured")


class _Words:
    """The words of rows of one format.

    Attributes:
        per_row: how many words a row has.

    Raises:
        ValueError: a dtype whose values could be NaN, or rows that are not whole words.
    """

    def __init__(self, row_format: RowFormat) -> None:
        for part in row_format.split_bytes:
            if part < _WORD.itemsize or part % _WORD.itemsize:
                raise ValueError(
                    f"rows of {' + '.join(map(str, row_format.split_bytes))} B: "
                    f"each part of a row is made of words of {_WORD.itemsize} bytes; take a multiple"
                )
        self.per_row = row_format.row_bytes // _WORD.itemsize
        self._masks = _masks(row_format)
        # Places of a row's scales, which are few: their words are masked once more.
        self._scales = range(row_format.split_bytes[0] // _WORD.itemsize, self.per_row)

    def mask(self, words: np.ndarray, first: int) -> None:
        """Make products into values, in place; `first` is the table's number of the first word."""
        keep, put = self._masks
        words &= keep
        words |= put
        for place in self._scales:
            scales = words[(place - first) % self.per_row :: self.per_row]
            scales &= _every_byte(_SCALE_CLEARED)
            scales |= _every_byte(_SCALE_SET)


def _factors(seed: int, chunks: np.ndarray) -> np.ndarray:
    """An odd number for each chunk: the draws behind those of the pattern."""
    return _splitmix64(seed, chunks + np.uint64(_CHUNK)) | np.uint64(1)


def _splitmix64(seed: int, draws: np.ndarray) -> np.ndarray:
    """Draws of these numbers from splitmix64, uint64."""
    state = _mix(np.array([seed & _MASK64], _WORD))  # or the draws of a seed would be another one's, shifted
    return _mix((draws + np.uint64(1)) * np.uint64(_GAMMA) + state)


def _mix(words: np.ndarray) -> np.ndarray:
    for shift, factor in _MIX:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(_LAST_SHIFT))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _masks(row_format: RowFormat) -> tuple[np.uint64, np.uint64]:
    """Bits of a word to keep, and bits to set; of scaled rows those of the codes."""
    if row_format.scaled:
        return _every_byte(_CODE_CLEARED), _every_byte(_CODE_SET)
    dtype = row_format.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}: known are {', '.join(map(str, _DTYPES))}")
    low = dtype.itemsize - 1
    return _every(b"\xff" * low + bytes([_CLEARED])), _every(b"\x00" * low + bytes([_SET]))


def _every(value: bytes) -> np.uint64:
    """A word of copies of one value."""
    return np.uint64(int.from_bytes(value * (_WORD.itemsize // len(value)), "little"))


def _every_byte(value: int) -> np.uint64:
    return _every(bytes([value]))
