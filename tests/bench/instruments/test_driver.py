"""What the driver is asked, with a driver, clocks and events that are fake: every answer is known beforehand."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench.instruments import bandwidth, driver
from bench.instruments.bandwidth import _bandwidth, _copy_samples, copy_bandwidth
from bench.instruments.clocks import Clock as HostClock
from bench.instruments.driver import Driver, EnergyMeter, PcieCounter, describe, open_driver

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WRAP = 1 << 32


class Clock:
    """Time that passes only when told, and what a board draws meanwhile: `watts` of the time since the start."""

    def __init__(self):
        self.now = 0.0
        self.joules = 5000.0
        self.watts = lambda now: 80.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.joules += seconds * self.watts(self.now + seconds / 2)
        self.now += seconds


class FakeError(Exception):
    """What the fake module raises."""


class FakeNvml:
    """A module like pynvml: a GPU at 17:00.0 whose counters follow `received` and the clock."""

    NVMLError = FakeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_VALUE_TYPE_UNSIGNED_INT, NVML_VALUE_TYPE_UNSIGNED_LONG, NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 1, 2, 3
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES, NVML_FI_DEV_PCIE_COUNT_RX_BYTES = 197, 198

    def __init__(self, clock=None):
        self.clock = clock or Clock()
        self.received = [WRAP - 1000]  # bytes at each reading; the last one stays
        self.refused = set()
        self.field_return, self.field_type = 0, 1

    def _ask(self, name):
        if name in self.refused:
            raise FakeError("Not Supported")

    def nvmlInit(self):
        self._ask("nvmlInit")

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):
        return f"at {bus_id}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return f"named {uuid}"

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"number {index}"

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        self._ask("nvmlDeviceGetCurrPcieLinkGeneration")
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle):
        return 16

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        self._ask("nvmlDeviceGetMaxPcieLinkGeneration")
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return 8

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId="00000000:17:00.0")

    def nvmlDeviceGetFieldValues(self, handle, fields):
        self._ask("nvmlDeviceGetFieldValues")
        value = self.received.pop(0) if len(self.received) > 1 else self.received[0]
        return [self._field({198: value, 197: 7}[field]) for field in fields]

    def _field(self, number):
        values = SimpleNamespace(uiVal=number % WRAP, ulVal=number, ullVal=number)
        return SimpleNamespace(nvmlReturn=self.field_return, valueType=self.field_type, value=values)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return round(1e3 * self.clock.joules)


@pytest.fixture
def nvml():
    return FakeNvml()


@pytest.fixture
def numa(tmp_path):
    """Where the system says which NUMA node a PCI device is on; gives the file."""
    file = tmp_path / "0000:17:00.0" / "numa_node"
    file.parent.mkdir()
    file.write_text("1\n")
    return file


@pytest.fixture
def gpu(monkeypatch):
    """torch's side of a GPU."""
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=150 << 30, pci_domain_id=0, pci_bus_id=0x17, pci_device_id=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(driver, "_busy", lambda device: nullcontext())
    return properties


def test_all_that_the_driver_knows(nvml, numa):
    answers = driver._answers(Driver(nvml, "gpu"), numa.parents[1])
    assert {name: answer.value for name, answer in answers.items()} == {
        "driver": "580.1",
        "pcie_generation": 5,
        "pcie_width": 16,
        "clocks_mhz": {"sm": 1980, "memory": 3201},
        "power_limit_w": 700.0,
        "numa_node": 1,
    }
    assert [answer.why for answer in answers.values()] == [None] * 6


def test_what_the_driver_does_not_know_has_a_reason_and_the_rest_is_there(nvml, numa, gpu):
    nvml.refused = {"nvmlDeviceGetCurrPcieLinkGeneration"}
    numa.write_text("-1\n")
    answers = driver._answers(Driver(nvml, "gpu"), numa.parents[1])
    assert answers["pcie_generation"] == (None, "nvmlDeviceGetCurrPcieLinkGeneration: Not Supported")
    assert answers["numa_node"][0] is None
    assert "says -1" in answers["numa_node"].why
    assert answers["pcie_width"] == (16, None)


