"""Table content that can be computed again for any row: what a placement fetched is checked without a second copy.

A table is made of words of eight bytes, and the words of chunks. Every chunk is the same pseudorandom pattern
times an odd number of its own: one multiplication a word, so that memory fills about as fast as it can be written.
Each value is then masked to be finite, smaller than 2 and not subnormal (some CPUs are slow with those). No row is
zero and none is a copy of another, so a row that is missing, misplaced or torn shows.

    fill(raw, torch.bfloat16, seed=0)                                # raw: uint8 [R, row_bytes], in host memory
    expected_rows(rows, row_bytes, torch.bfloat16, seed=0)           # the same bytes, for these rows only

Pattern and odd numbers are splitmix64, from Steele, Lea and Flood, "Fast splittable pseudorandom number
generators" (2014).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_WORD = np.dtype("<u8")
_CHUNK = 1 << 16  # words: chunk and pattern, 1 MiB together, stay in a core's cache
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_MASK64 = (1 << 64) - 1
# Of the highest byte of a value: the top exponent bit is cleared, and the next three are set.
_CLEARED, _SET = 0xBF, 0x38
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fill(raw: Tensor, dtype: torch.dtype, seed: int, first_row: int = 0) -> None:
    """Write the content of a table, in parallel.

    Args:
        raw: stored rows [R, row_bytes], uint8, contiguous, in host memory.
        dtype: of their values.
        seed: another seed is another table.
        first_row: number of `raw`'s first row, for a table that is written piece by piece.

    Raises:
        ValueError: a dtype whose values could be NaN, rows that are not whole words, or memory of another kind.
    """
    if raw.dtype != torch.uint8 or raw.ndim != 2 or raw.device.type != "cpu" or not raw.is_contiguous():
        raise ValueError(
            f"rows of shape {tuple(raw.shape)}, {raw.dtype}, on {raw.device}: give contiguous uint8 "
            "[rows, row_bytes] on the CPU; fill other memory from there, piece by piece"
        )
    keep, put = _masks(dtype)
    first = first_row * _words(raw.shape[1])
    words = raw.view(-1).numpy().view(_WORD)
    past = first + len(words)
    chunks = np.arange(first // _CHUNK, -(-past // _CHUNK), dtype=_WORD)
    pattern, factors = _pattern(seed, np.arange(_CHUNK, dtype=_WORD)), _factors(seed, chunks)
    cores = _cores()

    def work(core: int) -> None:
        for chunk, factor in zip(chunks[core::cores].tolist(), factors[core::cores]):
            start = chunk * _CHUNK
            low, high = max(start, first), min(start + _CHUNK, past)
            part = words[low - first : high - first]
            np.multiply(pattern[low - start : high - start], factor, out=part)
            part &= keep
            part |= put

    with ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(work, range(cores)):
            pass  # raises what a thread raised


def expected_rows(rows: Tensor, row_bytes: int, dtype: torch.dtype, seed: int) -> Tensor:
    """What `fill` writes into these rows, uint8 [N, row_bytes].

    Args:
        rows: row numbers [N], integers, repeats allowed.
    """
    keep, put = _masks(dtype)
    width = _words(row_bytes)
    first = rows.cpu().numpy().astype(_WORD)[:, None] * np.uint64(width)
    position = first + np.arange(width, dtype=_WORD)  # [N, words]
    chunk, at = np.divmod(position, np.uint64(_CHUNK))
    words = (_pattern(seed, at) * _factors(seed, chunk)) & keep | put
    return torch.from_numpy(words.view(np.uint8))


def _words(row_bytes: int) -> int:
    """Words of a row."""
    if row_bytes < _WORD.itemsize or row_bytes % _WORD.itemsize:
        raise ValueError(f"row_bytes={row_bytes}: rows are made of words of {_WORD.itemsize} bytes; take a multiple")
    return row_bytes // _WORD.itemsize


def _pattern(seed: int, at: np.ndarray) -> np.ndarray:
    """Words of the pattern."""
    return _splitmix64(seed, at)


def _factors(seed: int, chunks: np.ndarray) -> np.ndarray:
    """An odd number for each chunk: the draws behind those of the pattern."""
    return _splitmix64(seed, chunks + np.uint64(_CHUNK)) | np.uint64(1)


def _splitmix64(seed: int, draws: np.ndarray) -> np.ndarray:
    """Draws of these numbers from splitmix64, uint64; seeds are mixed first, so that none is another one shifted."""
    state = _mix(np.array([seed & _MASK64], _WORD))
    return _mix((draws + np.uint64(1)) * np.uint64(_GAMMA) + state)


def _mix(words: np.ndarray) -> np.ndarray:
    for shift, factor in _MIX:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(_LAST_SHIFT))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _masks(dtype: torch.dtype) -> tuple[np.uint64, np.uint64]:
    """Bits of a word to keep, and bits to set."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}: known are {', '.join(map(str, _DTYPES))}")
    low = dtype.itemsize - 1
    keep = (b"\xff" * low + bytes([_CLEARED])) * (_WORD.itemsize // dtype.itemsize)
    put = (b"\x00" * low + bytes([_SET])) * (_WORD.itemsize // dtype.itemsize)
    return np.uint64(int.from_bytes(keep, "little")), np.uint64(int.from_bytes(put, "little"))
