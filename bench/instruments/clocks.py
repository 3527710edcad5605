"""The clock of every benchmark: marks as the device that computes meets them, read once at the end.

clock = device_clock(device)
clock.begin(); clock.mark("join"); clock.mark("joined"); ...
for name, seconds in clock.end(): ...               # since the mark before
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Lap = tuple[str, float]


class Clock:
    """Marks of one stretch, for a device that computes while the host waits: the CPU.

    Args:
        now: the time, or for another device what stands for it.
    """

    def __init__(self, now: Callable[[], Any] = time.perf_counter) -> None:
        self._now = now

    def begin(self) -> None:
        """Start; the device must be idle, or the rest of its work is counted."""
        self._names: list[str] = []
        self._times = [self._now()]

    def mark(self, name: str) -> None:
        """What was given to the device so far is done here."""
        self._names.append(name)
        self._times.append(self._now())

    @property
    def begun(self) -> bool:
        """Whether the device has come to the begin."""
        return True

    def end(self) -> list[Lap]:
        """Wait for the device; name of each mark, and seconds since the one before."""
        # Of neighbours: an event's distance from a far one is no more exact than a microsecond.
        return list(zip(self._names, map(self._between, self._times, self._times[1:])))

    def _between(self, before: Any, after: Any) -> float:
        return after - before


class EventClock(Clock):
    """For CUDA: an event on the stream that is current at each mark.

    Args:
        event: makes one.
    """

    def __init__(self, event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        def recorded() -> Any:
            made = event()
            made.record()
            return made

        super().__init__(recorded)

    @property
    def begun(self) -> bool:
        """As Clock."""
        return self._times[0].query()

    def end(self) -> list[Lap]:
        """As Clock."""
        # Here and nowhere else: a pass of many steps is timed as a server runs it, the host ahead of the device.
        self._times[-1].synchronize()
        return super().end()

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1e3  # milliseconds


def device_clock(device: torch.device) -> Clock:
    """The clock that sees a device's work."""
    return EventClock() if device.type == "cuda" else Clock()


def total(spans: Sequence[Lap], name: str | None = None) -> float:
    """Seconds of all spans, or of those that end at marks of one name."""
    return sum(seconds for found, seconds in spans if name in (None, found))
