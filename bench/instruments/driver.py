"""What the driver says: the machine, PCIe bytes, energy.

    described = describe(device)                        # None on a CPU
    driver = open_driver(device)
    with PcieCounter(driver) as counter: ...            # then counter.received.value, or .why it is None
    EnergyMeter(driver).measure(step)                   # likewise

NVML is asked through `pynvml` (package nvidia-ml-py), which only this file imports and which may be missing. What
cannot be known is None with a reason, never an estimate.
"""

from __future__ import annotations

import importlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from bench.instruments.code_digest import code_sha256
from bench.instruments.results import results_head
from bench.schemas.common import Accelerator, Device, DeviceOrigin

LEAST_WINDOW_S = 10.0  # the energy counter moves in steps of up to 0.1 s: 1 % of this
_IDLE_PARTS = 10  # readings per idle window, from which its spread is taken
_WRAP = 1 << 32  # NVML's PCIe byte counters are 32 bits wide: 77 ms of a fast link
_RX = "NVML_FI_DEV_PCIE_COUNT_RX_BYTES"
_FASTEST_LINK = (6, 16)  # generation and lanes, where the driver does not name its own
_BUSY_BYTES, _BUSY_COPIES = 256 << 20, 2000  # a quarter of a second at 4 TB/s, in which the driver is asked
_PCI_DEVICES = Path("/sys/bus/pci/devices")


class Answer(NamedTuple):
    """A value, or None and why there is none."""

    value: Any
    why: str | None = None


class _Unanswered(Exception):
    """The driver did not say; the message is the reason."""


class Driver:
    """What NVML knows about one GPU.

    Args:
        nvml: the module, or None where there is none.
        handle: NVML's handle of the GPU.
        why: the reason, where `nvml` is None.
    """

    def __init__(self, nvml: Any, handle: Any = None, why: str = "") -> None:
        self._nvml = nvml
        self._handle = handle
        self._why = why

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer of NVML's function `question` about this GPU; raises _Unanswered."""
        return self._call(question, self._handle, *arguments)

    def version(self) -> Any:
        """Version of the driver; raises _Unanswered."""
        return _text(self._call("nvmlSystemGetDriverVersion"))

    def joules(self) -> float:
        """Energy of the whole board since its driver was loaded; raises _Unanswered."""
        return float(self.ask("nvmlDeviceGetTotalEnergyConsumption")) / 1e3  # millijoules

    def constant(self, name: str) -> Any:
        """A constant of NVML; raises _Unanswered."""
        self._require(name)
        return getattr(self._nvml, name)

    def field(self, name: str) -> int:
        """An unsigned integer that NVML calls a field value; raises _Unanswered."""
        (field,) = self.ask("nvmlDeviceGetFieldValues", [self.constant(name)])
        if field.nvmlReturn != 0:  # of this value; the call has succeeded all the same
            raise _Unanswered(f"{name}: {self._nvml.NVMLError(field.nvmlReturn)}")
        kinds = {
            self._nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
            self._nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
            self._nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        }
        if field.valueType not in kinds:
            raise _Unanswered(f"{name}: of value type {field.valueType}, not an unsigned integer")
        return int(getattr(field.value, kinds[field.valueType]))

    def _call(self, question: str, *arguments: Any) -> Any:
        self._require(question)
        try:
            return getattr(self._nvml, question)(*arguments)
        except self._nvml.NVMLError as error:
            raise _Unanswered(f"{question}: {error}") from error

    def _require(self, name: str) -> None:
        if self._nvml is None:
            raise _Unanswered(self._why)
        if not hasattr(self._nvml, name):
            raise _Unanswered(f"this nvidia-ml-py has no {name}")


