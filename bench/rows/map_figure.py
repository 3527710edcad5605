"""The figure of `bench/how_far.py verdict_map`'s results: where each class holds, and where the published models stand.

python -m bench.rows.map_figure out/verdict_map/results.json     draw it, beside it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from bench.instruments.claim import LOSS_ABOVE, WIN_UP_TO
from bench.instruments.drawing import redraw, save_all
from bench.rows.verdict_map import POINTS, boundary, point
from bench.rows.whole_model import AROUND, shown

_FOOT = 1e-2  # what stands for no compute at all on the logarithmic axis
_TOP = 1e8  # far above the points
_COLOURS = {"LOSS": "#D55E00", "INCONCLUSIVE": "#F0E442", "WIN": "#009E73"}
_STEPS = {1: "o", 512: "s", 32_768: "^"}
# One token's experts are rings: what they coincide with is seen inside.
_FILLED: dict[str, Any] = {"color": "black", "markersize": 5}
_HOLLOW: dict[str, Any] = {"color": "black", "markersize": 9, "markerfacecolor": "none"}


def draw_all(results: dict[str, Any], out: Path, narrow: bool = False) -> list[Path]:
    """Draw the figure into a folder; the file is complete or absent. Returns its path."""
    return save_all({"verdict_map": verdict_map}, results, out, narrow)


def verdict_map(results: dict[str, Any]) -> Any:
    """A panel per table and layout: the classes as regions, the published models as points."""
    layouts = list(dict.fromkeys(r["layout"] for r in results["records"]))
    figure, axes = plt.subplots(len(AROUND), len(layouts), figsize=(8, 7), squeeze=False, sharex=True, sharey=True)
    for row, (table, models) in zip(axes, AROUND.items()):
        for axis, layout in zip(row, layouts):
            _regions(axis, [r for r in results["records"] if (r["table"], r["layout"]) == (table, layout)])
            for model, experts, tokens in POINTS:
                if model in models:
                    style = _HOLLOW if experts == "one" else _FILLED
                    axis.plot(*point(model, experts, tokens), _STEPS[tokens], **style)
                    if tokens == 1 and experts != "one":  # of one token both are the same, and have one name
                        up = 5 if axis.texts else -5  # the two models of a panel stand close to each other
                        axis.annotate(shown(model), point(model, experts, 1), (-7, up), fontsize=7,
                                      textcoords="offset points", ha="right", va="center")  # fmt: skip
            axis.set(xscale="log", yscale="log", ylim=(_FOOT, _TOP), title=f"{table}, {layout}")
    for axis in axes[-1]:
        axis.set_xlabel("bytes above / bytes of the table")
    for row in axes:
        row[0].set_ylabel("bytes read / byte of rows")
    figure.legend(*_legend(axes[0][0]), frameon=False, loc="lower center", ncols=4, fontsize=8)
    figure.suptitle("Buried table against one that stays on top, by what lies above and what else is read")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def _regions(axis: Any, line: list[dict[str, Any]]) -> None:
    times = [r["bytes_above"] / r["table_bytes"] for r in line]
    loss, win = ([max(_FOOT, boundary(r, level)) for r in line] for level in (LOSS_ABOVE, WIN_UP_TO))
    axis.fill_between(times, _FOOT, loss, color=_COLOURS["LOSS"], label="LOSS")
    axis.fill_between(times, loss, win, color=_COLOURS["INCONCLUSIVE"], label="INCONCLUSIVE")
    axis.fill_between(times, win, _TOP, color=_COLOURS["WIN"], alpha=0.5, label="WIN")


def _legend(axis: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    for tokens, marker in _STEPS.items():
        handles.append(plt.Line2D([], [], marker=marker, linestyle="", **_FILLED))
        labels.append(f"{tokens:,} token{'s' * (tokens > 1)} a step")
    handles.append(plt.Line2D([], [], marker="o", linestyle="", **_HOLLOW))
    labels.append("hollow: one token's experts,\nfilled: the expected ones")
    return handles, labels


if __name__ == "__main__":
    redraw(draw_all, "bench.rows.map_figure")
