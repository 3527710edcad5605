"""Tables of a sweeps file: ratios with their class, and where they cross the thresholds.

    python -m bench.sweeps.table bench/results/bytedmd_sweeps.json [NAME ...]

A ratio is the ByteDMD price of a variant over that of `resident` at the same point. The class is that of
offload_prefetch (`bench.instruments.claim`); no wall time was measured, so a LOSS is one of price alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.instruments.claim import LEVELS, MARKS, Verdict, classify
from bench.instruments.reading import as_this_version, read_results
from bench.instruments.words import aligned
from bench.price.table import comparable
from bench.sweeps.points import SWEEPS
from engram_ref import cli

CROSSED = ("padding", "tokens", "share", "hot")  # sweeps of an amount that the ratio rises or falls with
_OFFLOADS = ("offload_naive", "offload_prefetch", "offload_hot")

Results = dict[str, Any]


def points_at(results: Results, sweep: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The points of a sweep by (model, boundary, variant, value)."""
    points = [point for point in results["points"] if point["sweep"] == sweep]
    return {(p["model"], p["boundary"], p["variant"], p["value"]): p for p in points}


def groups(results: Results, sweep: str) -> list[tuple[str, str]]:
    """The (model, boundary) pairs of a sweep."""
    return list(dict.fromkeys((p["model"], p["boundary"]) for p in results["points"] if p["sweep"] == sweep))


def ratios(results: Results, sweep: str, model: str, boundary: str, variant: str) -> list[float]:
    """Price over that of `resident`, for every value of the sweep."""
    points = points_at(results, sweep)
    return [
        points[model, boundary, variant, value]["cost"] / points[model, boundary, "resident", value]["cost"]
        for value in results["sweeps"][sweep]["values"]
    ]


def is_valid(results: Results, sweep: str, model: str, boundary: str, value: Any) -> bool:
    """Whether all variants of a point gave the same output bits, and nothing escaped the tracer but indices."""
    points = points_at(results, sweep)
    return comparable([points[model, boundary, variant, value] for variant in ("resident", *_OFFLOADS)])


def verdicts(results: Results, sweep: str, model: str, boundary: str) -> list[Verdict]:
    """The class of offload_prefetch at every value of a sweep."""
    found = ratios(results, sweep, model, boundary, "offload_prefetch")
    values = results["sweeps"][sweep]["values"]
    return [classify(r, None, is_valid(results, sweep, model, boundary, v)) for r, v in zip(found, values)]


class Crossing(NamedTuple):
    """Where a curve reaches a level.

    Attributes:
        low, high: the values between which it does; equal where it does so exactly at a measured one.
        at: interpolated along a straight line in logarithms; None where a value of 0 forbids that.
        rising: whether it comes from below.
    """

    low: float
    high: float
    at: float | None
    rising: bool


def crossings(values: Sequence[float], curve: Sequence[float], level: float) -> list[Crossing]:
    """Every place where a curve through measured points, given by rising values, goes through a level or ends on it.

    A curve that only touches the level at one point and turns back does not cross it.
    """
    found = []
    side = _side(curve[0], level)
    for i in range(1, len(values)):
        now = _side(curve[i], level)
        if now == 0 and i < len(values) - 1:
            continue  # on the level: what follows decides
        if side == 0:
            side = now
        if now != side:
            found.append(_between(values, curve, level, i, side))
            side = now
    return found


def _side(value: float, level: float) -> int:
    return (value > level) - (value < level)


def _between(values: Sequence[float], curve: Sequence[float], level: float, i: int, side: int) -> Crossing:
    """The crossing that is complete at place i; a point on the level, at i or just before, is where it happens."""
    for place in (i - 1, i):
        if curve[place] == level:
            return Crossing(values[place], values[place], values[place], side < 0)
    low, high = values[i - 1], values[i]
    at = None
    if low > 0:  # 0 has no logarithm
        part = math.log(level / curve[i - 1]) / math.log(curve[i] / curve[i - 1])
        at = low * (high / low) ** part
    return Crossing(low, high, at, side < 0)


def report(results: Results, sweep: str) -> str:
    """Ratios of every variant at every value of a sweep; the prefetch's with its class."""
    values = results["sweeps"][sweep]["values"]
    rows = [["model", "boundary", "variant", *map(value_text, values)]]
    for model, boundary in groups(results, sweep):
        marks = [MARKS[verdict.label] for verdict in verdicts(results, sweep, model, boundary)]
        for variant in _OFFLOADS:
            found = ratios(results, sweep, model, boundary, variant)
            ends = marks if variant == "offload_prefetch" else [" "] * len(marks)
            cells = [f"{ratio:.3f} {end}" for ratio, end in zip(found, ends)]
            rows.append([model, boundary, variant.removeprefix("offload_"), *cells])
    notes = [f"{SWEEPS[sweep].label}; price / price of resident, the prefetch's with its class:"]
    notes[0] += " W win (to 5x), i inconclusive (to 20x), L loss (price alone)"
    rows[0][3:] = [f"{head}  " for head in rows[0][3:]]  # over the numbers, not over the class behind them
    table = aligned(rows, left={0, 1, 2})
    return "\n".join([table, "", *notes, *_measured(results, sweep)])


