"""Figures of a wall-time results file; they show nothing that is not in it, and every panel names its device.

  python -m bench.wall.figures bench/results/gpu_wall_cpu.json     draw them again

timeline.svg   one step of every run: what each thread and stream did, and when compute waited
overhead.svg   step time against `resident`, with intervals and the noise floor
bandwidth.svg  bytes and rows per second of fetches with nothing beside them, against the measured limits
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.instruments.drawing import COLOURS, interval, panels, redraw, save_all
from bench.instruments.timing import NotMeasured, median_and_spread, unless_missing
from bench.instruments.words import device_label, short, signed_percent
from bench.wall.numbers import Run, Step, fetch_rates, noise_floor, overhead
from bench.wall.table import run_label, step_label

# Apart in colour and in grey: light, middle and dark, and hatches where two are near each other.
KINDS: dict[str, dict[str, Any]] = {
    "step": {"facecolor": "none", "hatch": ""},
    "hash": {"facecolor": "#F0E442", "hatch": "...."},
    "gather": {"facecolor": "#E69F00", "hatch": ""},
    "copy": {"facecolor": "#0072B2", "hatch": ""},
    "compute": {"facecolor": "#DDDDDD", "hatch": ""},
    "wait": {"facecolor": "#FFFFFF", "hatch": "//////"},
}
LANES = ("main", "background", "stream")
_TICKS = [-50, -10, -1, 0, 1, 10, 100, 1000, 10_000]  # per cent
_LINEAR = 1.0  # per cent: below this the scale of the overheads is linear
_GREY = "0.45"
_WIDTH = 500  # gaps below this part of a timeline are not shown
_MOST_SHOWN = 3.0  # times the median run: what takes longer is cut off

Results = dict[str, Any]
Lane = tuple[str, str, list[list[Any]]]  # run, lane, spans


def draw_all(results: Results, out: Path) -> list[Path]:
    """Draw every figure into a folder; each file is complete or absent. Returns the paths."""
    return save_all({"timeline": timeline, "overhead": overheads, "bandwidth": bandwidth}, results, out)


def _panels(results: Results, heights: list[float], title: str) -> tuple[Any, list[Any]]:
    """A figure with one panel per step."""
    return panels(heights, 8, 1.2, f"{title}\n{results['stream']['name']}", layout="constrained")


def _name(axis: Any, results: Results, step: Step) -> None:
    axis.set_title(f"{step_label(step)}\n{device_label(results)}", fontsize=9)


def timeline(results: Results) -> Any:
    """One step of every run: a strip per lane, runs one below the other, time from the step's begin."""
    strips = [_lanes(step) for step in results["steps"]]
    heights = [0.24 * len(lanes) + 1.1 for lanes in strips]
    figure, axes = _panels(results, heights, "One step: what ran when, and where compute waited for rows")
    widest = dict.fromkeys(KINDS, 0.0)
    for axis, step, lanes in zip(axes, results["steps"], strips):
        _name(axis, results, step)
        for kind, share in _draw_lanes(axis, lanes):
            widest[kind] = max(widest[kind], share)
    _name_kinds(figure, widest)
    return figure


def _name_kinds(figure: Any, widest: dict[str, float]) -> None:
    """The legend: a key for each kind that can be told from a line; of the others it says that they are no more."""
    seen = [kind for kind, share in widest.items() if share >= 1 / _WIDTH]
    keys = [Patch(edgecolor="black", linewidth=0.5, label=kind, **KINDS[kind]) for kind in seen]
    lines = ", ".join(kind for kind, share in widest.items() if 0 < share < 1 / _WIDTH)
    told = f"drawn as lines, nowhere as wide as 1/{_WIDTH} of a panel: {lines}" if lines else None
    where = {"loc": "outside lower center", "ncols": max(1, len(keys))}
    figure.legend(handles=keys, frameon=False, title=told, title_fontsize=8, **where)


def _lanes(step: Step) -> list[Lane]:
    """The lanes in which something happened, in reading order, of all first runs."""
    found = []
    for run in step["runs"]:
        for lane in LANES:
            spans = [span for span in run["spans"] if span[1] == lane]
            if spans and not run["repeat"]:
                found.append((run_label(run), lane, spans))
    return found


