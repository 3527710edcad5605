"""What ways to read rows took and what they asked for, as a table: requests counted, not estimated, beside the time.

    print(report(results))          # of bench/lookup_speed.py --reads

Read it from the end. `stream` is what the bus gives a kernel at best, `in_order` what it gives to the requests of
`as_is`. If `shuffled` is about as fast as `in_order` and `as_is` is not, rows wait for the translation of their
addresses, and sorting helps if `presorted` is near them. If `shuffled` is about as slow as `as_is`, it is the requests:
time goes with the lines that are asked for, or with the sectors, and the way with the fewest wins.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.instruments.timing import paired_ratio
from bench.instruments.words import aligned, short
from bench.reads.methods import METHODS
from bench.reads.requests import SECTOR

_HEAD = [
    ["tokens", "way", "median", "rows", "of rows", "of sectors", "lines", "sectors", "times as_is"],
    ["", "", "us", "M/s", "GB/s", "GB/s", "a row", "a row", ""],
]


def report(results: dict[str, Any]) -> str:
    """A line for each way and number of tokens; empty where no other way was read."""
    rows = [_line(case, name) for case in results["cases"] for name in case.get("asked", ())]
    if not rows:
        return ""
    notes = [
        "   lines, sectors: aligned stretches of 128 and 32 B that loads ask host memory for; what two loads ask for "
        "counts twice",
        f"   a copy over the same bus: {short(results['limits']['copy']['bytes_per_s'] / 1e9)} GB/s",
    ]
    return "\n".join([aligned(_HEAD + rows, left={1}, headers=2), *notes])


def _line(case: dict[str, Any], name: str) -> list[str]:
    samples, found, count = case["samples_s"], case["asked"][name], case["rows"]
    seconds = statistics.median(samples[name])
    plain = METHODS[name].by == "stream"  # of no rows
    return [
        f"{case['tokens']}",
        name,
        short(1e6 * seconds),
        "" if plain else short(count / seconds / 1e6),
        "" if plain else short(case["bytes"] / seconds / 1e9),
        short(found["sectors"] * SECTOR / seconds / 1e9),
        short(found["lines"] / count),
        short(found["sectors"] / count),
        _ratio(samples, name),
    ]


def _ratio(samples: dict[str, list[float]], name: str) -> str:
    if name == "as_is" or "as_is" not in samples:
        return ""
    found = paired_ratio(samples[name], samples["as_is"])
    return f"{found['median']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"
