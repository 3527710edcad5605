"""What the whole board does while passes run: clock, power, what slows it, its energy, and what crosses its PCIe link.

    watch = BoardWatch(open_driver(device))
    watch.begin(); ...; watch.look(); ...; watch.end()      # before a pass, while the device is busy, after it
    traffic = count_traffic(driver, one_pass, row_bytes)    # over as many passes as it takes to see the rows
    count_beside(device, one_pass, row_bytes, energy=True)      # traffic and energy of passes that are not timed

Everything is read, nothing is estimated: what the driver does not say is None, with its reason.
"""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.instruments.driver import Answer, Driver, EnergyMeter, PcieCounter, answer, open_driver
from bench.schemas.common import Fallback, Traffic

ENOUGH_BYTES = 50_000_000  # of rows, so that what else crosses the link is small beside them
MOST_ASKED = 3  # times the bytes of the rows: more is no rounding to lines of memory, and is counted again
BESIDE_ROWS = 100_000_000  # bytes that may cross beside few rows: a pass at batch 1 receives 15 MB without any
ENOUGH_S = 1.0  # after which there are enough passes in any case
THROUGHPUT = "nvmlDeviceGetPcieThroughput, windows of 20 ms"
_RX = "NVML_PCIE_UTIL_RX_BYTES"
_KILOBYTE = 1000
# Of NVML's bit mask; what is not a reason to run slower than a busy GPU would.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
_MASKS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")  # new name, old name


class BoardWatch:
    """The board's state in one pass.

    Args:
        driver: of the board.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def begin(self) -> None:
        """Before the pass."""
        self._seen: dict[str, Answer] = {"joules_before": answer(self._driver.joules)}

    def look(self) -> None:
        """While the device works on what it was given, and the host has nothing left to do but wait."""
        driver = self._driver
        self._seen["sm_mhz"] = answer(lambda: driver.ask("nvmlDeviceGetClockInfo", driver.constant("NVML_CLOCK_SM")))
        self._seen["power_w"] = answer(lambda: driver.ask("nvmlDeviceGetPowerUsage") / 1e3)
        self._seen["throttled"] = self._throttled()

    def end(self) -> dict[str, Any]:
        """After the pass, when the device has done everything.

        Returns:
            `value` and `why`. The value has sm_mhz, power_w, throttled (a list of reasons), joules_before, joules_after
            (of the board since its driver was loaded) and `unknown`: why any of them is None. Where the driver says
            nothing at all, the value is None.
        """
        self._seen["joules_after"] = answer(self._driver.joules)
        unknown = {name: found.why for name, found in self._seen.items() if found.why is not None}
        if len(unknown) == len(self._seen) and len(set(unknown.values())) == 1:  # one reason for all: nobody answers
            return {"value": None, "why": next(iter(unknown.values()))}
        return {"value": {**{name: found.value for name, found in self._seen.items()}, "unknown": unknown}, "why": None}

    def _throttled(self) -> Answer:
        found = Answer(None, "not asked")
        for question in _MASKS:
            found = answer(functools.partial(self._driver.ask, question))
            if found.why is None:
                return Answer(reasons(found.value))
        return found


def reasons(mask: int) -> list[str]:
    """The names of the bits in NVML's mask of what keeps clocks down; unknown bits by their number."""
    bits = [1 << place for place in range(mask.bit_length()) if mask >> place & 1]
    return [REASONS.get(bit, f"{bit:#x}") for bit in bits]


class PcieThroughput:
    """Bytes per second that the GPU received while the block ran, by samples of NVML's own windows of 20 ms.

    A fallback where the driver has no byte counter.

    Attributes:
        received: bytes_per_s (mean of the samples), samples_bytes_per_s and seconds, once the block has ended.
    """

    def __init__(self, driver: Driver, clock: Callable[[], float] = time.perf_counter) -> None:
        self._driver, self._clock = driver, clock
        self.received = Answer(None, "the block has not ended")

    def __enter__(self) -> PcieThroughput:
        self._samples: list[float] = []
        self._why: str | None = None
        self._begin = self._clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._why is not None:
            self.received = Answer(None, self._why)
            return
        mean = statistics.mean(self._samples)
        seconds = self._clock() - self._begin
        self.received = Answer({"bytes_per_s": mean, "samples_bytes_per_s": self._samples, "seconds": seconds})

    def _watch(self) -> None:
        """Sample until the block ends."""
        while self._why is None:
            # Without a pause: the driver's call lasts as long as its window.
            found = answer(
                lambda: self._driver.ask("nvmlDeviceGetPcieThroughput", self._driver.constant(_RX)) * _KILOBYTE
            )
            self._why = found.why
            if found.why is None:  # of a part of the time: between two windows nobody looks
                self._samples.append(float(found.value))
            if self._stop.is_set():  # asked last, so that there is one sample at least
                return


