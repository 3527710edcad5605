"""How far the class of the lookup alone can be moved: by how the lookup ends, and by what buries the table.

    python bench/how_far.py lookup_range            some minutes; writes out/lookup_range/results.json, prints tables
    python bench/how_far.py lookup_range --quick    a small version in seconds

Five toys (`bench.sweeps.lookup_range.toys`), five endings (`engram_toy.models.endings`), paddings of none to 10^7.
Prices are exact, and the same on every machine.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from bench.instruments.results import priced_head
from bench.setup.parallel import add_jobs, in_parallel
from bench.setup.streams import Source, Stream, text_source
from bench.sweeps.lookup_range import Toy, depth_table, endings_table, price_toy, toys
from engram_ref.hashing import HashPlan
from engram_ref.vocab import CompressedVocab

PROG = "lookup_range"
SEED = 0  # which window of the text, which weights: those of `bench/bytedmd_toy.py`
FULL, QUICK = {"tokens": 128, "hidden": 64}, {"tokens": 8, "hidden": 4}

Work = tuple[Toy, HashPlan, Stream]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this run alone."""
    add_jobs(parser)
    small = ", ".join(f"{name} {value}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"small: {small}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file."""
    sizes = QUICK if options.quick else FULL
    vocab = CompressedVocab.from_tokenizer(None)
    source = text_source(None, vocab)
    jobs = works(source, vocab, **sizes)
    found = dict(in_parallel(price, jobs, options.jobs))
    return {
        **priced_head(PROG, "bench.sweeps.lookup_range"),
        "configuration": {**sizes, "seed": SEED, "quick": options.quick},
        "stream": {"name": source.name, "sha256": source.sha256, "tokens": len(source.ids)},
        "toys": [{**found[i][0], "config": asdict(jobs[i][0].config)} for i in range(len(jobs))],
        "records": [record for i in range(len(jobs)) for record in found[i][1]],
    }


def works(source: Source, vocab: CompressedVocab, tokens: int, hidden: int) -> list[Work]:
    """Every toy with its hash constants and the text that it reads."""
    return [
        (toy, HashPlan.for_vocab(toy.config, vocab), source.window(toy.tokens, SEED)) for toy in toys(tokens, hidden)
    ]


def price(work: Work) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One toy, in a process of its own."""
    toy, plan, stream = work
    return price_toy(toy, plan, stream, SEED)


def report(results: dict[str, Any]) -> str:
    """Ratios by ending, and depths."""
    return f"{endings_table(results, {})}\n\n{depth_table(results)}"
