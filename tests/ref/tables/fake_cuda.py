"""A stand-in for the parts of CUDA that tables use, for tests on a CPU: page-locking, streams, events, copies.

Copies run as late as they are allowed to: when somebody waits for them. A buffer that is filled again too early,
or rows that are used before they arrived, are then wrong every time instead of now and then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch

from engram_ref.rows import memory
from engram_ref.tables import staging

ALREADY_LOCKED = 712  # cudaErrorHostMemoryAlreadyRegistered


class FakeRuntime:
    """What `torch.cuda.cudart()` is used for; notes every call and refuses to lock once `refuse` pieces are locked.

    Like CUDA it refuses to lock a byte twice, also if what was locked there is unmapped by now. A test that leaves
    something locked fails (`conftest.nothing_stays_locked`).
    """

    made: ClassVar[list[FakeRuntime]] = []  # by the running test

    def __init__(self, refuse: int | None = None) -> None:
        self.made.append(self)
        self.registered: dict[int, int] = {}  # address: bytes
        self.calls: list[str] = []
        self.refuse = refuse

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0
        if len(self.registered) == self.refuse:
            return 2  # out of memory
        if any(address < first + held and first < address + nbytes for first, held in self.registered.items()):
            return ALREADY_LOCKED
        self.calls.append("register")
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        del self.registered[address]
        return 0


def install_runtime(monkeypatch: pytest.MonkeyPatch, refuse: int | None = None) -> FakeRuntime:
    """Put a stand-in for CUDA's runtime in place."""
    fake = FakeRuntime(refuse)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fake.calls.append("synchronize"))
    monkeypatch.setattr(memory, "_forget_cuda_error", lambda: fake.calls.append("forget"))
    return fake


class FakeStream:
    """Copies in the order they were asked for, done when an event after them is waited for."""

    def __init__(self, device: Any = None) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.recorded: list[int] = []  # addresses of tensors that were recorded on this stream

    def run_until(self, count: int) -> None:
        for target, source in self.copies[self.done : count]:
            target.copy_(source)
        self.done = max(self.done, count)

    def synchronize(self) -> None:
        self.run_until(len(self.copies))

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()


class FakeEvent:
    """A point in a stream."""

    def record(self, stream: FakeStream) -> None:
        self.stream, self.count = stream, len(stream.copies)

    def synchronize(self) -> None:
        self.stream.run_until(self.count)


def install_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeStream, FakeStream, FakeRuntime]:
    """Put a stand-in for a GPU in place: the side stream, the current stream and the runtime."""
    side, current = FakeStream(), FakeStream()

    entered = [current]

    @contextmanager
    def enter(stream: FakeStream) -> Iterator[None]:
        entered.append(stream)
        yield
        entered.pop()

    class OnGpu(torch.Tensor):
        """A tensor that is written by the stream that was entered."""

        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> OnGpu:  # type: ignore[override]
            assert non_blocking
            entered[-1].copies.append((self.as_subclass(torch.Tensor), source))
            return self

        def record_stream(self, stream: FakeStream) -> None:  # type: ignore[override]
            stream.recorded.append(self.data_ptr())

    def empty(made: staging.Delivery, count: int) -> torch.Tensor:
        values = torch.full((count, made.format.width), float("nan"), dtype=made.format.dtype)
        return values.as_subclass(OnGpu)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: side)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(staging.Delivery, "empty", empty)
    monkeypatch.setattr(staging, "check_out", lambda out, *expected: out)  # it is on no CUDA device
    return side, current, install_runtime(monkeypatch)
