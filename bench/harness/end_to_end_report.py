"""Run the end-to-end benchmark, print what it found, draw the figures; or show the results of an earlier run.

python -m bench.harness.end_to_end_report out/gpu_checks/end_to_end/results.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench.harness.end_to_end import PROG, EndToEnd
from bench.harness.end_to_end_figures import draw_all
from bench.harness.end_to_end_numbers import Json
from bench.harness.end_to_end_table import report
from bench.harness.reading import as_this_version, read_results
from bench.harness.wall_table import measured_on
from engram_ref import cli


def measure(options: argparse.Namespace, tell: Callable[[str], None], copy: tuple[int, int]) -> None:
    """The command."""
    run = EndToEnd(options, tell, copy)
    print(measured_on(run.record.results), flush=True)
    show(run.run(), run.record.path)


def show(results: Json, path: Path) -> None:
    """Print the tables, and draw the figures beside the file."""
    print(f"\n{report(results)}\n\n{path}")
    for figure in draw_all(results, path.parent):
        print(figure)


def main() -> None:
    """Show a file that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.harness.end_to_end_report RESULTS.json")
    path = Path(sys.argv[1])
    with cli.one_line_errors(PROG), as_this_version(path):
        show(read_results(path, PROG), path)


if __name__ == "__main__":
    main()
