"""What every figure shares: colours, legend, and how it is saved as SVG, the same bytes for the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from bench.instruments.output import source
from bench.instruments.reading import as_this_version, read_results
from engram_ref import cli
from engram_ref.files.replacing import replacing_path

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


def save_all(drawings: Mapping[str, Callable[[dict[str, Any]], Any]], results: dict[str, Any], out: Path) -> list[Path]:
    """Draw each figure of these results and save it as `out`/NAME.svg; the same results give the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in drawings.items():
        # A fixed salt and no date: the same results give the same file.
        with plt.rc_context(
            {"svg.hashsalt": name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
        ):
            figure = draw(results)
            path = out / f"{name}.svg"
            with replacing_path(path) as part:
                figure.savefig(part, bbox_inches="tight", metadata={"Date": None, "Description": source(results)})
            plt.close(figure)
        paths.append(path)
    return paths


def legend_below(figure: Any, axis: Any) -> None:
    """The legend of one panel, for all, in a row at the foot of the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=len(labels))


def redraw(draw: Callable[[dict[str, Any], Path], list[Path]], module: str) -> None:
    """Draw the figures of the results file that the command line names, beside it."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {module} RESULTS.json")
    path = Path(sys.argv[1])
    with cli.one_line_errors(module), as_this_version(path):
        for figure in draw(read_results(path), path.parent):
            print(figure)
