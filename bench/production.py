"""What reading a table of published size costs under ByteDMD, row by row and exactly, on real index streams.

    python bench/production.py                 eleven minutes on two cores; writes out/production/results.json
    python bench/production.py --quick         a small version in seconds
    python bench/production.py --part hot      one part only: scale, hot, place, whole_model
    python bench/production.py --preset qwen38-flash-next --out out/qwen    Qwen3.8-Flash-Next's table and model instead

The last is priced twice: with rows of 320 B, bfloat16 as in its files, and of 160 B, a byte a value, as engines keep
them in fp8.

A toy of 10^6 values is not a table of 196 B parameters. Here the standard library's sources go through DeepSeek's
tokenizer and the hash of each published table, and every row that they name is priced on one LRU stack of rows.

  scale        demo, paper-27b, paper-40b, v41-flash at 10^5 and 10^6 tokens and all of the text; real text against
               independent uniform and Zipf ids: price per token, depths, reuse
  hot          tiers of 0.1 to 10 % of all rows, chosen on the first half of the text, charged on the second
  place        the lookups alone, the table above or below so many bytes that nobody reads; and with copies made one
               token ahead
  whole_model  the rows beside the weights of Dense-4B, Dense-8B and V4.1-Flash, as a function of tokens per step, up to
               the step in which they cost 3 % of the model; pinned above all else, below it, and copied a step ahead

Each in two layouts: held live, the whole table on the stack throughout; and compacted, ByteDMD's own rule, by which a
row that is not read again occupies nothing. Prices are integers and the same on every machine; a run that is killed
continues where it stopped. How fast this is: python bench/row_speed.py.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import itertools
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("production")

if importlib.util.find_spec("numba") is None:
    sys.exit("production: error: numba is not installed, and plain Python would take days: pip install '.[fast]'")

from bench.instruments.code_digest import code_sha256
from bench.instruments.journal import Journal
from bench.instruments.output import require_writable, say
from bench.instruments.results import conclude, results_head
from bench.rows.cases import LEAST_STEPS, Case, as_they_are, check_steps, price_case, source
from bench.rows.table import TABLES, report
from bench.rows.whole_model import AROUND, OTHERS, ROW_SIZES
from bench.schemas.production import Record, Results
from bench.setup.parallel import add_jobs, in_parallel
from engram_ref import cli

PROG: Final = "production"
SCHEMA_VERSION: Final = 2
PARTS = ("scale", "hot", "place", "whole_model")
HOT_SHARES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)  # of all rows; 0 is no tier
PADDINGS = (1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13)  # bytes
STEP_TOKENS = (1, 64, 512, 4096, 16_384)  # a stream of STREAM_TOKENS has steps enough of each
UNIFORM_STEPS = (512, 16_384)  # hardly a row comes twice: the price is nearly proportional to the tokens
STREAM_TOKENS = max(STEP_TOKENS) * LEAST_STEPS
LONG_STEPS = (32_768, 98_304)  # of the paper's table, and of all of the text
PREFETCHED_STEP = 512  # is priced with copies, too
QUICK_TOKENS, QUICK_STEPS = 5000, (1, 128)  # LEAST_STEPS of each, and a few to spare
# The code that decides a price; what a finished case is filed under.
PRICING_CODE = ("bench.rows.cases", "bench.rows.whole_model", "bench.setup.streams", "bench.setup.token_batches")


def cases_of(parts: tuple[str, ...] | list[str], quick: bool, preset: str | None = None) -> list[Case]:
    """Every case of these parts, in the order of the results; of DeepSeek's tables, or of another maker's preset.

    The latter comes in every size of its rows, one after the other.
    """
    tables, around = (TABLES, tuple(AROUND)) if preset is None else ((preset,), (preset,))
    million = 10**6
    cases = [Case("scale", table, tokens=tokens) for table in tables for tokens in (10**5, million, None)]
    cases += [Case("scale", table, stream, million) for table in tables for stream in ("uniform", "zipf")]
    cases += [Case("hot", table, values=HOT_SHARES) for table in tables]
    cases += [Case("place", table, tokens=million, values=PADDINGS) for table in tables]
    cases += [Case("place", table, tokens=10**5, values=PADDINGS, prefetch=True) for table in tables]
    for table, mode in itertools.product(around, ("decode", "prefill")):
        step = functools.partial(Case, "whole_model", table, mode=mode)
        for tokens in QUICK_STEPS if quick else STEP_TOKENS:
            copied = mode == "decode" and (quick or tokens == PREFETCHED_STEP)
            cases.append(step(tokens=STREAM_TOKENS, tokens_per_step=tokens, prefetch=copied))
            if quick or tokens in UNIFORM_STEPS:
                cases.append(step("uniform", tokens=STREAM_TOKENS, tokens_per_step=tokens))
        cases += [step(tokens_per_step=tokens) for tokens in LONG_STEPS if table == "paper-100b"]
    if quick:
        small = (replace(case, tokens=min(case.tokens or QUICK_TOKENS, QUICK_TOKENS)) for case in cases)
        cases = list(dict.fromkeys(case for case in small if case.tokens_per_step in QUICK_STEPS))  # some are equal now
    sizes: tuple[int | None, ...] = (None,) if preset is None else ROW_SIZES[preset]
    return [replace(case, row_bytes=size) for case in cases if case.part in parts for size in sizes]


def with_steps_enough(cases: list[Case]) -> list[Case]:
    """The cases without those whose text is too short for their steps, as that of another Python may be; says which."""
    kept = []
    for case in cases:
        try:
            check_steps(len(source(case.stream, case.tokens, as_they_are(case.table)).ids), case.tokens_per_step)
            kept.append(case)
        except ValueError as error:
            say(f"left out, {case.part} {case.table} {case.mode}: {error}")
    return kept


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=f"{', '.join(PARTS)} (default: all)")
    add_jobs(parser)
    add("--preset", choices=list(OTHERS), help="another maker's table instead of DeepSeek's four")
    add("--out", type=Path, default=Path("out/production"), metavar="DIR", help="results.json goes here")
    cli.add_fresh(parser)
    add("--quick", action="store_true", help=f"{QUICK_TOKENS:,} tokens of everything")
    return parser.parse_args(argv)


def keys_of(cases: list[Case]) -> dict[Case, str]:
    """What each case is filed under: a digest of all that its prices depend on."""
    code = [code_sha256(*PRICING_CODE), platform.python_version(), platform.machine()]
    keys = {}
    for case in cases:
        about = [*code, source(case.stream, case.tokens, as_they_are(case.table)).sha256, asdict(case)]
        keys[case] = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    return keys


def price_all(cases: list[Case], journal: Path, processes: int) -> list[Record]:
    """The records of all cases in their order: those of the journal, and the missing ones priced."""
    keys = keys_of(cases)
    with Journal(journal) as done:
        missing = [case for case in cases if keys[case] not in done.found]
        if len(missing) < len(cases):
            say(f"{len(cases) - len(missing)} of {len(cases)} cases are in {journal}")
        missing.sort(key=lambda case: case.tokens or sys.maxsize, reverse=True)  # None: all of the text, the longest
        began = time.monotonic()
        for count, (place, records) in enumerate(in_parallel(price_case, missing, processes), start=1):
            case = missing[place]
            done.add({keys[case]: {"records": records}})
            what = f"{case.part} {case.table} {case.row_bytes or ''} {case.stream} {case.mode} {case.tokens_per_step}"
            took = cli.time_left(time.monotonic() - began, count, len(missing))
            say(f"case {count:3d}/{len(missing)}  {what:<55} {took}")
        return [record for case in cases for record in done.found[keys[case]]["records"]]


def main() -> None:
    """The command."""
    options = parse()
    journal = options.out / "production.journal"
    try:
        with cli.one_line_errors(PROG):
            require_writable(options.out)
            if options.fresh:
                journal.unlink(missing_ok=True)
            parts = [part for part in PARTS if part in options.part]
            cases = cases_of(parts, options.quick, options.preset)
            content: Results = {
                "schema_version": SCHEMA_VERSION,
                **results_head(PROG),
                "configuration": {"parts": parts, "quick": options.quick},
                "records": price_all(with_steps_enough(cases), journal, options.jobs),
            }
            conclude(content, options.out / "results.json", report, rows="records")
    except KeyboardInterrupt:
        say(f"\n{PROG}: interrupted; finished cases are kept in {journal}, the same command continues")
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main, PROG)
