"""Gradient checkpointing that runs a block's hooks a second time: it gets the rows of the first time.

Recent releases of transformers checkpoint what a block computes, so that its hooks run once. Before, the whole call was
checkpointed, hooks included: in the backward pass the block is computed again, long after the forward has ended and
perhaps after others. Nothing is fetched a second time, and no history is advanced.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_checkpointed(decoder: Any, blocks: nn.ModuleList) -> bool:
    """Whether blocks are computed again in the backward pass."""
    return decoder.training and any(getattr(module, "gradient_checkpointing", False) for module in (decoder, *blocks))


def hooks_run_again(blocks: nn.ModuleList) -> bool:
    """Whether a block's hooks are inside what is checkpointed."""
    block = blocks[0]
    return type(block).__call__ is not nn.Module.__call__ or not hasattr(block, "gradient_checkpointing")
