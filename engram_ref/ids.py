"""Compressed ids that a hash takes: the vocabulary's, and DEAD.

    ids = check_ids(ids, size, least=DEAD)          # [B, T], or a ValueError that says which id and which limit

Without torch, as everything left of the row indices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DEAD = -1  # compressed id of a position that must not be looked up (an image token)


def check_ids(ids: Any, size: int, least: int = 0, what: str = "compressed ids") -> np.ndarray:
    """`ids` as an integer array [B, T] whose values all lie in `least` .. size - 1; a ValueError otherwise."""
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} of dtype {array.dtype}: give integers")
    if array.ndim != 2:
        raise ValueError(f"{what} of shape {array.shape}: give a batch of sequences, [B, T]")
    if array.size == 0:
        raise ValueError(f"{what} of shape {array.shape}: an empty batch has nothing to look up")
    low, high = int(array.min()), int(array.max())
    if low < least or high >= size:
        wrong = low if low < least else high
        raise ValueError(f"{what} contain {wrong}; the vocabulary has {least} .. {size - 1}")
    return array