def _draw_lanes(axis: Any, lanes: list[Lane]) -> list[tuple[str, float]]:
    """Spans as boxes, short ones on top; a thin line between runs, whose name stands at their first lane only.

    Returns the kind of every box and the share of the panel that it takes.
    """
    ends: dict[str, float] = {}
    for run, _, spans in lanes:
        ends[run] = max(ends.get(run, 0.0), *(span[3] for span in spans))
    shown = _horizon(list(ends.values()))
    scale, unit = (1e3, "ms") if shown >= 1e-3 else (1e6, "us")
    labels: list[str] = []
    shares: list[tuple[str, float]] = []
    for place, (run, lane, spans) in enumerate(lanes):
        for kind, begin, end in _merged(spans, shown / _WIDTH):
            shares.append((kind, (end - begin) / shown))
            box = [(begin * scale, (end - begin) * scale)]
            axis.broken_barh(box, (place - 0.4, 0.8), edgecolor="black", linewidth=0.5, **KINDS[kind])
        first = place == 0 or lanes[place - 1][0] != run
        labels.append(f"{run}:  {lane}" if first else lane)
        if first and place:
            axis.axhline(place - 0.5, color="0.8", linewidth=0.6)
        if first and ends[run] > shown:
            _beside(axis, place, f"ends at {short(ends[run] * scale, digits=3)} {unit}")
    _name_rows(axis, labels)
    axis.set_xlim(0, shown * scale * 1.01)
    axis.set_xlabel(f"{unit} since the step began")
    return shares


def _horizon(ends: list[float]) -> float:
    """Where the time axis ends: with the longest run, or before it where that would flatten most of the others."""
    if not ends:
        return 1.0
    return min(max(ends), _MOST_SHOWN * statistics.median(ends))


def _merged(spans: list[list[Any]], gap: float) -> list[tuple[str, float, float]]:
    """Kind, begin and end of boxes, longest first; spans of a kind nearer to each other than `gap` become one box."""
    boxes: list[tuple[str, float, float]] = []
    for kind in KINDS:
        begins = sorted((begin, end) for name, _, begin, end in spans if name == kind)
        for begin, end in begins:
            # A step on a GPU has thousands of kernels, and nobody can see the time between two of them.
            if boxes and boxes[-1][0] == kind and begin - boxes[-1][2] <= gap:
                _, first, last = boxes.pop()
                begin, end = first, max(last, end)
            boxes.append((kind, begin, end))
    return sorted(boxes, key=lambda box: box[1] - box[2])  # so that short ones are drawn on top


def overheads(results: Results) -> Any:
    """Overhead of every run, a panel per shape: the point is filled where it is resolved, and the noise is shaded."""
    heights = [0.27 * len(_compared(step)) + 1.1 for step in results["steps"]]
    title = "Step time against resident: median and 95 % interval; hollow: not resolved; shaded: noise floor"
    figure, axes = _panels(results, heights, title)
    for axis, step in zip(axes, results["steps"]):
        _name(axis, results, step)
        _draw_overheads(axis, step)
    return figure


def _compared(step: Step) -> list[Run]:
    return [run for run in step["runs"] if run["variant"] != "resident"]


def _draw_overheads(axis: Any, step: Step) -> None:
    runs = _compared(step)
    try:
        found = [overhead(step, run) for run in runs]
    except NotMeasured as why:
        axis.text(0.5, 0.5, f"no overheads: {why}", transform=axis.transAxes, ha="center")
        axis.set_yticks([])
        return
    axis.axvline(0, color=_GREY, linewidth=0.8)
    try:
        noise = noise_floor(step)
        axis.axvspan(100 * (noise["low"] - 1), 100 * (noise["high"] - 1), color="0.85", zorder=0)
    except NotMeasured as why:
        axis.text(0.01, 0.02, f"no noise floor: {why}", transform=axis.transAxes, fontsize=7)
    for place, (run, over) in enumerate(zip(runs, found)):
        interval(axis, place, over.in_percent, COLOURS[run["variant"]], over.resolved)
    said = [f"{signed_percent(over.median)} %" if over.resolved else "not resolved" for over in found]
    _rows(axis, [run_label(run) for run in runs], said)
    _per_cent(axis, [100 * bound for over in found for bound in (over.low, over.high)])


def _per_cent(axis: Any, values: list[float]) -> None:
    """A scale that is linear around 0 and logarithmic beyond, with room on both sides."""
    low, high = min([*values, -2.0]), max([*values, 2.0])
    axis.set_xscale("symlog", linthresh=_LINEAR)
    axis.set_xlim(1.6 * low, 1.6 * high)
    axis.set_xticks([tick for tick in _TICKS if 1.6 * low <= tick <= 1.6 * high])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:+.0f}" if tick else "0"))
    axis.minorticks_off()
    axis.set_xlabel("% more than resident (linear between -1 and +1, logarithmic beyond)")


