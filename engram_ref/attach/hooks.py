"""What stands in a model: one kind of hook, by which a model, its copies and its wrappers know what was put into them.

To be attached to a second time is refused block by block, wherever the block is held. A hook is not pickled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Hook:
    """What a module calls, until `remove`.

    Args:
        act: gets what torch gives to a hook.
        layer_id: the block that it stands before; None at the decoder.
    """

    def __init__(self, act: Callable[..., Any], layer_id: int | None = None) -> None:
        self.act: Callable[..., Any] | None = act
        self.layer_id = layer_id

    def __call__(self, *given: Any) -> Any:
        """What `act` returns to torch, or None once it is removed: nothing is changed."""
        return None if self.act is None else self.act(*given)

    def remove(self) -> None:
        """From now on it does nothing, in copies of the model, too."""
        self.act = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self  # a copy of the model computes with the same Engram, until that is detached

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "Engram is attached to this model and cannot be pickled with it: detach() first, or save its state_dict(), "
            "which has nothing of Engram in it"
        )


def refuse_twice(blocks: nn.ModuleList, layer_ids: Iterable[int]) -> None:
    """Refuse blocks before which Engram stands already.

    Raises:
        ValueError: there is one.
    """
    for layer_id in layer_ids:
        hooks = (hook for module in blocks[layer_id].modules() for hook in module._forward_pre_hooks.values())
        if any(isinstance(hook, Hook) and hook.act is not None and hook.layer_id is not None for hook in hooks):
            raise ValueError(
                f"an Engram layer stands before block {layer_id} of this model already, or of the one it is a copy of: "
                "detach() that one first"
            )


def forget_compiled() -> None:
    """Code that torch.compile has made of a model does not notice that hooks came or went: it is to be made anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
