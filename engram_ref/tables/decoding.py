"""From stored fp8 rows to values, wherever they are: the same bits from every path.

    values = dequantise_rows(raw, width)        # raw: uint8 [N, D + D/32], codes first -> [N, D] bfloat16

On a CPU the compiled loop of `decoding_fused` does it where numba is installed, on CUDA the kernel of
`engram_ref.kernels` where Triton is; torch's own operations (`engram_ref.fp8`) do it anywhere, and are what the others
are tested against.
"""

from __future__ import annotations

from torch import Tensor

from engram_ref import fp8


def dequantise_rows(raw: Tensor, width: int, out: Tensor | None = None) -> Tensor:
    """Values of packed rows.

    Args:
        raw: uint8 [N, width + width / 32], contiguous: codes, then scales.
        width: values per row.
        out: bfloat16 [N, width], contiguous, to write into instead of new memory.

    Returns:
        [N, width] bfloat16.
    """
    codes, scales = raw[:, :width].view(fp8.CODE_DTYPE), raw[:, width:].view(fp8.SCALE_DTYPE)
    values = fp8.dequantise(codes, scales)
    return values if out is None else out.copy_(values)
