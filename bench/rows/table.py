"""Tables of `bench/production.py`'s results, as text: what is in the results file and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bench.instruments.claim import LEVELS, LOSS_ABOVE, MARKS, WALL_TIME_CLAIM, WIN_UP_TO, classify
from bench.instruments.words import aligned
from bench.rows.whole_model import OTHERS, ROW_SIZES, shown

TABLES = ("demo", "paper-27b", "paper-40b", "v41-flash")
TEXT = "python-stdlib"
SCHEDULES = {"none": "offload_naive", "stands for it": "prefetch_stands", "for one use": "prefetch_one_use"}
_COPIED = ("prefetch_stands", "prefetch_one_use")
_UNDER = "that may show that a step stays under 3 %, and never that it does not"
_OWN, _BURIED = "engram_weights_step_price", "buried_step_price"

Record = dict[str, Any]


def report(results: dict[str, Any]) -> str:
    """All tables of the parts that were run."""
    parts = results["configuration"]["parts"]
    return "\n\n".join(table(results) for part in parts for table in _TABLES[part])


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


def scale_table(results: dict[str, Any], tokens: int | None = None, streams: Sequence[str] | None = None) -> str:
    """Price per token, mean depth and reuse, a line per table, stream, length and layout.

    Args:
        tokens, streams: of the lines; by default all.
    """
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
        if tokens not in (None, r["asked_tokens"]) or r["stream"] not in (streams or (r["stream"],)):
            continue
        first = sum(r["price_by_depth"]["first"].values())
        rows.append(
            [
                *(named(r), r["stream"], f"{r['tokens']:,}", f"{r['reads']:,}", percent(reuse(r)), r["layout"]),
                f"{r['price'] / r['tokens']:,.0f}",
                f"{per_byte(r):,.0f}",
                percent(first / r["price"]),
            ]
        )
    return aligned(rows, left={0, 1, 5})


def named(record: Record) -> str:
    """The table of a record, or the model around it; with the size of its rows where it was priced at several."""
    name = shown(record["table"], record["experts"]) if record["part"] == "whole_model" else record["table"]
    return f"{name}, {record['row_bytes']} B a row" if record["table"] in ROW_SIZES else name


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
        same = {name: r[name] for name in ("table", "row_bytes", "layout")}
        base = one(results, part="hot", hot_share=0.0, **same)
        filled = r["tier_rows_filled"] / r["tier_rows"] if r["tier_rows"] else 0.0
        rows.append(
            [
                *(named(r), r["layout"], f"{100 * r['hot_share']:g} %", f"{r['tier_rows']:,}", percent(filled)),
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
    found = select(results, part="place", prefetch=False)
    paddings = list(dict.fromkeys(r["padding_bytes"] for r in found if r["padding_bytes"]))
    head = ["table", "layout", "live bytes", *(f"{padding:.0e} B".replace("e+", "e") for padding in paddings)]
    rows = [[*head, *(f"{level:g}x at" for level in LEVELS)]]
    for table, row_bytes, layout in dict.fromkeys((r["table"], r["row_bytes"], r["layout"]) for r in found):
        line = [r for r in found if (r["table"], r["row_bytes"], r["layout"]) == (table, row_bytes, layout)]
        curve = {r["padding_bytes"]: placed(r) for r in line if r["padding_bytes"]}
        cells = [f"{ratio:.3g} {MARKS[classify(ratio, None).label]}" for ratio in curve.values()]
        live = line[0]["live_bytes"]
        at = [crossing_of(list(curve), list(curve.values()), level) for level in LEVELS]
        rows.append(
            [named(line[0]), layout, f"{live:.2g}", *cells, *(f"{x / live:.2g}" if x else "not reached" for x in at)]
        )
    note = (
        "price of the lookups below so many bytes that nobody reads / above them; W win (to 5x), i inconclusive, L loss"
    )
    note += "\n(over 20x, price alone). The last columns: bytes above the table over live bytes of the table"
    return f"{aligned(rows, left={0, 1})}\n\n{note}"


def placed(record: Record) -> float:
    """Price of the lookups below so many bytes over that of the table above them, without any copies."""
    return record["offload_naive"] / record["resident"]


def copies_table(results: dict[str, Any]) -> str:
    """What a copy of every row, made one token ahead, changes in the price of the lookups."""
    rows = [["table", "layout", "bytes above", "without", "stands for it", "for one use", "cheapest"]]
    for r in select(results, part="place", prefetch=True):
        if r["padding_bytes"] in (0, 10**9, 10**11):
            prices = {name: r[schedule] for name, schedule in SCHEDULES.items()}
            changes = [f"{100 * (price / r['offload_naive'] - 1):+.2f} %" for price in list(prices.values())[1:]]
            padding = f"{r['padding_bytes']:.0e}".replace("e+", "e") if r["padding_bytes"] else "0"
            price = f"{r['offload_naive'] / r['tokens']:,.0f}"
            rows.append([named(r), r["layout"], padding, price, *changes, min(prices, key=lambda name: prices[name])])
    note = "without: price a token; the others: what a copy of each row, one token ahead, changes of it"
    return f"{aligned(rows, left={0, 1, 6})}\n\n{note}"


def lines(results: dict[str, Any]) -> list[list[Record]]:
    """Whole models by rising step size: a line per model, experts, row size, mode, stream, its length and layout."""
    # A step size that does not divide the stream leaves some tokens out: such streams count as one, as they were asked.
    names = ("table", "experts", "row_bytes", "mode", "stream", "asked_tokens", "layout")
    found = select(results, part="whole_model", context=0)
    kept: dict[tuple[Any, ...], list[Record]] = {}
    for r in found:
        kept.setdefault(tuple(r[name] for name in names), []).append(r)
    return list(kept.values())


def whole_model_table(results: dict[str, Any]) -> str:
    """Price of the rows against that of the model's weights, by tokens per step, and where it reaches 3 %."""
    found = lines(results)
    steps = sorted({r["tokens_per_step"] for line in found for r in line})
    rows = [["model", "mode", "stream", "layout", *(f"{tokens:,}" for tokens in steps), "3 % at"]]
    for line in found:
        first, shares = line[0], {r["tokens_per_step"]: row_share(r) for r in line}
        cells = [f"{100 * shares[tokens]:.2g} %" if tokens in shares else "-" for tokens in steps]
        stream = first["stream"] + (", all" if first["asked_tokens"] is None else "")
        names = [named(first), first["mode"], stream, first["layout"]]
        rows.append([*names, *cells, reached(line)])
    return aligned(rows, left={0, 1, 2, 3})


