"""Run sweeps: in parallel, and resumable.

Every finished recording appends its prices to `sweeps.journal` beside the results. A run that is killed, at any moment,
and started again prices only what is missing, and writes the same files, byte for byte: the results hold no times.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.instruments.journal import Journal
from bench.instruments.output import require_writable, say
from bench.price.models import digest, toy_config
from bench.setup.parallel import in_parallel
from bench.setup.streams import Source, Stream, random_source, standard_library, text_source
from bench.sweeps.points import Case, Settings
from bench.sweeps.pricing import Job, price_cases
from engram_ref.cli import time_left
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_ref.vocab import CompressedVocab

LIBRARY_BYTES = 1 << 20  # of the standard library's sources; a window needs no more
# The code that decides a price, with all that it imports.
PRICING_CODE = ("bench.sweeps.pricing", "bench.setup.streams")
_BETWEEN_LINES = 2.0  # seconds
_OF_ANY_RECORDING = 400_000  # operations' worth of making the weights and finding the hot rows

Record = dict[str, Any]


class Texts:
    """What can be read, by the names that settings use; each is encoded once, and only if it is asked for."""

    def __init__(self, text: str | Path | None, tokenizer: str | Path | None) -> None:
        """`text` as for `streams.read_text`."""
        self.vocab = CompressedVocab.from_tokenizer(tokenizer)
        self._text, self._tokenizer = text, tokenizer
        self._sources: dict[str, Source] = {}
        self._windows: dict[str, Stream] = {}

    def source(self, name: str) -> Source:
        """A whole text."""
        if name not in self._sources:
            self._sources[name] = self._read(name)
        return self._sources[name]

    def _read(self, name: str) -> Source:
        if name == "text":
            return text_source(self._text, self.vocab, self._tokenizer)
        if name == "python-stdlib":
            library = standard_library(self.vocab, self._tokenizer, LIBRARY_BYTES)
            return replace(library, name=f"{library.name}, first {LIBRARY_BYTES >> 20} MiB")
        return random_source(name, len(self.vocab))

    def window(self, settings: Settings) -> Stream:
        """What these settings read.

        Raises:
            ValueError: the text is too short.
            OSError: it cannot be read.
        """
        name = stream_name(settings)
        if name not in self._windows:
            self._windows[name] = self.source(settings.stream).window(settings.seq_len, settings.seed)
        return self._windows[name]


def stream_name(settings: Settings) -> str:
    """Key of a window among the streams of a results file."""
    return f"{settings.stream}/{settings.seq_len}/{settings.seed}"


def keys_of(cases: Iterable[Case], texts: Texts, code: str) -> dict[Case, str]:
    """The journal's key of every case: a digest of all that its price depends on."""
    # What a price depends on beside its case; nothing stale is found under another key.
    by = [code, platform.python_version(), platform.machine()]
    ids: dict[str, str] = {}
    keys = {}
    for case in cases:
        name = stream_name(case.settings)
        if name not in ids:
            window = texts.window(case.settings)
            ids[name] = window.sha256 + digest(array("q", window.measured)) + digest(array("q", window.calibration))
        about = json.dumps([*by, texts.vocab.digest, ids[name], asdict(case)])
        keys[case] = hashlib.sha256(about.encode()).hexdigest()[:32]
    return keys


def make_jobs(cases: Iterable[Case], texts: Texts) -> list[Job]:
    """One job per recording, the long ones first."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(case.recording, []).append(case)
    plans: dict[EngramConfig, HashPlan] = {}
    jobs = []
    for group in groups.values():
        settings = group[0].settings
        config = toy_config(group[0].model, settings.d_model, settings.preset)
        if config not in plans:
            plans[config] = HashPlan.for_vocab(config, texts.vocab)
        jobs.append(Job(tuple(group), config, plans[config], texts.window(settings)))
    # So that no core is left alone with a long one at the end.
    return sorted(jobs, key=operations, reverse=True)  # sorted keeps the order of equals


def operations(job: Job) -> int:
    """About how many operations its program does: what a recording takes is nearly proportional."""
    case, config = job.cases[0], job.config
    tokens, hidden, width = case.settings.seq_len, config.hidden, config.embedding_width
    setup = _OF_ANY_RECORDING + job.plan.layer(config.layer_ids[0]).rows * config.row_width // 4
    values = tokens * width  # of the rows that are looked up
    lookup = values * (1 + case.prefetches)
    products = tokens * hidden * (4 * hidden if case.model == "kv-bank" else 2 * width * (1 + config.hc_mult))
    layer = lookup + products + values  # about one operation with each, beside the products
    block = layer + tokens * hidden * (8 * hidden + 2 * tokens)
    return setup + {"lookup": lookup, "layer": layer, "block": block}[case.boundary]


def price_all(cases: Sequence[Case], texts: Texts, code: str, journal: Path, processes: int) -> dict[Case, Record]:
    """The record of every case: those of the journal, and the missing ones priced.

    Args:
        code: what `code_sha256` says.
        journal: its file, made when the first price is found.

    Raises:
        ValueError: a worker was killed, or the journal's folder cannot be written.
    """
    keys = keys_of(cases, texts, code)
    require_writable(journal.parent)  # after bad input was refused, which leaves nothing behind
    with Journal(journal) as done:
        missing = [case for case in keys if keys[case] not in done.found]
        jobs = make_jobs(missing, texts)
        if len(missing) < len(keys):
            say(f"{len(keys) - len(missing):,} of {len(keys):,} prices are in {journal}")
        progress = _Progress(jobs)
        try:
            for place, records in in_parallel(price_cases, jobs, processes):
                done.add(dict(zip((keys[case] for case in jobs[place].cases), records)))
                progress.advance(jobs[place])
        except BrokenProcessPool:
            raise ValueError(
                f"a worker was killed, perhaps for memory; finished prices are kept in {journal}: "
                "the same command continues, --jobs 1 needs less"
            ) from None
        return {case: done.found[key] for case, key in keys.items()}


class _Progress:
    """A line every few seconds: what was just finished, and how long the rest takes at this pace."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._left = self._all = sum(map(operations, jobs))
        self._count, self._done = len(jobs), 0
        self._began = self._said = time.monotonic()

    def advance(self, job: Job) -> None:
        """A job is finished."""
        self._left -= operations(job)
        self._done += 1
        now = time.monotonic()
        if now - self._said < _BETWEEN_LINES and self._done < self._count:
            return
        self._said, elapsed = now, now - self._began
        case = job.cases[0]
        what = f"{case.model} {case.boundary}, {case.settings.seq_len} tokens, width {case.settings.d_model}"
        took = time_left(elapsed, self._all - self._left, self._all)
        say(f"price {self._done:3d}/{self._count}  {what:<42} {took}")
