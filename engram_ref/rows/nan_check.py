"""fp8 rows with a code or a scale that is NaN are refused: no table is shipped with one, so the bytes are not rows.

    refuse_nan("table.safetensors", raw, codes=256, number=lambda at: first + at)

Rows are looked at where they are read, while they are in the caches: 30 ns a row, against a microsecond to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from engram_ref.rows.fp8 import NAN_CODE, NAN_SCALE

_CHECKED = 1 << 18  # bytes looked at together: half a second-level cache


def refuse_nan(path: str | Path, raw: np.ndarray, codes: int, number: Callable[[int], int]) -> None:
    """Refuse rows, or a part of them, that hold NaN.

    Args:
        path: where they were read, for the message.
        raw: uint8 [N, w].
        codes: how many of the w bytes are codes; the others, behind them, are scales.
        number: the number of the row at a position of `raw`.

    Raises:
        ValueError: there is one; the message gives its number.
    """
    at = find_nan(raw, codes)
    if at is not None:
        raise ValueError(f"{path}: row {number(at)} has a code or a scale that is NaN: not fp8 rows")


def find_nan(raw: np.ndarray, codes: int) -> int | None:
    """Position of the first of some rows, uint8 [N, w], that has a NaN among its `codes` codes or its scales."""
    step = max(1, _CHECKED // raw.shape[1])
    for first in range(0, len(raw), step):
        piece = raw[first : first + step]
        if _has_nan(piece, codes):
            return first + next(at for at in range(len(piece)) if _has_nan(piece[at : at + 1], codes))
    return None


def _has_nan(raw: np.ndarray, codes: int) -> bool:
    magnitude = (raw[:, :codes] & NAN_CODE).max(initial=0)  # NaN is the largest of each
    return bool(magnitude == NAN_CODE or raw[:, codes:].max(initial=0) == NAN_SCALE)
