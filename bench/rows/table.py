"""Tables of `bench/production.py`'s results, as text: what is in the results file and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.instruments.claim import WALL_TIME_CLAIM, classify
from bench.instruments.words import aligned
from bench.rows.whole_model import ALL_MODELS

TABLES = ("demo", "paper-27b", "paper-40b", "v41-flash")
LAYOUTS = ("held live", "compacted")
TEXT = "python-stdlib"

Record = dict[str, Any]


def report(results: dict[str, Any]) -> str:
    """All tables of the parts that were run."""
    parts = results["configuration"]["parts"]
    return "\n\n".join(_TABLES[part](results) for part in parts)


def select(results: dict[str, Any], **wanted: Any) -> list[Record]:
    """The records that have these values, in their order."""
    return [r for r in results["records"] if all(r.get(key) == value for key, value in wanted.items())]


def one(results: dict[str, Any], **wanted: Any) -> Record:
    """The record that has these values.

    Raises:
        ValueError: there is none, or several.
    """
    found = select(results, **wanted)
    if len(found) != 1:
        raise ValueError(f"{len(found)} records with {wanted}: exactly one is needed")
    return found[0]


def scale_table(results: dict[str, Any]) -> str:
    """Price per token, mean depth and reuse, a line per table, stream, length and layout."""
    head = [
        "table",
        "stream",
        "tokens",
        "reads",
        "seen before",
        "layout",
        "price a token",
        "per byte",
        "first reads' share",
    ]
    rows = [head]
    for r in select(results, part="scale"):
        first = sum(r["price_by_depth"]["first"].values())
        rows.append(
            [
                *(r["table"], r["stream"], f"{r['tokens']:,}", f"{r['reads']:,}", percent(reuse(r)), r["layout"]),
                f"{r['price'] / r['tokens']:,.0f}",
                f"{per_byte(r):,.0f}",
                percent(first / r["price"]),
            ]
        )
    return aligned(rows, left={0, 1, 5})


def reuse(record: Record) -> float:
    """Share of the reads whose row had been read before."""
    return 1 - record["distinct_rows"] / record["reads"]


def per_byte(record: Record) -> float:
    """Mean price of a byte read: the root of what may be called the effective depth."""
    return record["price"] / (record["reads"] * record["row_bytes"])


def hot_table(results: dict[str, Any]) -> str:
    """What a tier of the rows most frequent before saves, a line per table, layout and size."""
    rows = [["table", "layout", "tier", "rows", "filled", "of the reads", "price", "saved"]]
    for r in select(results, part="hot"):
        base = one(results, part="hot", table=r["table"], layout=r["layout"], hot_share=0.0)
        filled = r["tier_rows_filled"] / r["tier_rows"] if r["tier_rows"] else 0.0
        rows.append(
            [
                *(r["table"], r["layout"], f"{100 * r['hot_share']:g} %", f"{r['tier_rows']:,}", percent(filled)),
                *(
                    percent(r["reads_of_tier"] / r["reads"]),
                    f"{r['price']:.3g}",
                    percent(1 - r["price"] / base["price"]),
                ),
            ]
        )
    return aligned(rows, left={0, 1})


def place_table(results: dict[str, Any]) -> str:
    """The lookups alone, the table below so many unread bytes against above them, with the class."""
    found = select(results, part="place")
    paddings = list(dict.fromkeys(r["padding_bytes"] for r in found))
    rows = [["table", "layout", *(f"{padding:.0e} B".replace("e+", "e").replace("e0", "e") for padding in paddings)]]
    for table, layout in dict.fromkeys((r["table"], r["layout"]) for r in found):
        cells = []
        for padding in paddings:
            r = one(results, part="place", table=table, layout=layout, padding_bytes=padding)
            ratio = r["offload_naive"] / r["resident"]
            cells.append(f"{ratio:.2f} {classify(ratio, None).label}")
        rows.append([table, layout, *cells])
    return aligned(rows, left={0, 1})


def whole_model_table(results: dict[str, Any]) -> str:
    """Price of the rows against that of the model's weights, by tokens per step, and where it reaches 3 %."""
    found = select(results, part="whole_model")
    steps = list(dict.fromkeys(r["tokens_per_step"] for r in found))
    rows = [["model", "mode", "stream", "layout", *(f"{tokens:,}" for tokens in steps), "3 % at"]]
    for key in dict.fromkeys((r["table"], r["mode"], r["stream"], r["layout"]) for r in found):
        table, mode, stream, layout = key
        line = select(results, part="whole_model", table=table, mode=mode, stream=stream, layout=layout)
        shares = [row_share(r) for r in line]
        crossing = crossing_of([r["tokens_per_step"] for r in line], shares)
        rows.append(
            [
                *(ALL_MODELS[table].name, mode, stream, layout),
                *(f"{100 * share:.2g} %" for share in shares),
                f"{crossing:,.0f}" if crossing else f"over {steps[-1]:,}",
            ]
        )
    return aligned(rows, left={0, 1, 2, 3})


def row_share(record: Record, place: str = "offload_naive") -> float:
    """Price of the rows of a step as a share of the price of its weights, which is taken from below."""
    return record[place] / (record["steps"] * record["weights_step_price"])


def crossing_of(tokens: Sequence[int], shares: Sequence[float], level: float = WALL_TIME_CLAIM) -> float | None:
    """Tokens per step at which the share reaches `level`, interpolated between measured points on log axes.

    None where it stays below; the first point where it starts above.
    """
    if shares[0] >= level:
        return float(tokens[0])
    for (t0, s0), (t1, s1) in zip(zip(tokens, shares), zip(tokens[1:], shares[1:])):
        if s1 >= level:
            part = math.log(level / s0) / math.log(s1 / s0)
            return math.exp(math.log(t0) + part * math.log(t1 / t0))
    return None


def percent(share: float) -> str:
    """A share with one digit, or two significant ones where it is small."""
    return f"{100 * share:.1f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"


def depth_shares(records: Iterable[Record]) -> dict[int, tuple[float, float]]:
    """Per power of two of the depth in bytes: share of all reads, first and later ones."""
    bins: dict[int, list[float]] = {}
    for r in records:
        for column, kind in enumerate(("first", "later")):
            for b, count in r["reads_by_depth"][kind].items():
                bins.setdefault(int(b), [0.0, 0.0])[column] += count / r["reads"]
    return {b: (first, later) for b, (first, later) in sorted(bins.items())}


_TABLES = {"scale": scale_table, "hot": hot_table, "place": place_table, "whole_model": whole_model_table}
