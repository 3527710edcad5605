"""From stored fp8 rows to values, wherever they are: the same bits from every path.

    values = dequantise_rows(raw, width)        # raw: uint8 [N, D + D/32], codes first -> [N, D] bfloat16

On a CPU the compiled loop of `decoding_fused` does it where numba is installed, on CUDA the kernel of
`engram_ref.rows.kernels` where Triton is; torch's own operations (`engram_ref.rows.fp8`) do it anywhere, and are what
the others are tested against.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engram_ref.compiled import numba_works
from engram_ref.rows import fp8
from engram_ref.rows.gather import gather_parts, in_threads

_decode_rows: Callable[..., Any] | None = None
if numba_works():
    from engram_ref.rows.decoding_fused import decode_rows as _decode_rows
_TRITON = importlib.util.find_spec("triton") is not None


def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels that decode rows on this device, `engram_ref.rows.kernels`: on CUDA where Triton is installed."""
    if device.type != "cuda" or not _TRITON:
        return None
    from engram_ref.rows import kernels

    return kernels


def dequantise_rows(raw: Tensor, width: int, out: Tensor | None = None) -> Tensor:
    """Values of packed rows.

    Args:
        raw: uint8 [N, width + width / 32], contiguous: codes, then scales.
        width: values per row.
        out: bfloat16 [N, width], contiguous, to write into instead of new memory.

    Returns:
        [N, width] bfloat16.
    """
    if out is None:
        out = torch.empty((len(raw), width), dtype=torch.bfloat16, device=raw.device)
    kernels = kernels_for(raw.device)
    if kernels is not None:
        kernels.dequantise_rows(raw, width, out)
    elif raw.device.type == "cpu" and _decode_rows is not None:
        _decode([raw], None, width, out)
    else:
        out.copy_(fp8.dequantise(raw[:, :width].view(fp8.CODE_DTYPE), raw[:, width:].view(fp8.SCALE_DTYPE)))
    return out


def gather_values(parts: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
    """Values of some fp8 rows in host memory, gathered and decoded in one pass.

    Args:
        parts: uint8 [R, w] each, contiguous: packed rows, or codes and scales.
        rows: row numbers [N], int32 or int64, contiguous, checked.
        out: bfloat16 [N, D], contiguous.
    """
    width = out.shape[1]
    if _decode_rows is not None:
        _decode(parts, rows, width, out)
        return
    raw = torch.empty((len(rows), sum(part.shape[1] for part in parts)), dtype=torch.uint8, device="cpu")
    gather_parts(parts, rows, raw)
    dequantise_rows(raw, width, out)


def _decode(parts: Sequence[Tensor], rows: Tensor | None, width: int, out: Tensor) -> None:
    assert _decode_rows is not None and out.is_contiguous() and all(part.is_contiguous() for part in parts)
    decode, codes, scales = _decode_rows, parts[0], parts[-1]
    shift = width if len(parts) == 1 else 0  # packed rows have their scales behind the codes
    sources = codes.data_ptr(), codes.shape[1], scales.data_ptr() + shift, scales.shape[1]
    numbers = (0, False) if rows is None else (rows.data_ptr(), rows.dtype == torch.int64)
    target = out.data_ptr()
    in_threads(lambda first, last: decode(*sources, *numbers, first, last, width, target), len(out), out.nbytes)
