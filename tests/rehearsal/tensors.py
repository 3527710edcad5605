"""Tensors that say they are on cuda:0: every operation passes `dispatch`, which refuses what a GPU would refuse.

A CudaTensor holds a CPU tensor with its values. Operations run on what is held; mixed devices, synchronisation during
capture, and copies that CUDA calls an invalid value raise. What a capture meets is taped by `graphs`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rehearsal import graphs, host_memory

DEVICE = torch.device("cuda", 0)
GENERATORS: set[int] = set()  # addresses of the random number generators that were made for cuda:0
_ON_EITHER = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "set_", "lift_fresh"}
_INDEXED = {"index", "index_put_", "_index_put_impl_"}
_TELL_THE_HOST = {
    "_local_scalar_dense", "equal", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "item",
}  # fmt: skip
_MATH_ATTENTION = 0  # of SDPBackend: made of plain operations, which both devices have


class CudaError(RuntimeError):
    """What a GPU would refuse."""


class SyncDebug:
    """`torch.cuda.set_sync_debug_mode`."""

    mode = "default"

    @classmethod
    def set(cls, mode: str) -> None:
        """default, warn or error."""
        cls.mode = mode


def synchronising(why: str) -> None:
    """The host waits for the device here."""
    if graphs.capturing() is not None:
        raise CudaError(f"CUDA error: operation not permitted when stream is capturing ({why})")
    if SyncDebug.mode == "warn":
        warnings.warn(f"called a synchronizing CUDA operation: {why}", stacklevel=2)
    if SyncDebug.mode == "error":
        raise CudaError(f"called a synchronizing CUDA operation: {why}")


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        assert not isinstance(held, CudaTensor) and held.device.type == "cpu", f"{type(held)} on {held.device}"
        made.held = held
        return made

    def data_ptr(self) -> int:
        """Address of the first byte."""
        return self.held.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        """Copies to the host."""
        synchronising("tolist")
        return self.held.tolist()

    def is_pinned(self, *args: Any) -> bool:
        """Only host memory is."""
        return False

    def record_stream(self, stream: Any) -> None:
        """Nothing is recycled here, so nothing has to be kept."""
        if not hasattr(stream, "wait_event"):
            raise TypeError(f"record_stream({stream!r}): not a stream")

    def __repr__(self, **unused: Any) -> str:
        return f"CudaTensor({self.held!r})"

    def __deepcopy__(self, memo: Any) -> CudaTensor:
        return self.detach().clone()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Dispatching(TorchDispatchMode):
    """Every operation of a thread, also those that have no tensor yet, such as torch.empty."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def is_cuda(device: Any) -> bool:
    """Whether an argument names the stand-in."""
    return device is not None and torch.device(device).type == "cuda"


def held(value: Any) -> Any:
    """What a CudaTensor holds; anything else as it is."""
    return value.held if isinstance(value, CudaTensor) else value


@functools.cache
def _is_made_of_others(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation of aten."""
    name = func._schema.name.split("::")[1]
    tensors = [x for x in graphs.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_cuda = [x for x in tensors if isinstance(x, CudaTensor)]
    if not on_cuda and not is_cuda(kwargs.get("device")):
        return _on_host(func, name, args, kwargs)
    if _is_made_of_others(func):
        with Dispatching():  # in inference mode, operations that are made of others come as they are
            return func.decompose(*args, **kwargs)
    _refuse_mixed(name, args, tensors, on_cuda)
    if name in _TELL_THE_HOST or (name == "repeat_interleave" and "output_size" not in kwargs):
        synchronising(name)
    if name == "_fused_sdp_choice":
        return _MATH_ATTENTION
    if name in ("_to_copy", "copy_"):
        _check_copy(name, args, kwargs)
    if name == "_to_copy" and not is_cuda(kwargs.get("device") or args[0].device):
        return func(args[0].held, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    with torch.inference_mode(False), torch.no_grad():  # a view of a plain tensor cannot be made an inference tensor
        return _on_cuda(func, args, kwargs, on_cuda)


def _on_host(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    pinned = kwargs.pop("pin_memory", False) or name == "_pin_memory"
    made = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
    return host_memory.RUNTIME.allocate(made) if pinned else made


def _on_cuda(func: Any, args: Any, kwargs: dict[str, Any], on_cuda: list[CudaTensor]) -> Any:
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in GENERATORS:
        raise CudaError("Expected a 'cuda' device type for generator but found 'cpu'")
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    plain = graphs.mapped(held, (args, kwargs))
    graph = graphs.capturing()
    if graph is not None and func._schema.is_mutable:
        graph.about_to_write(plain)
    out = func(*plain[0], **plain[1])
    if graph is not None:
        graph.tape(func, *plain, out)
    known = {id(x.held): x for x in on_cuda}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        made = known.get(id(value))
        if made is not None and (made.shape != value.shape or made.stride() != value.stride()):
            raise NotImplementedError(f"{func}: the stand-in has no operations that change a tensor's shape in place")
        return CudaTensor(value) if made is None else made

    return graphs.mapped(wrapped, out)


def _refuse_mixed(name: str, args: Any, tensors: list[torch.Tensor], on_cuda: list[CudaTensor]) -> None:
    """As on a GPU: numbers (tensors of no dimension) may come from the CPU, and copies and indices may cross."""
    if not on_cuda:
        return
    if name in _INDEXED:
        if not isinstance(args[0], CudaTensor):
            raise CudaError(f"indices should be either on cpu or on the same device as the indexed tensor ({name})")
        for index in args[1]:
            if index is not None and (index.dtype in (torch.bool, torch.uint8) or not isinstance(index, CudaTensor)):
                synchronising("an index that is a mask, or on the CPU")
        if name != "index" and not isinstance(args[2], CudaTensor) and args[2].dim():
            raise CudaError("expected the values of index_put_ on the device of self")
    if name in _ON_EITHER:
        return
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, CudaTensor) and x.dim()]
    if strangers:
        raise CudaError(f"Expected all tensors to be on the same device, {name} found cpu tensors of {strangers}")


def _check_copy(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """A copy between the host and the device: it may wait, and its host side may not lie across registrations."""
    if name == "copy_":
        target, source = args[0], args[1]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        crosses, host = isinstance(target, CudaTensor) != isinstance(source, CudaTensor), source
        host = target if isinstance(source, CudaTensor) else source
    else:
        host, blocking = args[0], not kwargs.get("non_blocking", False)
        crosses = is_cuda(kwargs.get("device")) != isinstance(host, CudaTensor) if kwargs.get("device") else False
    if not crosses:
        return
    if blocking:
        synchronising("a copy between host and device")
    if isinstance(host, CudaTensor) or not host.numel():
        return
    locked = host_memory.RUNTIME.holds(host.data_ptr(), host.untyped_storage().nbytes() and _span(host))
    if locked is host_memory.ACROSS:
        raise CudaError("CUDA error: invalid argument (one copy reaches over the end of a registered range)")
    if graphs.capturing() is not None and locked is not host_memory.INSIDE:
        raise CudaError("CUDA error: operation not permitted when stream is capturing (a copy of pageable memory)")


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first to its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))) * tensor.itemsize
