"""The table of a lookup-speed results file: microseconds per placement and tokens, beside what others published.

    print(report(json.loads(Path("out/lookup_speed/results.json").read_text())))

Ratios are paired, round by round, with a 95 % interval; "not resolved" stands where it holds 1 or reaches into the
noise floor, `resident` against itself.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.evidence.published import figure
from bench.instruments.timing import overhead, paired_ratio, quantile
from bench.instruments.words import aligned, gib, measured_on, short

PUBLISHED = (1, 2, 4)  # tokens
_PARTS = ("hash", "start", "join", "whole", "arrive", "handed over")
_HEAD = [
    ["tokens", "way", "on", "median", "p20-p80", "times resident", "floor", "late", "vLLM"],
    ["", "", "", "us", "us", "", "us", "", "us"],
]


def report(results: dict[str, Any]) -> str:
    """Everything that a results file says; the first line names the device it was measured on."""
    table, clock = results["table"], results["clock"]
    lines = [
        measured_on(results),
        f"One layer of {table['preset']}, {table['parameters'] / 1e9:.3g}e9 parameters, {gib(table['bytes'])}: "
        f"{table['columns']} rows of {table['row_bytes']} B a token; {results['stream']} ids; {clock}",
    ]
    rows = [row for case in results["cases"] for row in _case(results, case)]
    notes = [f"   {name}: {what}" for name, what in results["ways"].items()]
    notes += [f"   {left_out['way']}: left out, {left_out['why']}" for left_out in results["skipped"]]
    return "\n".join([*lines, aligned(_HEAD + rows, left={1, 2}, headers=2), *notes, *_foot(results), *_where(results)])


def _where(results: dict[str, Any]) -> list[str]:
    """Where the time of a staged fetch goes, by tokens; nothing where a run has not asked."""
    cases = [case for case in results["cases"] if "parts_s" in case]
    if not cases:
        return []
    threads = [int(name) for name in cases[0]["gather_s"]]
    head = ["tokens", *_PARTS, *(f"{n} thread{'s' * (n > 1)}" for n in threads), "stolen", "switched away"]
    table = [head, ["", *["us"] * (len(head) - 3), "ms", "times"]]
    for case in cases:
        samples = [case["parts_s"][part] for part in _PARTS] + [case["gather_s"][str(n)] for n in threads]
        came_between = case["disturbed"]
        table.append(
            [
                f"{case['tokens']}",
                *(short(1e6 * statistics.median(one)) for one in samples),
                short(1e3 * came_between["stolen_s"]),
                f"{came_between['switched_away']:.0f}",
            ]
        )
    return [
        "where the time of staged goes, by the host's clock, medians; whole: from token ids to the join",
        aligned(table, left=set(), headers=2),
        "   start: check, gather, submit the copy; arrive: what the device takes after the join; handed over: a whole "
        "fetch by a worker thread, its caller waiting",
        "   threads: the gather alone, into staging memory, by so many that stay; start less that of 1 is what is paid "
        "to submit",
        "   stolen: by the host of a virtual machine, from all its processors; switched away: this process, unasked",
    ]


def handover_table(results: dict[str, Any]) -> str:
    """What it costs to hand a fetch to the worker and to wait for it, by tokens; see `bench.setup.staged_parts`."""
    head = ["tokens", "rows", "KiB", "by the caller", "by the worker", "more", "times [95 %]"]
    table = [head, ["", "", "", *["us"] * 3, ""]]
    for case in results["cases"]:
        here, handed = (case["parts_s"][part] for part in ("whole", "handed over"))
        ratio = paired_ratio(handed, here)
        more = statistics.median(there - at_once for there, at_once in zip(handed, here))
        table.append(
            [
                f"{case['tokens']}",
                f"{case['rows']:,}",
                short(case["bytes"] / 1024),
                *(short(1e6 * seconds) for seconds in (statistics.median(here), statistics.median(handed), more)),
                f"{short(ratio['median'])} [{short(ratio['low'])}, {short(ratio['high'])}]",
            ]
        )
    return "\n".join([measured_on(results), aligned(table, left=set(), headers=2)])


def published_us(tokens: int) -> float:
    """What vLLM's lookup takes for one of PUBLISHED."""
    return figure(f"vllm.lookup.{tokens}")


def _foot(results: dict[str, Any]) -> list[str]:
    copied = results["limits"]["copy"]
    return [
        f"   floor: bytes of the rows over {short(copied['bytes_per_s'] / 1e9)} GB/s ({copied['what']}, measured in "
        "this run); for rows that the device has, none is given",
        "   late: samples whose kernels were not all launched when the device came to them: launching is in them",
        f"   vLLM: published for the same kind of lookup in place, {short(figure('vllm.lookup.table_gib'))} GiB of "
        "rows in host memory, on a GB300: another GPU, another bus to the host (NVLink-C2C, not PCIe), another clock; "
        "to hold against uva, not like for like",
    ]


def _case(results: dict[str, Any], case: dict[str, Any]) -> list[list[str]]:
    floor = case["bytes"] / results["limits"]["copy"]["bytes_per_s"]
    rows = []
    for label, samples in case["samples_s"].items():
        published = label == "uva" and case["tokens"] in PUBLISHED
        low, high = (short(1e6 * quantile(samples, share)) for share in (0.2, 0.8))
        rows.append(
            [
                f"{case['tokens']}",
                label,
                results["device"],
                short(1e6 * statistics.median(samples)),
                f"{low}-{high}",
                _ratio(case, label),
                "" if label.startswith("resident") else short(1e6 * floor),
                f"{case['launched_late'][label]}",
                f"{published_us(case['tokens']):g}" if published else "",
            ]
        )
    return rows


def _ratio(case: dict[str, Any], label: str) -> str:
    """Against `resident`, which is the noise floor where it is measured again."""
    samples = case["samples_s"]
    if "resident" not in samples:
        return "-"
    if label == "resident":
        return "baseline"
    found = paired_ratio(samples[label], samples["resident"])
    interval = f"[{found['low']:.3g}, {found['high']:.3g}]"
    if label == "resident again":
        return f"noise floor {interval}"
    noise = paired_ratio(samples["resident again"], samples["resident"])
    resolved = overhead(found, lambda: noise, len(samples[label])).resolved
    return f"{format(found['median'], '.3g') if resolved else 'not resolved'} {interval}"
