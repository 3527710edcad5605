"""Figures of the runs on a GPU: what each place of the table adds to a decode step, and the lookup by itself.

decode_gpu.svg, decode_gpu_100b.svg   us that a place adds to a decode step without Engram, a panel per case, with 3 %
lookup_gpu.svg                        from token ids to rows, by tokens of a step, with the bus's floor and vLLM's
"""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

from bench.evidence.lookup_table import PUBLISHED, published_us
from bench.instruments.claim import WALL_TIME_CLAIM
from bench.instruments.drawing import COLOURS, interval, legend_below, panels, save_all
from bench.instruments.timing import NotMeasured
from bench.instruments.words import device_label
from bench.served.classes import added_each
from bench.served.numbers import Json, row_of, token_times

_AXIS = (15, 8000)  # us: the same for all panels and both figures
_WAYS = {"resident": "resident", "uva": "offload_uva", "staged": "offload_prefetch"}


def draw_decode(results: Json, out: Path, narrow: bool = False, name: str = "decode_gpu") -> list[Path]:
    """Draw what each place adds to a decode step."""
    return save_all({name: decode}, results, out, narrow)


draw_hundred = functools.partial(draw_decode, name="decode_gpu_100b")


def decode(results: Json) -> Any:
    """A panel per case: median, least and most over the rounds of what each place adds to a step."""
    title = "What Engram adds to a decode step, by the place of its table"
    figure, axes = panels([2.6] * len(results["cases"]), width=5.5, margin=1, title=title)
    for axis, case in zip(axes, results["cases"]):
        table = f"{case['table']['parameters'] / 1e9:.3g} B parameters"
        axis.set_title(f"{table}, {case['backbone']}, batch {case['batch']}\n{device_label(results)}", fontsize=9)
        _places(axis, case)
    return legend_below(figure, axes[0])


def _places(axis: Any, case: Json) -> None:
    # What was left out of a run has no rounds.
    rows = [row for row in case["rows"] if row["rounds"] and row["variant"] != "no_engram" and not row["repeat"]]
    step = token_times(row_of(case, "no_engram"))["median"]
    counts = set()
    for place, row in enumerate(rows):
        try:
            added = [1e6 * each for each in added_each(case, row["label"])]
        except NotMeasured:
            continue
        counts.add(len(added))
        # `own_compute` is no place of a table, and has no colour among theirs.
        colour = COLOURS.get(row["variant"], "#F0E442")
        interval(axis, place, (statistics.median(added), min(added), max(added)), colour)
    axis.axvline(1e6 * WALL_TIME_CLAIM * step, color="0.45", linestyle="--", linewidth=0.8, label="3 % of the step")
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axis.set_xscale("log")
    axis.set_xlim(_AXIS)
    rounds = " or ".join(map(str, sorted(counts)))
    axis.set_xlabel(f"us added to a decode step: median, least to most of {rounds} rounds")


def draw_lookup(results: Json, out: Path, narrow: bool = False) -> list[Path]:
    """Draw the lookup by itself."""
    return save_all({"lookup_gpu": _lookup}, results, out, narrow)


def _lookup(results: Json) -> Any:
    title = f"From token ids to rows, one layer\n{device_label(results)}"
    figure, (axis,) = panels([3.6], width=6, margin=1, title=title)
    cases = sorted(results["cases"], key=lambda case: case["tokens"])
    tokens = [case["tokens"] for case in cases]
    for way, colour in _WAYS.items():
        us = [1e6 * statistics.median(case["samples_s"][way]) for case in cases]
        axis.plot(tokens, us, "o-", color=COLOURS[colour], label=way)
    floor = [1e6 * case["bytes"] / results["limits"]["copy"]["bytes_per_s"] for case in cases]
    axis.plot(tokens, floor, ":", color="0.3", label="the rows' bytes over the bus")
    axis.plot(PUBLISHED, [published_us(count) for count in PUBLISHED], "x", color="black", label="vLLM, on a GB300")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [str(count) for count in tokens])
    axis.set_xlabel("tokens of a step")
    axis.set_ylabel("us")
    return legend_below(figure, axis, foot=0.12, columns=3)
