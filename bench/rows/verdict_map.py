"""One map of the classes: bytes above the table, as multiples of the table, against compute per byte fetched.

    records = map_records(reads, config, "v41-flash")      # prices of the rows, pinned above and buried, per burial
    boundary(record, WIN_UP_TO)                            # bytes of weights per byte of rows, from which it is a WIN

In a steady run every step reads its rows, and what lies above them is either idle or read once by the step. So at x
bytes above for each byte of the table, and y bytes read for each byte of rows that is fetched,

    ratio(x, y) = (rows buried under x + y * w) / (rows of a table that stays on top + y * w)

with w the price of one byte that lies at the foot of what is above, as the weights do in their cycle. The lookup alone
is y = 0.
"""

from __future__ import annotations

from typing import Any

from bench.instruments.claim import LOSS_ABOVE, WIN_UP_TO, classify
from bench.instruments.words import aligned
from bench.rows.cases import LAYOUTS
from bench.rows.whole_model import MODELS, STEP, shown, step_price, table_of
from engram_ref.config import EngramConfig
from engram_toy.fast.last_reads import RowReads
from engram_toy.fast.rows import price_rows, start
from engram_toy.tracer.stack import read_price

ABOVE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # bytes above / bytes of the table
# Models on the map: by name, whose experts, and tokens of a decode step.
POINTS = tuple(
    (model, experts, tokens)
    for model, experts in (("dense-4b", ""), ("dense-8b", ""), ("v41-flash", "one"), ("v41-flash", "expected"))
    for tokens in (1, STEP, 32_768)
)

Record = dict[str, Any]


def map_records(reads: RowReads, config: EngramConfig, table: str, above: tuple[float, ...] = ABOVE) -> list[Record]:
    """A record per layout and burial.

    Args:
        reads: of decode steps.
        config: geometry of the table; its bytes are those of all its rows.
        table: its name.
    """
    size = reads.table_rows * config.row_bytes()
    found = []
    for layout, held in LAYOUTS.items():
        begin = start(reads, held)
        pinned = price_rows(reads, begin, config.row_bytes()).total
        for times in above:
            nbytes = round(times * size)
            buried = price_rows(reads, begin, config.row_bytes(), between_steps=nbytes).total
            found.append(
                {
                    "table": table,
                    "layout": layout,
                    "table_bytes": size,
                    "bytes_above": nbytes,
                    "row_bytes_read": len(reads.links) * config.row_bytes(),
                    "pinned": pinned,
                    "buried": buried,
                    "price_of_a_byte_below": read_price(nbytes),
                }
            )
    return found


def ratio(record: Record, per_byte: float, price_of_a_byte: float | None = None) -> float:
    """Price of a buried table over that of one that stays on top, with so many bytes read for each byte of rows.

    Args:
        price_of_a_byte: of one that is read; by default it lies at the foot of what is above.
    """
    price = record["price_of_a_byte_below"] if price_of_a_byte is None else price_of_a_byte
    compute = per_byte * record["row_bytes_read"] * price
    return (record["buried"] + compute) / (record["pinned"] + compute)


def boundary(record: Record, level: float) -> float:
    """Bytes read for each byte of rows at which the ratio falls to a level; 0 where the lookup alone is below it."""
    # The ratio falls as y grows: each level is crossed at one y.
    over = record["buried"] - level * record["pinned"]
    return max(0.0, over / ((level - 1) * record["row_bytes_read"] * record["price_of_a_byte_below"]))


def point(model: str, experts: str, tokens: int) -> tuple[float, float]:
    """Where a decode step of a published model stands: bytes above / bytes of the table, bytes read / bytes of rows."""
    shape = MODELS[model]
    around = shape.decoding(experts, tokens)
    # Rows; the primes that a column really has are a little larger.
    table = sum(shape.table.table_size_per_order) * shape.table.heads * len(shape.table.layer_ids)
    return (
        around.live_bytes / (table * shape.table.row_bytes()),
        around.read_bytes / (tokens * shape.table.bytes_per_token()),
    )


def point_ratio(results: Record, layout: str, model: str, experts: str, tokens: int) -> float:
    """At most so much does a decode step of a published model cost with its table buried, over one with it on top.

    Raises:
        ValueError: no record of these results is buried as deep as the model's table.
    """
    x, y = point(model, experts, tokens)
    # A model with idle experts stands at all that lies above, but its weights are priced where they lie, at the foot of
    # what a step reads: its ratio is no smaller than that of its rows by themselves.
    read = MODELS[model].decoding(experts, tokens).read_bytes
    return ratio(_next_larger(results, table_of(model), layout, x), y, step_price(read, MODELS[model].blocks) / read)


def map_table(results: Record) -> str:
    """Per table, layout and burial: the lookup's ratio and class, and how much compute makes it a WIN."""
    rows = [["table", "layout", "bytes above / table", "lookup", "class", "no LOSS from y =", "WIN from y ="]]
    for r in results["records"]:
        alone = ratio(r, 0.0)
        levels = (boundary(r, level) for level in (LOSS_ABOVE, WIN_UP_TO))
        times = f"{r['bytes_above'] / r['table_bytes']:.2g}"
        cells = [f"{alone:.2f}", classify(alone, None).label, *(f"{y:.2g}" for y in levels)]
        rows.append([r["table"], r["layout"], times, *cells])
    return aligned(rows, left={0, 1, 4})


def points_table(results: Record) -> str:
    """Published models on the map: their place, and their ratio and class in both layouts."""
    rows = [["model", "tokens", "bytes above / table", "read per byte of rows", *LAYOUTS, "class"]]
    for model, experts, tokens in POINTS:
        x, y = point(model, experts, tokens)
        found = [point_ratio(results, layout, model, experts, tokens) for layout in LAYOUTS]
        classes = dict.fromkeys(classify(r, None).label for r in found)
        cells = [f"{x:.2g}", f"{y:,.1f}" if y < 100 else f"{y:,.0f}", *(f"{r:.4f}" for r in found), ", ".join(classes)]
        rows.append([shown(model, experts), f"{tokens:,}", *cells])
    return aligned(rows, left={0, 6})


def _next_larger(results: Record, table: str, layout: str, times: float) -> Record:
    """The record of the next larger burial: there the ratio of the lookup is no smaller."""
    line = [r for r in results["records"] if (r["table"], r["layout"]) == (table, layout)]
    if not line:
        raise ValueError(f"no records of {table!r}, {layout} in these results")
    larger = [r for r in line if r["bytes_above"] >= times * r["table_bytes"]]
    if not larger:  # of a smaller burial it would be no bound
        end = max(r["bytes_above"] / r["table_bytes"] for r in line)
        raise ValueError(f"{table}, {layout}: the map ends at {end:.3g} times the table, before {times:.3g}")
    return min(larger, key=lambda r: r["bytes_above"])
