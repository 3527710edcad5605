"""The whole answer on one screen: what offloading costs in ByteDMD's price, in wall time, and where that turns.

    python bench/verdict.py                   from the committed results
    python bench/verdict.py --results DIR     from a folder with results files of the same names
    python bench/verdict.py --export DIR      in the form of the lab that asked: a folder that runs in its tree

A line is a boundary: what the ratio is divided by. The lines of the toy are exact prices of whole programs; those of
the whole model are rows of a table of published size against the weights of a model, which are taken from below. Wall
times are those of the toy's plain Python; of whole models they are a finding of their own, on hardware. Below it stands
what the start page says: over definitions, texts, managers and tiers, in which cases the claim survives.

`bench/fill_docs.py` takes the tables and single values of the finding about ByteDMD from here.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("verdict")

from bench.evidence.committed import RESULTS, Evidence
from bench.evidence.price import halves
from bench.instruments.claim import WALL_TIME_CLAIM
from bench.instruments.reading import as_this_version
from bench.lab.export import export
from bench.rows.whole_model import STEP
from bench.site.start_page import verdict_lines, verdict_sentence
from engram_ref import cli

_WIDTH = 130  # columns


def main() -> None:
    """The command."""
    parser = cli.Parser(prog="verdict", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the lab's folder instead (bench/lab)")
    options = parser.parse_args()
    folder: Path = options.results
    with cli.one_line_errors("verdict"), as_this_version(folder):
        if options.export is not None:
            print("\n".join(f"wrote {path}" for path in export(options.export)))
            return
        print(screen(Evidence(folder)))


def screen(evidence: Evidence) -> str:
    """The table of both halves, and the verdict in words."""
    claim = (
        f"The claim: under {100 * WALL_TIME_CLAIM:g} % of wall time. The whole model is priced at {STEP} tokens a step."
    )
    words = [verdict_sentence(evidence), *verdict_lines(evidence).splitlines()]
    wrapped = (textwrap.fill(text.replace("*", ""), _WIDTH, subsequent_indent="  ") for text in words)
    return "\n".join([halves(evidence), claim, "", *wrapped])


if __name__ == "__main__":
    cli.run(main, "verdict")