def reached(line: Sequence[Record]) -> str:
    """Tokens per step at which the rows of a line reach 3 %, as text."""
    tokens, shares = [r["tokens_per_step"] for r in line], [row_share(r) for r in line]
    at = crossing_of(tokens, shares)
    if at is None:
        return f"over {tokens[-1]:,}"
    return f"{at:,.0f}" if shares[0] < WALL_TIME_CLAIM else f"below {tokens[0]:,}"


def steady_table(results: dict[str, Any], step: int) -> str:
    """Whether a stream has run long enough: the share of the rows over all steps and over the second half of them."""
    rows = [["model", "mode", "layout", "tokens", "a step", "steps", "all steps", "second half", "ratio"]]
    for r in select(results, part="whole_model", context=0, stream=TEXT):
        if r["experts"] in ("", "expected") and r["tokens_per_step"] in (step, 16_384, 98_304):
            whole, half = row_share(r), row_share({**r, **r["second_half"]})
            names = [named(r), r["mode"], r["layout"], f"{r['tokens']:,}"]
            shares = [f"{100 * whole:.2g} %", f"{100 * half:.2g} %", f"{half / whole:.2f}"]
            rows.append([*names, f"{r['tokens_per_step']:,}", f"{r['steps']:,}", *shares])
    return aligned(rows, left={0, 1, 2})


def complete_table(results: dict[str, Any], step: int) -> str:
    """One step, by what Engram adds to it, in per cent of the same model without Engram."""
    rows = [["model", "context", "layout", "pinned", "below", "copied", "own weights", "buried", "in all", "under 3 %"]]
    for r in select(results, part="whole_model", tokens_per_step=step, mode="decode", stream=TEXT):
        parts = additions(r)
        cells = [
            f"{100 * parts[name]:.2g}" for name in ("pinned", "below", "copied", "own weights", "buried", "in all")
        ]
        context = f"{r['context']:,}" if r["context"] else "left out"
        rows.append([named(r), context, r["layout"], *cells, under_claim(r)])
    note = (
        "pinned: rows of a table that stays above the weights; below: of an offloaded one; copied: with the dearer\n"
        "kind of copy one step ahead; own weights: Engram's projections; buried: what both add to the depth of the\n"
        "model's weights; in all: copied + own weights + buried. Per cent of the step without Engram, at most, since\n"
        f"its weights are counted from below: {_UNDER}"
    )
    return f"{aligned(rows, left={0, 2})}\n\n{note}"


def under_claim(record: Record) -> str:
    """Whether a step stays under 3 % for certain."""
    if record["table"] in OTHERS:  # of what lies above its rows a part alone is known
        return "no bound"
    # What is an upper bound can show that the claim holds, never that it fails.
    return "yes" if additions(record)["in all"] < WALL_TIME_CLAIM else "not decided"


