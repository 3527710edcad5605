"""The lookup alone, over what nobody has prescribed: how it ends, and how much buries the table.

    about, records = price_toy(toy, plan, stream, seed=0)     # a record per ending, variant and padding

Its class is chosen by whoever chooses these two; so the class is shown with the range that they span, and with the
bound under every manager of memory (`engram_toy.floor`), which nobody can choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.instruments.claim import by_seed, by_task
from bench.instruments.words import aligned
from bench.price.models import digest, make_workload, toy_config
from bench.setup.streams import Stream
from bench.sweeps.points import FLOOR, PADDINGS
from bench.sweeps.pricing import Relaid
from bench.sweeps.readdressed import Readdressed, TableInputs
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_toy.bytedmd import record
from engram_toy.models.endings import ENDINGS
from engram_toy.models.layouts import Layout
from engram_toy.models.programs import Workload, build

VARIANTS = ("resident", "offload_naive", "offload_prefetch")
BASE_PADDING = 10**6  # the question's
_SMALL_BANK = "kv-bank, at most 1,000 values"

Record = dict[str, Any]


@dataclass(frozen=True)
class Toy:
    """One model whose lookup is priced.

    Attributes:
        name: as shown.
        config: its geometry.
        model: of the program.
        tokens: of the text; of the small bank, few enough that most rows are read once.
    """

    name: str
    config: EngramConfig
    model: str
    tokens: int


def toys(tokens: int, hidden: int) -> list[Toy]:
    """The models of the verdict, and a bank whose resident values are as few as the question had in mind.

    The small bank is read once by a text that reads each of its rows often, and once by three tokens.
    """
    bank = toy_config("kv-bank", hidden)
    # Two columns of a few rows of 2 * hidden values: at width 64 five rows, 640 values, so that a byte of the resident
    # bank lies within the thousand topmost.
    few = bank.replace(heads=1, table_size_per_order=(2,) * len(bank.orders))
    return [
        Toy("engram", toy_config("engram", hidden), "engram", tokens),
        Toy("engram, V4.1's form", toy_config("engram", hidden, "v41-flash"), "engram", tokens),
        Toy("kv-bank", bank, "kv-bank", tokens),
        Toy(_SMALL_BANK, few, "kv-bank", tokens),
        Toy(f"{_SMALL_BANK}, 3 tokens", few, "kv-bank", 3),
    ]


def price_toy(toy: Toy, plan: HashPlan, stream: Stream, seed: int) -> tuple[Record, list[Record]]:
    """What a toy reads, and its prices: one record per ending, variant and padding.

    Args:
        plan: the hash constants of its geometry.
        stream: a window of so many tokens as the toy says.
        seed: of weights and rows.
    """
    workload = make_workload(toy.model, toy.config, plan, stream.measured, seed)
    indices = workload.row_indices()
    named = {row for position in indices for row in position}
    width = len(workload.table[0])
    about = {
        "toy": toy.name,
        "tokens": toy.tokens,
        "lookups": sum(map(len, indices)),
        "distinct_rows": len(named),
        "row_values": width,
        "row_stream_sha256": digest(np.array(indices)),
    }
    return about, [
        {"toy": toy.name, "ending": ending, **price} for ending in ENDINGS for price in price_ending(workload, ending)
    ]


def price_ending(workload: Workload, ending: str) -> Iterator[Record]:
    """Price of every variant at every padding: variant, padding, cost, what the rows themselves cost, and the floor."""
    resident, naive, prefetch = (Layout.variant(name, len(workload.table)) for name in VARIANTS)
    # The naive layout reads what the resident one does, elsewhere: one recording serves both, and all paddings.
    for recorded, layouts in ((resident, (resident, naive)), (prefetch, (prefetch,))):
        program = build(workload, "lookup", recorded, padding=0, ending=ending)
        recording = record(program.function, program.arguments, program.kinds)
        table = TableInputs(recording, program, recorded)
        relaid, floors = Relaid(recording, table), Readdressed(recording, table, FLOOR)
        for layout in layouts:
            start, inputs = relaid.lay(layout), floors.lay(layout)
            for padding in PADDINGS:
                costs = relaid.cost_by_kind(start, padding, bytes_per_element=1)
                (least,) = floors.cost_by_kind(inputs, padding, bytes_per_element=1).values()
                prices = {"cost": sum(costs.values()), "row_cost": costs["row"], "floor": least}
                yield {"variant": layout.name, "padding": padding, **prices}


# --- what the results say ----------------------------------------------------------------------


def ratio(
    results: Record, toy: str, ending: str, padding: int, variant: str = "offload_prefetch", price: str = "cost"
) -> float:
    """Price, or floor, of a variant over that of the resident table, at one padding and ending."""
    found = {
        r["variant"]: r[price]
        for r in results["records"]
        if (r["toy"], r["ending"], r["padding"]) == (toy, ending, padding)
    }
    return found[variant] / found["resident"]


def floor_ratio(results: Record, toy: str, ending: str) -> float:
    """The bound under every manager of the offloaded table over that of the resident one: bound over bound.

    Of the naive program: a manager moves a value whenever it reads one, and needs no copies that the program makes.
    """
    return ratio(results, toy, ending, BASE_PADDING, "offload_naive", FLOOR)


def span(results: Record, toy: str, endings: Sequence[str] = ENDINGS) -> tuple[float, float]:
    """Least and largest ratio of the prefetch, over endings and all paddings."""
    found = [ratio(results, toy, ending, padding) for ending in endings for padding in PADDINGS]
    return min(found), max(found)


def named_class(results: Record, toy: str) -> str:
    """The class at the question's padding with the rows returned, and the classes between which it can be chosen."""
    here = ratio(results, toy, ENDINGS[0], BASE_PADDING)
    low, high = span(results, toy)
    return f"{by_seed(here)}; {by_seed(low)} to {by_seed(high)}, {low:.2g} to {high:.2g}"