def _rows(axis: Any, labels: list[str], values: list[str]) -> None:
    """A name at the left of every row and its number at the right, outside the panel."""
    _name_rows(axis, labels)
    for place, value in enumerate(values):
        _beside(axis, place, value)


def _name_rows(axis: Any, labels: list[str]) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(labels) - 0.4, -0.6)  # the first on top


def _beside(axis: Any, place: int, text: str) -> None:
    axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)


def bandwidth(results: Results) -> Any:
    """Fetches with nothing beside them: bytes per second from memory, rows per second from the disk, and the limits."""
    shown = [panel for panel in (_memory_panel(results), _disk_panel(results)) if panel.fetches]
    if not shown:
        return _empty(results, "no fetch was timed alone, so no bandwidth was measured")
    heights = [0.27 * len(panel.fetches) + 1.3 for panel in shown]
    title = f"Fetches that nothing hides: median and p20 to p80\n{results['stream']['name']}"
    figure, axes = panels(heights, 12, 0.8, title, columns=1, layout="constrained")
    for axis, panel in zip(axes, shown):
        _draw_rates(axis, panel)
        axis.set_title(f"{device_label(results)}\n{panel.origin}", fontsize=9)
    return figure


class _Rates(NamedTuple):
    """One panel of rates: `scale` bytes per second are one `unit`, and so is the limit."""

    fetches: list[tuple[Step, Run]]
    scale: Callable[[Step], float]
    unit: str
    limit: float | None
    origin: str


def _memory_panel(results: Results) -> _Rates:
    copy = results["limits"]["copy"]
    fetches = _fetches(results, lambda run: run["page_cache"] is None)
    limit = copy["bytes_per_s"] / 1e9
    return _Rates(fetches, lambda step: 1e9, "GB/s", limit, f"dashed: {limit:,.3g} GB/s, copy, {copy['what']}")


def _disk_panel(results: Results) -> _Rates:
    disk = results["limits"]["disk"]
    fetches = _fetches(results, lambda run: run["page_cache"] is not None)
    limit = disk["reads_per_s"]
    apart = any(step["table"].get("layout") == "split" for step, _ in fetches)
    least = "one part of a row" if apart else "one row"
    origin = f"dashed: {limit:,.0f} reads/s of {least} or more, {disk['what']}" if limit else f"no limit: {disk['why']}"
    return _Rates(fetches, lambda step: step["table"]["row_bytes"], "rows/s", limit, origin)


def _fetches(results: Results, wanted: Callable[[Run], bool]) -> list[tuple[Step, Run]]:
    """Offloaded runs whose fetch was timed alone, with their steps."""
    return [
        (step, run)
        for step in results["steps"]
        for run in step["runs"]
        if run["variant"].startswith("offload") and wanted(run) and unless_missing(partial(fetch_rates, run), [])
    ]


def _draw_rates(axis: Any, panel: _Rates) -> None:
    texts, seen = [], [panel.limit] if panel.limit else []
    for place, (step, run) in enumerate(panel.fetches):
        rates = [rate / panel.scale(step) for rate in fetch_rates(run)]
        interval(axis, place, median_and_spread(rates), COLOURS[run["variant"]])
        texts.append(_rate_text(run, statistics.median(rates), panel))
        seen += rates
    _rows(axis, [f"{step_label(s)}: {r['variant']} {r['page_cache'] or ''}".rstrip() for s, r in panel.fetches], texts)
    axis.set_xscale("log")
    # Powers of ten around all of them, so that two at least are labelled.
    axis.set_xlim(10 ** math.floor(math.log10(0.9 * min(seen))), 10 ** math.ceil(math.log10(1.1 * max(seen))))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"{panel.unit}, each unique row counted once")
    if panel.limit:
        axis.axvline(panel.limit, color="black", linewidth=1.2, linestyle="--", zorder=1)


def _rate_text(run: Run, rate: float, panel: _Rates) -> str:
    """The rate, and for memory its share of the limit: one read from a disk may bring several rows."""
    text = f"{rate:,.0f} {panel.unit}" if rate >= 1000 else f"{rate:.3g} {panel.unit}"
    if panel.limit is None or run["page_cache"]:
        return text
    return f"{text} = {100 * rate / panel.limit:.3g} % of the limit"


def _empty(results: Results, why: str) -> Any:
    figure, axis = plt.subplots(figsize=(8, 1.2))
    axis.axis("off")
    axis.text(0.5, 0.5, f"{device_label(results)}: {why}", ha="center", va="center")
    return figure


if __name__ == "__main__":
    redraw(draw_all, "bench.wall.figures")
