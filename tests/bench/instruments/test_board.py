"""Board state and bus traffic of passes, from a driver, clocks and counters that are fake."""

import functools
from types import SimpleNamespace

import pytest
import torch

from bench.instruments import board
from bench.instruments.board import BoardWatch, PcieThroughput, count_traffic, reasons
from bench.instruments.driver import Driver, open_driver
from bench.instruments.timing import NotMeasured
from bench.schemas.common import Traffic
from bench.schemas.served import Board as BoardRecord
from bench.served import rounds as end_to_end_rounds
from bench.wall import step as steps
from bench.wall import table
from bench.wall.numbers import over_control, run_of
from bench.wall.record import run_record
from tests.bench.instruments.test_driver import WRAP, FakeNvml
from tests.bench.test_gpu_wall import SCHEMA as WALL_SCHEMA
from tests.bench.wall.example import example, limits
from tests.schemas import validator


class Board(FakeNvml):
    """A busy board that is held back by its power cap, on a link that every pass sends so many bytes over."""

    NVML_PCIE_UTIL_RX_BYTES = 1

    def __init__(self, per_pass=1000):
        super().__init__()
        self.total, self.per_pass = WRAP - 10, per_pass
        self.kilobytes = [40, 20, 30]
        self.sampled = 0

    def nvmlDeviceGetFieldValues(self, handle, fields):
        self._ask("nvmlDeviceGetFieldValues")
        return [self._field({198: self.total % WRAP, 197: 7}[field]) for field in fields]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x4 | 0x200

    def nvmlDeviceGetPcieThroughput(self, handle, counter):
        self._ask("nvmlDeviceGetPcieThroughput")
        assert counter == self.NVML_PCIE_UTIL_RX_BYTES
        self.sampled += 1
        return self.kilobytes[self.sampled % len(self.kilobytes)]

    def one_pass(self, seconds=0.25):
        self.clock.sleep(seconds)
        self.total += self.per_pass


@pytest.fixture
def nvml():
    return Board()


def watched(nvml, seconds=2.0):
    """The state of one pass of so many seconds."""
    watch = BoardWatch(Driver(nvml, "gpu"))
    watch.begin()
    watch.look()
    nvml.clock.sleep(seconds)
    return watch.end()


def test_a_pass_knows_clock_power_reasons_and_both_ends_of_its_energy(nvml):
    found = watched(nvml)
    assert found["why"] is None
    assert found["value"] == {
        "joules_before": 5000.0,
        "sm_mhz": 1980,
        "power_w": 650.5,
        "throttled": ["software power cap", "0x200"],
        "joules_after": 5160.0,  # 80 W
        "unknown": {},
    }
    validator(BoardRecord).validate(found)


def test_reasons_have_both_of_nvmls_names(nvml):
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x1 | 0x40
    assert watched(nvml)["value"]["throttled"] == ["idle", "hardware thermal slowdown"]
    assert reasons(0) == []


def test_what_the_board_does_not_say_is_none_with_its_reason(nvml):
    nvml.refused = {"nvmlDeviceGetTotalEnergyConsumption"}
    found = watched(nvml)["value"]
    assert found["joules_before"] is found["joules_after"] is None and found["sm_mhz"] == 1980
    why = "nvmlDeviceGetTotalEnergyConsumption: Not Supported"
    assert found["unknown"] == {"joules_before": why, "joules_after": why}
    watch = BoardWatch(open_driver(torch.device("cpu")))
    watch.begin()
    watch.look()
    assert watch.end() == {"value": None, "why": "device cpu has no NVIDIA driver"}


@pytest.mark.parametrize(
    ("row_bytes", "passes"),
    [(0, 4), (12_500_000, 4), (30_000_000, 2), (60_000_000, 1), (1, 4)],  # a second, or 50 MB of rows
)
def test_passes_are_repeated_until_there_is_something_to_see(nvml, row_bytes, passes):
    found = count_traffic(Driver(nvml, "gpu"), nvml.one_pass, row_bytes, nvml.clock)
    assert (found["value"], found["why"], found["fallback"]) == (1000, None, None)
    assert (found["passes"], found["seconds"], found["row_bytes"]) == (passes, 0.25 * passes, passes * row_bytes)
    validator(Traffic).validate(found)


@pytest.mark.parametrize(
    ("row_bytes", "per_pass", "counted_again"),
    [(60_000_000, 180_000_000, False), (60_000_000, 180_000_001, True), (0, 180_000_001, False)],
)
def test_far_more_than_the_rows_is_counted_again(nvml, row_bytes, per_pass, counted_again):
    nvml.per_pass = per_pass

    def one_pass():
        nvml.one_pass()
        nvml.per_pass = 70_000_000  # what came with the first does not come again

    found = count_traffic(Driver(nvml, "gpu"), one_pass, row_bytes, nvml.clock)
    assert found.get("first") == (per_pass if counted_again else None)
    if counted_again:
        assert (found["value"], found["passes"], found["row_bytes"]) == (70_000_000, 1, row_bytes)
    validator(Traffic).validate(found)


@pytest.mark.parametrize(("per_pass", "counted_again"), [(25_000_000, False), (25_000_001, True)])
def test_beside_few_rows_what_crosses_anyway_is_not_counted_again(per_pass, counted_again, nvml):
    """In four passes of a quarter of a second each."""
    nvml.per_pass = per_pass
    assert ("first" in count_traffic(Driver(nvml, "gpu"), nvml.one_pass, 1_000_000, nvml.clock)) is counted_again