def endings_table(results: Record, wall_overhead: dict[str, float | None]) -> str:
    """A line per toy and ending: the ratio at every padding; at the question's, that of the floor, and its class by
    both rules.

    Args:
        wall_overhead: toy -> extra wall time of its lookup's prefetch as a share, where it was measured.
    """
    base = f"at {BASE_PADDING:,}: floor"
    rows = [["lookup of", "ending", *(f"{p:,}" for p in PADDINGS), base, "plain rule", "task 011"]]
    for about in results["toys"]:
        for ending in ENDINGS:
            toy = about["toy"]
            found = {padding: ratio(results, toy, ending, padding) for padding in PADDINGS}
            here = found[BASE_PADDING]
            task = by_task(here, wall_overhead.get(toy))
            ratios = [*found.values(), floor_ratio(results, toy, ending)]
            rows.append([toy, ending, *(f"{r:.2f}" for r in ratios), by_seed(here), task])
    return aligned(rows, left={0, 1, len(rows[0]) - 2, len(rows[0]) - 1})


def depth_table(results: Record) -> str:
    """How deep the resident rows of every toy lie, by what their reads cost on average."""
    rows = [["lookup of", "tokens", "lookups", "rows", "resident values", "price a value", "as at depth"]]
    for about in results["toys"]:
        resident = next(r for r in results["records"] if r["toy"] == about["toy"] and r["variant"] == "resident")
        each = resident["row_cost"] / (about["lookups"] * about["row_values"])
        values = about["distinct_rows"] * about["row_values"]
        counts = (about["tokens"], about["lookups"], about["distinct_rows"], values)
        # A read at depth d costs its root.
        rows.append([about["toy"], *(f"{n:,}" for n in counts), f"{each:.1f}", f"{each**2:,.0f}"])
    return aligned(rows, left={0})
