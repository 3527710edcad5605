"""One real index stream under every definition of ByteDMD, under the floor, and with a memory that could be built.

    found = list(records("v41-flash", 100_000, "compacted"))
    definitions_table({"records": found})

A definition says what a read costs. The floor is what no manager can beat that moves a value only by reading it; "kept
copies" is what one could have that never moves a row and copies up, once, what is read again: so the best lies between
these two. Each of them with the table on top, and below so many bytes that nobody reads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.instruments.claim import classify
from bench.instruments.words import aligned
from bench.rows.cases import LAYOUTS, read_rows, source
from engram_ref.config import EngramConfig
from engram_toy.definitions import DEFINITIONS
from engram_toy.fast.floor import row_floor
from engram_toy.fast.kept_copies import price_kept
from engram_toy.fast.last_reads import RowReads
from engram_toy.fast.rows import Start, price_rows, start

TABLES = ("paper-27b", "paper-40b", "v41-flash")
PADDINGS = (0, 10**10, 10**11)  # bytes above the table
KEPT, FLOOR = "kept copies", "floor"
ROWS = (*(name for name in DEFINITIONS if name != "two-stack"), KEPT, FLOOR)  # "two-stack" is "live" for rows

Record = dict[str, Any]


def records(table: str, tokens: int, layout: str) -> Iterator[Record]:
    """Price and seconds under every definition and padding, for the first so many tokens."""
    config = EngramConfig.preset(table)
    reads = read_rows(source("python-stdlib", tokens).ids, config)
    about = {"table": table, "tokens": tokens, "reads": len(reads.links), "distinct_rows": len(reads.rows)}
    begin = start(reads, LAYOUTS[layout])
    for definition, padding in itertools.product(ROWS, PADDINGS):
        began = time.perf_counter()
        low, high = price(definition, reads, begin, config.row_bytes(), padding)
        case = {"layout": layout, "definition": definition, "padding_bytes": padding}
        prices = {"price": low, "price_at_most": high, "seconds": time.perf_counter() - began}
        yield {**about, **case, **prices}


def price(definition: str, reads: RowReads, begin: Start, row_bytes: int, padding: int) -> tuple[int, int]:
    """Least and most of one definition's price; they differ for the floor alone, by 1 % at most."""
    if definition == FLOOR:
        return row_floor(reads, begin, row_bytes, padding)
    if definition == KEPT:
        return (price_kept(reads, begin, row_bytes, padding),) * 2
    once = replace(reads, step_reads=max(1, len(reads.links)))  # nothing is read in between: no step begins
    return (price_rows(once, begin, row_bytes, padding, definition=definition).total,) * 2


def definitions_table(results: Record) -> str:
    """A line per table, tokens, layout and definition: price a token on top, and how many times as much below."""
    paddings = sorted({r["padding_bytes"] for r in results["records"]})
    head = ["table", "tokens", "layout", "definition", "price a token", *(f"below {p:.0e} B" for p in paddings[1:])]
    rows = [[*head, "class"]]
    for key, at in _lines(results).items():
        ratios = [at[padding]["price"] / at[0]["price"] for padding in paddings[1:]]
        classes = dict.fromkeys(classify(ratio, None).label for ratio in ratios)
        cells = [f"{at[0]['price'] / at[0]['tokens']:,.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        rows.append([key[0], f"{key[1]:,}", *key[2:], *cells, ", ".join(classes)])
    return aligned(rows, left={0, 2, 3, len(head)})


def spread(results: Record, table: str, tokens: int, layout: str, padding: int) -> tuple[float, float]:
    """Least and largest ratio over all definitions of depth, without floor and kept copies."""
    found = [
        at[padding]["price"] / at[0]["price"]
        for key, at in _lines(results).items()
        if key[:3] == (table, tokens, layout) and key[3] in DEFINITIONS
    ]
    return min(found), max(found)


def ratio(results: Record, definition: str, table: str, tokens: int, layout: str, padding: int) -> float:
    """Price below so many bytes over the price on top."""
    at = _lines(results)[table, tokens, layout, definition]
    return at[padding]["price"] / at[0]["price"]


def best_manager(results: Record, table: str, tokens: int, layout: str, padding: int) -> tuple[float, float]:
    """Between which ratios the best manager's lies: no price of its is below the floor, or above that of the copies."""
    floor, kept = (_lines(results)[table, tokens, layout, name] for name in (FLOOR, KEPT))
    # One over the other: a ratio of two floors, or of two prices of one memory that could be built, bounds nothing.
    return floor[padding]["price"] / kept[0]["price"], kept[padding]["price"] / floor[0]["price"]


def _lines(results: Record) -> dict[tuple[Any, ...], dict[int, Record]]:
    found: dict[tuple[Any, ...], dict[int, Record]] = {}
    for r in results["records"]:
        key = (r["table"], r["tokens"], r["layout"], r["definition"])
        found.setdefault(key, {})[r["padding_bytes"]] = r
    return found
