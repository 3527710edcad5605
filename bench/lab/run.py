"""Engram's offload under ByteDMD, at sizes that the original tracer serves: numbers only, into results.json beside it.

    PYTHONPATH=src python experiments/engram-offload/run.py          a few minutes; --quick: seconds

Every variant of every configuration: price, price a token, depths, wall time of the untraced function. The tracer walks
its whole stack at every event, so its time grows with padding times events: paddings that it cannot serve within the
rule of five minutes are listed under "not_served", with the time that they would take at that growth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import bytedmd as tracer
from bytedmd import bytedmd, traced_eval

from bench.lab.model import BOUNDARIES, VARIANTS, arguments, matrix, program, rows_named

FULL: dict[str, Any] = {
    "tokens": 16, "width": 8, "columns": 4, "rows": 61, "seeds": [0], "paddings": [0, 1000, 10_000],
    "offloaded_shares": [0.1, 1.0], "too_large": [100_000, 1_000_000], "timed_calls": 5,
}  # fmt: skip
QUICK: dict[str, Any] = {**FULL, "tokens": 4, "width": 2, "seeds": [0], "paddings": [0, 100], "offloaded_shares": [1.0]}
TEXT = "to be or not to be that is the question whether it is nobler in the mind to suffer or to take arms"
LOWER_BOUND = 0.3849  # of the measured price: what the best oracle allocator could pay, by the lab's tables


def words(count: int) -> list[int]:
    """The first words of the text, numbered by when they first occur."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers) + 1) for word in TEXT.split()[:count]]


def measure(c: dict[str, Any], boundary: str, seed: int, padding: int, share: float) -> list[dict[str, Any]]:
    """A record per variant; all of them must give the same output."""
    named = rows_named(words(c["tokens"]), c["columns"], c["rows"])
    bank = matrix(f"bank {seed}", c["rows"], 2 * c["width"])
    hidden = matrix(f"hidden {seed}", c["tokens"], c["width"])
    head = [matrix(f"{name} {seed}", c["width"], c["width"]) for name in ("query", "output")]
    # 7 and 100 have no factor in common: the share is spread over the bank.
    offloaded = frozenset(row for row in range(c["rows"]) if row * 7 % 100 < 100 * share)
    records, outputs = [], set()
    for variant in VARIANTS:
        forward = program(boundary, variant, named, offloaded, c["rows"])
        given = arguments(variant, offloaded, bank, hidden, head, padding)
        began = time.perf_counter()
        depths, result = traced_eval(forward, given)
        traced = time.perf_counter() - began
        # A second trace, for the check below: not where one takes minutes.
        cost = bytedmd(forward, given) if padding <= 1000 else sum(_root(depth) for depth in depths)
        if cost != sum(_root(depth) for depth in depths):
            raise AssertionError("bytedmd and traced_eval disagree")
        outputs.add(_digest(result[0]))  # the padding behind it is no output
        found = {"boundary": boundary, "variant": variant, "seed": seed, "padding": padding, "offloaded_share": share}
        found |= {"cost": cost, "cost_per_token": cost / c["tokens"], "geometric_lower_bound": LOWER_BOUND * cost}
        found |= {"reads": len(depths), "reads_by_depth": _histogram(depths), "output_sha256": _digest(result[0])}
        records.append({**found, "traced_s": traced, "wall_time_s": _wall_times(forward, given, c["timed_calls"])})
    if len(outputs) != 1:
        raise AssertionError(f"{boundary}, padding {padding}: the variants give different outputs")
    return records


def _root(depth: int) -> int:
    root = int(depth**0.5)
    return root if root * root >= depth else root + 1


def _digest(result: Any) -> str:
    return hashlib.sha256(b"".join(struct.pack("<d", value) for row in result for value in row)).hexdigest()


def _histogram(depths: Any) -> dict[str, int]:
    """Reads at depths 2^b .. 2^(b+1) - 1, by b."""
    counts = Counter(int(depth).bit_length() - 1 for depth in depths)
    return {str(b): counts[b] for b in sorted(counts)}


def _wall_times(forward: Any, given: Any, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        forward(*given)
        times.append(time.perf_counter() - began)
    return times


def not_served(c: dict[str, Any], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paddings left out, and seconds that one trace would take: its arguments alone are stored in squared time."""
    longest = max(r["traced_s"] for r in records if r["padding"] == max(c["paddings"]))
    return [
        {"padding": padding, "estimated_s": longest * (padding / max(1, *c["paddings"])) ** 2}
        for padding in c["too_large"]
    ]


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version in seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"), metavar="FILE")
    options = parser.parse_args()
    c = QUICK if options.quick else FULL
    records: list[dict[str, Any]] = []
    for boundary in BOUNDARIES:
        for seed in c["seeds"]:
            for padding in c["paddings"]:
                for share in c["offloaded_shares"] if boundary == "lookup" else [1.0]:
                    records += measure(c, boundary, seed, padding, share)
                    print(f"{boundary}, seed {seed}, padding {padding}, share {share}", flush=True)
    source = Path(str(tracer.__file__)).read_bytes()
    results = {
        "schema_version": 1,
        "benchmark": "engram-offload",
        "configuration": {**c, "text": TEXT, "quick": options.quick, "lower_bound_factor": LOWER_BOUND},
        "environment": {"python": platform.python_version(), "platform": platform.platform(), "cpu": _processor()},
        "git_commit": _commit(),
        "tracer_sha256": hashlib.sha256(source).hexdigest(),
        "records": records,
        "not_served": not_served(c, records),
    }
    lines = ",\n".join(json.dumps(record) for record in records)
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "records")
    options.out.write_text(f'{{\n{head},\n"records": [\n{lines}\n]\n}}\n', encoding="utf-8")
    print(f"wrote {options.out}")


def _processor() -> str:
    """The model of the processor, or its architecture where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return next(filter(None, names), platform.machine())


if __name__ == "__main__":
    main()
