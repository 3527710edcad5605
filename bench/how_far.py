"""How far each answer reaches: four runs, each with a results file and tables of its own.

python bench/how_far.py lookup_range      the lookup's endings and paddings, five toys
python bench/how_far.py energy_by_tier    rows of decode steps by the tier they come from, in published energies
python bench/how_far.py verdict_map       the map of WIN, INCONCLUSIVE and LOSS
python bench/how_far.py other_texts       texts of eight other kinds; downloads packages for the run
python bench/how_far.py NAME --help
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("how_far")

from bench.instruments.output import require_writable
from bench.instruments.results import conclude
from bench.ranges import energy_by_tier, lookup_range, other_texts, verdict_map
from engram_ref import cli

PROG = "how_far"
RUNS = {run.PROG: run for run in (lookup_range, energy_by_tier, verdict_map, other_texts)}


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("run", choices=RUNS, metavar="NAME", help=", ".join(RUNS))
    run = RUNS[parser.parse_args(sys.argv[1:2]).run]
    parser = cli.Parser(prog=run.PROG, description=run.__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("out") / run.PROG, metavar="DIR", help="results.json goes here"
    )
    run.add_options(parser)
    options = parser.parse_args(sys.argv[2:])
    with cli.one_line_errors(run.PROG):
        require_writable(options.out)
        conclude(run.measure(options), options.out / "results.json", run.report, rows="records")


if __name__ == "__main__":
    cli.run(main, PROG)
