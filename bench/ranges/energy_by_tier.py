"""Time or energy? What the rows of a decode step cost by the tier they come from, in energies that others published.

    python bench/how_far.py energy_by_tier         some minutes; writes out/energy_by_tier/results.json, prints tables
    python bench/how_far.py energy_by_tier --quick    65,536 tokens

The results hold counts alone: how many rows the steps of real text read, how many of them once a step, how many never
before. Energies are published ranges (docs/findings/published.json), multiplied in where the tables are made. Nothing
of this is a measurement of energy.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from bench.energy.table import crossing_table, reuse_table, step_table
from bench.evidence.published import energy_tiers
from bench.instruments.output import say
from bench.instruments.results import priced_head
from bench.rows.cases import LEAST_STEPS, check_steps, read_rows, source
from bench.rows.whole_model import AROUND, MODELS, STEP
from engram_ref.config import EngramConfig

PROG = "energy_by_tier"
STEPS = (1, 8, 64, 512, 4096, 32_768)  # tokens
FULL, QUICK = 1 << 20, 1 << 16  # tokens: of the largest step, and of 512 tokens, LEAST_STEPS and more


def records(tokens: int) -> tuple[str, list[dict[str, Any]]]:
    """Digest of the text, and counts of both tables at every step size that the text has enough steps of."""
    text = source("python-stdlib", tokens)
    found = []
    for table, models in AROUND.items():
        config = MODELS[models[0]].table
        for step in STEPS:
            if tokens >= LEAST_STEPS * step:
                say(f"{table}, {step:,} tokens a step")
                found.append({"table": table, **count_steps(text.ids, config, step)})
    return text.sha256, found


def count_steps(ids: np.ndarray, config: EngramConfig, tokens_per_step: int) -> dict[str, Any]:
    """Reads of the second half of the steps: all, those that are the first of their row in a step, and the first ever.

    Args:
        ids: compressed, int64 [T].

    Raises:
        ValueError: the text has too few steps.
    """
    check_steps(len(ids), tokens_per_step)
    reads = read_rows(ids, config, "decode", tokens_per_step)
    steps = len(reads.links) // reads.step_reads
    counted = steps - steps // 2  # the first half warms up
    begin = steps // 2 * reads.step_reads
    return {
        "tokens": steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "steps_counted": counted,
        "reads": len(reads.links) - begin,
        "distinct_in_step": int(reads.first_in_step()[begin:].sum()),
        "first_ever": int((reads.links[begin:] < 0).sum()),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this run alone."""
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} tokens")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file."""
    tokens = QUICK if options.quick else FULL
    sha256, found = records(tokens)
    return {
        **priced_head(PROG, "bench.ranges.energy_by_tier"),
        "configuration": {"tokens": tokens, "quick": options.quick},
        "stream": {"name": "python-stdlib", "sha256": sha256},
        "records": found,
    }


def report(results: dict[str, Any]) -> str:
    """The three tables of the counts, with published energies multiplied in."""
    places = energy_tiers()
    tables = crossing_table(results, places), step_table(places, STEP), reuse_table(results)
    return "\n\n".join(tables)