def _measured(results: Results, sweep: str) -> list[str]:
    """What was reached where a setting only aims at it."""
    points = points_at(results, sweep)
    values = results["sweeps"][sweep]["values"]
    lines = []
    for model in dict.fromkeys(model for model, _ in groups(results, sweep)):
        if sweep in ("padding", "tokens", "compute"):
            for boundary in ("lookup", "layer", "block"):
                some = [points[model, boundary, "resident", v] for v in values]
                pads = values if sweep == "padding" else [results["configuration"]["padding"]] * len(values)
                cells = ", ".join(f"{pad / p['working_set']:.3g}" for pad, p in zip(pads, some))
                lines.append(f"padding / live values, {model} {boundary}: {cells}")
        elif sweep in ("share", "hot", "wrong"):
            name = {"share": "share_below", "hot": "share_below", "wrong": "share_wrong"}[sweep]
            variant = {"share": "offload_naive", "hot": "offload_hot", "wrong": "offload_prefetch"}[sweep]
            cells = ", ".join(f"{points[model, 'lookup', variant, v][name]:.4g}" for v in values)
            what = "copies mispredicted" if sweep == "wrong" else "lookups below"
            lines.append(f"{what}, reached by {variant}, {model}: {cells}")
    return lines


def crossing_report(results: Results) -> str:
    """Where the ratio of the prefetch (of offload_hot, in the sweep of hot tiers) goes through 2, 5 and 20."""
    rows = [["sweep", "model", "boundary", "variant", *(f"{level:g}x" for level in LEVELS)]]
    for sweep in (name for name in CROSSED if name in results["sweeps"]):
        variant = "offload_hot" if sweep == "hot" else "offload_prefetch"
        values = results["sweeps"][sweep]["values"]
        for model, boundary in groups(results, sweep):
            curve = ratios(results, sweep, model, boundary, variant)
            cells = [crossing_text(values, curve, level) for level in LEVELS]
            rows.append([sweep, model, boundary, variant.removeprefix("offload_"), *cells])
    note = "~ interpolated along a straight line in logarithms between the two measured values beside it"
    return "\n".join([aligned(rows, left=set(range(7))), "", note])


def crossing_text(values: Sequence[float], curve: Sequence[float], level: float) -> str:
    """One cell: where the level is reached, or on which side of it all points lie."""
    found = crossings(values, curve, level)
    if not found:
        span = f"{value_text(values[0])} to {value_text(values[-1])}"
        if max(curve) <= level:
            return f"not reached, {span}"
        return f"above throughout, {span}"
    return "; ".join(_crossing_text(crossing) for crossing in found)


def _crossing_text(crossing: Crossing) -> str:
    direction = "up" if crossing.rising else "down"
    if crossing.low == crossing.high:
        return f"{direction} at {value_text(crossing.low)}"
    between = f"{value_text(crossing.low)} .. {value_text(crossing.high)}"
    return f"{direction} in {between}" if crossing.at is None else f"{direction} ~{_rounded(crossing.at)} ({between})"


def _rounded(value: float) -> str:
    """Two significant digits: more would be a pretence, the curve in between is not measured."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def value_text(value: Any) -> str:
    """A value of a sweep as people write it."""
    if isinstance(value, int) and value >= 1000:
        exponent = len(str(value)) - 1
        return f"10^{exponent}" if value == 10**exponent else f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def report_all(results: Results) -> str:
    """Every table of a results file."""
    parts = [f"{name}\n\n{report(results, name)}" for name in results["sweeps"]]
    if any(name in CROSSED for name in results["sweeps"]):
        parts.append(f"crossings\n\n{crossing_report(results)}")
    return "\n\n\n".join(parts)


def main() -> None:
    """Print the tables of a results file."""
    parser = cli.Parser(prog="python -m bench.sweeps.table", description=__doc__)
    parser.add_argument("path", type=Path, metavar="SWEEPS.json", help="what `bytedmd_toy.py --sweep` has written")
    parser.add_argument("names", nargs="*", metavar="NAME", help="sweeps to show; without any, all of them")
    options = parser.parse_args()
    path, names = options.path, options.names
    with cli.one_line_errors("sweep_table"), as_this_version(path):
        results = read_results(path)
        if unknown := [name for name in names if name not in results["sweeps"]]:
            raise ValueError(f"no sweep {unknown[0]}: this file has {', '.join(results['sweeps'])}")
        print("\n\n\n".join(report(results, name) for name in names) if names else report_all(results))


if __name__ == "__main__":
    cli.run(main, "sweep_table")
