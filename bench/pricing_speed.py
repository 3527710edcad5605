"""How fast stack distances are found: plain Python and numba, on the same logs, in the same process.

What: times `stack_depths` of `engram_toy.stack` and of `engram_toy.fast.stack` on three logs, compares their
depths, and prints the median per log, the time per read, the growth from the small to the large random log and
the ratio of the two.
Why: ByteDMD needs the depth of every read, and a run on a real text has millions. The random logs are the worst
case (every read is deep); the shallow log is the common one: a large bank held live below a small working set.

    python bench/pricing_speed.py
    python bench/pricing_speed.py --repeats 7 --out pricing_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

import numba
import numpy

from engram_toy import stack
from engram_toy.fast import stack as fast_stack
from engram_toy.stack import Log

IMPLEMENTATIONS = {"python": stack.stack_depths, "numba": fast_stack.stack_depths}

# name: live values above the bank, values of the bank, reads; all at scale 1
WORKLOADS = {
    "random-100k": (100_000, 0, 300_000),
    "random-1m": (1_000_000, 0, 3_000_000),
    "shallow-20k-over-1m": (20_000, 1_000_000, 3_000_000),
}
SMALL, LARGE = "random-100k", "random-1m"


def random_log(live: int, bank: int, reads: int, seed: int = 1) -> Log:
    """Instructions that read two of `live` values at random and replace the first by the result.

    The number of live values stays the same throughout; at the start `bank` more lie below them, and all are
    returned. So every instruction also stores a live value: a touch that no read is charged for.
    """
    rng = random.Random(seed).random
    pool = list(range(bank, bank + live))
    left, right = array("i"), array("i")
    for value in range(bank + live, bank + live + reads // 2):
        place = int(rng() * live)
        left.append(pool[place])
        right.append(pool[int(rng() * live)])
        pool[place] = value
    return Log(inputs=bank + live, left=left, right=right, returned=[*range(bank), *pool])


def measure(logs: dict[str, Log], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, by log and implementation. They take turns, so that both meet the same machine."""
    warm_up = Log(inputs=1, left=array("i", [0]), right=array("i", [-1]))
    for stack_depths in IMPLEMENTATIONS.values():
        stack_depths(warm_up)  # numba compiles here
    samples: dict[str, dict[str, list[float]]] = {
        name: {implementation: [] for implementation in IMPLEMENTATIONS} for name in logs
    }
    for _ in range(repeats):
        for name, log in logs.items():
            depths = {}
            for implementation, stack_depths in IMPLEMENTATIONS.items():
                start = time.perf_counter()
                depths[implementation] = stack_depths(log)
                samples[name][implementation].append(time.perf_counter() - start)
            if depths["python"] != depths["numba"]:
                raise RuntimeError(f"the implementations disagree on the log {name}: no times are worth reporting")
    return samples


def summarise(samples: dict[str, dict[str, list[float]]], logs: dict[str, Log]) -> dict[str, dict[str, Any]]:
    """Medians, nanoseconds per read and the ratio of the implementations, by log."""
    summary: dict[str, dict[str, Any]] = {}
    for name, by_implementation in samples.items():
        reads = len(stack.read_values(logs[name]))
        medians = {implementation: statistics.median(times) for implementation, times in by_implementation.items()}
        summary[name] = {
            "inputs": logs[name].inputs,
            "reads": reads,
            "median_s": medians,
            "ns_per_read": {implementation: median / reads * 1e9 for implementation, median in medians.items()},
            "numba_over_python": medians["numba"] / medians["python"],
        }
    return summary


def report(summary: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'log':22}{'inputs':>11}{'reads':>11}{'':4}{'':9}{'median s':>10}{'ns/read':>9}{'numba/python':>14}"]
    for name, row in summary.items():
        for implementation in IMPLEMENTATIONS:
            ratio = f"{row['numba_over_python']:14.3f}" if implementation == "numba" else ""
            lines.append(
                f"{name:22}{row['inputs']:>11,}{row['reads']:>11,}{'':4}{implementation:9}"
                f"{row['median_s'][implementation]:>10.3f}{row['ns_per_read'][implementation]:>9.0f}{ratio}"
            )
    for implementation in IMPLEMENTATIONS:
        growth = summary[LARGE]["median_s"][implementation] / summary[SMALL]["median_s"][implementation]
        size = summary[LARGE]["reads"] / summary[SMALL]["reads"]
        lines.append(f"growth {implementation}: {growth:.1f} times the time for {size:.0f} times the log")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "numpy": numpy.__version__,
        "numba": numba.__version__,
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def processor() -> str:
    """The processor's name where Linux tells it, else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write under a temporary name, then rename: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time exact LRU stack distances in plain Python and in numba on the same logs.",
        epilog="""\
logs, in every one of which an instruction reads two random values and replaces one of them:
  random-100k            10^5 live values, 3 * 10^5 reads, anywhere on the stack
  random-1m              10^6 live values, 3 * 10^6 reads, anywhere on the stack: the worst case
  shallow-20k-over-1m    3 * 10^6 reads among 20,000 values above a bank of 10^6 that is never read

Expect 10 to 20 s a repeat at scale 1, nearly all of it in plain Python. A read is one entry of
the trace; the stores of live values between them (one for every two reads) are part of its time.

examples:
  python bench/pricing_speed.py --scale 0.1              a quick look
  python bench/pricing_speed.py --out out/pricing.json   raw samples and environment, to keep
""",
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each implementation on each log (5)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the sizes of all logs (1.0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write raw samples and environment here")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}: give 1 or more")
    if arguments.scale * min(live for live, _, _ in WORKLOADS.values()) < 1:
        parser.error(f"--scale is {arguments.scale}: no live values would be left; give 0.0001 or more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    logs = {name: random_log(*(int(size * arguments.scale) for size in sizes)) for name, sizes in WORKLOADS.items()}
    samples = measure(logs, arguments.repeats)
    summary = summarise(samples, logs)
    print(report(summary))
    if arguments.out:
        document = {"environment": environment(), "scale": arguments.scale, "summary": summary, "samples_s": samples}
        write_json(arguments.out, document)
        print(f"raw samples in {arguments.out}")


if __name__ == "__main__":
    main()
