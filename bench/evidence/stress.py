"""The table of a stress run, as printed and as `docs/stress.md` shows it.

python -m tests.fuzz      (its modules say what each kind does)
"""

from __future__ import annotations

from typing import Any

from bench.instruments.words import aligned

_HEAD = ["kind", "cases", "refused", "at work", "faults", "seconds"]


def report(results: dict[str, Any]) -> str:
    """A line per kind, and how much of the whole this was."""
    share = f"{100 * results['configuration']['share']:g} % of the whole run of each kind"
    return f"{aligned([_HEAD, *map(cells, results['kinds'])], {0})}\n\n{share}"


def cells(kind: dict[str, Any]) -> list[str]:
    """One kind: cases, those refused in one line, kills that what was finished outlived, faults, how long it took."""
    some = (f"{kind[name]:,}" if name in kind else "-" for name in ("refused", "at_work"))
    return [kind["kind"], f"{kind['cases']:,}", *some, f"{len(kind['faults']):,}", f"{kind['seconds']:.0f}"]
