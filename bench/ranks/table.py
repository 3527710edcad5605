"""What ranks measured, and what the model says, as text for a terminal and as tables for a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from bench.instruments.words import aligned, markdown, measured_on

Results = dict[str, Any]
_NO_TIMES = "gloo on a CPU: what is counted holds anywhere; these times mean nothing elsewhere"


def measured_table(results: Results) -> str:
    """Bytes that a rank received in a fetch of all layers, against the formula, and the slowest rank's median time."""
    rows = [["ranks", "way", "tokens", "ids B", "rows B", "control B", "formula", "ms"]]
    for run, case, most in _cases(results):
        slowest = max(statistics.median(rank["samples_s"]) for rank in case["by_rank"])
        equal = "none" if most["formula"] is None else "equal" if formula_holds(case) else "DIFFERS"
        counted = [f"{most[name]:,}" for name in ("ids", "rows", "control")]
        rows.append([str(run["ranks"]), case["way"], f"{case['tokens']}", *counted, equal, f"{1e3 * slowest:.2f}"])
    first = results["runs"][0]
    lines = [f"sharded tables, {first['preset']}, rows of {first['row_bytes']} B", aligned(rows, left={1, 6})]
    return "\n".join([*lines, _NO_TIMES if results["device"] == "cpu" else measured_on(results)])


def _cases(results: Results) -> Iterator[tuple[Results, Results, Results]]:
    """Every case with its run, and the rank that received most."""
    for run in results["runs"]:
        for case in run["cases"]:
            yield run, case, max(case["by_rank"], key=lambda rank: rank["ids"] + rank["rows"])


def formula_holds(case: dict[str, Any]) -> bool:
    """Whether every rank received what its plan says, to the byte."""
    return all(
        rank["formula"] is None or {name: rank[name] for name in ("ids", "rows")} == rank["formula"]
        for rank in case["by_rank"]
    )


def bytes_table(results: Results) -> str:
    """Counted bytes of every run against the formula, for a page; no times."""
    rows = []
    for run, case, most in _cases(results):
        equal = "depends on the tokens" if most["formula"] is None else "equal" if formula_holds(case) else "differs"
        counted = [f"{most[name]:,} B" for name in ("ids", "rows", "control")]
        rows.append([str(run["ranks"]), case["way"], f"{case['tokens']:,}", *counted, equal])
    head = ["ranks", "way", "tokens a rank", "row numbers", "rows", "control", "formula"]
    return markdown(head, rows, right={0, 2, 3, 4, 5})


def most_hidden(results: Results) -> str:
    """The largest number of ranks whose exchange is no longer than the window, by link and tokens; for a page."""
    keys = {(entry["phase"], entry["tokens"]) for entry in results["model"]}
    links = list(dict.fromkeys(entry["link"] for entry in results["model"]))
    rows = []
    for phase, tokens in sorted(keys):
        cells = []
        for link in links:
            line = [e for e in results["model"] if (e["link"], e["phase"], e["tokens"]) == (link, phase, tokens)]
            hidden = [entry["ranks"] for entry in line if entry["seconds"] <= entry["window_s"]]
            largest = "all" if len(hidden) == len(line) else f"{max(hidden)}" if hidden else "none"
            cells.append(
                f"{largest} of {line[-1]['ranks']:,} ({1e6 * line[0]['seconds']:,.0f} us at {line[0]['ranks']})"
            )
        window = line[0]["window_s"]  # of any link: it is compute
        rows.append([f"{phase}, {tokens:,}", f"{1e6 * window:,.0f} us", *cells])
    return markdown(["tokens a rank", "window", *links], rows, right=range(1, len(links) + 2))


def stragglers_table(results: Results) -> str:
    """What waiting for each other costs a decode step, over the mean rank by itself; for a page."""
    rows = []
    for entry in results["schedule"]:
        if entry["ranks"] in (2, 8, 64, 1024):
            shares = entry["jitter"], entry["slower"], entry["step_s"] / entry["alone_s"] - 1
            noise, slower, more = (100 * share for share in shares)
            exchange, waited = (f"{1e6 * entry[name]:,.0f} us" for name in ("exchange_s", "waited_s"))
            rows.append([f"{entry['ranks']:,}", exchange, f"{noise:g} %", f"{slower:g} %", f"+{more:.1f} %", waited])
    head = ["ranks", "exchange", "noise", "one rank slower", "step against the mean rank alone", "of it waited"]
    return markdown(head, rows, right=range(len(head)))
