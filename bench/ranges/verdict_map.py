"""The map of WIN, INCONCLUSIVE and LOSS, computed: bytes above the table against compute per byte fetched.

    python bench/how_far.py verdict_map            some minutes; writes out/verdict_map/results.json, prints two tables
    python bench/how_far.py verdict_map --quick    16,384 tokens

Decode steps of 512 tokens of real text on the paper's table and on V4.1-Flash's; see `bench.rows.verdict_map`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.instruments.output import require_writable
from bench.instruments.results import conclude, priced_head
from bench.rows.cases import read_rows, source
from bench.rows.verdict_map import map_records, map_table, points_table
from bench.rows.whole_model import AROUND, MODELS
from engram_ref import cli

PROG = "verdict_map"
STEP = 512  # tokens
FULL, QUICK = 1 << 18, 1 << 14  # tokens


def main(argv: list[str]) -> None:
    """The run."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/verdict_map"), metavar="DIR", help="results.json")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} tokens")
    options = parser.parse_args(argv)
    tokens = QUICK if options.quick else FULL
    with cli.one_line_errors(PROG):
        require_writable(options.out)
        text = source("python-stdlib", tokens)
        records = []
        for table, models in AROUND.items():
            config = MODELS[models[0]].table
            records += map_records(read_rows(text.ids, config, "decode", STEP), config, table)
        results = {
            **priced_head(PROG, "bench.rows.verdict_map", "bench.rows.cases"),
            "configuration": {"tokens": tokens, "tokens_per_step": STEP, "quick": options.quick},
            "stream": {"name": "python-stdlib", "sha256": text.sha256},
            "records": records,
        }
        conclude(results, options.out / "results.json", report, rows="records")


def report(results: dict[str, Any]) -> str:
    """The map, and the points on it."""
    return f"{map_table(results)}\n\n{points_table(results)}"
