"""Gathering rows of a table in host memory, as fast as its memory allows.

    gather(table, rows, out)        # out[i] = table[rows[i]], all as bytes

With numba the loop of `gather_fused` does it, without it torch's index_select. A few rows (decoding) are copied by
the calling thread alone, many (a long prompt) by as many threads as torch may use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engram_ref.compiled import numba_works
from engram_ref.threads.errands import Pool

_copy_rows: Callable[..., Any] | None = None
_are_below: Callable[..., bool] | None = None
if numba_works():
    from engram_ref.rows.gather_fused import are_below as _are_below
    from engram_ref.rows.gather_fused import copy_rows as _copy_rows

_THREAD_BYTES = 4 << 20  # of output for each thread: 0.3 ms or more, against 0.1 ms to start one


def are_below(rows: Tensor, limit: int) -> bool:
    """Whether row numbers [N], int32 or int64, contiguous, on the CPU, are all in 0 .. limit - 1."""
    # In one thread: torch would wake others for a long vector, up to 10 ms on a busy machine.
    if _are_below is None:
        numbers = rows.numpy()  # signed: torch.compile traces this, and torch has no maximum of unsigned ones
        return not len(numbers) or (int(numbers.min()) >= 0 and int(numbers.max()) < limit)
    wide = rows.dtype == torch.int64
    limit = min(limit, 2**63 if wide else 2**31)  # from here on, unsigned, stand the negative ones
    return _are_below(rows.data_ptr(), wide, rows.shape[0], limit)


def gather(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """Copy `table[rows[i]]` to `out[i]`.

    Args:
        table: [R, row_bytes] uint8 on the CPU, contiguous.
        rows: row numbers [N], int32 or int64, contiguous, checked: `check_rows` has seen them.
        out: [N, row_bytes] uint8 on the CPU; between its rows there may be gaps.
    """
    count, row_bytes = out.shape
    assert table.is_contiguous() and rows.is_contiguous() and out.stride(1) == 1
    assert rows.shape[0] == count and table.shape[1] == row_bytes and table.dtype == out.dtype == torch.uint8
    if _copy_rows is None:
        out.copy_(torch.index_select(table, 0, rows))
        return
    copy, target, stride = _copy_rows, out.data_ptr(), out.stride(0)
    addresses = table.data_ptr(), rows.data_ptr(), rows.dtype == torch.int64
    in_threads(lambda first, last: copy(*addresses, first, last, row_bytes, target, stride), count, count * row_bytes)


def gather_parts(parts: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
    """The same for rows that lie in several parts: side by side in `out` [N, bytes of all parts]."""
    if len(parts) == 1:
        gather(parts[0], rows, out)  # a slice of everything would take longer than a few rows
        return
    first = 0
    for part in parts:
        width = part.shape[1]
        gather(part, rows, out[:, first : first + width])
        first += width


def in_threads(work: Callable[[int, int], object], count: int, nbytes: int) -> None:
    """Let `work(first, last)` do all of 0 .. count - 1: at once, or in several threads if there is much to write.

    Args:
        work: lets other threads run meanwhile.
        count: of whatever is worked on.
        nbytes: that will be written.
    """
    threads = nbytes // _THREAD_BYTES
    if threads > 1:
        threads = min(threads, torch.get_num_threads())
    if threads < 2:
        work(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    pool = Pool(threads, "gather")  # threads that end: none spins on a processor that others need
    try:
        pool.do_all([partial(work, *share) for share in pairwise(bounds)])
    finally:
        pool.close()
