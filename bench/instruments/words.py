"""Numbers, devices and tables in words: what every table of a benchmark writes alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any


def aligned(rows: list[list[str]], left: set[int], headers: int = 1) -> str:
    """Rows of cells as columns of equal width under a ruled head; the columns of `left` are flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
        if number == headers - 1:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows of cells as a table of Markdown; the columns of `right` are flush right."""
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def measured_on(results: dict[str, Any]) -> str:
    """One line: the device, and that a CPU's times are no GPU's."""
    name = device_label(results)
    if results["device"] == "cpu":
        return f"Measured on the {name}. These are CPU times; no GPU figure follows."
    card = results["environment"]["accelerator"]
    known = {key: "unknown" if value is None else value for key, value in card.items()}
    return (
        f"Measured on the {name}, PCIe generation {known['pcie_generation']} width {known['pcie_width']}, "
        f"driver {known['driver']}, CUDA {known['cuda']}."
    )


def device_label(results: dict[str, Any]) -> str:
    """What every figure and table calls its device: CPU or GPU, and its name."""
    return f"{'CPU' if results['device'] == 'cpu' else 'GPU'} {results['device_name']}"


def commit_of(results: dict[str, Any]) -> str:
    """The code that ran: its commit, and whether it had changes."""
    git = results["git"]
    return (git["commit"] or "unknown")[:12] + (" with changes" if git["dirty"] else "")


def gib(nbytes: float | None) -> str:
    """Bytes in GiB, three digits."""
    return "unknown" if nbytes is None else f"{nbytes / 2**30:.3g} GiB"


def short(value: float, digits: int = 4) -> str:
    """A few digits of a number >= 0, without an exponent; whole from 1,000 on."""
    if value >= 1000 or value == 0:
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if value >= 1e-4 else "<0.0001"


def fraction(share: float) -> str:
    """A part or a multiple of a whole: 1/640, 42 %, all, 4.5 x."""
    if share == 1:
        return "all"
    if share > 1:
        return f"{short(share, digits=2)} x"
    return f"{short(100 * share, digits=3)} %" if share > 0.1 else f"1/{1 / share:,.0f}"


def signed_percent(share: float) -> str:
    """A share as signed per cent, the sign for `%` left out."""
    return f"{100 * share:+.1f}" if abs(share) < 1 else f"{100 * share:+.0f}"


def signed(value: float) -> str:
    """`short` of a number that may be negative."""
    return f"{'-' if value < 0 else ''}{short(abs(value))}"
