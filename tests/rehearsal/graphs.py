"""CUDA graphs: the operations that a capture meets are taped, and a replay runs them again into the same tensors.

Only what is given to a stream of the capture is taped; the other streams, and other threads, run on. Operations run
during capture, too, as a GPU's would not: when it ends, what they wrote over is put back, and what they made is filled
with a pattern, so that a caller who reads it without a replay gets garbage, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

POOL = (0, 1)
_ACTIVE: list[CUDAGraph] = []


def leaves(given: Any) -> Iterator[Any]:
    """What an operation is given, or gives, one by one; torch's pytree knows more containers, and takes much longer."""
    if isinstance(given, (list, tuple, dict)):
        for one in given.values() if isinstance(given, dict) else given:
            yield from leaves(one)
    else:
        yield given


def mapped(change: Callable[[Any], Any], given: Any) -> Any:
    """The same containers of changed leaves."""
    if isinstance(given, dict):
        return {name: mapped(change, one) for name, one in given.items()}
    if isinstance(given, list):
        return [mapped(change, one) for one in given]
    return tuple(mapped(change, one) for one in given) if isinstance(given, tuple) else change(given)


def capturing() -> CUDAGraph | None:
    """The graph that the current stream is captured into."""
    if not _ACTIVE:
        return None
    from tests.rehearsal.streams import current

    return owner_of(current())


def any_capture() -> bool:
    """Whether any stream is being captured."""
    return bool(_ACTIVE)


def owner_of(stream: Any) -> CUDAGraph | None:
    """The graph that a stream is captured into."""
    return next((graph for graph in _ACTIVE if stream in graph.streams), None)


class CUDAGraph:
    """A tape.

    Attributes:
        streams: that take part in the capture; the first began it.
        operations: what a replay runs.
        replays: how often it was.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.streams: list[Any] = []
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self._open: set[Any] = set()  # streams that joined, and that nobody has waited for since they got work
        self._before: dict[int, tuple[Any, Any]] = {}  # storages as they were when the capture first wrote to them
        self._ended = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """Begin, on the current stream, which must not be the default one."""
        from tests.rehearsal.streams import DEFAULT, current
        from tests.rehearsal.tensors import CudaError

        stream = current()
        if stream is DEFAULT:
            raise CudaError("CUDA graphs must be captured on a non-default stream")
        if owner_of(stream) is not None or self._ended:
            raise CudaError("CUDA error: this stream, or this graph, is captured already")
        self.streams = [stream]
        _ACTIVE.append(self)

    def capture_end(self) -> None:
        """End; every stream that joined must have been waited for."""
        from tests.rehearsal.tensors import CudaError

        if self not in _ACTIVE:
            raise CudaError("CUDA error: this graph is not being captured")
        _ACTIVE.remove(self)
        self._ended = True
        if self._open:
            raise CudaError(f"CUDA error: {len(self._open)} captured streams were not joined to the first")
        for storage, content in self._before.values():
            storage.copy_(content)
        self._before.clear()
        for _, args, kwargs, out in self.operations:
            _spoil(args, kwargs, out)

    def wait(self, waiting: Any, event: Any) -> None:
        """A stream waits for an event of this capture: it takes part from now on, and the event's stream is joined."""
        from tests.rehearsal.tensors import CudaError

        if self not in _ACTIVE:
            raise CudaError("CUDA error: this event was recorded during a capture that has ended")
        if waiting not in self.streams:
            self.streams.append(waiting)
            self._open.add(waiting)
        if event.stream is not waiting:
            self._open.discard(event.stream)

    def about_to_write(self, *given: Any) -> None:
        """Keep the content of all tensors that an operation may write to, until the capture ends."""
        for tensor in leaves(given):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._before:
                storage = tensor.untyped_storage()
                self._before[storage.data_ptr()] = storage, storage.clone()

    def tape(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Remember an operation that ran on the current stream."""
        from tests.rehearsal.streams import current

        if current() is not self.streams[0]:
            self._open.add(current())
        self.operations.append((func, args, kwargs, out))

    def pool(self) -> Any:
        """Of its memory, once it is captured."""
        from tests.rehearsal.tensors import CudaError

        if not self._ended:
            raise CudaError("Called CUDAGraph::pool() without a preceding successful capture.")
        return POOL

    def reset(self) -> None:
        """Let go of the tape."""
        self.operations = []

    def replay(self) -> None:
        """Run the operations again, into the tensors that they made."""
        from tests.rehearsal.tensors import CudaError

        if not self._ended:
            raise CudaError("Called CUDAGraph.replay without a preceding successful capture")
        self.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, out in self.operations:
                _again(func, args, kwargs, out)


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    made = func(*args, **kwargs)
    for kept, new in zip(leaves(out), leaves(made)):
        shared = (
            isinstance(kept, torch.Tensor) and kept.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
        )
        if isinstance(kept, torch.Tensor) and not shared:  # a view, and what was written in place, is there already
            kept.copy_(new)


def _spoil(args: Any, kwargs: Any, out: Any) -> None:
    """Fill what a captured operation made with a pattern: a GPU has not computed it yet."""
    given = {x.untyped_storage().data_ptr() for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    with torch.inference_mode():
        for made in leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                made.fill_(float("nan") if made.is_floating_point() else 85)
