"""Figures of an end-to-end results file; every panel names its device.

  python -m bench.served.figures bench/results/end_to_end_cpu.json     draw them again

baselines.svg        the overhead of every variant against both baselines, a panel per case
overhead_parts.svg   the overhead of the prefetched table as stacked parts, per phase, a panel per case
slower_bus.svg       what a slowed bus costs, by the delay of a decode step's rows, with the window and 3 %
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.instruments.claim import PUBLISHED_WINDOW_S, WALL_TIME_CLAIM
from bench.instruments.drawing import COLOURS, interval, legend_below, name_points, panels, redraw, save_all
from bench.instruments.timing import NotMeasured, Overhead
from bench.instruments.words import device_label
from bench.served import numbers
from bench.served.numbers import BASELINES, PARTS, PHASES, WHOLE, Json, Slowed

PART_COLOURS = {
    "own compute": COLOURS["offload_hot"],
    "lookup": COLOURS["resident"],
    "not hidden": COLOURS["offload_prefetch"],
}
_CLAIM = 100 * WALL_TIME_CLAIM
_HATCH = "////"  # a part that is not resolved


def draw_all(results: Json, out: Path, narrow: bool = False) -> list[Path]:
    """Draw every figure into a folder; each file is complete or absent. Returns the paths."""
    drawings = {"baselines": baselines, "overhead_parts": overhead_parts}
    if any(row["bus"] for case in results["cases"] for row in case["rows"]):
        drawings["slower_bus"] = slower_bus
    return save_all(drawings, results, out, narrow)


def _panels(results: Json, title: str, height: float = 3.3) -> tuple[Any, list[tuple[Any, Json]]]:
    cases = [case for case in results["cases"] if case["rows"]]
    figure, axes = panels([height] * len(cases), width=6, margin=1, title=title)
    for axis, case in zip(axes, cases):
        axis.set_title(f"{numbers.case_name(case)}\n{device_label(results)}", fontsize=9)
    return figure, list(zip(axes, cases))


def baselines(results: Json) -> Any:
    """A line per variant, with a point against each baseline; what is not resolved is hollow."""
    title = "Overhead against both baselines, prefill and decoding\n95 %; hollow: not resolved"
    figure, cases = _panels(results, title, height=4.6)
    for axis, case in cases:
        rows = [row for row in case["rows"] if row["rounds"] and row["variant"] != "no_engram" and not row["repeat"]]
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(_CLAIM, color="0.45", linewidth=0.8, linestyle="--", label="3 %")
        for baseline in BASELINES:
            name_points(axis, COLOURS[baseline], f"against {baseline}")
        for place, row in enumerate(rows):
            if place % 2:  # which two lie together is seen although as far from the next
                axis.axhspan(place - 0.5, place + 0.5, color="0.93", zorder=0, linewidth=0)
            _compare(axis, place, case, row)
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=7)
        axis.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
        axis.set_xscale("symlog", linthresh=10)  # what is lost may be negative
        axis.set_xlabel("% of the baseline")
    return legend_below(figure, cases[0][0])


def _compare(axis: Any, place: int, case: Json, row: Json) -> None:
    for number, baseline in enumerate(BASELINES):
        if row["label"] == baseline:
            continue
        try:
            part = numbers.against(case, row, baseline, "together")
        except NotMeasured:
            continue
        # Both baselines on either side of the variant's line.
        interval(axis, place + 0.5 * number - 0.25, part.in_percent, COLOURS[baseline], part.resolved)


def overhead_parts(results: Json) -> Any:
    """Stacked parts, one bar per phase; what is not resolved is hatched, the whole stands beside them as measured."""
    title = "Overhead of a prefetched table, taken apart\nmedians of the parts; beside them the whole, by itself"
    figure, cases = _panels(results, title)
    for axis, case in cases:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel("% of the model without Engram")
        _name_parts(axis)
        try:
            for place, phase in enumerate(PHASES):
                _stack(axis, place, numbers.decomposition(case, phase))
        except NotMeasured as why:
            axis.text(0.5, 0.5, str(why), transform=axis.transAxes, ha="center")
        axis.set_xticks(range(len(PHASES)), [phase.replace("token", "median token") for phase in PHASES])
    return legend_below(figure, cases[0][0])


def _name_parts(axis: Any) -> None:
    """The legend's keys, whatever the first bar says: colours of the parts, and what hatching means."""
    axis.axhline(_CLAIM, color="0.45", linewidth=0.8, linestyle="--", label="3 %")
    for name, colour in PART_COLOURS.items():
        axis.fill_between([], [], color=colour, label=name)
    axis.fill_between([], [], facecolor="white", edgecolor="0.3", hatch=_HATCH, label="hatched: not resolved")
    name_points(axis, "black", "the whole, 95 %")


def _stack(axis: Any, place: int, parts: dict[str, Overhead]) -> None:
    """Parts above each other; negative ones hang below 0."""
    foot = {True: 0.0, False: 0.0}
    for name in PARTS:
        part, colour = parts[name], PART_COLOURS[name]
        height, up = 100 * part.median, part.median >= 0
        fill = colour if part.resolved else "white"
        style = {"facecolor": fill, "edgecolor": colour, "hatch": "" if part.resolved else _HATCH}
        axis.bar(place, height, 0.5, bottom=foot[up], **style)
        foot[up] += height
    interval(axis, place + 0.33, parts[WHOLE].in_percent, "black", upright=True)


def slower_bus(results: Json) -> Any:
    """Overhead above `resident` against the delay of a step's rows."""
    title = "What a slower bus costs a decode step, above the resident table\nhollow: not resolved"
    figure, cases = _panels(results, title)
    for axis, case in cases:
        try:
            _draw_buses(axis, numbers.slowed(case))
        except NotMeasured as why:
            axis.text(0.5, 0.5, str(why), transform=axis.transAxes, ha="center")
    return legend_below(figure, cases[0][0])


def _draw_buses(axis: Any, buses: list[Slowed]) -> None:
    name_points(axis, COLOURS["offload_prefetch"], "median, 95 %")
    for one in buses:
        interval(axis, 1e6 * one.delay_s, one.extra.in_percent, COLOURS["offload_prefetch"], one.extra.resolved, True)
    axis.axhline(_CLAIM, color="0.45", linewidth=0.8, linestyle="--", label="3 %")
    if buses:
        axis.axvline(1e6 * numbers.window_s(buses), color=COLOURS["resident"], linewidth=1.2, label="window here")
    window, told = 1e6 * PUBLISHED_WINDOW_S, "56 us, computed by others"
    axis.axvline(window, color=COLOURS["offload_naive"], linestyle=":", label=told)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=10)
    axis.margins(y=0.12)
    axis.set_xlabel("us from the request until a step's rows have arrived")
    axis.set_ylabel("slowed - resident, % of no_engram")


if __name__ == "__main__":
    redraw(draw_all, "bench.served.figures")
