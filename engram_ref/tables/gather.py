"""Gathering rows of a table in host memory, as fast as its memory allows.

    gather(table, rows, out)        # out[i] = table[rows[i]], all as bytes

With numba the loop of `gather_fused` does it, without it torch's index_select. A few rows (decoding) are copied by
the calling thread alone: waking others takes longer. Many (a long prompt) are split over as many threads as torch
may use; they are ordinary threads that end, not a pool that spins on processors which others need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_copy_rows: Callable[..., Any] | None = None
if importlib.util.find_spec("numba"):
    from engram_ref.tables.gather_fused import copy_rows as _copy_rows

_CACHE_LINE = 64
_STREAM_BYTES = 8 << 20  # an output that would push everything else out of the caches is written past them
_THREAD_BYTES = 4 << 20  # of output for each thread: 0.3 ms or more, against 0.1 ms to start one


def gather(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """Copy `table[rows[i]]` to `out[i]`.

    Args:
        table: [R, row_bytes] uint8 on the CPU, contiguous.
        rows: row numbers [N], int32 or int64, contiguous, checked: `check_rows` has seen them.
        out: [N, row_bytes] uint8 on the CPU, contiguous.
    """
    count, row_bytes = out.shape
    assert table.is_contiguous() and rows.is_contiguous() and out.is_contiguous()
    assert len(rows) == count and table.shape[1] == row_bytes and table.dtype == out.dtype == torch.uint8
    if _copy_rows is None:
        torch.index_select(table, 0, rows, out=out)
        return
    target = out.data_ptr()
    nbytes = count * row_bytes
    past_caches = nbytes >= _STREAM_BYTES and row_bytes % _CACHE_LINE == 0 and target % _CACHE_LINE == 0
    addresses = table.data_ptr(), rows.data_ptr(), rows.dtype == torch.int64
    threads = min(torch.get_num_threads(), nbytes // _THREAD_BYTES)
    if threads < 2:
        _copy_rows(*addresses, 0, count, row_bytes, target, past_caches)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        started = [
            pool.submit(_copy_rows, *addresses, first, last, row_bytes, target, past_caches)
            for first, last in pairwise(bounds)
        ]
    for share in started:
        share.result()
