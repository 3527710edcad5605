"""The finding after the lab's template, every number of it taken from results.json.

python experiments/engram-offload/finding.py     writes docs/findings/engram-offload-bytedmd.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

WIN, LOSS = 5, 20  # the task's thresholds

TEMPLATE = """# Engram's offload under ByteDMD

Date: {date}. Author: {author}. Status: SUCCESS.
Answers: task 011, whether "under 3 % offload overhead" survives ByteDMD.

Classification: {classes}. Raw data: `experiments/engram-offload/results.json`.

## Hypothesis

If an offloaded bank lies far down the stack and its rows are copied ahead of use, then the price of the lookups rises
with the depth, because a copy changes when a deep read happens and never whether.

## Config

| what | value |
| --- | --- |
{config}

m is none, M the whole bank, p all lookups, as in the paper; p is varied in the second table. The heuristic is the
paper's: exact, one position ahead. Paddings that this tracer cannot serve: {not_served}.

## Results

{table}

Prices of seed {seed}. Geometric LB: {factor} times the price, the lab's lower bound of an oracle allocator. Wall time:
median of {calls} calls of the untraced function.

## Key Table

{key_table}

## Analysis

**What worked.** Outputs of all variants agree to the bit; only the layout of memory differs.
**What didn't.** The prefetch: it reads every deep value as often, and its own copy as well.
**Surprise.** Padding and the share offloaded alone move the ratio of the lookup from {least} to {most}; divided by an
attention head it is {head}. A class without its denominator and its padding says nothing.

## Open Questions

1. Which padding stands for host memory, and which for an SSD? The factor of the task is the root of the padding chosen.
2. Do explicit placement and its copies, on a grid of addresses, leave a gap between the two layouts?

## Files

`experiments/engram-offload/model.py`, `run.py`, `finding.py`, `results.json`; Phase 1:
`docs/findings/engram-offload-paper-read.md`.

## Impact on DISCOVERIES.md

Proposed: an offload ratio under ByteDMD is set by the padding and by what stands in the denominator; state both.
"""


def classify(ratio: float) -> str:
    """By price alone."""
    return "WIN" if ratio <= WIN else "LOSS" if ratio > LOSS else "INCONCLUSIVE"


def finding(results: dict[str, Any], date: str, author: str) -> str:
    """The page."""
    c = results["configuration"]
    seed, deepest = c["seeds"][0], max(c["paddings"])
    full = [r for r in results["records"] if r["offloaded_share"] == 1.0 and r["seed"] == seed]
    lookups = [ratio(results, r) for r in results["records"] if r["boundary"] == "lookup" and _last(r)]
    heads = [ratio(results, r) for r in results["records"] if r["boundary"] == "attention" and _last(r)]
    at = {r["boundary"]: ratio(results, r) for r in full if r["padding"] == deepest and _last(r)}
    named = ", ".join(f"{classify(value)} at the {boundary}" for boundary, value in at.items())
    return TEMPLATE.format(
        date=date,
        author=author,
        classes=f"{named}, padding {deepest:,}",
        config="\n".join(f"| {key} | {value} |" for key, value in c.items()),
        not_served=", ".join(
            f"{n['padding']:,} (about {n['estimated_s']:,.0f} s a trace)" for n in results["not_served"]
        ),
        table=_table(results, full),
        key_table=_key_table(results, seed),
        seed=seed,
        factor=c["lower_bound_factor"],
        calls=c["timed_calls"],
        least=f"{min(lookups):.2f} ({classify(min(lookups))})",
        most=f"{max(lookups):.2f} ({classify(max(lookups))})",
        head=f"{min(heads):.2f} to {max(heads):.2f}",
    )


def _last(record: dict[str, Any]) -> bool:
    return record["variant"] == "offload_prefetch"


def ratio(results: dict[str, Any], record: dict[str, Any]) -> float:
    """Price over that of the resident bank in the same configuration."""
    names = ("boundary", "seed", "padding", "offloaded_share")
    same = [r for r in results["records"] if all(r[name] == record[name] for name in names)]
    return record["cost"] / next(r["cost"] for r in same if r["variant"] == "resident")


def _table(results: dict[str, Any], records: list[dict[str, Any]]) -> str:
    head = "| boundary | padding | variant | ByteDMD | per token | Geometric LB (0.3849×) | ratio | wall time, ms |"
    lines = [head, "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for r in records:
        cells = [r["boundary"], f"{r['padding']:,}", r["variant"], f"{r['cost']:,}", f"{r['cost_per_token']:,.0f}"]
        cells += [f"{r['geometric_lower_bound']:,.0f}", f"{ratio(results, r):.3f}"]
        lines.append("| " + " | ".join([*cells, f"{1000 * statistics.median(r['wall_time_s']):.2f}"]) + " |")
    return "\n".join(lines)


def _key_table(results: dict[str, Any], seed: int) -> str:
    """The lookup's prefetch over the resident bank, by padding and share offloaded, with its class."""
    found = [r for r in results["records"] if r["boundary"] == "lookup" and r["seed"] == seed and _last(r)]
    shares = sorted({r["offloaded_share"] for r in found})
    lines = [
        "| padding | " + " | ".join(f"p = {share:g}" for share in shares) + " |",
        "| ---: |" + " --- |" * len(shares),
    ]
    for padding in sorted({r["padding"] for r in found}):
        at = {r["offloaded_share"]: ratio(results, r) for r in found if r["padding"] == padding}
        lines.append(f"| {padding:,} | " + " | ".join(f"{at[s]:.2f} {classify(at[s])}" for s in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=here / "results.json", metavar="FILE")
    page = here.parents[1] / "docs" / "findings" / "engram-offload-bytedmd.md"
    parser.add_argument("--out", type=Path, default=page, metavar="FILE")
    parser.add_argument("--date", required=True)
    parser.add_argument("--author", required=True)
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    options.out.write_text(finding(results, options.date, options.author), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
