"""How long it takes to price rows at production scale, from text to price, and how much memory.

    python bench/row_speed.py                      about five minutes on two cores
    python bench/row_speed.py --rounds 1           a quick look
    python bench/row_speed.py --out FILE.json      raw samples and environment, to keep

DeepSeek-V4.1-Flash's index stream, 48 row reads a token over two layers on one stack, in the layout "held live", at
10^5 and 10^6 tokens and all of the standard library's sources. Every sample is a process of its own, so that memory
is its own peak; the sizes take turns. A warm-up round fills caches: compiled code, the compressed vocabulary, files.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("row_speed")

from bench.instruments.output import require_writable_file
from bench.instruments.results import conclude, results_head
from bench.instruments.words import aligned
from engram_ref import cli

PROG = "row_speed"
TABLE = "v41-flash"
SIZES = {"10^5": 10**5, "10^6": 10**6, "all": None}
STAGES = ("load", "text", "link", "price")


def measure_once(tokens: int | None) -> dict[str, Any]:
    """Seconds of every stage, and the peak of memory, in the process that runs it."""
    began = time.perf_counter()  # imports are the stage "load"
    from bench.rows.cases import read_rows, source
    from engram_ref.config import EngramConfig
    from engram_toy.fast.rows import price_rows, start

    config, marks = EngramConfig.preset(TABLE), [time.perf_counter()]
    ids = source("python-stdlib", tokens).ids
    marks.append(time.perf_counter())
    reads = read_rows(ids, config)
    marks.append(time.perf_counter())
    priced = price_rows(reads, start(reads, held=True), config.row_bytes())
    marks.append(time.perf_counter())
    seconds = dict(zip(STAGES, (b - a for a, b in zip([began, *marks], marks))))
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "tokens": len(ids),
        "reads": len(reads.links),
        "price": priced.total,
        "seconds": seconds,
        "total_s": marks[-1] - began,
        "peak_bytes": peak,
    }


def measure(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Samples of every size; the warm-up round is not kept."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in SIZES}
    context = multiprocessing.get_context("spawn")  # a fork would begin with what is loaded here
    for number in range(-1, rounds):
        for name, tokens in SIZES.items():
            with context.Pool(1) as pool:  # a process of its own, whose peak of memory is the sample's
                sample = pool.apply(measure_once, (tokens,))
            print(f"round {number + 1}  {name:<5} {sample['total_s']:7.2f} s", file=sys.stderr)
            if number >= 0:
                samples[name].append(sample)
    return samples


def report(results: dict[str, Any]) -> str:
    """Medians by stage and size, and how they grow against n log n."""
    rows: list[list[str]] = [
        ["tokens", "row reads", *(f"{stage}, s" for stage in STAGES), "all, s", "GiB", "time / n log n", "bytes / read"]
    ]
    first = 0.0
    for samples in results["samples"].values():
        reads, total = samples[0]["reads"], median(samples, "total_s")
        work = reads * math.log2(reads)
        first = first or total / work
        peak = median(samples, "peak_bytes")
        stages = [f"{statistics.median([s['seconds'][stage] for s in samples]):.2f}" for stage in STAGES]
        growth = [f"{total / work / first:.2f}", f"{peak / reads:.0f}"]
        sizes = [f"{samples[0]['tokens']:,}", f"{reads:,}"]
        rows.append([*sizes, *stages, f"{total:.1f}", f"{peak / 2**30:.2f}", *growth])
    return aligned(rows, left=set()) + "\n\ntime / n log n: of the whole run, against the smallest size"


def median(samples: list[dict[str, Any]], key: str) -> float:
    """The median of one quantity."""
    return statistics.median([sample[key] for sample in samples])


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--rounds", type=cli.at_least(1), default=3, help="samples of each size")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write raw samples and environment here")
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        require_writable_file(options.out)
    results = {**results_head(PROG), "table": TABLE, "samples": measure(options.rounds)}
    with cli.one_line_errors(PROG):
        conclude(results, options.out, report)


if __name__ == "__main__":
    cli.run(main, PROG)
