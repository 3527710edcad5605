"""A bus slowed in software: a table whose rows arrive no sooner than a bus of a given bandwidth would bring them.

    table = ThrottledTable(HostTable(rows, device), Bus.parse("4:56"))       # 4 GB/s, and 56 us before the first byte

Fetches share the bus: one begins when the one before has crossed it. The wait is the host's, at the join.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engram_ref.tables.base import Pending, Table

_SPIN_S = 3e-4  # the end of a wait is spun, because sleeping is no more exact than this
_SLOWEST = 1e3  # bytes per second; a step reads kilobytes at least, and is to end


@dataclass(frozen=True)
class Bus:
    """What a bus can do.

    Attributes:
        bytes_per_s: of payload; infinite is possible.
        latency_s: from the request to the first byte.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Bus:
        """GB/s, or GB/s:us; `inf:56` is a bus of 56 us and no limit of bandwidth.

        Raises:
            ValueError: it is neither, or a bus that brings nothing.
        """
        bandwidth, _, latency = text.partition(":")
        try:
            bus = cls(1e9 * float(bandwidth), 1e-6 * float(latency or 0))
        except ValueError:
            bus = cls(0.0)
        if not bus.bytes_per_s >= _SLOWEST or not 0 <= bus.latency_s < 1:
            raise ValueError(f"{text!r} must be GB/s or GB/s:us, such as 4, 0.5:20 or inf:56, and 1e-6 GB/s at least")
        return bus

    @property
    def finite_bytes_per_s(self) -> float | None:
        """The bandwidth; None where there is no limit, which JSON could not say."""
        return None if self.bytes_per_s == float("inf") else self.bytes_per_s

    def seconds(self, nbytes: int) -> float:
        """From the request of so many bytes until all have arrived."""
        return self.latency_s + nbytes / self.bytes_per_s

    def __str__(self) -> str:
        bandwidth = f"{self.bytes_per_s / 1e9:g} GB/s" if self.finite_bytes_per_s else ""
        latency = f"{1e6 * self.latency_s:g} us" if self.latency_s else ""
        return " + ".join(part for part in (bandwidth, latency) if part) or "as it is"


def rest(seconds: float) -> None:
    """Wait exactly: sleep for most of it, spin at the end."""
    until = time.perf_counter() + seconds
    if seconds > _SPIN_S:
        time.sleep(seconds - _SPIN_S)
    while time.perf_counter() < until:
        pass


class ThrottledTable(Table):
    """A table behind a slow bus.

    Args:
        behind: where the rows are; it stays the caller's to close.
        bus: how fast they may come.
        clock, sleep: the host's.
    """

    placement = "throttled"

    def __init__(
        self,
        behind: Table,
        bus: Bus,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = rest,
    ) -> None:
        super().__init__(behind.rows, behind.format, behind.device, behind.index_device)
        self.bus = bus
        self.waits = behind.waits
        self._behind = behind
        self._clock, self._sleep = clock, sleep
        self._busy_until = 0.0

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Begin to fetch; what comes back is not ready before the bus has brought it."""
        begin = max(self._clock(), self._busy_until)
        # Of all rows that are asked for, repeats included: so they are copied through staging.
        due = begin + self.bus.seconds(len(rows) * self.format.row_bytes)
        self._busy_until = due - self.bus.latency_s  # latencies overlap, bytes do not
        return _Delayed(self._behind.start(rows, out), due, self._clock, self._sleep)

    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored."""
        return self._behind.stored(rows)

    def _held(self) -> dict[str, int]:
        return self._behind.bytes_held()

    @property
    def bytes_copied(self) -> int:
        """Bytes that copies have brought to an accelerator."""
        return self._behind.bytes_copied

    def trim(self) -> None:
        """Give back staging memory."""
        self._behind.trim()


@dataclass(frozen=True)
class _Delayed:
    pending: Pending
    due: float
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def wait(self) -> Tensor:
        """The rows, when the bus would have brought them."""
        # It suits tables that the CPU gathers from, at whose join the host waits anyway.
        while (left := self.due - self.clock()) > 0:
            self.sleep(left)
        return self.pending.wait()
