"""What a ratio means: the classification of one comparison, as a pure function of measured numbers.

The task that asked the question was put twice, and not alike. Its public form, task 011, says no-go above 20 *while the
overhead in wall time stays under 3 %*. The form in which it was handed out kept the first half alone. `classify`
follows the former, in that the reason of a LOSS says whether the second half holds; `by_task` and `by_seed` say what
each form makes of a ratio, to be shown side by side.
"""

from __future__ import annotations

from typing import NamedTuple

# Price ratios of prefetch to resident, as the task has them; between the first and the last nothing is decided.
WIN_UP_TO = 5.0
STRONG_BELOW = 2.0
LOSS_ABOVE = 20.0
# What a figure writes at each, and what a table puts behind a ratio, by its class.
LEVELS = {STRONG_BELOW: "2", WIN_UP_TO: "5: WIN up to here", LOSS_ABOVE: "20: LOSS above"}
MARKS = {"WIN": "W", "INCONCLUSIVE": "i", "LOSS": "L", "INVALID": "x"}
WALL_TIME_CLAIM = 0.03  # the paper's "<3 %"
# Time for the rows of layer 2 in Qwen3-32B, and a step of its 64 blocks, as arXiv 2603.10087 computes them.
PUBLISHED_WINDOW_S, PUBLISHED_STEP_S = 56e-6, 3.6e-3


class Verdict(NamedTuple):
    """A class (WIN, LOSS, INCONCLUSIVE, INVALID, BASELINE) and what it rests on, in one sentence."""

    label: str
    reason: str


def classify(price_ratio: float, wall_overhead: float | None, valid: bool = True) -> Verdict:
    """Classify a variant against `resident` at one boundary.

    Args:
        price_ratio: ByteDMD price divided by that of `resident`.
        wall_overhead: extra wall time as a share of `resident`'s (0.03 is 3 %), or None if it was not
            measured, or not resolved from the noise.
        valid: whether outputs agreed bit for bit and no value escaped the tracer.
    """
    if not valid:
        return Verdict("INVALID", "outputs differ, or a value escaped the tracer: the prices cannot be compared")
    if not price_ratio > 0:  # nor are they NaN
        raise ValueError(f"price ratio {price_ratio}: prices are positive")
    if price_ratio <= WIN_UP_TO:
        reason = (
            f"up to {WIN_UP_TO:g}x, with room to spare below {STRONG_BELOW:g}x; thresholds that came with the question"
        )
        return Verdict("WIN", f"{reason}, far above the paper's 3 %")
    if price_ratio <= LOSS_ABOVE:
        return Verdict(
            "INCONCLUSIVE",
            f"between {WIN_UP_TO:g}x and {LOSS_ABOVE:g}x: more padding, or a larger share off the top, decides",
        )
    if wall_overhead is None:
        return Verdict("LOSS", f"above {LOSS_ABOVE:g}x in price; the wall-time half is missing")
    if wall_overhead < WALL_TIME_CLAIM:
        return Verdict("LOSS", f"above {LOSS_ABOVE:g}x in price at under 3 % of wall time: wall-time gaming")
    return Verdict("LOSS", f"above {LOSS_ABOVE:g}x in price; wall time is over 3 % too, so it hides nothing")


def by_seed(price_ratio: float) -> str:
    """The class by the plain thresholds, price alone."""
    return classify(price_ratio, None).label


def by_task(price_ratio: float, wall_overhead: float | None) -> str:
    """What task 011 decides: go, ambiguous, or no-go, which needs both halves.

    Args:
        price_ratio, wall_overhead: as for `classify`.
    """
    label = by_seed(price_ratio)
    if label != "LOSS":
        return {"WIN": "go", "INCONCLUSIVE": "ambiguous"}[label]
    if wall_overhead is None:  # both halves are needed
        return f"no-go if wall time is under {100 * WALL_TIME_CLAIM:g} %"
    return "no-go" if wall_overhead < WALL_TIME_CLAIM else f"no no-go: wall time {100 * wall_overhead:+.0f} %"
