"""Figures of `bench/production.py`'s results; they show nothing that is not in them.

  python -m bench.rows.figures out/production/results.json     draw them, beside it

row_depths.svg    how deep the rows of each published table lie when they are read
place.svg         the lookups alone: what it costs to lie under other bytes, with the thresholds
hot_tier.svg      what a tier of frequent rows saves
whole_model.svg   all that Engram adds to a step of a whole model, with the claim, and its rows alone, by tokens
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from bench.instruments.claim import LEVELS, WALL_TIME_CLAIM
from bench.instruments.drawing import legend_below, redraw, save_all
from bench.rows.table import Record, additions, depth_shares, lines, one, placed, row_share, select
from bench.rows.whole_model import shown

TABLE_COLOURS = {"demo": "#009E73", "paper-27b": "#56B4E9", "paper-40b": "#0072B2", "v41-flash": "#D55E00"}
MODEL_COLOURS = {
    ("dense-4b", ""): "#0072B2",
    ("dense-8b", ""): "#56B4E9",
    ("v41-flash", "one"): "#D55E00",
    ("v41-flash", "expected"): "#E69F00",
    ("v41-flash", "all"): "#999999",
}
LAYOUT_LINES = {"held live": "-", "compacted": "--"}
_NESTED = (9, 7, 5, 3)  # markers of one place, the first below the others
_OF_TIER = (("tier_rows_filled", "tier_rows"), ("reads_of_tier", "reads"))


def draw_all(results: dict[str, Any], out: Path, narrow: bool = False) -> list[Path]:
    """Draw every figure into a folder; each file is complete or absent. Returns the paths.

    Raises:
        ValueError: the results are not of DeepSeek's tables, which the figures show.
    """
    absent = [table for table in TABLE_COLOURS if not select(results, part="scale", table=table)]
    if absent:
        raise ValueError(f"no records of {', '.join(absent)}: draw a run of all parts and without --preset")
    drawings = {"row_depths": _depths, "place": _place, "hot_tier": _hot, "whole_model": whole_model}
    return save_all(drawings, results, out, narrow)


def _depths(results: dict[str, Any]) -> Any:
    """Share of the reads per power of two of the depth; first reads above the axis's foot, later ones on them."""
    found = select(results, part="scale", stream="python-stdlib")
    longest = {table: max(r["tokens"] for r in found if r["table"] == table) for table in TABLE_COLOURS}
    figure, axes = plt.subplots(2, len(longest), figsize=(11, 5), sharex=True, sharey=True)
    for row, layout in zip(axes, LAYOUT_LINES):
        for axis, (table, tokens) in zip(row, longest.items()):
            record = one(results, part="scale", table=table, stream="python-stdlib", tokens=tokens, layout=layout)
            bins = depth_shares(record)
            first, later = ([100 * pair[i] for pair in bins.values()] for i in (0, 1))
            axis.bar(list(bins), first, 0.85, color="#D55E00", label="first read of a row")
            axis.bar(list(bins), later, 0.85, bottom=first, color="#0072B2", label="read before")
            axis.set_title(f"{table}, {layout}", fontsize=9)
            axis.set_xticks(range(10, 41, 10), [f"$2^{{{b}}}$" for b in range(10, 41, 10)])
        row[0].set_ylabel("% of the reads")
    for axis in axes[-1]:
        axis.set_xlabel("depth in bytes")
    figure.suptitle("How deep a row lies when it is read: all of the standard library's sources, token by token")
    return legend_below(figure, axes[0][0], foot=0.05)


