"""The interval of a median against every resample there is, and against drawn ones where these are too many."""

import itertools
import math
import random
import statistics
from collections import Counter

import pytest

from bench.instruments.intervals import median_interval


def of_all_resamples(samples):
    """Both ends, by counting medians of all n^n resamples."""
    counts = Counter(statistics.median(draws) for draws in itertools.product(samples, repeat=len(samples)))
    reached = dict(zip(sorted(counts), itertools.accumulate(counts[median] for median in sorted(counts))))
    return tuple(
        min(median for median, count in reached.items() if count >= share * len(samples) ** len(samples))
        for share in (0.025, 0.975)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_it_is_that_of_all_resamples(count):
    draw = random.Random(count)
    for digits in (1, 9):  # with samples that are equal, and without
        samples = tuple(round(draw.gauss(1, 0.1), digits) for _ in range(count))
        assert median_interval(samples) == pytest.approx(of_all_resamples(samples), rel=1e-15)


@pytest.mark.parametrize("count", [30, 31, 400])
def test_drawn_medians_fall_below_each_end_as_often_as_they_should(count):
    """Of 2,000 drawn medians 50 are beyond each end, within five standard deviations and a step of few samples."""
    draw = random.Random(count)
    samples = tuple(draw.gauss(1, 0.1) for _ in range(count))
    medians = [statistics.median(draw.choices(samples, k=count)) for _ in range(2000)]
    low, high = median_interval(samples)
    assert abs(sum(median < low for median in medians) - 50) < 35 + 50 * (count < 100)  # a step of few samples is large
    assert abs(sum(median > high for median in medians) - 50) < 35 + 50 * (count < 100)


def test_the_order_of_samples_does_not_matter_and_scaling_scales():
    samples = (3.0, 1.0, 2.0, 5.0, 4.0, 9.0, 8.0)
    assert median_interval(samples) == median_interval(samples[::-1])
    assert median_interval(tuple(4 * sample for sample in samples)) == tuple(
        4 * end for end in median_interval(samples)
    )


def test_an_even_number_of_very_many_samples_has_the_interval_of_one_more():
    """A power in the chances of an even number leaves float64 from 31,000 on; those of an odd number have none."""
    count = 40_000
    draw = random.Random(count)
    samples = tuple(draw.gauss(1, 0.1) for _ in range(count))
    step = 0.1 * (2 * math.pi) ** 0.5 / count  # from one of the middle samples to the next
    for even, odd in zip(median_interval(samples), median_interval((*samples, 1.0))):
        assert abs(even - odd) < 20 * step


@pytest.mark.parametrize("samples", [(), (1.0, float("nan"), 2.0), (float("inf"),)])
def test_what_has_no_median_is_refused(samples):
    with pytest.raises(ValueError, match="no median"):
        median_interval(samples)
