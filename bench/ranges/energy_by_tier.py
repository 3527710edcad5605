"""Time or energy? What the rows of a decode step cost by the tier they come from, in energies that others published.

    python bench/how_far.py energy_by_tier         some minutes; writes out/energy_by_tier/results.json, prints tables
    python bench/how_far.py energy_by_tier --quick    65,536 tokens

The results hold counts alone: how many rows the steps of real text read, how many of them once a step, how many never
before. Energies are published ranges (docs/findings/published.json), multiplied in where the tables are made. Nothing
of this is a measurement of energy.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bench.energy.step_reads import count_steps
from bench.energy.table import crossing_table, reuse_table, step_table
from bench.evidence.published import energy_tiers
from bench.instruments.results import priced_head
from bench.rows.cases import LEAST_STEPS, source
from bench.rows.whole_model import AROUND, MODELS

PROG = "energy_by_tier"
STEPS = (1, 8, 64, 512, 4096, 32_768)  # tokens
PAPER_STEP = 512  # sequences of the paper's run, one token each
FULL, QUICK = 1 << 20, 1 << 16  # tokens: of the largest step, and of 512 tokens, LEAST_STEPS and more


def records(tokens: int) -> tuple[str, list[dict[str, Any]]]:
    """Digest of the text, and counts of both tables at every step size that the text has enough steps of."""
    text = source("python-stdlib", tokens)
    found = []
    for table, models in AROUND.items():
        config = MODELS[models[0]].table
        for step in STEPS:
            if tokens >= LEAST_STEPS * step:
                print(f"{table}, {step:,} tokens a step", file=sys.stderr, flush=True)
                found.append({"table": table, **count_steps(text.ids, config, step)})
    return text.sha256, found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this run alone."""
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} tokens")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file."""
    tokens = QUICK if options.quick else FULL
    sha256, found = records(tokens)
    return {
        **priced_head(PROG, "bench.energy.step_reads"),
        "configuration": {"tokens": tokens, "quick": options.quick},
        "stream": {"name": "python-stdlib", "sha256": sha256},
        "records": found,
    }


def report(results: dict[str, Any]) -> str:
    """The three tables of the counts, with published energies multiplied in."""
    places = energy_tiers()
    tables = crossing_table(results, places), step_table(places, PAPER_STEP), reuse_table(results)
    return "\n\n".join(tables)
