"""`bytedmd_toy.py --sweep`: what is to be swept, prices, files, tables."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from bench.instruments.code_digest import code_sha256
from bench.instruments.output import draw_where_possible
from bench.instruments.results import conclude
from bench.price.models import MODELS_OF
from bench.sweeps.points import GRID, NAMES, QUICK_AXES, Axes, Settings, grid_points, points_of
from bench.sweeps.record import grid_content, sweeps_content
from bench.sweeps.run import PRICING_CODE, Texts, price_all, stream_name
from bench.sweeps.table import report_all
from engram_ref import cli


def run_sweeps(options: Namespace, prog: str) -> None:
    """Price the sweeps that the options name; write results and figures to --out and print the tables."""
    journal = options.out / "sweeps.journal"
    try:
        with cli.one_line_errors(prog):
            _run(options, journal)
    except KeyboardInterrupt:
        kept = f"finished prices are kept in {journal}, the same command continues"
        print(f"\n{prog}: interrupted; {kept}", file=sys.stderr)
        sys.exit(130)  # as a shell tells of Ctrl-C


def _run(options: Namespace, journal: Path) -> None:
    names = chosen(options)
    if options.fresh:
        journal.unlink(missing_ok=True)
    base, models = base_of(options), MODELS_OF[options.preset] if options.model == "both" else (options.model,)
    texts = Texts(options.text, options.tokenizer)
    points = [point for name in names if name != GRID for point in points_of(name, base, models, options.quick)]
    axes = QUICK_AXES if options.quick else Axes()
    grid = list(grid_points(base, axes)) if GRID in names else []
    cases = list(dict.fromkeys(point.case for point in [*points, *grid]))
    records = price_all(cases, texts, code_sha256(*PRICING_CODE), journal, options.jobs)

    about = {name: str(value) if (value := getattr(options, name)) else None for name in ("text", "tokenizer")}
    about["quick"] = options.quick
    if points:
        windows = {stream_name(point.case.settings): texts.window(point.case.settings) for point in points}
        asked = {**about, "models": list(models), **asdict(base)}
        sweeps = sweeps_content(asked, points, records, windows)
        conclude(sweeps, options.out / "sweeps.json", report_all, rows="points")
        draw_where_possible("bench.sweeps.figures", sweeps, options.out)
    if grid:
        asked = {**about, "models": ["engram"], **asdict(base)}
        prices = grid_content(asked, base, axes, records, texts.window(base))
        conclude(prices, options.out / "grid.json", None, rows="")


def chosen(options: Namespace) -> list[str]:
    """Names of the sweeps in their canonical order.

    Raises:
        ValueError: a sweep that the model does not have, or the original tracer.
    """
    if options.tracer != "own":
        raise ValueError("--tracer upstream checks single runs: leave out --sweep")
    of_engram = {"preset", GRID}
    if options.model == "kv-bank" and (wrong := of_engram.intersection(options.sweep)):
        raise ValueError(f"sweep {min(wrong)} is of model engram: leave out --model kv-bank")
    left_out = of_engram if options.model == "kv-bank" else set()
    return [name for name in NAMES if name in options.sweep or ("all" in options.sweep and name not in left_out)]


def base_of(options: Namespace) -> Settings:
    """The base configuration: what the command line says, all lookups offloaded, every copy right."""
    same = ("preset", "seq_len", "d_model", "seed", "padding", "bytes_per_element", "definition")
    known = {name: getattr(options, name) for name in same}
    return Settings(stream="text", share=1.0, hot=options.hot_share, wrong=0.0, **known)
