"""Put the stand-in in CUDA's place, for the whole process: import this before anything that asks torch for a device.

python -m tests.rehearsal COMMAND ...       does
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.interpreter import repeat_nothing
from tests.rehearsal import graphs, streams, tensors
from tests.rehearsal.host_memory import RUNTIME
from tests.rehearsal.tensors import DEVICE, CudaError, CudaTensor, Dispatching, held, is_cuda, synchronising

_FREE, _TOTAL = 78 << 30, 80 << 30


class Properties:
    """Of a card that there is none of."""

    name = "stand-in for a GPU"
    total_memory, L2_cache_size, multi_processor_count = _TOTAL, 50 << 20, 132
    major, minor = 9, 0
    pci_domain_id, pci_bus_id, pci_device_id = 0, 5, 0


class Generator(torch._C.Generator):
    """A source of random numbers that knows its device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._on = DEVICE if is_cuda(device) else torch.device("cpu")
        if is_cuda(device):
            tensors.GENERATORS.add(self._cdata)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it was made for."""
        return self._on


class on_device:
    """`torch.cuda.device`: there is one."""

    def __init__(self, device: Any) -> None:
        if not isinstance(device, int) and torch.device(device).type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextlib.contextmanager
def captured(graph: graphs.CUDAGraph, pool: Any = None, stream: Any = None, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    with streams.use(stream or streams.Stream()):
        graph.capture_begin()
        try:
            yield
        finally:
            graph.capture_end()


def _replace_torch_cuda() -> None:
    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = (lambda: 1), (lambda: 0)
    cuda.init = cuda._lazy_init = lambda: None
    cuda.Stream, cuda.Event, cuda.stream, cuda.device = streams.Stream, streams.Event, streams.use, on_device
    cuda.current_stream, cuda.default_stream = streams.current, lambda device=None: streams.DEFAULT
    cuda.synchronize, cuda.empty_cache = streams.synchronize, lambda: None
    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle = graphs.CUDAGraph, captured, lambda: (0, 1)
    cuda.is_current_stream_capturing = lambda: graphs.capturing() is not None
    cuda.cudart = lambda: RUNTIME
    cuda.mem_get_info = lambda device=None: (_FREE, _TOTAL)
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda device=None: 0
    cuda.get_device_properties, cuda.get_device_name = (
        (lambda device=None: Properties()),
        lambda d=None: Properties.name,
    )
    cuda.get_device_capability = lambda device=None: (Properties.major, Properties.minor)
    cuda.set_sync_debug_mode = tensors.SyncDebug.set
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    cuda.get_rng_state, cuda.set_rng_state = (lambda device=0: torch.get_rng_state()), lambda *state: None
    cuda._sleep = lambda cycles: None


def _replace_in_torch() -> None:
    torch.Generator = Generator
    plain_tensor = torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> Any:
        """torch.tensor makes its numbers on the CPU, where no operation sees the device it is asked for."""
        if not is_cuda(kwargs.get("device")):
            return plain_tensor(*args, **kwargs)
        synchronising("torch.tensor with a CUDA device copies pageable memory")
        return CudaTensor(plain_tensor(*args, **{**kwargs, "device": "cpu"}))

    torch.tensor = tensor

    def is_pinned(self: torch.Tensor, *args: Any) -> bool:
        return RUNTIME.holds(self.untyped_storage().data_ptr(), 1) != "in no range"

    torch.Tensor.is_pinned = is_pinned
    torch.Tensor.pin_memory = lambda self, *args: RUNTIME.allocate(self.clone())
    plain_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """With the device's index: without one, torch would ask the guard, which knows meta only."""
        args = tuple(DEVICE if isinstance(x, (str, torch.device)) and is_cuda(x) else x for x in args)
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = DEVICE
        return plain_to(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False, **kw: self.to(DEVICE, non_blocking=non_blocking)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def _guard_cuda_as_meta() -> None:
    """A build of torch for CPUs has no guard of CUDA devices, which indexing asks for: meta's, which is idle, serves.

    Guards stand in an array of pointers, by the number of the device's type.
    """
    from torch._C._autograd import DeviceType

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 32).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[DeviceType.CUDA.value] = guards[DeviceType.Meta.value]


def _dispatch_in_every_thread() -> None:
    Dispatching().__enter__()
    run = threading.Thread.run

    def dispatching_run(thread: threading.Thread) -> None:
        with Dispatching():
            run(thread)

    threading.Thread.run = dispatching_run


def _launch_kernels_on_what_is_held() -> None:
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        for given in graphs.leaves((args, kwargs)):
            host = isinstance(given, torch.Tensor) and not isinstance(given, CudaTensor)
            if host and given.numel() and not RUNTIME.holds_all(given.data_ptr(), tensors._span(given)):
                raise CudaError(f"a kernel was given {given.numel()} values at an address that no GPU can read")
        plain = graphs.mapped(held, (args, kwargs))

        def again(*plain_args: Any, **plain_kwargs: Any) -> None:
            with _disable_current_modes():
                launch(self, *plain_args, **plain_kwargs)

        graph = graphs.capturing()
        if graph is None:
            again(*plain[0], **plain[1])
        else:  # not run: it makes no tensor, and one that waits for the CPU would wait in vain
            graph.tape(again, *plain, None)

    GridExecutor.__call__ = launched


def report() -> str:
    """What is left when the process ends: registrations that nobody ended, and those that were refused."""
    return f"stand-in: {len(RUNTIME.registered)} ranges still registered, {len(RUNTIME.refused)} calls refused"


@functools.cache
def install() -> None:
    """Once, however often it is called."""
    repeat_nothing()
    _guard_cuda_as_meta()
    _replace_torch_cuda()
    _replace_in_torch()
    _launch_kernels_on_what_is_held()
    _dispatch_in_every_thread()
    atexit.register(lambda: print(report(), *RUNTIME.refused, sep="\n", file=sys.stderr))
