"""Wall time: warm-up, interleaving, raw samples, paired ratios with an interval, and the noise floor.

The noise floor is a case measured against itself.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from bench.instruments.intervals import median_interval
from bench.instruments.words import signed_percent
from engram_ref.cli import time_left

if TYPE_CHECKING:
    import torch

LEAST_SAMPLES = 3  # fewer have no spread to speak of
_SAY_SECONDS = 2.0  # between two lines of progress
_Thing = TypeVar("_Thing")
_Other = TypeVar("_Other")


def rounds(
    things: Sequence[_Thing], numbers: Sequence[int], what: str = "", tell: Callable[[str], object] = lambda text: None
) -> Iterator[tuple[int, list[_Thing]]]:
    """Each round's number and all things in its order: A B C, B C A, ...; nothing is collected inside of a round.

    Args:
        numbers: of the rounds, ascending; those of warm-up rounds are negative.
        what: is measured, for people.
        tell: progress, every few seconds: which round begins, and how long the others will take.
    """
    collecting = gc.isenabled()
    gc.disable()
    # Between rounds the collector looks only at what has come about since now: to look at everything that transformers
    # has loaded takes half a second, and cools every cache.
    gc.freeze()
    began = said = time.perf_counter()
    try:
        for done, number in enumerate(numbers):
            if (at := time.perf_counter()) - said > _SAY_SECONDS:
                where = f"round {number + 1} of {numbers[-1] + 1}" if number >= 0 else "warm-up"
                tell(f"{what}: {where}  {time_left(at - began, done, len(numbers))}")
                said = at
            # Whatever the machine does meanwhile happens to all of them, and none is always first.
            first = number % len(things)
            yield number, [*things[first:], *things[:first]]
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every case, `repeats` samples each, in rounds; warm-up rounds are run and not kept."""
    ways = {name: Prepared(lambda _, run=run: run, lambda run: run()) for name, run in cases.items()}  # type: ignore[misc]
    return prepared_samples(ways, lambda: None, repeats, warmup, clock)


@dataclass(frozen=True)
class Prepared:
    """One way to do the same: `prepare` is not timed, `run` is, with what `prepare` made of the round's input."""

    prepare: Callable[[Any], Any]
    run: Callable[[Any], object]


def prepared_samples(
    ways: Mapping[str, Prepared],
    draw: Callable[[], Any],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every way, one sample a round; what is drawn for a round, rows for instance, is the same for all."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: measure at least once")
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number, turn in rounds(list(ways.items()), range(-warmup, repeats)):
        drawn = draw()
        for name, way in turn:
            given = way.prepare(drawn)
            start = clock()
            way.run(given)
            elapsed = clock() - start
            if number >= 0:
                samples[name].append(elapsed)
    return samples


def median_and_spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the values that a fifth and four fifths of the samples lie below."""
    return statistics.median(samples), quantile(samples, 0.2), quantile(samples, 0.8)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(samples)
    return {"median": statistics.median(ordered), "q25": quantile(ordered, 0.25), "q75": quantile(ordered, 0.75)}


def paired_ratio(samples: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Median of sample / baseline round by round, with a 95 % bootstrap interval of that median.

    The ratio is resolved only where the interval leaves out 1.
    """
    if len(samples) != len(baseline) or not samples:
        raise ValueError(f"{len(samples)} samples against {len(baseline)}: a paired ratio needs equally many, and one")
    ratios = tuple(a / b for a, b in zip(samples, baseline))
    low, high = median_interval(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high}


class NotMeasured(ValueError):
    """A number that these results cannot give; the text says why."""


def unless_missing(number: Callable[[], _Thing], instead: _Other) -> _Thing | _Other:
    """A number, or what stands where these results cannot give it."""
    try:
        return number()
    except NotMeasured:
        return instead


class Overhead(NamedTuple):
    """Extra time as a share of a baseline's (0.03 is 3 %), with the 95 % interval of that median."""

    median: float
    low: float
    high: float
    resolved: bool

    @property
    def interval(self) -> str:
        """Its ends, in signed per cent."""
        return f"[{signed_percent(self.low)}, {signed_percent(self.high)}]"

    def __str__(self) -> str:
        """Median and interval, or that it is not resolved."""
        return f"{signed_percent(self.median) if self.resolved else 'not resolved'} {self.interval}"

    @property
    def in_percent(self) -> tuple[float, float, float]:
        """Median, low and high."""
        return 100 * self.median, 100 * self.low, 100 * self.high


def overhead(ratio: Mapping[str, float], noise: Callable[[], Mapping[str, float]], samples: int) -> Overhead:
    """What a paired ratio to a baseline says.

    It is not resolved where the interval holds 1 or reaches into the noise floor, on fewer than three samples, and
    where there is no noise floor to hold it against.

    Args:
        noise: gives the paired ratio of the baseline against itself, or raises NotMeasured.
        samples: that the ratio was taken of.
    """
    try:
        floor = noise()
    except NotMeasured:
        resolved = False
    else:  # what lies within the floor is noise
        apart = ratio["low"] > max(1.0, floor["high"]) or ratio["high"] < min(1.0, floor["low"])
        resolved = apart and samples >= LEAST_SAMPLES
    return Overhead(ratio["median"] - 1, ratio["low"] - 1, ratio["high"] - 1, resolved)


def noise_interval(floor: Mapping[str, float]) -> str:
    """A noise floor in words, in per cent."""
    low, high = (signed_percent(floor[end] - 1) for end in ("low", "high"))
    return f"noise floor: resident against itself [{low}, {high}] %"


def quantile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of the samples lie below; linear interpolation between the two nearest samples."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


FLUSHED = 1 << 28  # bytes: more than the caches of most machines, and of a GPU, hold


class CacheFlush:
    """Writes memory that nobody needs, on the host and on an accelerator.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = np.zeros(FLUSHED // 8, np.int64)
        import torch  # here: the toy has no torch, and measures wall time, too

        on_device = device.type == "cuda"
        self._device = torch.zeros(FLUSHED // 8, dtype=torch.int64, device=device) if on_device else None
        self._wait = torch.cuda.synchronize  # kept: torch is imported here alone

    def __call__(self) -> None:
        """Flush, and wait until it is done."""
        self._host += 1
        if self._device is not None:
            self._device.add_(1)
            self._wait(self._device.device)