def open_driver(device: torch.device, nvml: Any = None) -> Driver:
    """The driver's side of a device; where it cannot be asked, every answer will say why.

    Args:
        nvml: a module with pynvml's functions instead of pynvml.
    """
    if device.type != "cuda":
        return Driver(None, why=f"device {device} has no NVIDIA driver")
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError:
        return Driver(None, why="NVML is not installed: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
        return Driver(nvml, _handle(nvml, torch.cuda.get_device_properties(device)))
    except nvml.NVMLError as error:
        return Driver(None, why=f"NVML: {error}")
    except _Unanswered as error:
        return Driver(None, why=str(error))


def _handle(nvml: Any, properties: Any) -> Any:
    """NVML's handle of the device with these torch properties."""
    if hasattr(properties, "pci_bus_id"):  # not by its number: the two count devices in different orders
        bus, slot = properties.pci_bus_id, properties.pci_device_id
        return nvml.nvmlDeviceGetHandleByPciBusId(f"{properties.pci_domain_id:08x}:{bus:02x}:{slot:02x}.0")
    if hasattr(properties, "uuid"):
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    if nvml.nvmlDeviceGetCount() == 1:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    raise _Unanswered(f"torch {torch.__version__} does not say which of several GPUs it uses; take a newer one")


def describe(device: torch.device, nvml: Any = None) -> Accelerator | None:
    """The accelerator, asked while it is busy; None on a CPU.

    What is not known is None, and `unknown` says why: by name of the entry.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    with _busy(device):  # an idle device has low clocks and a slow link
        answers = _answers(open_driver(device, nvml))
    found = {
        "name": properties.name,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "memory_bytes": properties.total_memory,
        **{name: found.value for name, found in answers.items()},
        "unknown": {name: found.why for name, found in answers.items() if found.why is not None},
    }
    return cast(Accelerator, found)  # the driver's answers are what they are


def device_head(benchmark: str, device: torch.device, configuration: dict[str, Any], *modules: str) -> DeviceOrigin:
    """How the results of a device begin: `bench.instruments.results.results_head`, with the device's own description.

    Args:
        configuration: that two runs must share, to go on with each other's results.
        modules: whose code the results depend on.
    """
    about, accelerator = results_head(benchmark), describe(device)
    machine = about["environment"]
    return {
        "benchmark": benchmark,
        "device": cast(Device, device.type),
        "device_name": accelerator["name"] if accelerator else machine["cpu"],
        "configuration": configuration,
        "code_sha256": code_sha256(*modules),
        "environment": {**machine, "accelerator": accelerator, "page_size": os.sysconf("SC_PAGE_SIZE")},
        "git": about["git"],
    }


@contextmanager
def _busy(device: torch.device) -> Iterator[None]:
    """Copies within the device while the block runs."""
    source = torch.empty(_BUSY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(_BUSY_COPIES):
        target.copy_(source)
    try:
        yield
    finally:
        torch.cuda.synchronize(device)
        del source, target
        torch.cuda.empty_cache()


def _answers(driver: Driver, pci_devices: Path = _PCI_DEVICES) -> dict[str, Answer]:
    questions: dict[str, Callable[[], Any]] = {
        "driver": driver.version,
        "pcie_generation": lambda: driver.ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        "pcie_width": lambda: driver.ask("nvmlDeviceGetCurrPcieLinkWidth"),
        "clocks_mhz": lambda: {
            "sm": driver.ask("nvmlDeviceGetClockInfo", driver.constant("NVML_CLOCK_SM")),
            "memory": driver.ask("nvmlDeviceGetClockInfo", driver.constant("NVML_CLOCK_MEM")),
        },
        "power_limit_w": lambda: driver.ask("nvmlDeviceGetEnforcedPowerLimit") / 1e3,  # milliwatts
        "numa_node": lambda: _numa_node(_text(driver.ask("nvmlDeviceGetPciInfo").busId), pci_devices),
    }
    return {name: answer(question) for name, question in questions.items()}


def answer(question: Callable[[], Any]) -> Answer:
    """What asking the driver gives, or why it gives nothing."""
    try:
        return Answer(question())
    except _Unanswered as error:
        return Answer(None, str(error))


def _text(answer: str | bytes) -> str:
    """Some releases of pynvml give bytes."""
    return answer.decode() if isinstance(answer, bytes) else answer


def _numa_node(bus_id: str, pci_devices: Path) -> int:
    """NUMA node of the PCI device."""
    # NVML writes the domain with eight digits, the system with four.
    file = pci_devices / bus_id.lower()[-12:] / "numa_node"
    try:
        node = int(file.read_text())
    except OSError as error:
        raise _Unanswered(f"{file}: {error.strerror}") from error
    if node < 0:
        raise _Unanswered(f"{file} says {node}: the system does not know")
    return node


class PcieCounter:
    """Bytes that the GPU received over its PCIe link while the block ran, by the driver's own counter.

    It counts whatever crosses the link, commands and packet headers too. A thread reads it every `interval_s`; where it
    was held up for too long, the answer is None.

    Attributes:
        received: bytes, once the block has ended.
    """

    def __init__(
        self, driver: Driver, interval_s: float = 0.01, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._driver = driver
        self._interval_s = interval_s
        self._clock = clock
        self.received = Answer(None, "the block has not ended")

    def __enter__(self) -> PcieCounter:
        self._why: str | None = None
        self._total, self._longest = 0, 0.0
        self._last: tuple[int, float] | None = None  # value, and when
        self._poll()  # the count at the begin, whenever the thread gets to run
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    @property
    def works(self) -> bool:
        """Whether the driver has answered so far."""
        return self._why is None

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        why = self._why or self._unseen_wrap()
        self.received = Answer(None if why else self._total, why)

    def _watch(self) -> None:
        while self._why is None and not self._stop.wait(self._interval_s):
            self._poll()

    def _poll(self) -> None:
        if self._why is not None:
            return
        try:
            value, now = self._driver.field(_RX), self._clock()
            if self._last is not None:
                last, then = self._last
                self._total += _grown(last, value)
                self._longest = max(self._longest, now - then)
            self._last = value, now
        except _Unanswered as error:
            self._why = str(error)

    def _unseen_wrap(self) -> str | None:
        # A counter that went round once more than it was read shows nothing of it.
        rate = _link_rate(self._driver)
        if self._longest * rate < _WRAP:
            return None
        return (
            f"the counter was not read for {self._longest * 1e3:.0f} ms: at {rate / 1e9:.0f} GB/s it can wrap "
            f"unseen in {_WRAP / rate * 1e3:.0f} ms"
        )


def _grown(last: int, value: int) -> int:
    """By how much a counter grew that may have wrapped once."""
    if value >= last:
        return value - last
    if last >= _WRAP:  # a wider counter, which does not wrap
        raise _Unanswered(f"the PCIe counter went back from {last} to {value}")
    return value - last + _WRAP


def _link_rate(driver: Driver) -> float:
    """Bytes per second that the link cannot exceed: 0.25 GB/s a lane, doubled with each generation."""
    try:
        # Not the link as it is now: an idle one is slow, and becomes faster while the block runs.
        generation = driver.ask("nvmlDeviceGetMaxPcieLinkGeneration")
        lanes = driver.ask("nvmlDeviceGetMaxPcieLinkWidth")
    except _Unanswered:
        generation, lanes = _FASTEST_LINK
    return 0.25e9 * 2 ** (generation - 1) * lanes


class EnergyMeter:
    """Energy of the whole board for one step, above what it draws when idle.

    Args:
        driver: its total energy counter is read.
        window_s: length of the loaded window and of the idle ones before and after it.
        clock, sleep: the host's.
    """

    def __init__(
        self,
        driver: Driver,
        window_s: float = LEAST_WINDOW_S,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if window_s < LEAST_WINDOW_S:
            raise ValueError(f"window_s={window_s}: the counter is too coarse for less than {LEAST_WINDOW_S:.0f} s")
        self._driver = driver
        self._window_s = window_s
        self._clock = clock
        self._sleep = sleep

    def measure(self, step: Callable[[], object]) -> Answer:
        """Repeat `step` for a window, between two idle ones.

        Args:
            step: ends synchronised with the device.

        Returns:
            joules_per_step (above idle), steps, seconds, joules (all of them), idle_w and spread_w; None where the
            power under load exceeds the idle power by no more than the idle readings differ among themselves.
        """
        try:
            # Before and after, so that what drifts meanwhile is part of the spread.
            idle = self._idle_watts()
            steps, seconds, joules = self._load(step)
            idle += self._idle_watts()
        except _Unanswered as error:
            return Answer(None, str(error))
        idle_w, spread_w = statistics.mean(idle), max(idle) - min(idle)
        load_w = joules / seconds
        if load_w - idle_w <= spread_w:
            why = f"{load_w:.1f} W under load, {idle_w:.1f} W idle, and idle readings differ by {spread_w:.1f} W"
            return Answer(None, f"not resolvable: {why}")
        return Answer(
            {
                "joules_per_step": (load_w - idle_w) * seconds / steps,
                "steps": steps,
                "seconds": seconds,
                "joules": joules,
                "idle_w": idle_w,
                "spread_w": spread_w,
            }
        )

    def _load(self, step: Callable[[], object]) -> tuple[int, float, float]:
        """Steps, seconds and joules of a loaded window."""
        joules, start, steps = self._driver.joules(), self._clock(), 0
        while self._clock() - start < self._window_s:
            step()
            steps += 1
        return steps, self._clock() - start, self._driver.joules() - joules

    def _idle_watts(self) -> list[float]:
        """Mean power of every part of an idle window."""
        watts = []
        for _ in range(_IDLE_PARTS):
            joules, start = self._driver.joules(), self._clock()
            self._sleep(self._window_s / _IDLE_PARTS)
            watts.append((self._driver.joules() - joules) / (self._clock() - start))
        return watts
