"""Streams and events in which everything happens at once: what is kept is the order that CUDA asks for.

An event is recorded before it is waited for; times are taken between timing events; no wait during capture; a stream
takes part in a capture once it has waited for an event of that capture, and must be waited for before the capture ends.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from tests.rehearsal import graphs
from tests.rehearsal.tensors import DEVICE, CudaError, synchronising


class Stream:
    """A queue whose work is done as soon as it is given."""

    def __init__(self, device: Any = None, priority: int = 0, **unused: Any) -> None:
        self.device, self.priority = DEVICE, priority
        self.cuda_stream = id(self)

    def __ne__(self, other: object) -> bool:
        """As torch's own, which says of None that it is no other stream."""
        return other is not None and self is not other

    __hash__ = object.__hash__

    def wait_event(self, event: Event) -> None:
        """What follows comes after the event."""
        graph = graphs.owner_of(self)
        if event.graph is not None:
            event.graph.wait(self, event)
        elif graph is not None and not event.external:
            raise CudaError("CUDA error: a captured stream waits for an event that was recorded outside of the capture")

    def wait_stream(self, other: Stream) -> None:
        """What follows comes after all that `other` has got."""
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """An event here."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits."""
        synchronising("Stream.synchronize")

    def query(self) -> bool:
        """Whether all is done."""
        synchronising("Stream.query")
        return True

    def __enter__(self) -> Stream:
        self._before = current()
        _local.stream = self
        return self

    def __exit__(self, *error: object) -> None:
        _local.stream = self._before


class Event:
    """A point in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, external: bool = False, **x: Any) -> None:
        self.timing, self.external = enable_timing, external
        self.at: float | None = None
        self.graph: Any = None
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Here, on the stream given or the current one."""
        stream = stream or current()
        self.graph = None if self.external else graphs.owner_of(stream)
        self.stream = stream
        self.at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """What the stream gets next comes after it."""
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits for it."""
        if graphs.capturing() is not None or self.graph is not None:
            raise CudaError("CUDA error: operation not permitted when stream is capturing (Event.synchronize)")

    def query(self) -> bool:
        """Whether it has happened."""
        self.synchronize()
        return True

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds between two timing events that were recorded."""
        if not (self.timing and other.timing):
            raise CudaError("Both events must be created with argument 'enable_timing=True'")
        if self.at is None or other.at is None:
            raise CudaError("Both events must be recorded before calculating elapsed time")
        return 1e3 * (other.at - self.at)


class use:
    """`torch.cuda.stream`."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = current()
        _local.stream = self._stream or self._before

    def __exit__(self, *error: object) -> None:
        _local.stream = self._before


_local = threading.local()
DEFAULT = Stream()


def current(device: Any = None) -> Stream:
    """The current stream of this thread."""
    return getattr(_local, "stream", DEFAULT)


def synchronize(device: Any = None) -> None:
    """`torch.cuda.synchronize`."""
    if graphs.any_capture():
        raise CudaError("CUDA error: operation not permitted when stream is capturing (synchronize)")
    if torch.device(device or "cuda").type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
