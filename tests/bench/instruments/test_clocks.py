"""The benchmarks' clock, on a host and a device that are fake: every time is known beforehand."""

import pytest
import torch

from bench.instruments.clocks import Clock, EventClock, device_clock, total


class Device:
    """Work that the host only gives; the device reaches an event when all work given before is done."""

    def __init__(self):
        self.given = 0.0
        self.log = []

    def now(self):
        return self.given

    def event(self):
        return Event(self)


class Event:
    """An event as torch.cuda.Event(enable_timing=True)."""

    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.given
        self.device.log.append("record")

    def synchronize(self):
        assert self.at == self.device.given, "not the last event"
        self.device.log.append("synchronize")

    def elapsed_time(self, other):
        self.device.log.append("read")
        return (other.at - self.at) * 1e3  # milliseconds


@pytest.mark.parametrize("kind", ["host", "events"])
def test_laps_are_the_time_between_marks_and_the_device_is_waited_for_once(kind):
    device = Device()
    clock = Clock(device.now) if kind == "host" else EventClock(device.event)
    for _ in range(2):  # a second stretch starts anew
        device.log.clear()
        device.given += 7
        clock.begin()
        for name, seconds in (("join", 0.25), ("joined", 0.5), ("join", 0.125), ("joined", 2.0), ("end", 1.0)):
            device.given += seconds
            clock.mark(name)
        laps = clock.end()
        assert laps == [("join", 0.25), ("joined", 0.5), ("join", 0.125), ("joined", 2.0), ("end", 1.0)]
        assert (total(laps), total(laps, "joined")) == (3.875, 2.5)
        assert device.log == ([] if kind == "host" else ["record"] * 6 + ["synchronize"] + ["read"] * 5)


def test_each_device_has_its_clock():
    assert type(device_clock(torch.device("cpu"))) is Clock
    assert type(device_clock(torch.device("cuda"))) is EventClock
