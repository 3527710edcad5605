"""Figures of a sweeps file, one per sweep: price over that of `resident` against the value that was varied.

  python -m bench.sweeps.figures bench/results/bytedmd_sweeps.json     draw them beside it

Saved as sweep_NAME.svg: a panel per model and boundary, a line per variant, the thresholds at 2, 5 and 20 drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from bench.instruments.claim import LEVELS
from bench.instruments.drawing import COLOURS, legend_below, redraw, save_all
from bench.sweeps.points import SWEEPS
from bench.sweeps.table import groups, ratios, value_text

# Naive and prefetch nearly coincide: the wider line stays visible below.
_STYLES = {"offload_naive": ("o", "-", 3.0), "offload_prefetch": ("s", "-", 1.2), "offload_hot": ("^", "--", 1.2)}
_LOGARITHMIC = {"padding", "tokens", "share", "hot", "bytes", "compute", "wrong"}  # the others have names for values
_SIDE_BY_SIDE = 5  # names that a panel has room for, written level


def draw_all(results: dict[str, Any], out: Path, names: Iterable[str] | None = None) -> list[Path]:
    """Draw a figure for every sweep, or those named, into a folder, each complete or absent. Returns the paths."""
    return save_all(
        {f"sweep_{name}": partial(_figure, sweep=name) for name in names or results["sweeps"]}, results, out
    )


def _figure(results: dict[str, Any], sweep: str) -> Any:
    """Models in rows, boundaries in columns, one scale for all."""
    pairs, label = groups(results, sweep), SWEEPS[sweep].label
    models, boundaries = (list(dict.fromkeys(names)) for names in zip(*pairs))
    size = (10.5, 1.4 + 2.6 * len(models))
    figure, axes = plt.subplots(len(models), len(boundaries), figsize=size, squeeze=False, sharex=True, sharey=True)
    for panels, model in zip(axes, models):
        for axis, boundary in zip(panels, boundaries):
            _panel(axis, results, sweep, model, boundary)
        panels[0].set_ylabel("price / price of resident")
    for axis in axes[-1]:
        axis.set_xlabel(label)
    _limit(axes, results, sweep)
    figure.suptitle(f"What offloading costs in ByteDMD, against {label}\n{_caption(results, sweep)}")
    return legend_below(figure, axes[0][0], foot=0.2 / size[1])


def _panel(axis: Any, results: dict[str, Any], sweep: str, model: str, boundary: str) -> None:
    values = results["sweeps"][sweep]["values"]
    places = values if sweep in _LOGARITHMIC else list(range(len(values)))
    for number, (variant, (marker, line, width)) in enumerate(_STYLES.items()):
        heights = ratios(results, sweep, model, boundary, variant)
        style = {"linestyle": line, "marker": marker, "markersize": 4, "linewidth": width}
        if sweep in _LOGARITHMIC:
            axis.plot(places, heights, color=COLOURS[variant], label=variant, **style)
        else:  # names lie on no line; variants stand side by side
            beside = [place + 0.16 * (number - 1) for place in places]
            axis.plot(beside, heights, color=COLOURS[variant], label=variant, **{**style, "linestyle": "none"})
    for level in LEVELS:
        axis.axhline(level, color="0.45", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axis.set_title(f"{model}, {boundary}")
    axis.set_yscale("log")
    _scale(axis, places, values, sweep)


def _scale(axis: Any, places: list[Any], values: list[Any], sweep: str) -> None:
    """Logarithmic along the values, 0 at a place of its own; or the values side by side."""
    if sweep not in _LOGARITHMIC:
        axis.set_xlim(-0.5, len(places) - 0.5)
    elif places[0] == 0:
        axis.set_xscale("symlog", linthresh=places[1], linscale=0.6)
    else:
        axis.set_xscale("log")
    axis.set_xticks(places, [_tick(value) for value in values])
    if len(places) > _SIDE_BY_SIDE and sweep not in _LOGARITHMIC:  # names are longer than numbers
        axis.tick_params(axis="x", labelrotation=30)
    axis.minorticks_off()


def _tick(value: Any) -> str:
    """A value under its tick; powers of ten as such."""
    text = value_text(value)
    return f"$10^{{{text[3:]}}}$" if text.startswith("10^") else text


def _limit(axes: Any, results: dict[str, Any], sweep: str) -> None:
    """One range for all panels that shows all points and all thresholds, and what these are."""
    heights = [h for m, b in groups(results, sweep) for v in _STYLES for h in ratios(results, sweep, m, b, v)]
    low, high = 0.85 * min(1.0, *heights), max(36.0, 1.3 * max(heights))
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    for axis in axes.flat:
        axis.set_ylim(low, high)
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for axis in axes[:, -1]:
        for level, text in LEVELS.items():
            axis.annotate(
                text, (1, level), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=8, color="0.35", annotation_clip=False,
            )  # fmt: skip


def _caption(results: dict[str, Any], sweep: str) -> str:
    """The base configuration, without what is varied here."""
    c = results["configuration"]
    text = next(window["name"] for name, window in results["streams"].items() if name.startswith("text/"))
    parts = {
        "preset": f"form {c['preset']}",
        "": text if sweep != "reuse" else f"text: {text}",
        "tokens": f"{c['seq_len']} tokens",
        "compute": f"width {c['d_model']}",
        "padding": f"padding {c['padding']:,}",
        "share": f"share {c['share']:g}",
        "hot": f"hot tier {c['hot']:g} of the rows",
        "definition": f"definition {c['definition']}",
        "bytes": f"{c['bytes_per_element']} B per value",
        "seed": f"seed {c['seed']}",
    }
    return ", ".join(text for name, text in parts.items() if name != sweep)


if __name__ == "__main__":
    redraw(draw_all, "bench.sweeps.figures")
