"""The map of WIN, INCONCLUSIVE and LOSS, computed: bytes above the table against compute per byte fetched.

    python bench/how_far.py verdict_map            some minutes; writes out/verdict_map/results.json, prints two tables
    python bench/how_far.py verdict_map --quick    16,384 tokens

Decode steps of 512 tokens of real text on the paper's table and on V4.1-Flash's; see `bench.rows.verdict_map`.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.instruments.results import priced_head
from bench.rows.cases import read_rows, source
from bench.rows.verdict_map import map_records, map_table, points_table
from bench.rows.whole_model import AROUND, MODELS, STEP

PROG = "verdict_map"
FULL, QUICK = 1 << 18, 1 << 14  # tokens: 512 steps, and 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this run alone."""
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} tokens")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file."""
    tokens = QUICK if options.quick else FULL
    text = source("python-stdlib", tokens)
    records = []
    for table, models in AROUND.items():
        config = MODELS[models[0]].table
        records += map_records(read_rows(text.ids, config, "decode", STEP), config, table)
    return {
        **priced_head(PROG, "bench.rows.verdict_map", "bench.rows.cases"),
        "configuration": {"tokens": tokens, "tokens_per_step": STEP, "quick": options.quick},
        "stream": {"name": "python-stdlib", "sha256": text.sha256},
        "records": records,
    }


def report(results: dict[str, Any]) -> str:
    """The map, and the points on it."""
    return f"{map_table(results)}\n\n{points_table(results)}"
