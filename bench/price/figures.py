"""Figures of a results file; they show nothing that is not in it.

  python -m bench.price.figures out/bytedmd_toy/results.json     draw them again

depths.svg       how deep the reads of each variant go, per model
ratios.svg       price of each variant against `resident`, per boundary, with the thresholds
cost_by_kind.svg what the price of each variant is made of
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm

from bench.instruments.claim import LEVELS
from bench.instruments.drawing import COLOURS, legend_below, redraw, save_all
from bench.price.table import Run, find_run, groups, scale_text, variants

_BINS = 25  # powers of two of depth; deeper reads share the last
# Reads of these kinds first, so that what offloading changes lies at the foot of each bar.
KIND_COLOURS = {
    "row": "#D55E00",
    "staged row": "#E69F00",
    "weight": "#0072B2",
    "activation": "#56B4E9",
    "token": "#009E73",
    "hash constant": "#F0E442",
    "row index": "#CC79A7",
    "pad": "#999999",
}
_SMALL = 0.01  # of a bar: less is not seen in it


def draw_all(results: dict[str, Any], out: Path, narrow: bool = False) -> list[Path]:
    """Draw every figure into a folder; each file is complete or absent. Returns the paths."""
    return save_all({"depths": _depths, "ratios": _ratios, "cost_by_kind": _cost_by_kind}, results, out, narrow)


def _models(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(model for model, _ in groups(results)))


def _boundaries(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(boundary for _, boundary in groups(results)))


def _caption(results: dict[str, Any]) -> str:
    c, s = results["configuration"], results["stream"]
    scale = scale_text(results["runs"][0])
    return (
        f"{s['name']}, {c['seq_len']} tokens, width {c['d_model']}, padding {c['padding']:,}, "
        f"definition {c['definition']}, {c['bytes_per_element']} B per value, seed {c['seed']}"
        + (f"\n{c['preset']}: {scale}" if scale else "")
    )


def _grid(results: dict[str, Any], height: float, shared: bool = False) -> tuple[Any, Any, list[tuple[Any, list[Run]]]]:
    """Models in rows, boundaries in columns: the figure, its axes, and each panel with the runs of all variants."""
    models, boundaries = _models(results), _boundaries(results)
    size = (11, height * len(models))
    figure, axes = plt.subplots(len(models), len(boundaries), figsize=size, squeeze=False, sharex=shared, sharey=shared)
    panels = []
    for axis, (model, boundary) in zip(axes.flat, itertools.product(models, boundaries)):
        axis.set_title(f"{model}, {boundary}")
        panels.append((axis, [find_run(results, model, boundary, name) for name in variants(results)]))
    return figure, axes, panels


def _depths(results: dict[str, Any]) -> Any:
    """Where each variant finds the table: reads per power of two of depth, a strip per variant."""
    names = variants(results)
    figure, axes, panels = _grid(results, 2.3, shared=True)
    for axis, runs in panels:
        strips = [_table_reads(run) for run in runs]
        # No reads, no shade: 0 has no place on a logarithmic scale.
        shares = [[reads / sum(strip) or float("nan") for reads in strip] for strip in strips]
        shades = axis.imshow(shares, aspect="auto", cmap="viridis_r", norm=LogNorm(0.001, 1))
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(0, _BINS, 4), [f"$2^{{{b}}}$" for b in range(0, _BINS, 4)])
    for axis in axes[-1]:
        axis.set_xlabel("depth in the stack, in values")
    figure.suptitle(f"How deep table rows are read, copies included\n{_caption(results)}")
    figure.tight_layout(rect=(0, 0, 0.93, 1))
    figure.colorbar(shades, cax=figure.add_axes((0.945, 0.18, 0.012, 0.55)), label="share of reads")
    return figure


def _table_reads(run: dict[str, Any]) -> list[int]:
    counts: Counter[int] = Counter()
    for kind in ("row", "staged row"):
        for bin_, reads in run["depth_histogram"].get(kind, {}).items():
            counts[min(int(bin_), _BINS - 1)] += reads
    return [counts[b] for b in range(_BINS)]


def _ratios(results: dict[str, Any]) -> Any:
    """Price against resident, on a log scale, with the thresholds drawn."""
    models, boundaries = _models(results), _boundaries(results)
    offloads = [name for name in variants(results) if name != "resident"]
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 4), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models):
        for i, variant in enumerate(offloads):
            costs = [[find_run(results, model, b, v)["cost"] for b in boundaries] for v in (variant, "resident")]
            heights = [ours / resident for ours, resident in zip(*costs)]
            places = [b + (i - 1) * 0.3 for b in range(len(boundaries))]
            bars = axis.bar(places, heights, 0.28, color=COLOURS[variant], label=variant)
            axis.bar_label(bars, [f"{h:.2f}" if h < 10 else f"{h:.1f}" for h in heights], fontsize=7, padding=2)
        for level, text in LEVELS.items():
            axis.axhline(level, color="0.45", linewidth=0.8, linestyle="--")
            axis.text(len(boundaries) - 0.55, level, text, ha="right", va="bottom", fontsize=8, color="0.35")
        axis.set_yscale("log")
        axis.set_ylim(0.8, max(40, 1.5 * max(bar.get_height() for bar in axis.patches)))
        axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axis.set_xticks(range(len(boundaries)), boundaries)
        axis.set_xlim(-0.5, len(boundaries) - 0.5)  # nothing beside the bars, whose numbers need the width on a phone
        axis.set_title(model)
    axes[0][0].set_ylabel("ByteDMD price / price of resident")
    figure.suptitle(f"What offloading costs depends on what it is divided by\n{_caption(results)}")
    return legend_below(figure, axes[0][0])


def _cost_by_kind(results: dict[str, Any]) -> Any:
    """Stacked price by kind of value: one panel per model and boundary."""
    names, parts = variants(results), _parts(results)
    figure, axes, panels = _grid(results, 3.1)
    for axis, runs in panels:
        foot = [0.0] * len(runs)
        for label, (colour, kinds) in parts.items():
            costs = [sum(run["cost_by_kind"].get(kind, 0) for kind in kinds) / 1e6 for run in runs]
            axis.bar(range(len(runs)), costs, 0.7, bottom=foot, color=colour, label=label)
            foot = [a + b for a, b in zip(foot, costs)]
        axis.set_xticks(range(len(runs)), [name.removeprefix("offload_") for name in names])
        axis.set_ylim(0, 1.05 * max(foot))
    for axis in axes[:, 0]:
        axis.set_ylabel("price in millions")
    figure.suptitle(f"What the price is made of\n{_caption(results)}")
    return legend_below(figure, axes[0][0], foot=0.06)


def _parts(results: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Name in the legend -> colour and kinds; kinds that no bar shows are one part, whose name says so."""
    costs = {kind: [run["cost_by_kind"].get(kind, 0) for run in results["runs"]] for kind in KIND_COLOURS}
    bars = [run["cost"] for run in results["runs"]]
    small = [kind for kind in costs if all(cost < _SMALL * bar for cost, bar in zip(costs[kind], bars))]
    parts = {kind: (colour, [kind]) for kind, colour in KIND_COLOURS.items() if kind not in small}
    if small:
        parts[f"under {100 * _SMALL:g} % of every bar: {', '.join(small)}"] = ("black", small)
    return parts


if __name__ == "__main__":
    redraw(draw_all, "bench.price.figures")
