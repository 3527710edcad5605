"""Tables of `bench/how_far.py other_texts`'s results: a line per text, and the range over all real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.instruments.words import aligned

CONTROLS = ("zipf", "python-stdlib, shuffled")

Record = dict[str, Any]


def real(results: Record) -> list[Record]:
    """The records of texts that somebody wrote."""
    return [r for r in results["records"] if r["text"] not in CONTROLS]


def spread(results: Record, of: Callable[[Record], float]) -> tuple[float, float]:
    """Least and largest of a number over the real texts that have all the tokens."""
    # Reuse grows with length: a shorter text would stand at an end of the range for its length, not for its kind.
    found = [of(record) for record in real(results) if record["tokens"] == results["configuration"]["tokens"]]
    return min(found), max(found)


def rows_seen(record: Record, table: str) -> float:
    """Share of the row reads whose row had been read before."""
    counts = record["tables"][table]
    return 1 - counts["distinct_rows"] / counts["reads"]


def per_byte(record: Record, table: str, layout: str) -> float:
    """Mean price of a byte."""
    counts = record["tables"][table]
    return counts["price"][layout] / (counts["reads"] * counts["row_bytes"])


def tier_reads(record: Record, table: str) -> float:
    """Share of the reads that a hot tier serves."""
    return record["tables"][table]["hot"]["reads_of_tier"] / record["tables"][table]["hot"]["reads"]


def tier_saves(record: Record, table: str) -> float:
    """Share of the price that a hot tier saves."""
    hot = record["tables"][table]["hot"]
    return 1 - hot["price"] / hot["price_without"]


def once_a_step(record: Record, table: str) -> float:
    """Share of a decode step's row reads that are the first of their row in the step."""
    return record["tables"][table]["distinct_in_step"] / record["tables"][table]["step_reads"]


def texts_table(results: Record) -> str:
    """Reuse of n-grams and what V4.1-Flash's rows do, a line per text."""
    table = "v41-flash"
    rows = [
        ["text", "tokens", "2-grams", "3", "4", "shuffled: 2", "3", "4", "rows seen", "held", "compacted",
         "tier reads", "saves", "once a step", "of weights"]
    ]  # fmt: skip
    for r in results["records"]:
        grams = [f"{100 * r[key][n]:.1f}" for key in ("seen_before", "shuffled_seen_before") for n in ("2", "3", "4")]
        shares = (tier_reads(r, table), tier_saves(r, table), once_a_step(r, table))
        rows.append(
            [
                *(r["text"], f"{r['tokens']:,}", *grams, f"{100 * rows_seen(r, table):.1f}"),
                *(f"{per_byte(r, table, layout):,.0f}" for layout in ("held live", "compacted")),
                *(f"{100 * share:.1f}" for share in shares),
                f"{100 * r['tables'][table]['step_price_share']:.2g}",
            ]
        )
    return aligned(rows, left={0}) + f"\n\n{_LEGEND}"


_LEGEND = (
    "Shares in per cent. 2-grams, 3, 4: seen before in this text; shuffled: the same tokens in another order. rows "
    "seen: of V4.1-Flash's\nrow reads; held, compacted: price of a byte; tier: the 1 % of rows most frequent in the "
    "first half, on the second; once a step: of the\nreads of a decode step of 512 tokens, those of a row not yet "
    "read in it; of weights: their price, held live, of the weights'."
)


def batch_table(results: Record) -> str:
    """Independent texts as one batch, a line per corpus and table: what a step reads once only."""
    rows = [["texts", "how many", "steps", "table", "once a step", "never before"]]
    for r in results["records"]:
        for table, counts in r.get("batch", {"tables": {}})["tables"].items():
            cells = [f"{100 * counts[key] / counts['reads']:.1f} %" for key in ("distinct_in_step", "first_ever")]
            rows.append([r["text"], f"{r['batch']['texts']:,}", f"{r['batch']['steps']:,}", table, *cells])
    return aligned(rows, left={0, 3})
