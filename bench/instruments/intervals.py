"""The bootstrap interval of a median, exactly: what infinitely many resamples would give, and none is drawn.

    low, high = median_interval([1.02, 0.98, 1.01])

A resample of n samples draws n with replacement. How many of its draws are among the k least samples is binomial, so
the chance that its median is a given sample, or lies halfway between two, is a formula of n alone (Maritz and Jarrett
1978; Efron 1979). Drawing takes longer, and gives another interval for every seed.
"""

from __future__ import annotations

import functools
import math

import numpy as np

_TAIL = 0.025  # left out at each end of 95 %
_FAR = 8  # standard deviations: a middle draw that far from the middle has a chance below 1e-15


@functools.lru_cache(maxsize=4096)
def median_interval(samples: tuple[float, ...]) -> tuple[float, float]:
    """The 95 % percentile interval of the median of some samples; reports ask for the same one again and again.

    Raises:
        ValueError: no sample, or one that is no finite number, of which there is no order.
    """
    if not samples or not np.isfinite(samples).all():
        raise ValueError(f"{len(samples)} samples, some of them no numbers: there is no median")
    lower, upper, chances = _middle_draws(len(samples))
    ordered = np.sort(samples)
    medians = (ordered[lower] + ordered[upper]) / 2
    order = np.argsort(medians, kind="stable")
    ends = np.searchsorted(np.cumsum(chances[order]), (_TAIL, 1 - _TAIL))
    low, high = medians[order][ends].tolist()
    return low, high


@functools.cache
def _middle_draws(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two middle draws of a resample (of an odd number one, twice): by rank, [P] each, and their chances, [P]."""
    # Ranks too far from the middle to matter are left out: a binomial deviates there by sqrt(count) / 2.
    half, far = count // 2, math.ceil(_FAR / 2 * math.sqrt(count)) + 1
    edges = np.arange(max(0, half - far), min(count, half + far) + 1)  # draws among the first `edge` samples
    ranks = edges[:-1]
    if count % 2:
        # The middle draw is among the first samples if the majority of draws is.
        return ranks, ranks, np.diff(_at_least(half + 1, count, edges / count))
    # Two different ones: half of the draws end at the first, and the other half begin at the second.
    # In logarithms, since of some 31,000 samples a power by itself is beyond float64, and the other one below it.
    with np.errstate(divide="ignore"):  # of an end, which no draw is beyond
        below, above = half * np.log(edges / count), half * np.log(1 - edges / count)
    inside = _log_difference(below[1:], below[:-1])[:, None] + _log_difference(above[:-1], above[1:])[None, :]
    # [P, P]; above the diagonal alone, for the first of the two is the smaller.
    apart = np.exp(np.where(np.tri(len(ranks), dtype=bool), -np.inf, _log_choose(count, half) + inside))
    same = np.diff(_at_least(half, count, edges / count)) - apart.sum(axis=1)
    lower, upper = np.triu_indices(len(ranks))
    return ranks[lower], ranks[upper], (apart + np.diag(same))[lower, upper]


def _log_difference(larger: np.ndarray, smaller: np.ndarray) -> np.ndarray:
    """log(e^larger - e^smaller), for each."""
    return larger + np.log1p(-np.exp(smaller - larger))


def _at_least(least: int, count: int, shares: np.ndarray) -> np.ndarray:
    """The chance that of so many draws at least `least` fall into a share, for each share, [E]."""
    # Not of 0: minus infinity times no draw is no number.
    inside, outside = (np.log(np.maximum(each, 1e-300)) for each in (shares, 1 - shares))
    # Shares are at most _FAR standard deviations above the middle, and so many more draws than that have no chance.
    draws = np.arange(least, min(count, least + 2 * math.ceil(_FAR / 2 * math.sqrt(count)) + 2) + 1)
    ways = np.array([_log_choose(count, each) for each in draws.tolist()])
    return np.exp(ways + np.outer(inside, draws) + np.outer(outside, count - draws)).sum(axis=1)


def _log_choose(count: int, chosen: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)
