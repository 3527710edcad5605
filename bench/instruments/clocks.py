"""A clock for a whole pass of many steps: marks as the device meets them, read once at the end.

    clock = pass_clock(device)
    clock.begin(); clock.mark("join"); clock.mark("joined"); ...
    for name, seconds in clock.end(): ...               # since the mark before

`StepTimer` waits for the device after every step; a server does not, and lets the host run ahead. Times are differences
of neighbouring events, since an event's distance from a far one is no more exact than a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Span = tuple[str, float]


class PassClock(Protocol):
    """Marks of one pass."""

    def begin(self) -> None:
        """Start; the device is idle."""
        ...

    def mark(self, name: str) -> None:
        """What was given to the device so far is done here."""
        ...

    def end(self) -> list[Span]:
        """Wait for the device; name of each mark, and seconds since the one before."""
        ...


class HostPassClock:
    """For a device that computes while the host waits."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def begin(self) -> None:
        """Start."""
        self._names: list[str] = []
        self._times = [self._clock()]

    def mark(self, name: str) -> None:
        """Remember now."""
        self._times.append(self._clock())
        self._names.append(name)

    def end(self) -> list[Span]:
        """As PassClock."""
        return [(name, b - a) for name, a, b in zip(self._names, self._times, self._times[1:])]


class EventPassClock:
    """For CUDA: an event on the current stream for each mark.

    Args:
        event: makes one.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))

    def begin(self) -> None:
        """Start; the stream must be idle, or its rest is counted."""
        self._names: list[str] = []
        self._events = [self._record()]

    def mark(self, name: str) -> None:
        """Record an event."""
        self._names.append(name)
        self._events.append(self._record())

    def end(self) -> list[Span]:
        """As PassClock."""
        self._events[-1].synchronize()
        pairs = zip(self._names, self._events, self._events[1:])
        return [(name, before.elapsed_time(event) / 1e3) for name, before, event in pairs]

    def _record(self) -> Any:
        event = self._event()
        event.record()
        return event


def pass_clock(device: torch.device) -> PassClock:
    """The clock that sees a device's work."""
    return EventPassClock() if device.type == "cuda" else HostPassClock()


class StepTimer(Protocol):
    """When things happen within one step, as the device that computes sees it."""

    def begin(self) -> None:
        """Start the clock; the device is idle."""
        ...

    def mark(self, name: str) -> None:
        """Remember that the work given so far was done, and that given next was not."""
        ...

    def end(self) -> dict[str, float]:
        """Seconds from begin to every mark and to `end`; waits for the device, once."""
        ...


class HostTimer:
    """A StepTimer for a device that computes while the host waits: the CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def begin(self) -> None:
        """Start the clock."""
        self._marks: dict[str, float] = {}
        self._start = self._clock()

    def mark(self, name: str) -> None:
        """Remember now."""
        _check_mark(name, self._marks)
        self._marks[name] = self._clock()

    def end(self) -> dict[str, float]:
        """Seconds from begin to every mark and to `end`."""
        self._marks["end"] = self._clock()
        return {name: at - self._start for name, at in self._marks.items()}


class EventTimer:
    """A StepTimer for CUDA: events on the stream that is current at each mark; the host waits only at the end.

    Args:
        event: makes one.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))

    def begin(self) -> None:
        """Record the first event; the stream must be idle, or its rest is counted."""
        self._marks: dict[str, Any] = {}
        self._start = self._record()

    def mark(self, name: str) -> None:
        """Record an event."""
        _check_mark(name, self._marks)
        self._marks[name] = self._record()

    def end(self) -> dict[str, float]:
        """Record the last event, wait for it, and read them all."""
        self._marks["end"] = self._record()
        self._marks["end"].synchronize()
        return {name: self._start.elapsed_time(event) / 1e3 for name, event in self._marks.items()}

    def _record(self) -> Any:
        event = self._event()
        event.record()
        return event


def _check_mark(name: str, marks: dict[str, Any]) -> None:
    if name in marks or name == "end":
        raise ValueError(f"mark {name!r}: give each mark of a step another name, and none of them 'end'")


def step_timer(device: torch.device) -> StepTimer:
    """The timer that sees a device's work."""
    return EventTimer() if device.type == "cuda" else HostTimer()
