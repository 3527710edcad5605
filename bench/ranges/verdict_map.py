"""The map of WIN, INCONCLUSIVE and LOSS, computed: bytes above the table against compute per byte fetched.

    python bench/how_far.py verdict_map            some minutes; writes out/verdict_map/results.json, prints two tables
    python bench/how_far.py verdict_map --quick    16,384 tokens

Decode steps of 512 tokens of real text on the paper's table and on V4.1-Flash's; see `bench.rows.verdict_map`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.instruments.code_digest import code_sha256
from bench.instruments.output import finish, printed_anyway, require_writable
from bench.instruments.results import environment, git_commit, write_unless_same
from bench.rows.cases import read_rows, source
from bench.rows.verdict_map import map_records, map_table, points_table
from bench.rows.whole_model import AROUND, MODELS
from engram_ref import cli

PROG = "verdict_map"
SCHEMA_VERSION = 1
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
            "schema_version": SCHEMA_VERSION,
            "benchmark": PROG,
            "configuration": {"tokens": tokens, "tokens_per_step": STEP, "quick": options.quick},
            "environment": environment(),
            "git": git_commit(),
            "code_sha256": code_sha256("bench.rows.verdict_map", "bench.rows.cases"),
            "stream": {"name": "python-stdlib", "sha256": text.sha256},
            "records": records,
        }
        path = options.out / "results.json"
        with printed_anyway(lambda: f"{map_table(results)}\n\n{points_table(results)}"):
            written = write_unless_same(path, results, "records")
            print(f"wrote {path}" if written else f"{path} says the same already", file=sys.stderr)
        finish(results, path)
