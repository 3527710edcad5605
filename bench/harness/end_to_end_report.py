"""Run the end-to-end benchmark, print what it found, draw the figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from bench.harness.end_to_end import EndToEnd
from bench.harness.end_to_end_figures import draw_all
from bench.harness.end_to_end_table import report
from bench.harness.wall_table import measured_on


def measure(options: argparse.Namespace, tell: Callable[[str], None], copy: tuple[int, int]) -> None:
    """The command."""
    run = EndToEnd(options, tell, copy)
    print(measured_on(run.record.results), flush=True)
    results = run.run()
    print(f"\n{report(results)}\n\n{run.record.path}")
    for figure in draw_all(results, options.out):
        print(figure)
