"""One real index stream under every definition of ByteDMD, and the floor under all managers; how long each takes.

    python bench/row_definitions.py --tokens 100000 1000000 --out FILE.json

DeepSeek-V4.1-Flash's rows, token by token, in both layouts. Prices are the same on every machine; seconds are not.
The floor is given between two numbers, within 1 %, of which the lower is a bound itself.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.instruments.results import results_head, write_json
from bench.instruments.words import aligned
from bench.rows.cases import LAYOUTS, read_rows, source
from engram_ref import cli
from engram_ref.config import EngramConfig
from engram_toy.definitions import DEFINITIONS
from engram_toy.fast.floor import row_floor
from engram_toy.fast.rows import price_rows, start

PROG = "row_definitions"
TABLE = "v41-flash"


def records(tokens: int) -> list[dict[str, Any]]:
    """Price and seconds of every definition and layout, for the first so many tokens."""
    config = EngramConfig.preset(TABLE)
    reads = read_rows(source("python-stdlib", tokens).ids, config)
    about = {"tokens": tokens, "reads": len(reads.links), "distinct_rows": len(reads.rows)}
    found = []
    for layout, held in LAYOUTS.items():
        begin = start(reads, held)
        for definition in (*DEFINITIONS, "floor"):
            began = time.perf_counter()
            if definition == "floor":
                low, high = row_floor(reads, begin, config.row_bytes())
            else:
                low = high = price_rows(reads, begin, config.row_bytes(), definition=definition).total
            case = {"layout": layout, "definition": definition, "price": low, "price_at_most": high}
            found.append({**about, **case, "seconds": time.perf_counter() - began})
    return found


def report(found: list[dict[str, Any]]) -> str:
    """A line per definition and layout."""
    rows = [["tokens", "layout", "definition", "price", "at most", "s"]]
    for r in found:
        prices = f"{r['price']:,}", f"{r['price_at_most']:,}"
        rows.append([f"{r['tokens']:,}", r["layout"], r["definition"], *prices, f"{r['seconds']:.1f}"])
    return aligned(rows, left={1, 2})


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--tokens", type=cli.at_least(1, 1 << 25), nargs="+", default=[10**5], help="default: 10^5")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write prices and environment here")
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        found = [record for tokens in options.tokens for record in records(tokens)]
        if options.out:
            write_json(options.out, {**results_head(PROG), "table": TABLE, "records": found})
    print(report(found))


if __name__ == "__main__":
    cli.run(main, PROG)