def _place(results: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for table, colour in TABLE_COLOURS.items():
        for layout, style in LAYOUT_LINES.items():
            line = select(results, part="place", prefetch=False, table=table, layout=layout)
            line = [r for r in line if r["padding_bytes"]]  # the axis is logarithmic
            sizes = [r["padding_bytes"] / r["live_bytes"] for r in line]
            ratios = [placed(r) for r in line]
            axis.plot(sizes, ratios, style, color=colour, marker="o", markersize=3, label=f"{table}, {layout}")
    axis.set(xscale="log", yscale="log", xlabel="bytes above the table, live and never read / live bytes of the table")
    axis.set_ylabel("price below them / price above them")
    for level, text in LEVELS.items():
        _level(axis, level, text)
    axis.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axis.minorticks_off()
    figure.suptitle("The lookups alone: a verdict on what lies above, against the size of the table")
    return legend_below(figure, axis, foot=0.13, columns=4)


def _hot(results: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharex=True)
    for size, (table, colour) in zip(_NESTED, TABLE_COLOURS.items()):
        for layout, style in LAYOUT_LINES.items():
            line = [r for r in select(results, part="hot", table=table, layout=layout) if r["hot_share"]]
            base = one(results, part="hot", table=table, layout=layout, hot_share=0.0)
            shares = [100 * r["hot_share"] for r in line]
            saved = [100 * (1 - r["price"] / base["price"]) for r in line]
            axes[0].plot(shares, saved, style, color=colour, marker="o", markersize=3, label=f"{table}, {layout}")
        # Of either layout: which rows a tier holds does not depend on it.
        full, served = ([100 * r[part] / r[whole] for r in line] for part, whole in _OF_TIER)
        nested = {"markersize": size, "linewidth": size / 3}  # tables that are as full lie on each other
        axes[1].plot(shares, full, color=colour, marker="o", **nested)
        axes[1].plot(shares, served, ":", color=colour, marker="s", markersize=5)
    axes[0].set(xscale="log", ylabel="% of the price saved", title="what it saves", ylim=(0, None))
    axes[1].set(title="solid: how full it gets; dotted: reads that it serves", ylabel="%", ylim=(0, 105))
    for axis in axes:
        axis.set_xlabel("rows in the hot tier, % of all")
        axis.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        axis.minorticks_off()
    figure.suptitle("A hot tier, chosen on one half of the text and charged on the other")
    return legend_below(figure, axes[0], foot=0.13, columns=4)


def whole_model(results: dict[str, Any]) -> Any:
    """Above all that Engram adds, which the claim is about; below its rows alone, which grow with the step."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.4), sharex=True, sharey="row")
    for above, below, mode in zip(*axes, ("decode", "prefill")):
        found = [line for line in lines(results) if line[0]["mode"] == mode and line[0]["asked_tokens"] is not None]
        for line in found:
            _by_step(above, line, in_all)
            _by_step(below, line, row_share)
            copied = [r for r in line if "prefetch_stands" in r and r["layout"] == "held live"]
            shares = [100 * additions(r)["in all"] for r in copied]
            above.plot([r["tokens_per_step"] for r in copied], shares, "o", color=_colour(line), markersize=4)
        above.set(xscale="log", yscale="log", title=f"{mode}: all that Engram adds")
        below.set(yscale="log", title=f"{mode}: its rows alone", xlabel="tokens per step")
        _level(above, 100 * WALL_TIME_CLAIM, "3 %: the claim", left=0.3)
        _level(below, 100 * WALL_TIME_CLAIM, "3 %, by the rows alone")
    for row in axes:
        row[0].set_ylabel("at most, % of the weights' price")
    title = "The whole model: what Engram adds to the price of a step"
    figure.suptitle(f"{title}\nall: rows, Engram's own weights, and how much deeper both bury the model's")
    _name_lines(axes[0][0])
    return legend_below(figure, axes[0][0], foot=0.12, columns=2)


def in_all(record: Record) -> float:
    """What Engram adds to a step that copies no row, as a share of the price of the weights."""
    # Where copies were priced, they are among what buries.
    beside = record["engram_weights_step_price"] + record["buried_step_price"]
    return row_share(record) + beside / record["weights_step_price"]


def _by_step(axis: Any, line: list[Record], share: Callable[[Record], float]) -> None:
    """A share of the weights by tokens per step; of random ids in one layout."""
    first, tokens, shares = line[0], [r["tokens_per_step"] for r in line], [100 * share(r) for r in line]
    if first["stream"] == "python-stdlib":
        axis.plot(tokens, shares, LAYOUT_LINES[first["layout"]], color=_colour(line))
    elif first["layout"] == "held live":
        axis.plot(tokens, shares, ":", color=_colour(line), linewidth=1)


def _colour(line: list[Record]) -> str:
    return MODEL_COLOURS[line[0]["table"], line[0]["experts"]]


def _name_lines(axis: Any) -> None:
    """The legend's keys: a colour for a model, a style for what is priced."""
    for (table, experts), colour in MODEL_COLOURS.items():
        axis.plot([], [], color=colour, label=shown(table, experts))
    for layout, style in LAYOUT_LINES.items():
        axis.plot([], [], style, color="black", label=layout)
    axis.plot([], [], ":", color="black", linewidth=1, label="random ids, held live")
    axis.plot([], [], "o", color="black", markersize=4, label="rows copied a step ahead")


def _level(axis: Any, level: float, text: str, left: float = 0.02) -> None:
    """A threshold, written on its line from a share of the axis's width on."""
    axis.axhline(level, color="0.45", linewidth=0.8, linestyle="--")
    place = dict(xycoords=axis.get_yaxis_transform(), xytext=(0, 2), textcoords="offset points")
    axis.annotate(text, (left, level), fontsize=8, color="0.35", **place)


if __name__ == "__main__":
    redraw(draw_all, "bench.rows.figures")
