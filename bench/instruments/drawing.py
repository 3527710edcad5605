"""What every figure shares: colours, legend, and how it is saved as SVG, the same bytes for the same numbers."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # before pyplot, which chooses for itself otherwise: each measures text in its own way
from matplotlib import pyplot as plt
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FixedLocator

from bench.instruments.output import source
from bench.instruments.reading import as_this_version, read_results
from engram_ref import cli
from engram_ref.files.replacing import replacing_path

NARROW = 3.1  # inches: what a phone of 360 CSS pixels has room for, beside the page's margins
_DIGEST = re.compile(r"\b[a-z][0-9a-f]{10}\b")  # how a part of a figure is named: a digest of where it lies
_NUMBER = re.compile(r"(?<![\w.#-])-?\d+(?:\.\d+)?")  # none within a word: colours and letters have numbers, too
_SAME_PLACE = 0.001  # points: nobody sees less
# Okabe and Ito's palette: told apart by everyone, and on paper.
COLOURS = {
    "no_engram": "#999999",
    "resident": "#0072B2",
    "offload_naive": "#D55E00",
    "offload_prefetch": "#CC79A7",
    "offload_hot": "#009E73",
    "offload_uva": "#56B4E9",
    "offload_disk": "#E69F00",
}


def save_all(
    drawings: Mapping[str, Callable[[dict[str, Any]], Any]], results: dict[str, Any], out: Path, narrow: bool = False
) -> list[Path]:
    """Draw each figure of these results and save it as `out`/NAME.svg; the same results give the same bytes.

    Args:
        narrow: as `out`/NAME.narrow.svg, laid out for a phone.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in drawings.items():
        # A fixed salt and no date: the same results give the same file.
        with plt.rc_context(
            {"svg.hashsalt": name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
        ):
            figure = draw(results)
            if narrow:
                stack(figure)
            path = out / f"{name}{'.narrow' * narrow}.svg"
            with replacing_path(path) as part:
                figure.savefig(part, bbox_inches="tight", metadata={"Date": None, "Description": source(results)})
            plt.close(figure)
        paths.append(path)
    return paths


def same_picture(one: str, other: str) -> bool:
    """Whether two saved figures show the same.

    Processors differ in the last digit of a logarithm, which may change the last digit of a place and its digest.
    """
    (words, places), (other_words, other_places) = _words_and_places(one), _words_and_places(other)
    return words == other_words and all(abs(a - b) <= _SAME_PLACE for a, b in zip(places, other_places))


def _words_and_places(svg: str) -> tuple[list[str], list[float]]:
    """What stands between numbers, with digests by their order, and the numbers."""
    order: dict[str, str] = {}
    numbered = _DIGEST.sub(lambda digest: order.setdefault(digest[0], f"part{len(order)}"), svg)
    return _NUMBER.split(numbered), list(map(float, _NUMBER.findall(numbered)))


def panels(
    heights: Sequence[float], width: float, margin: float, title: str, columns: int = 2, **layout: Any
) -> tuple[Any, list[Any]]:
    """A figure with a panel for each height, in rows as high as their highest; panels that are left over are blank.

    Args:
        heights, width: of panels, in inches.
        margin: added to the figure's height.
        layout: of `pyplot.subplots`.
    """
    columns = min(columns, len(heights))
    rows = [max(heights[first : first + columns]) for first in range(0, len(heights), columns)]
    size = (width * columns, sum(rows) + margin)
    figure, grid = plt.subplots(len(rows), columns, figsize=size, squeeze=False, height_ratios=rows, **layout)
    for left_over in grid.flat[len(heights) :]:
        left_over.axis("off")
    figure.suptitle(title)
    return figure, list(grid.flat[: len(heights)])


def interval(
    axis: Any,
    place: float,
    found: tuple[float, float, float],
    colour: str,
    filled: bool = True,
    upright: bool = False,
) -> None:
    """A median on the line from its low to its high; hollow where it says nothing.

    Args:
        place: on the other axis.
        found: median, low and high.
        upright: the line stands, and `place` lies on the horizontal axis.
    """
    line, point = ([*found[1:]], [place, place]), ([found[0]], [place])
    axis.plot(*(line[::-1] if upright else line), color="black", linewidth=1.2, solid_capstyle="butt", zorder=2)
    style = {"color": colour, "markeredgecolor": "black", "markerfacecolor": colour if filled else "white"}
    axis.plot(*(point[::-1] if upright else point), "o", markersize=7, zorder=3, clip_on=False, **style)


def name_points(axis: Any, colour: str, label: str) -> None:
    """The legend's point for those that `interval` draws: a filled one, whatever the first of them says."""
    axis.plot([], [], "o", markersize=7, color=colour, markeredgecolor="black", label=label)


def legend_below(figure: Any, axis: Any, foot: float = 0.07, columns: int | None = None) -> Any:
    """The figure with the legend of one panel, for all, at its foot: a share of its height."""
    figure.tight_layout(rect=(0, foot, 1, 1))
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=columns or len(labels))
    return figure