def count_traffic(
    driver: Driver, one_pass: Callable[[], object], row_bytes: int, clock: Callable[[], float] = time.perf_counter
) -> Traffic:
    """What the GPU received over PCIe in a pass, counted over several: until 50 MB of rows were asked for, or a second.

    Far more than the rows is counted a second time: it may be something that happens once.

    Args:
        one_pass: ends synchronised with the device.
        row_bytes: of the rows that a pass asks for; 0 for a pass without any.
        clock: the host's.

    Returns:
        value: bytes of a pass by the driver's counter, or None, and `why`.
        first: what was counted before, where that was counted again.
        passes, seconds, row_bytes: of the stretch that was counted.
        fallback: where there is no counter, bytes per second and what they were measured with; else None.
    """
    received, passes, seconds = _count(driver, one_pass, row_bytes, clock)
    first = None
    if received.value is not None and received.value > max(MOST_ASKED * passes * row_bytes, BESIDE_ROWS) and row_bytes:
        first = round(received.value / passes)
        received, passes, seconds = _count(driver, one_pass, row_bytes, clock)
    total, why = received
    fallback: Fallback | None = None
    if total is None:
        with PcieThroughput(driver, clock) as rate:
            # For a whole second, however many bytes: what is sampled is a rate.
            passes, seconds = _repeat(one_pass, 0, None, clock) if answers(driver) else (0, 0.0)
        fallback = {"what": THROUGHPUT, "value": rate.received.value, "why": rate.received.why}
    found: Traffic = {
        "value": None if total is None else round(total / passes),
        "why": why,
        "passes": passes,
        "seconds": seconds,
        "row_bytes": passes * row_bytes,
        "fallback": fallback,
    }
    return found if first is None else {**found, "first": first}


def _count(
    driver: Driver, one_pass: Callable[[], object], row_bytes: int, clock: Callable[[], float]
) -> tuple[Answer, int, float]:
    """What the driver counted, over how many passes, and how long they took."""
    with PcieCounter(driver) as counter:
        # Where there is no counter, passes would tell nothing.
        passes, seconds = _repeat(one_pass, row_bytes, ENOUGH_BYTES, clock) if counter.works else (0, 0.0)
    return counter.received, passes, seconds


def answers(driver: Driver) -> bool:
    """Whether the driver samples PCIe throughput at all."""
    return answer(lambda: driver.ask("nvmlDeviceGetPcieThroughput", driver.constant(_RX))).why is None


def _repeat(
    one_pass: Callable[[], object], row_bytes: int, enough: int | None, clock: Callable[[], float]
) -> tuple[int, float]:
    """Run passes until a second is over, or enough bytes of rows were asked for; how many, and how long they took."""
    begin, passes = clock(), 0
    while True:
        one_pass()
        passes += 1
        seconds = clock() - begin
        if seconds >= ENOUGH_S or (enough is not None and passes * row_bytes >= enough):
            return passes, seconds


class Beside(NamedTuple):
    """What the accelerator's driver counted over passes that are not timed, since reading disturbs.

    Attributes:
        traffic: from `count_traffic`; None on a CPU.
        energy: of `EnergyMeter`, or why there is none.
    """

    traffic: Traffic | None
    energy: Answer

    @property
    def received(self) -> list[int] | None:
        """Bytes received over PCIe in a pass, by the driver's counter."""
        return None if self.traffic is None or self.traffic["value"] is None else [self.traffic["value"]]


def count_beside(device: torch.device, one_pass: Callable[[], object], row_bytes: int, energy: bool) -> Beside:
    """Bytes received over PCIe in a pass, and with `energy` its joules.

    Args:
        one_pass: ends synchronised with the device; not called on a CPU.
        row_bytes: of the rows that a pass asks for.
    """
    if device.type == "cpu":
        return Beside(None, Answer(None, "a CPU: no board counter is read"))
    driver = open_driver(device)
    traffic = count_traffic(driver, one_pass, row_bytes)
    return Beside(traffic, EnergyMeter(driver).measure(one_pass) if energy else Answer(None, "not asked for: --energy"))
