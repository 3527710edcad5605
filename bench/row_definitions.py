"""Real index streams under every definition of ByteDMD, and the floor under all managers; how long each takes.

    python bench/row_definitions.py                    10^5 and 10^6 tokens of three tables; writes out/row_definitions
    python bench/row_definitions.py --tokens 100000    a minute or two

DeepSeek-V4.1-Flash's rows and those of the paper's tables, token by token, in both layouts; the table on top, and below
10^10 and 10^11 bytes. Prices are the same on every machine; seconds are not. The floor is given between two numbers,
within 1 %, of which the lower is a bound itself.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("row_definitions")

from bench.instruments.output import require_writable, say
from bench.instruments.results import conclude, priced_head
from bench.rows.cases import LAYOUTS
from bench.rows.definitions import TABLES, Record, definitions_table, records
from bench.setup.parallel import add_jobs, in_parallel
from engram_ref import cli

PROG = "row_definitions"


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    tokens = [10**5, 10**6]
    add("--tokens", type=cli.at_least(1, 1 << 25), nargs="+", default=tokens, metavar="N", help="default: 10^5, 10^6")
    add("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="NAME", help=f"default: {', '.join(TABLES)}")
    add("--out", type=Path, default=Path("out/row_definitions"), metavar="DIR", help="results.json goes here")
    add("--quick", action="store_true", help="1,000 tokens of each table")
    add_jobs(parser)
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        require_writable(options.out)
        # The longest come last here, and are started first.
        jobs = list(itertools.product([1000] if options.quick else options.tokens, options.tables, LAYOUTS))[::-1]
        found: dict[int, list[Record]] = {}
        for place, priced in in_parallel(_records_of, jobs, options.jobs):
            found[place] = priced
            tokens, table, layout = jobs[place]
            say(f"{table}, {tokens:,} tokens, {layout}: {len(found)} of {len(jobs)}")
        every = [record for at in sorted(found, reverse=True) for record in found[at]]
        results = {**priced_head(PROG, "bench.rows.definitions"), "records": every}
        conclude(results, options.out / "results.json", definitions_table, rows="records")


def _records_of(job: tuple[int, str, str]) -> list[Record]:
    tokens, table, layout = job
    return list(records(table, tokens, layout))


if __name__ == "__main__":
    cli.run(main, PROG)
