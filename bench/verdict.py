"""Both halves of the answer, side by side: what offloading costs in ByteDMD's price, and in wall time.

    python bench/verdict.py                   the table, from the committed results
    python bench/verdict.py --results DIR     from a folder with results files of the same names

A line is a boundary: what the ratio is divided by. The lines of the toy are exact prices of whole programs; those of
the whole model are rows of a table of published size against the weights of a model, which are taken from below. Wall
times are those of the toy's plain Python; of whole models they are a finding of their own, on hardware.

`bench/fill_docs.py` takes the tables and single values of the finding about ByteDMD from here.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.evidence.committed import RESULTS, STEP, Evidence
from bench.evidence.price import halves
from bench.instruments.claim import WALL_TIME_CLAIM
from bench.instruments.reading import as_this_version
from engram_ref import cli


def main() -> None:
    """The command."""
    parser = cli.Parser(prog="verdict", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    folder: Path = parser.parse_args().results
    with cli.one_line_errors("verdict"), as_this_version(folder):
        print(halves(Evidence(folder)))
    claim = f"{100 * WALL_TIME_CLAIM:g} % of wall time"
    print(f"\nThe claim: under {claim}. The whole model is priced at {STEP} tokens a step.")


if __name__ == "__main__":
    cli.run(main, "verdict")
