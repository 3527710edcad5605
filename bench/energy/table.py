"""Tables of the counts of `bench/how_far.py energy_by_tier`: energies and crossings come from them and from figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.energy.tiers import Tier, crossings, rows_energy, weights_energy
from bench.instruments.words import aligned
from bench.rows.whole_model import MODELS, shown, table_of
from engram_ref.place.energy import PAGE, Range, pages_per_row

# Models, and whose experts a step reads.
SHOWN = (("dense-4b", ""), ("dense-8b", ""), ("v41-flash", "one"), ("v41-flash", "expected"), ("v41-flash", "all"))
REUSE = {"each read": "reads", "once a step": "distinct_in_step", "never again": "first_ever"}

Record = dict[str, Any]


def shares(results: Record, table: str, key: str) -> dict[int, float]:
    """Tokens a step -> share of the row reads that are fetched, of one table and one kind of reuse."""
    found = {r["tokens_per_step"]: r[key] / r["reads"] for r in results["records"] if r["table"] == table}
    if not found:
        raise ValueError(f"no counts of the table {table!r} in these results")
    return found


def weight_bytes(model: str, experts: str, tokens: float) -> int:
    """Bytes of weights that a decode step of so many tokens reads; keys and values are left out."""
    return MODELS[model].decoding(experts, max(1, round(tokens))).read_bytes


def crossing_table(results: Record, tiers: list[Tier], reuse: Sequence[str] = tuple(REUSE)) -> str:
    """Tokens a step at which rows reach 3 % of the weights' energy, a line per model and reuse, a column per tier."""
    rows = [["model", "a row is fetched", *(tier.name for tier in tiers)]]
    for model, experts in SHOWN:
        for name, key in ((name, REUSE[name]) for name in reuse):
            cells = [_range(crossing(results, tiers, tier, model, experts, key)) for tier in tiers]
            rows.append([shown(model, experts), name, *cells])
    return aligned(rows, left={0, 1})


def crossing(
    results: Record, tiers: list[Tier], tier: Tier, model: str, experts: str, key: str
) -> tuple[float | None, float | None]:
    """Earliest and latest crossing of a model whose rows come from a tier."""
    shape = MODELS[model].table
    fetched = shares(results, table_of(model), key)
    weights = partial(weight_bytes, model, experts)
    return crossings(tier, tiers[0], weights, shape.row_bytes(), shape.rows_per_token(), fetched)


def step_table(tiers: list[Tier], tokens: int) -> str:
    """Energy of the rows of one step as a share of its weights', and the bytes that move, every read fetched."""
    head = ["model", "weights", "rows asked for", "as 4 KiB pages", "moved per byte", *(tier.name for tier in tiers)]
    rows = [head]
    for model, experts in SHOWN:
        shape, nbytes = MODELS[model].table, weight_bytes(model, experts, tokens)
        reads = tokens * shape.rows_per_token()
        asked, moved = reads * shape.row_bytes(), reads * pages_per_row(shape.row_bytes()) * PAGE
        cells = [_share(tier, tiers[0], reads, shape.row_bytes(), nbytes) for tier in tiers]
        sizes = f"{nbytes / 1e9:.2f} GB", f"{asked / 1e6:.2f} MB", f"{moved / 1e6:.1f} MB", f"{moved / asked:.1f}"
        rows.append([shown(model, experts), *sizes, *cells])
    return aligned(rows, left={0})


def share(tier: Tier, hbm: Tier, reads: int, row_bytes: int, weight_bytes: int) -> Range:
    """Least and most of rows' energy over weights' energy, every read fetched from its tier."""
    low, high = rows_energy(tier, hbm, reads, reads, row_bytes)
    least, most = weights_energy(weight_bytes, hbm)
    # Of HBM by itself the figure cancels, whichever it is.
    return (low / least, high / most) if tier == hbm else (low / most, high / least)


def _share(tier: Tier, hbm: Tier, reads: int, row_bytes: int, weight_bytes: int) -> str:
    low, high = share(tier, hbm, reads, row_bytes, weight_bytes)
    return f"{100 * low:.2g} %" if high < 1.001 * low else f"{100 * low:.2g}–{100 * high:.2g} %"


def reuse_table(results: Record) -> str:
    """What a step fetches of what it reads, a line per table and step size."""
    rows = [["table", "tokens a step", "steps", "rows read", "once a step", "never again"]]
    for r in results["records"]:
        cells = [f"{100 * r[key] / r['reads']:.1f} %" for key in ("distinct_in_step", "first_ever")]
        rows.append([r["table"], f"{r['tokens_per_step']:,}", f"{r['steps_counted']:,}", f"{r['reads']:,}", *cells])
    return aligned(rows, left={0})


def _range(found: tuple[float | None, float | None]) -> str:
    first, last = ("beyond" if at is None else "below 1" if at < 1 else f"{_digits(at)}" for at in found)
    return first if first == last else f"{first}–{last}"


def _digits(at: float) -> str:
    return f"{float(f'{at:.3g}'):,.0f}" if at >= 10 else f"{at:.1f}"
