"""The exchange on paper for 2 to 1,024 ranks, against the window before the second block, and what stragglers cost.

  python -m bench.ranks.figures bench/results/sharded_cpu.json     draw it again

sharded.svg    decode and prefill, a line per link and number of tokens; dots are bytes of real runs over the bandwidth
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from bench.instruments.drawing import redraw, save_all
from engram_ref.sharding.on_paper import LINKS

Results = dict[str, Any]
_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_STYLES = ("-", "--", "-.", ":")
_NOISE = ("#DDA0C8", "#A8467F", "#3F0F2E")  # not the links', and darker where there is more of it
_NESTED = (4.0, 2.4, 1.2)  # widths: noise that changes little lies on what it changes


def draw_all(results: Results, out: Path) -> list[Path]:
    """Draw the figure into a folder; complete or absent. Returns its path in a list."""
    return save_all({"sharded": sharded}, results, out)


def sharded(results: Results) -> Any:
    """Three panels: decode, prefill, and a decode step of ranks that wait for each other."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, phase in zip(axes, ("decode", "prefill")):
        _model(axis, results, phase)
    _stragglers(axes[2], results)
    figure.suptitle("Sharded V4.1 tables on paper: latency and bytes of published links; nothing here was timed")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(LINKS))
    return figure


def _model(axis: Any, results: Results, phase: str) -> None:
    entries = [entry for entry in results["model"] if entry["phase"] == phase]
    counts = sorted({entry["tokens"] for entry in entries})
    for colour, link in zip(_COLOURS, LINKS.values()):
        for style, tokens in zip(_STYLES, counts):
            line = [entry for entry in entries if (entry["link"], entry["tokens"]) == (link.name, tokens)]
            label = link.name if tokens == counts[0] else None
            axis.plot([e["ranks"] for e in line], [1e6 * e["seconds"] for e in line], style, color=colour, label=label)
    for style, tokens in zip(_STYLES, counts):
        window = next(entry["window_s"] for entry in entries if entry["tokens"] == tokens)
        if phase == "prefill" or tokens == counts[0]:  # decode has one window, whatever the tokens
            axis.axhline(1e6 * window, color="0.5", linestyle=style if phase == "prefill" else "-", linewidth=0.8)
            axis.annotate("window", (1024, 1e6 * window), fontsize=7, color="0.4", ha="right", va="bottom")
    told = ", ".join(f"{style} {tokens:,}" for style, tokens in zip(("solid", "dashed", "dash-dot", "dotted"), counts))
    axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel="exchange, us")
    axis.set_title(f"{phase}: tokens a rank\n{told}", fontsize=8)
    axis.set_xticks([2, 8, 64, 1024], ["2", "8", "64", "1,024"])


def _stragglers(axis: Any, results: Results) -> None:
    slowest = sorted({entry["slower"] for entry in results["schedule"]})
    noises = sorted({entry["jitter"] for entry in results["schedule"]})
    for colour, width, jitter in zip(_NOISE, _NESTED, noises):
        for style, slower in zip(_STYLES, slowest):
            line = [e for e in results["schedule"] if (e["jitter"], e["slower"]) == (jitter, slower)]
            over = [100 * (e["step_s"] / e["alone_s"] - 1) for e in line]
            axis.plot([e["ranks"] for e in line], over, style, color=colour, linewidth=width)
        axis.plot([], [], color=colour, linewidth=width, label=f"noise {100 * jitter:g} %")
    for style, slower in zip(_STYLES, slowest):
        if slower:
            axis.plot([], [], style, color="black", label=f"one rank {100 * slower:g} % slower")
    axis.set(xscale="log", xlabel="ranks", ylabel="step against the mean rank alone, + %")
    axis.set_title("decode, 64 tokens a rank, Ethernet:\nranks that wait for each other (simulated)", fontsize=8)
    axis.set_xticks([2, 8, 64, 1024], ["2", "8", "64", "1,024"])
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    redraw(draw_all, "bench.ranks.figures")