def stack(figure: Any, width: float = NARROW) -> None:
    """Lay a figure out anew in one column: its panels, legend and titles, with letters as large as they are.

    A panel that took its label from another one in its row or column gets it for itself. A scale of colours is laid
    below the panels.
    """
    panels = [axis for axis in figure.axes if axis.get_subplotspec() is not None]
    scales = [axis for axis in figure.axes if axis not in panels]
    shown = [axis for axis in panels if axis.axison]
    _label_each(shown)
    heights = [max(2.2, min(3.0, axis.get_position().height * figure.get_figheight())) for axis in shown]
    figure.set_size_inches(width, sum(heights) + 0.8 * len(shown) + 1.2)
    grid = GridSpec(len(shown), 1, figure=figure, height_ratios=heights)
    for place, (axis, height) in enumerate(zip(shown, heights)):
        axis.set_subplotspec(grid[place])
        axis.tick_params(labelbottom=True, labelleft=True)
        axis.set_title(_wrapped(axis.get_title(), width), fontsize=9)
        axis.set_xlabel(_wrapped(axis.get_xlabel(), 0.8 * width))
        axis.set_ylabel(_wrapped(axis.get_ylabel(), height))
        # Ticks with names, for which a narrow axis has no room side by side: a word a line.
        if isinstance(axis.xaxis.get_major_locator(), FixedLocator):
            names = [name.get_text().replace(" ", "\n") for name in axis.get_xticklabels()]
            axis.set_xticks(axis.get_xticks(), names)
    # Asked before the axes of the scales are removed.
    coloured = [(scale._colorbar.mappable, scale.get_ylabel()) for scale in scales]
    for axis in [*scales, *(axis for axis in panels if not axis.axison)]:
        axis.remove()
    figure.set_layout_engine("constrained")
    for colours, label in coloured:  # made anew: it lies, where it stood
        figure.colorbar(colours, ax=shown, location="bottom", label=label, aspect=30, pad=0.01)
    for legend in list(figure.legends):  # a copy: each is taken out of it below
        handles, labels = legend.legend_handles, [_wrapped(text.get_text(), 0.8 * width) for text in legend.get_texts()]
        legend.remove()
        columns = max(1, int(_letters(width) / (max(map(len, labels)) + 7)))
        figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    figure.suptitle(_wrapped(figure.get_suptitle(), width), fontsize=9)


def _label_each(panels: list[Any]) -> None:
    """Labels of axes that stand once for a row or a column of panels, at each of them."""
    cells = {axis: axis.get_subplotspec() for axis in panels}
    for axis, cell in cells.items():
        below = [other.get_xlabel() for other in panels if cells[other].colspan == cell.colspan]
        left = [other.get_ylabel() for other in panels if cells[other].rowspan == cell.rowspan]
        axis.set_xlabel(axis.get_xlabel() or next(filter(None, reversed(below)), ""))
        axis.set_ylabel(axis.get_ylabel() or next(filter(None, left), ""))


def _letters(width: float) -> float:
    """How many letters of a title have room in so many inches."""
    return 15 * width


def _wrapped(text: str, width: float) -> str:
    lines = [textwrap.wrap(line, int(_letters(width))) or [""] for line in text.splitlines()]
    return "\n".join(part for line in lines for part in line)


def redraw(
    draw: Callable[[dict[str, Any], Path], list[Path]],
    module: str,
    report: Callable[[dict[str, Any]], str] = lambda results: "",
    benchmark: str | None = None,
) -> None:
    """Draw the figures of the results file that the command line names, beside it; before, print what it says."""
    parser = cli.Parser(prog=f"python -m {module}", description=sys.modules["__main__"].__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what a run has written")
    path = parser.parse_args().results
    with cli.one_line_errors(module), as_this_version(path):
        results = read_results(path, benchmark)
        print(report(results), end="\n\n" if benchmark else "")
        for figure in draw(results, path.parent):
            print(figure)
