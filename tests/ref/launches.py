"""What a step would launch on an accelerator, counted on a CPU.

with Launches() as counted: ...  # counted.names: every operation that is no view and makes no memory, in order
"""

from torch.utils._python_dispatch import TorchDispatchMode

# Of what is left over when views are told by their schema; a scalar stays on the CPU.
NOTHING = ("empty", "new_empty", "_unsafe_view", "promote_types", "scalar_tensor")


class Launches(TorchDispatchMode):
    """Notes the names of the operations inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        returned = [x.alias_info for x in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        name = function.overloadpacket.__name__
        if not is_view and not name.startswith(NOTHING):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
