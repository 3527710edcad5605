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
    """What a module calls, from `stand` until `remove`.

    Args:
        module: it stands before this one's forward, or behind it.
        act: gets what torch gives to a hook.
        layer_id: the block that it stands before; None at the decoder.
        behind: it stands behind, and is called whatever becomes of the forward.
    """

    def __init__(
        self, module: nn.Module, act: Callable[..., Any], layer_id: int | None = None, behind: bool = False
    ) -> None:
        self.act: Callable[..., Any] | None = act
        self.layer_id = layer_id
        self._module: nn.Module | None = module
        self._behind = behind

    def __call__(self, *given: Any) -> Any:
        """What `act` returns to torch, or None once it is removed: nothing is changed."""
        return None if self.act is None else self.act(*given)

    def stands_in(self, module: nn.Module) -> bool:
        """Whether a module, or one inside of it, calls this hook before its forward."""
        return any(hook is self for part in module.modules() for hook in part._forward_pre_hooks.values())

    def stand(self) -> None:
        """Let the module call it."""
        assert self._module is not None, "a hook that was removed"
        if self._behind:
            self._module.register_forward_hook(self, always_call=True)
        else:
            self._module.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """From now on it does nothing, in copies of the model, too. Calling it again does nothing."""
        self.act = None
        if self._module is not None:
            # Not by the handle that torch returns: who is interrupted on the way back from there never gets it.
            for hooks, *remarks in _registers(self._module):
                for number in [number for number, hook in list(hooks.items()) if hook is self]:
                    for register in (*remarks, hooks):
                        register.pop(number, None)
        self._module = None  # a copy of the model does not keep the model

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self  # a copy of the model computes with the same Engram, until that is detached

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "Engram is attached to this model and cannot be pickled with it: detach() first, or save its state_dict(), "
            "which has nothing of Engram in it"
        )


def _registers(module: nn.Module) -> tuple[tuple[dict[int, Any], ...], ...]:
    """The hooks of a module, before and behind, each with what torch has remarked of them."""
    return (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
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