def claim_weights(record: Record) -> float:
    """Bytes of weights a step from which all that Engram adds is under 3 % of their price, about.

    The weights' price grows as the three halves' power of their bytes, and what lies below them as no more than the
    root: the share falls as the bytes grow, or faster. What Engram buries of them falls so to its first order.
    """
    return record["read_bytes"] * additions(record)["in all"] / WALL_TIME_CLAIM


def additions(record: Record) -> dict[str, float]:
    """What Engram adds to a step whose copies were priced, by part, as shares of the same step without Engram."""
    weights = record["steps"] * record["weights_step_price"]
    own, buried = (record[name] / record["weights_step_price"] for name in (_OWN, _BURIED))
    copied = max(record[kind] for kind in _COPIED) / weights  # of both kinds, the dearer
    parts = {"pinned": record["pinned"] / weights, "below": record["offload_naive"] / weights, "copied": copied}
    return {**parts, "own weights": own, "buried": buried, "in all": copied + own + buried}


def baseline_table(results: dict[str, Any], step: int) -> str:
    """One step against both baselines: a table that stays resident, at the lookup and in the model; and no Engram."""
    head = ["model", "layout", "lookup", "class", "copied", "class", "model", "class", "over no Engram", "under 3 %"]
    rows = [head]
    for r in select(results, part="whole_model", tokens_per_step=step, mode="decode", stream=TEXT, context=0):
        copied, model = against_pinned(r)
        judged = ((lookups_against_pinned(r, "offload_naive"), ".3g"), (copied, ".3g"), (model, ".5f"))
        cells = [cell for ratio, digits in judged for cell in (f"{ratio:{digits}}", classify(ratio, None).label)]
        rows.append([named(r), r["layout"], *cells, f"{100 * additions(r)['in all']:.2g} %", under_claim(r)])
    note = (
        "over a table that stays above the weights at every step; lookup: offloaded rows; copied: a step ahead, the\n"
        "dearer way; model: the whole step with these copies; over no Engram: at most, since weights are counted from\n"
        f"below: {_UNDER}"
    )
    return f"{aligned(rows, left={0, 1, 3, 5, 7, 9})}\n\n{note}"


def by_step_table(results: dict[str, Any], steps: Sequence[int], step: int) -> str:
    """The class of a published table's lookups by tokens a step, and in the second half of the text."""
    rows = [["model", "layout", *(f"{tokens:,}" for tokens in steps), "second half"]]
    for line in lines(results):
        found = {r["tokens_per_step"]: r for r in line}
        if (line[0]["mode"], line[0]["stream"]) == ("decode", TEXT) and set(steps) <= found.keys():
            # In the second half much has been read before.
            asked = (*(found[tokens] for tokens in steps), found[step]["second_half"])
            ratios = [lookups_against_pinned(r, "offload_naive") for r in asked]
            cells = [f"{ratio:.3g} {MARKS[classify(ratio, None).label]}" for ratio in ratios]
            rows.append([named(line[0]), line[0]["layout"], *cells])
    note = (
        "price of offloaded rows, not copied, over those of a table that stays above the weights, by tokens a step;\n"
        f"second half: of the text, at {step} tokens a step. W win (to {WIN_UP_TO:g}x), i inconclusive, L loss (over "
        f"{LOSS_ABOVE:g}x)"
    )
    return f"{aligned(rows, left={0, 1})}\n\n{note}"


def lookups_against_pinned(record: Record, *schedules: str) -> float:
    """Price of offloaded rows over that of a table pinned above the weights, by the dearest of these schedules."""
    return max(record[schedule] for schedule in schedules) / record["pinned"]


def against_pinned(record: Record) -> tuple[float, float]:
    """Price of offloaded, copied rows over that of a table pinned above the weights: of the rows alone, of the step."""
    # These are prices of one step, those of rows are of all steps together.
    rest = record["steps"] * sum(record[name] for name in ("weights_step_price", _OWN, _BURIED))
    lookups = lookups_against_pinned(record, *_COPIED)
    return lookups, (lookups * record["pinned"] + rest) / (record["pinned"] + rest)


def row_share(record: Record) -> float:
    """Price of the rows of a step as a share of the price of its weights, which is taken from below."""
    return record["offload_naive"] / (record["steps"] * record["weights_step_price"])


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


def depth_shares(record: Record) -> dict[int, tuple[float, float]]:
    """Per power of two of the depth in bytes: share of all reads, first and later ones."""
    first, later = (record["reads_by_depth"][kind] for kind in ("first", "later"))
    bins = sorted(first.keys() | later.keys(), key=int)
    return {int(b): (first.get(b, 0) / record["reads"], later.get(b, 0) / record["reads"]) for b in bins}


_TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], ...]] = {
    "scale": (scale_table,),
    "hot": (hot_table,),
    "place": (place_table, copies_table),
    "whole_model": (whole_model_table,),
}