def test_a_gpu_is_described_with_its_unknowns(nvml, gpu):
    del FakeNvml.nvmlDeviceGetEnforcedPowerLimit  # an older package
    try:
        described = describe(CUDA, nvml)
    finally:
        FakeNvml.nvmlDeviceGetEnforcedPowerLimit = lambda self, handle: 700_000
    assert described["name"] == "NVIDIA H200"
    assert described["memory_bytes"] == 150 << 30
    assert described["driver"] == "580.1"
    assert described["power_limit_w"] is None
    assert described["unknown"]["power_limit_w"] == "this nvidia-ml-py has no nvmlDeviceGetEnforcedPowerLimit"
    assert set(described["unknown"]) <= {"power_limit_w", "numa_node"}


def test_a_cpu_has_no_accelerator(nvml):
    assert describe(CPU, nvml) is None
    with PcieCounter(open_driver(CPU, nvml)) as counter:
        pass
    assert counter.received == (None, "device cpu has no NVIDIA driver")
    assert EnergyMeter(open_driver(CPU)).measure(pytest.fail) == (None, "device cpu has no NVIDIA driver")


def test_without_the_package_the_reason_is_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert driver._answers(open_driver(CUDA))["driver"] == (None, "NVML is not installed: pip install nvidia-ml-py")


def test_a_driver_that_is_not_loaded_is_a_reason(nvml, gpu):
    nvml.refused = {"nvmlInit"}
    assert driver._answers(open_driver(CUDA, nvml))["driver"] == (None, "NVML: Not Supported")


def test_the_same_gpu_is_found_in_both_numberings(nvml, gpu, monkeypatch):
    assert driver._handle(nvml, gpu) == "at 00000000:17:00.0"
    assert driver._handle(nvml, SimpleNamespace(uuid="ab-c")) == "named GPU-ab-c"
    with pytest.raises(driver._Unanswered, match="which of several GPUs"):
        driver._handle(nvml, SimpleNamespace())
    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", lambda: 1)
    assert driver._handle(nvml, SimpleNamespace()) == "number 0"


@pytest.mark.parametrize(("kind", "number"), [(1, WRAP - 1), (2, WRAP - 1), (3, WRAP + 5)])
def test_field_values_are_read_by_their_type(nvml, kind, number):
    nvml.field_type, nvml.received = kind, [number]
    assert Driver(nvml).field(driver._RX) == number


def test_field_values_that_mean_nothing_are_not_read(nvml):
    nvml.field_type = 0  # floating point
    with pytest.raises(driver._Unanswered, match="value type 0"):
        Driver(nvml).field(driver._RX)
    nvml.field_return = 3
    with pytest.raises(driver._Unanswered, match=r"PCIE_COUNT_RX_BYTES: 3"):
        Driver(nvml).field(driver._RX)


def counted(nvml, readings, seconds=0.001):
    """A counter that reads `readings` one after the other; its thread sleeps."""
    nvml.received = list(readings)
    counter = PcieCounter(Driver(nvml, "gpu"), interval_s=3600.0, clock=nvml.clock)
    with counter:
        for _ in readings[2:]:
            nvml.clock.sleep(seconds)
            counter._poll()
        nvml.clock.sleep(seconds)
    return counter


def test_bytes_are_summed_over_wraps(nvml):
    counter = counted(nvml, [WRAP - 1000, WRAP - 1, 500, 500, 4_000_000_000, 100])
    # 999 to the last byte before the wrap, 501 over it, none, and once around again.
    assert counter.received == (999 + 501 + 0 + (4_000_000_000 - 500) + (WRAP - 4_000_000_000 + 100), None)


def test_the_difference_of_first_and_last_would_be_wrong(nvml):
    readings = [10, 3_000_000_000, 1_000_000_000, 20]
    assert counted(nvml, readings).received.value == 2 * WRAP + 10 != readings[-1] - readings[0]


def test_a_wrap_that_may_have_gone_unseen_is_no_number(nvml):
    # Generation 4, 8 lanes: at most 16 GB/s, so 2^32 bytes take 268 ms.
    assert counted(nvml, [0, 100], seconds=0.26).received == (100, None)
    value, why = counted(nvml, [0, 100], seconds=0.28).received
    assert value is None
    assert why == "the counter was not read for 280 ms: at 16 GB/s it can wrap unseen in 268 ms"
    nvml.refused = {"nvmlDeviceGetMaxPcieLinkGeneration"}  # then the fastest link there is
    assert counted(nvml, [0, 100], seconds=0.05).received.value is None
    assert counted(nvml, [0, 100], seconds=0.03).received.value == 100


