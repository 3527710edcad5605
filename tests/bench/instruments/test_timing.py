"""The clock is fake, so every sample is known."""

import gc
from types import SimpleNamespace

import pytest

from bench.instruments import timing
from bench.instruments.timing import interleave, paired_ratio, rounds, summary
from bench.wall import step
from bench.wall.step import Shape
from engram_ref.cli import time_left


class FakeClock:
    """Time passes only while a case runs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def case(self, name, durations):
        left = iter(durations)

        def run():
            self.calls.append(name)
            self.now += next(left)

        return run


def test_warm_up_is_dropped_and_rounds_rotate():
    clock = FakeClock()
    cases = {"a": clock.case("a", [100, 1, 2, 3]), "b": clock.case("b", [100, 4, 5, 6])}
    samples = interleave(cases, repeats=3, warmup=1, clock=clock)
    assert samples == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert clock.calls == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_the_collector_is_off_inside_and_back_on_after():
    states = []
    interleave({"a": lambda: states.append(gc.isenabled())}, repeats=2)
    assert states == [False, False, False]
    assert gc.isenabled()


def test_rounds_begin_with_another_thing_each_and_say_where_they_are_now_and_then(monkeypatch):
    seconds = iter([0.0, 1.0, 2.5, 3.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(seconds))
    said = []
    found = list(rounds("abc", [-1, 0, 5], "letters", said.append))
    assert found == [(-1, ["c", "a", "b"]), (0, ["a", "b", "c"]), (5, ["c", "a", "b"])]
    assert said == [f"letters: round 1 of 6  {time_left(2.5, 1, 3)}"] and gc.isenabled() and gc.get_freeze_count() == 0


def test_a_step_says_how_long_the_rest_will_take(monkeypatch):
    monkeypatch.setattr(timing, "_SAY_SECONDS", -1.0)
    said = []
    shape = Shape("decode", 4, 1)
    stepper, control = SimpleNamespace(shape=shape, run=lambda *_: None), step.control()
    step.measure(stepper, [control], {control.label: step.Samples()}, 2, 1, said.append, lambda: None)
    assert [line.partition("  ")[0] for line in said] == [
        f"{shape}: {where}" for where in ("warm-up", "round 1 of 2", "round 2 of 2")
    ]
    assert "left" not in said[0] and all(line.endswith(" s left") for line in said[1:])


def test_no_repeats_is_refused():
    with pytest.raises(ValueError, match="measure at least once"):
        interleave({"a": lambda: None}, repeats=0)


def test_summary():
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "q25": 2.0, "q75": 4.0}
    assert summary([2.0]) == {"median": 2.0, "q25": 2.0, "q75": 2.0}


def test_paired_ratio_cancels_what_both_met():
    drift = [1.0, 2.0, 10.0, 3.0, 5.0]
    ratio = paired_ratio([1.5 * d for d in drift], drift)
    assert ratio == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_paired_ratio_interval_holds_the_median_and_repeats():
    a, b = [1.0, 1.4, 0.9, 1.2, 1.1, 1.3], [1.0] * 6
    ratio = paired_ratio(a, b)
    assert ratio["low"] < ratio["median"] < ratio["high"]
    assert ratio == paired_ratio(a, b)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], [])])
def test_unpaired_samples_are_refused(a, b):
    with pytest.raises(ValueError, match="equally many"):
        paired_ratio(a, b)
