"""Several runs of the hardware benchmark on one machine as one results file, with its figures and its summary.

    python -m bench.wall.merge OUT/results.json OUT/wall/results.json OUT/disk/results.json

Runs are kept apart where their table sizes must not meet (a table that fits into memory but not onto the disk);
evidence of one machine is one file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench.instruments.output import printed_anyway
from bench.instruments.reading import as_this_version, read_results
from bench.instruments.results import write_json
from bench.wall import figures as wall_figures
from bench.wall.table import wall_table
from engram_ref import cli

PROG = "merge"
_SAME = ("benchmark", "device", "device_name", "git")


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One results dict: the steps and components of all runs, the first one's machine and limits.

    Raises:
        ValueError: no runs, or runs of another machine or commit.
    """
    if not runs:
        raise ValueError("nothing to merge: name the results of at least one run")
    first = runs[0]
    for run in runs[1:]:
        for name in _SAME:
            if run[name] != first[name]:
                raise ValueError(f"runs of different {name}: {first[name]} and {run[name]}; merge those of one machine")
    done = {part["case"].removesuffix("_1").removesuffix("_2") for run in runs for part in run["components"]}
    skipped = {entry["case"]: entry for run in runs for entry in run["components_skipped"] if entry["case"] not in done}
    disks = [run["limits"]["disk"] for run in runs]
    return {
        **first,
        "configuration": {"runs": [run["configuration"] for run in runs]},
        "limits": {**first["limits"], "disk": next((d for d in disks if d["reads_per_s"] is not None), disks[0])},
        "steps": [step for run in runs for step in run["steps"]],
        "components": [part for run in runs for part in run["components"]],
        "components_skipped": list(skipped.values()),
    }


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="the file to write; figures go beside it")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN.json", help="results of gpu_wall.py; absent: left out"
    )
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        for path in options.runs:
            if not path.exists():
                print(f"{PROG}: {path} does not exist and is left out", file=sys.stderr)
        found = [path for path in options.runs if path.exists()]
        with as_this_version(options.out):
            results = merged([read_results(path, "gpu_wall") for path in found])
        with printed_anyway(lambda: wall_table(results)):
            write_json(options.out, results)
            if results["steps"]:
                wall_figures.draw_all(results, options.out.parent)


if __name__ == "__main__":
    cli.run(main, PROG)
