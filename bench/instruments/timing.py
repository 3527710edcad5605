"""Wall time: warm-up, interleaving, raw samples, paired ratios with an interval, and the noise floor.

Cases are run in rounds, A B C, B C A, ..., so that whatever the machine does meanwhile happens to all of them
and none is always first; ratios are taken within a round. The noise floor is a case measured against itself.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LEAST_SAMPLES = 3  # fewer have no spread to speak of
_RESAMPLES = 2000
_Case = tuple[str, Callable[[], object]]


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every case, `repeats` samples each, in rounds; warm-up rounds are run and not kept."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: measure at least once")
    samples: dict[str, list[float]] = {name: [] for name in cases}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_number in range(-warmup, repeats):
            for name, run in _rotated(list(cases.items()), round_number):
                start = clock()
                run()
                elapsed = clock() - start
                if round_number >= 0:
                    samples[name].append(elapsed)
            gc.collect()  # between rounds, never inside a sample
    finally:
        if collecting:
            gc.enable()
    return samples


def _rotated(cases: list[_Case], by: int) -> list[_Case]:
    return cases[by % len(cases) :] + cases[: by % len(cases)]


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(samples)
    return {
        "median": statistics.median(ordered),
        "q25": quantile(ordered, 0.25),
        "q75": quantile(ordered, 0.75),
    }


def paired_ratio(samples: Sequence[float], baseline: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of sample / baseline round by round, with a 95 % bootstrap interval of that median.

    The ratio is resolved only where the interval leaves out 1.
    """
    if len(samples) != len(baseline) or not samples:
        raise ValueError(f"{len(samples)} samples against {len(baseline)}: a paired ratio needs equally many, and one")
    low, high = _interval(tuple(a / b for a, b in zip(samples, baseline)), seed)
    return {"median": statistics.median(a / b for a, b in zip(samples, baseline)), "low": low, "high": high}


@functools.lru_cache(maxsize=4096)
def _interval(ratios: tuple[float, ...], seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of their median; reports ask for the same one again and again."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return quantile(medians, 0.025), quantile(medians, 0.975)


def is_resolved(ratio: Mapping[str, float], floor: Mapping[str, float], samples: int) -> bool:
    """Whether a paired ratio says anything: it leaves out 1 and all of the noise floor, on enough samples.

    `floor` is the paired ratio of the baseline against itself: what lies within it is noise.
    """
    apart = ratio["low"] > max(1.0, floor["high"]) or ratio["high"] < min(1.0, floor["low"])
    return apart and samples >= LEAST_SAMPLES


def quantile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of the samples lie below; linear interpolation between the two nearest samples."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class NotMeasured(ValueError):
    """A number that these results cannot give; the text says why."""


_Rows = np.ndarray  # row numbers [N], int64


@dataclass(frozen=True)
class Way:
    """One way to do the same: `prepare` is not timed, `run` is, with what `prepare` made of the rows."""

    prepare: Callable[[_Rows], Any]
    run: Callable[[Any], object]


def prepared_samples(
    ways: Mapping[str, Way], draw: Callable[[], _Rows], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every way, one sample a round, each way in turn the first; the rows of a round are the same for all.

    The first round is warm-up and is not kept.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: measure at least once")
    samples: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds + 1):
            rows = draw()
            for name in names[number % len(names) :] + names[: number % len(names)]:
                given = ways[name].prepare(rows)
                start = clock()
                ways[name].run(given)
                elapsed = clock() - start
                if number:
                    samples[name].append(elapsed)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples


FLUSHED = 1 << 28  # bytes: more than the caches of most machines, and of a GPU, hold


class CacheFlush:
    """Writes memory that nobody needs, on the host and on an accelerator.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = np.zeros(FLUSHED // 8, np.int64)
        on_device = device.type == "cuda"
        self._device = torch.zeros(FLUSHED // 8, dtype=torch.int64, device=device) if on_device else None

    def __call__(self) -> None:
        """Flush, and wait until it is done."""
        self._host += 1
        if self._device is not None:
            self._device.add_(1)
            torch.cuda.synchronize(self._device.device)
