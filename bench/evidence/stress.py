"""The table of a stress run, as printed and as `docs/stress.md` shows it.

python -m tests.fuzz      (its modules say what each kind does)
"""

from __future__ import annotations

from typing import Any


def report(results: dict[str, Any]) -> str:
    """A line per kind, and how much of the whole this was."""
    head = f"{'kind':<9} {'cases':>7} {'refused':>8} {'faults':>7} {'seconds':>8}"
    share = f"{100 * results['configuration']['share']:g} % of the whole run of each kind"
    return "\n".join([head, *map(line, results["kinds"]), "", share])


def line(kind: dict[str, Any]) -> str:
    """One kind: how many cases, how many of them were refused in one line, how many faults."""
    refused = f"{kind['refused']:,}" if "refused" in kind else "-"
    return f"{kind['kind']:<9} {kind['cases']:>7,} {refused:>8} {len(kind['faults']):>7,} {kind['seconds']:>8.0f}"
