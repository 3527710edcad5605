"""Real index streams under every definition of ByteDMD, and the floor under all managers; how long each takes.

    python bench/row_definitions.py                        10^5 tokens, three tables; writes out/row_definitions
    python bench/row_definitions.py --tokens 1000000   a quarter of an hour, mostly one core; no step of `make findings`

DeepSeek-V4.1-Flash's rows and those of the paper's tables, token by token, in both layouts; the table on top, and below
10^10 and 10^11 bytes. Prices are the same on every machine; seconds are not. The floor is given between two numbers,
within 1 %, of which the lower is a bound itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.instruments.output import require_writable
from bench.instruments.results import conclude, priced_head, write_unless_same
from bench.rows.definitions import TABLES, definitions_table, records
from engram_ref import cli

PROG = "row_definitions"


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--tokens", type=cli.at_least(1, 1 << 25), nargs="+", default=[10**5], metavar="N", help="default: 10^5")
    add("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="NAME", help=f"default: {', '.join(TABLES)}")
    add("--out", type=Path, default=Path("out/row_definitions"), metavar="DIR", help="results.json goes here")
    add("--quick", action="store_true", help="1,000 tokens of each table")
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        require_writable(options.out)
        results: dict[str, Any] = {**priced_head(PROG, "bench.rows.definitions"), "records": []}
        for tokens in [1000] if options.quick else options.tokens:
            for table in options.tables:
                print(f"{table}, {tokens:,} tokens", file=sys.stderr, flush=True)
                results["records"] += records(table, tokens)
                write_unless_same(options.out / "results.json", results, "records")  # what is finished is kept
        conclude(results, options.out / "results.json", definitions_table, rows="records")


if __name__ == "__main__":
    cli.run(main, PROG)