def test_without_a_counter_throughput_is_sampled_for_a_second_and_says_so(nvml):
    nvml.refused = {"nvmlDeviceGetFieldValues"}
    found = count_traffic(Driver(nvml, "gpu"), nvml.one_pass, 60_000_000, nvml.clock)
    assert found["value"] is None and found["why"] == "nvmlDeviceGetFieldValues: Not Supported"
    assert (found["passes"], found["seconds"]) == (4, 1.0)
    fallback = found["fallback"]
    assert fallback["what"].startswith("nvmlDeviceGetPcieThroughput") and fallback["why"] is None
    samples = fallback["value"]["samples_bytes_per_s"]
    assert set(samples) <= {20_000, 30_000, 40_000} and min(samples) <= fallback["value"]["bytes_per_s"] <= max(samples)
    validator(Traffic).validate(found)


def test_without_both_nothing_is_run_and_nothing_is_guessed(nvml):
    nvml.refused = {"nvmlDeviceGetFieldValues", "nvmlDeviceGetPcieThroughput"}
    found = count_traffic(Driver(nvml, "gpu"), pytest.fail, 1, nvml.clock)
    assert (found["value"], found["passes"], found["fallback"]["value"]) == (None, 0, None)
    assert found["fallback"]["why"] == "nvmlDeviceGetPcieThroughput: Not Supported"
    validator(Traffic).validate(found)


def test_samples_are_averaged(nvml):
    nvml.kilobytes = [10, 20, 60]
    with PcieThroughput(Driver(nvml, "gpu"), nvml.clock) as rate:
        while nvml.sampled < 30:
            rate._thread.join(0.001)
    value = rate.received.value
    assert value["bytes_per_s"] == pytest.approx(sum(value["samples_bytes_per_s"]) / len(value["samples_bytes_per_s"]))
    assert len(value["samples_bytes_per_s"]) == nvml.sampled


# --- in the benchmarks ---------------------------------------------------------------------------------


def on_clock(nvml, monkeypatch):
    """Let benchmarks ask the fake driver, on its clock."""
    monkeypatch.setattr(board, "open_driver", lambda device: Driver(nvml, "gpu"))
    monkeypatch.setattr(board, "count_traffic", functools.partial(board.count_traffic, clock=nvml.clock))


def test_a_cpu_is_not_asked():
    counted = board.count_beside(torch.device("cpu"), pytest.fail, 1000, energy=True)
    assert counted == (None, (None, "a CPU: no board counter is read")) and counted.received is None


def test_the_counter_of_the_control_is_kept_and_taken_off(nvml, monkeypatch):
    """Steps mode: all runs, the backbone by itself too, over steps that receive 1,000 B without any rows."""
    on_clock(nvml, monkeypatch)
    results = example()
    step, runs = results["steps"][0], {}
    for name, received in (("no_engram", 1000), ("offload_uva", 1_600_000)):
        nvml.per_pass = received
        variant = steps.Variant(name, "in place" if name == "no_engram" else "prefetched")
        rows = 0 if name == "no_engram" else 1_600_000
        counted = board.count_beside(torch.device("cuda"), nvml.one_pass, rows, energy=False)
        assert counted.received == [received] and counted.energy == (None, "not asked for: --energy")
        record = run_record(variant, steps.Samples(), step, limits(False), "ab" * 32, counted, [])
        assert record["pcie"]["passes"] == 4 and record["bytes"]["counter"] == [received]
        runs[name] = record
        for number, run in enumerate(step["runs"]):
            if run["variant"] == name:
                step["runs"][number] = {**run, **{key: record[key] for key in ("pcie", "freed")}}
                step["runs"][number]["bytes"] = {**run["bytes"], "counter": record["bytes"]["counter"]}
                step["runs"][number]["bytes"]["counter_what"] = record["bytes"]["counter_what"]
    assert runs["no_engram"]["freed"] is None and runs["offload_uva"]["freed"] == step["table"]["bytes"]
    for run in step["runs"]:
        run.setdefault("freed", None)
    WALL_SCHEMA.validate(results)
    assert over_control(step, run_of(step, "offload_uva")) == 1_599_000
    with pytest.raises(NotMeasured, match=r"no counter sees this traffic|by another counter"):
        over_control(step, run_of(step, "resident"))
    text = table.step_table(results, step)
    line = next(line for line in text.splitlines() if line.startswith("offload_uva")).split()
    assert "1.599" in line and "less no_engram" in text and "freed" in text


def test_the_traffic_of_an_end_to_end_row_is_counted_with_its_rows(nvml, monkeypatch):
    on_clock(nvml, monkeypatch)
    rounds = object.__new__(end_to_end_rounds.Rounds)
    rounds._options = SimpleNamespace(energy=False)
    rounds._model = SimpleNamespace(device=torch.device("cuda"))
    rounds._server = SimpleNamespace(serve=lambda *given: nvml.one_pass())
    content = {"table": {"row_bytes": 264}, "rounds": [{"round": 0, "rows_requested": 100_000}]}
    rounds._case = SimpleNamespace(content=content)
    work = SimpleNamespace(round=SimpleNamespace(number=0))
    for name, passes in (("no_engram", 4), ("offload_prefetch", 2)):  # 26.4 MB a pass, 50 are enough
        prefetcher = None if name == "no_engram" else object()
        contender = end_to_end_rounds.Variant(name, "none", prefetcher=prefetcher)
        found = rounds._counted_beside(work, contender)["pcie"]
        assert (found["value"], found["passes"]) == (1000, passes)
