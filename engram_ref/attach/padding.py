"""Which positions of a chunk hold no token, as the attention mask of a transformers decoder says it.

    padding = padding_of(attention_mask, batch=B, length=T, past=n)      # booleans [B, T], or None: all are tokens

A mask comes as the user gave it, [B, positions] with 0 for padding, or as `generate` prepares it for a static cache:
[B, 1, T, positions], added to the scores or boolean, where a position that is padding does not see even itself; or a
dict of such masks by kind of attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What is added to the score of what is not to be seen, or less: exp(-50) is lost beside 1 even in float64. People add
# -1e3 and -1e9 as well as the least of the dtype; biases by distance are small where they matter here, at a distance of
# 0 or 1.
_HIDDEN = -50.0
_DYNAMIC = "where generate() made it, for a static cache of sliding windows alone, take a dynamic cache"
_MEND = "give the two-dimensional mask, [B, positions], or none"


def padding_of(mask: Any, batch: int, length: int, past: int) -> Tensor | None:
    """Where the `length` positions after the first `past` are padding: booleans [B, T], or None where none can be.

    Args and errors: as for `require_columns`.
    """
    require_columns(mask, batch, length, past)
    columns = columns_of(mask, length, past)
    return None if columns is None else padding_in(columns, batch, length)


def require_columns(mask: Any, batch: int, length: int, past: int) -> None:
    """Refuse a mask that has no column for each position, or not one row for each of a chunk.

    Args:
        mask: `attention_mask` as the decoder gets it.
        batch, length: of the token ids (B, T).
        past: positions in the cache.

    Raises:
        ValueError: a mask from which padding cannot be seen.
    """
    mask = chosen(mask)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        shown = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
        raise ValueError(f"an attention mask {shown}, from which padding cannot be seen: {_MEND}")
    if mask.shape[-1] < past + length or mask.shape[0] not in (1, batch):
        windowed = mask.ndim == 4 and mask.shape[-1] < past + length
        mend = f"{_DYNAMIC}; else {_MEND}" if windowed else _MEND
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} for {batch} sequences of {past} cached and {length} new "
            f"positions: {mend}"
        )
    if mask.ndim == 4 and mask.shape[2] != length:
        raise ValueError(f"an attention mask of shape {tuple(mask.shape)} for {length} new positions: {_MEND}")
    if mask.ndim == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        # Integers, which transformers would add to the scores.
        raise ValueError(f"an attention mask of shape {tuple(mask.shape)}, {mask.dtype}: give booleans; {_MEND}")


def columns_of(mask: Any, length: int, past: int, before: int = 0) -> Tensor | None:
    """What a mask says of a chunk and of `before` positions in front of it: its columns [B or 1, ..., before + T].

    Args:
        mask: that `require_columns` let pass.
        length, past: of the chunk, and positions in the cache.
        before: how many of the latter are wanted.
    """
    mask = chosen(mask)
    return None if mask is None else mask[..., past - before : past + length]


def padding_in(columns: Tensor, batch: int, length: int) -> Tensor:
    """Where a chunk is padding, by the columns of its mask: booleans [B, T]."""
    of_chunk = columns[..., columns.shape[-1] - length :]
    if columns.ndim == 2:
        return (of_chunk == 0).expand(batch, length)
    sees = visible(of_chunk)  # [B or 1, T, T]
    return ~sees.diagonal(dim1=1, dim2=2).expand(batch, length)  # does a position see itself?


def chosen(mask: Any) -> Any:
    """Of masks by kind of attention the one that hides least."""
    if not isinstance(mask, dict):
        return mask
    return mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)


def visible(mask: Tensor) -> Tensor:
    """Which position sees which, in any head, by booleans or scores of four dimensions: booleans [B, T, positions]."""
    sees = mask if mask.dtype == torch.bool else mask > _HIDDEN
    return sees[:, 0] if sees.shape[1] == 1 else sees.any(dim=1)
