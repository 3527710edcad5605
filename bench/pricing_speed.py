"""What ByteDMD costs to compute: one traced operation, and the depth of one read, in Python and in numba.

    python bench/pricing_speed.py                          about two minutes
    python bench/pricing_speed.py --scale 0.1              a quick look
    python bench/pricing_speed.py --out FILE.json          raw samples and environment, to keep

Tracing: the same arithmetic on plain numbers, on tracked ones, and as an inner product that the tracer logs at
once. Pricing: `stack_depths` of `engram_toy.tracer.stack` and `engram_toy.fast.stack` on the same logs:

    random-100k          10^5 live values, 3*10^5 touches, anywhere on the stack
    random-1m            10^6 live values, 3*10^6 touches, anywhere on the stack: the worst case
    shallow-20k-over-1m  3*10^6 touches among 20,000 values above 10^6 that are held live and never read

All values are live to the end, and what an instruction stores is dead at once, so that the stack keeps its size
and every touch is one charged read. Implementations take turns on one log, and must agree on every depth.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("pricing_speed")

from bench.instruments.output import require_writable_file
from bench.instruments.results import conclude, results_head
from bench.instruments.timing import interleave, paired_ratio
from engram_ref import cli
from engram_toy.bytedmd import traced_eval
from engram_toy.functional import dot
from engram_toy.tracer import stack
from engram_toy.tracer.stack import Log

PROG = "pricing_speed"
# name: values that are read, values that lie below them, touches; all at scale 1
LOGS = {
    "random-100k": (100_000, 0, 300_000),
    "random-1m": (1_000_000, 0, 3_000_000),
    "shallow-20k-over-1m": (20_000, 1_000_000, 3_000_000),
}
SMALL, LARGE = "random-100k", "random-1m"
OPERATIONS = 200_000  # plain ones take some milliseconds, far more than a step of the clock


def random_log(live: int, below: int, touches: int, seed: int = 1) -> Log:
    """Instructions that read two of `live` values at random, above `below` others; all are returned."""
    draw = random.Random(seed).random
    left, right = (array("i", [below + int(draw() * live) for _ in range(touches // 2)]) for _ in range(2))
    return Log(inputs=below + live, left=left, right=right, returned=list(range(below + live)))


def price_logs(scale: float, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of both implementations on every log."""
    from engram_toy.fast import stack as fast_stack  # needs numba

    fast_stack.stack_depths(random_log(10, 0, 10))  # compiles
    measured = {}
    for name, sizes in LOGS.items():
        log = random_log(*(int(size * scale) for size in sizes))
        print(f"{name}: {log.inputs:,} live, {2 * len(log.left):,} touches", file=sys.stderr)
        if stack.stack_depths(log) != fast_stack.stack_depths(log):
            raise AssertionError(f"the implementations disagree on {name}")
        python, numba = partial(stack.stack_depths, log), partial(fast_stack.stack_depths, log)
        samples = interleave({"python": python, "numba": numba}, repeats, warmup=0)  # compared, so warm
        measured[name] = {"live": log.inputs, "touches": 2 * len(log.left), "samples_s": samples}
    return measured


def trace_operations(repeats: int) -> dict[str, Any]:
    """Seconds of OPERATIONS multiplications and additions, on plain values, tracked, and logged at once."""
    half = OPERATIONS // 2
    xs, ys = [0.5] * half, [1.5] * half

    def loop(xs: list[Any], ys: list[Any]) -> Any:
        total = xs[0] * ys[0]
        for x, y in zip(xs, ys):
            total = total + x * y
        return total

    def traced(function: Callable[[list[Any], list[Any]], Any]) -> float:
        """Seconds inside the traced function alone."""
        spent = []  # wrapping and pricing around it are not an operation's cost

        def timed(xs: list[Any], ys: list[Any]) -> Any:
            start = time.perf_counter()
            result = function(xs, ys)
            spent.append(time.perf_counter() - start)
            return result

        traced_eval(timed, (xs, ys))
        return spent[0]

    samples: dict[str, list[float]] = {"plain": [], "traced": [], "traced inner product": []}
    for round_number in range(-1, repeats):  # the first round warms up
        plain = interleave({"plain": lambda: loop(xs, ys)}, 1, warmup=0)["plain"][0]
        times = {"plain": plain, "traced": traced(loop), "traced inner product": traced(dot)}
        if round_number >= 0:
            for name, seconds in times.items():
                samples[name].append(seconds)
    return {"operations": OPERATIONS, "samples_s": samples}


def report(results: dict[str, Any]) -> str:
    """Medians, nanoseconds a touch or an operation, ratios and growth, as text."""
    lines = []
    tracing = results["tracing"]
    for name, samples in tracing["samples_s"].items():
        ns = statistics.median(samples) / tracing["operations"] * 1e9
        ratio = paired_ratio(samples, tracing["samples_s"]["plain"])["median"]
        lines.append(f"one operation, {name:<24}{ns:8.0f} ns  {ratio:6.1f} x plain")
    for name, log in results["pricing"].items():
        python, numba = (statistics.median(log["samples_s"][key]) for key in ("python", "numba"))
        ratio = paired_ratio(log["samples_s"]["python"], log["samples_s"]["numba"])["median"]
        per_touch = [seconds / log["touches"] * 1e9 for seconds in (python, numba)]
        lines.append(
            f"{name:<20} python {python:7.3f} s {per_touch[0]:6.0f} ns a touch   "
            f"numba {numba:7.3f} s {per_touch[1]:5.0f} ns a touch   ratio {ratio:5.1f}"
        )
    for key in ("python", "numba"):
        small, large = (results["pricing"][name]["samples_s"][key] for name in (SMALL, LARGE))
        growth = statistics.median(large) / statistics.median(small)
        lines.append(f"from 10^5 to 10^6 live values {key} takes {growth:.1f} times as long for 10 times the touches")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--repeats", type=cli.at_least(1), default=5, help="samples of each")
    parser.add_argument("--scale", type=cli.share, default=1.0, help="share of the logs' sizes, 0 .. 1")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write raw samples and environment here")
    options = parser.parse_args()
    if options.scale < 0.001:
        parser.error(f"--scale {options.scale} leaves nothing to measure: give at least 0.001")
    with cli.one_line_errors(PROG):
        require_writable_file(options.out)
    results = {
        **results_head(PROG),
        "scale": options.scale,
        "tracing": trace_operations(options.repeats),
        "pricing": price_logs(options.scale, options.repeats),
    }
    with cli.one_line_errors(PROG):
        conclude(results, options.out, report)


if __name__ == "__main__":
    cli.run(main, PROG)