def test_a_wide_counter_that_goes_back_is_no_number(nvml):
    nvml.field_type = 3
    assert counted(nvml, [2 * WRAP, 3 * WRAP]).received == (WRAP, None)
    value, why = counted(nvml, [2 * WRAP, 5]).received
    assert value is None
    assert "went back" in why


def test_the_thread_reads_while_the_block_runs(nvml):
    nvml.received = [3_000_000_000 * number % WRAP for number in range(20)]
    with PcieCounter(Driver(nvml, "gpu"), interval_s=0.001, clock=nvml.clock) as counter:
        assert counter.received.value is None
        while len(nvml.received) > 1:
            counter._thread.join(0.001)
    assert counter.received == (19 * 3_000_000_000, None)
    assert not counter._thread.is_alive()


def test_a_driver_that_fails_later_ends_the_count_with_its_reason(nvml):
    nvml.received = [0, 100]
    with PcieCounter(Driver(nvml, "gpu"), interval_s=0.001, clock=nvml.clock) as counter:
        nvml.refused = {"nvmlDeviceGetFieldValues"}
        counter._thread.join()
    assert counter.received == (None, "nvmlDeviceGetFieldValues: Not Supported")


def metered(nvml, watts, step_s=0.5):
    """A measurement of 10 s idle, 10 s of steps and 10 s idle, of a board that draws `watts`."""
    nvml.clock.watts = watts
    meter = EnergyMeter(Driver(nvml, "gpu"), clock=nvml.clock, sleep=nvml.clock.sleep)
    return meter.measure(lambda: nvml.clock.sleep(step_s))


def test_energy_is_what_steps_add_to_idle(nvml):
    energy, why = metered(nvml, lambda now: 300.0 if 10 < now < 20 else 80.0)
    assert why is None
    assert nvml.clock.now == pytest.approx(30)
    expected = {
        "joules_per_step": (300 - 80) * 10 / 20,
        "steps": 20,
        "seconds": 10,
        "joules": 3000,
        "idle_w": 80,
        "spread_w": 0,
    }
    assert energy == pytest.approx(expected, abs=0.01)  # the counter gives millijoules


def test_energy_within_the_spread_of_idle_is_no_number(nvml):
    def cooling(now, load):  # 100 W at first, 80 W in the end
        return 100.0 - 20.0 * now / 30 + (load if 10 < now < 20 else 0.0)

    for load in (0.0, 19.0):
        nvml.clock.now = 0.0
        energy, why = metered(nvml, lambda now, load=load: cooling(now, load))
        assert energy is None
        assert why == f"not resolvable: {90 + load:.1f} W under load, 90.0 W idle, and idle readings differ by 19.3 W"
    nvml.clock.now = 0.0
    assert metered(nvml, lambda now: cooling(now, 20.0)).value["joules_per_step"] == pytest.approx(10, abs=0.01)


def test_an_energy_counter_that_stands_still_is_no_number(nvml):
    assert metered(nvml, lambda now: 0.0).value is None


def test_a_board_without_an_energy_counter_is_not_loaded(nvml):
    nvml.refused = {"nvmlDeviceGetTotalEnergyConsumption"}
    meter = EnergyMeter(Driver(nvml, "gpu"), clock=nvml.clock, sleep=nvml.clock.sleep)
    assert meter.measure(pytest.fail) == (None, "nvmlDeviceGetTotalEnergyConsumption: Not Supported")


def test_short_energy_windows_are_refused(nvml):
    with pytest.raises(ValueError, match=r"window_s=9\.9: the counter is too coarse for less than 10 s"):
        EnergyMeter(Driver(nvml), window_s=9.9)


def test_copies_in_ram_are_timed(monkeypatch):
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "COPIES", 5)
    limits = copy_bandwidth(CPU)
    copy = limits["copy"]
    assert limits["gather"] is None
    assert (copy["what"], copy["bytes"], len(copy["samples_s"])) == ("memcpy in RAM", 1 << 20, 5)
    assert copy["bytes_per_s"] == pytest.approx((1 << 20) / sorted(copy["samples_s"])[2])
    assert 1e8 < copy["bytes_per_s"] < 1e12  # a slow disk's pace, and more than any RAM's


def test_warm_up_copies_are_not_kept():
    clock = Clock()
    durations = iter([9.0, 5.0, 1.0, 2.0, 3.0])
    samples = _copy_samples(lambda: clock.sleep(next(durations)), 3, HostClock(clock))
    assert samples == [1.0, 2.0, 3.0]
    assert _bandwidth("x", 10, samples)["bytes_per_s"] == 5.0
