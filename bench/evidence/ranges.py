"""How far each answer reaches: over endings and paddings, denominators, tiers, texts, and on the map of the classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from bench.energy import table as energy_table
from bench.evidence.committed import Evidence, rounded_up
from bench.evidence.published import energy_tiers
from bench.instruments.claim import LOSS_ABOVE, WIN_UP_TO, by_seed
from bench.price.table import claimed_overhead, denominator_table, find_run, most_ratio, noise_floor, rows_ratio
from bench.rows import definitions, verdict_map
from bench.rows import other_texts_table as texts
from bench.rows.whole_model import STEP
from bench.sweeps import lookup_range
from bench.sweeps.points import FLOOR
from engram_toy.models.endings import ENDINGS, NEAREST

_TOYS = {"engram": "engram", "v41": "engram, V4.1's form"}
_SMALL = "kv-bank, at most 1,000 values"
_TABLE, _TOKENS = "v41-flash", (10**5, 10**6)  # of which row definitions are quoted
_LAYOUT_KEYS = {"held live": "held", "compacted": "compacted"}


def blocks(e: Evidence) -> dict[str, Callable[[], str]]:
    """The marked blocks, by name."""
    return {
        "lookup_endings": lambda: lookup_range.endings_table(e["lookup_range"], walls(e)),
        "lookup_depths": lambda: lookup_range.depth_table(e["lookup_range"]),
        "denominators": lambda: denominator_table(e.toy),
        "energy_crossings": lambda: energy_table.crossing_table(e["energy_by_tier"], energy_tiers()),
        "energy_short": lambda: energy_table.crossing_table(
            e["energy_by_tier"], energy_tiers(), ("each read", "once a step")
        ),
        "energy_step": lambda: energy_table.step_table(energy_tiers(), STEP),
        "energy_reuse": lambda: energy_table.reuse_table(e["energy_by_tier"]),
        "map_table": lambda: verdict_map.map_table(e["verdict_map"]),
        "map_points": lambda: verdict_map.points_table(e["verdict_map"]),
        "other_texts": lambda: texts.texts_table(e["other_texts"]),
        "row_definitions": lambda: definitions.definitions_table(e["row_definitions"]),
        "text_batches": lambda: texts.batch_table(e["other_texts"]),
    }


def walls(e: Evidence) -> dict[str, float | None]:
    """Extra wall time of the lookup's prefetch of the toys that were timed."""
    found = {}
    for model in ("engram", "kv-bank"):
        run, resident = (find_run(e.toy, model, "lookup", name) for name in ("offload_prefetch", "resident"))
        found[model] = claimed_overhead(run, resident, noise_floor(e.toy, model, "lookup"))
    return found


def values(e: Evidence) -> dict[str, str]:
    """Single values of sentences, by name."""
    return _lookup_values(e) | _definition_values(e) | _map_values(e) | _text_values(e)


def _lookup_values(e: Evidence) -> dict[str, str]:
    quoted = {
        "engram.returned": ("engram", ENDINGS[0]),
        "engram.dropped": ("engram", "dropped"),
        "engram.nearest": ("engram", NEAREST),
        "small.returned": (_SMALL, ENDINGS[0]),
        "small.once.returned": (f"{_SMALL}, 3 tokens", ENDINGS[0]),
    }
    found = {}
    for key, (toy, ending) in quoted.items():
        ratio = lookup_range.ratio(e["lookup_range"], toy, ending, lookup_range.BASE_PADDING)
        found[f"ending.{key}"] = f"{ratio:.1f}"
    for end, bound in zip(("least", "most"), lookup_span(e)):
        found[f"range.engram.{end}"] = f"{bound:.2g}"
    for model, boundary in itertools.product(("engram", "kv-bank"), ("layer", "block")):
        found[f"most.{model}.{boundary}"] = f"{most_ratio(e.toy, model, boundary):.2f}"
        found[f"rows.{model}.{boundary}.alone"] = f"{rows_ratio(e.toy, model, boundary):.2f}"
    return found


def lookup_span(e: Evidence) -> tuple[float, float]:
    """Least and largest ratio of the toy's lookup, over endings and paddings."""
    return lookup_range.span(e["lookup_range"], "engram")


def lookup_floors(e: Evidence, form: str = "engram") -> tuple[float, float]:
    """Least and largest ratio of the floors of a toy's lookup, bound over bound, whatever becomes of the rows."""
    found = [lookup_range.floor_ratio(e["lookup_range"], _TOYS[form], ending) for ending in ENDINGS]
    return min(found), max(found)


def layer_classes(e: Evidence) -> str:
    """Classes of the toy's layer over all definitions of depth; every larger boundary divides by more."""
    # The floor is a bound, no price.
    return ", ".join(dict.fromkeys(by_seed(ratio) for name, ratio in _defined(e, "layer").items() if name != FLOOR))


def text_spread(e: Evidence) -> str:
    """Price of a decode step's rows over Dense-4B's weights, in per cent, over real texts of one length."""
    return _spread(e, lambda r: 100 * r["tables"]["paper-100b"]["step_price_share"])


def energy_span(e: Evidence, tier: str) -> str:
    """Tokens a step at which the rows of Dense-4B reach 3 % of its weights' energy, each read fetched from a tier."""
    tiers = energy_tiers()
    one = next(found for found in tiers if found.name == tier)
    first, last = energy_table.crossing(e["energy_by_tier"], tiers, one, "dense-4b", "", "reads")
    if first is None or last is None:
        raise ValueError(f"{tier}: rows never reach the claimed share, and the start page says where they do")
    return f"{float(f'{first:.2g}'):,.0f} to {float(f'{last:.2g}'):,.0f}"


def _definition_values(e: Evidence) -> dict[str, str]:
    lookup, naive = _defined(e, "lookup"), _defined(e, "lookup", "offload_naive")
    cheaper = [f"`{name}`" for name in naive if lookup[name] < naive[name]]  # the toy's copies save something
    found = {
        "defs.lookup": ", ".join(f"`{name}` {_with_class(ratio)}" for name, ratio in lookup.items() if name != FLOOR),
        "defs.lookup.floor": " to ".join(map(_with_class, lookup_floors(e))),
        "rowdefs.tokens": f"{_TOKENS[0]:,}",
        "defs.cheaper": ", ".join(cheaper) or "none",
        "defs.layer.classes": layer_classes(e),
        "defs.layer.stationary": f"{_defined(e, 'layer')['stationary']:.2f}",
    }
    priced = e["row_definitions"]
    for tokens, (layout, key) in itertools.product(_TOKENS, _LAYOUT_KEYS.items()):
        at = (_TABLE, tokens, layout, max(definitions.PADDINGS))
        key = key if tokens == _TOKENS[0] else f"{key}.{tokens}"
        low, high = definitions.spread(priced, *at)
        found[f"rowdefs.{key}"] = f"{low:.3g} to {high:.3g}"
        for short, definition in (("floor", FLOOR), ("kept", definitions.KEPT)):
            found[f"rowdefs.{key}.{short}"] = f"{definitions.ratio(priced, definition, *at):.3g}"
        found[f"rowdefs.{key}.best"] = " to ".join(f"{end:.3g}" for end in definitions.best_manager(priced, *at))
    return found


def _defined(e: Evidence, boundary: str, variant: str = "offload_prefetch") -> dict[str, float]:
    """Definition -> ratio of the toy's Engram; of the floor, too."""
    values = e.sweeps["sweeps"]["definition"]["values"]
    return {value: e.swept("definition", value, "engram", boundary, variant) for value in values}


def _with_class(ratio: float) -> str:
    return f"{ratio:.3g} ({by_seed(ratio)})"


def _map_values(e: Evidence) -> dict[str, str]:
    levels = {"win": WIN_UP_TO, "loss": LOSS_ABOVE}
    records = e["verdict_map"]["records"]
    highest = {f"map.{name}": max(verdict_map.boundary(r, level) for r in records) for name, level in levels.items()}
    lowest = min(verdict_map.point(*point)[1] for point in verdict_map.POINTS)
    # Upwards: a step that reads as much as the page says is on the right side of every record's boundary.
    return {**{name: rounded_up(value, 2) for name, value in highest.items()}, "map.models": f"{lowest:.2g}"}


def _text_values(e: Evidence) -> dict[str, str]:
    numbers: dict[str, Callable[[dict[str, Any]], float]] = {
        "rows_seen": lambda r: 100 * texts.rows_seen(r, _TABLE),
        "tier_reads": lambda r: 100 * texts.tier_reads(r, _TABLE),
        "tier_saves": lambda r: 100 * texts.tier_saves(r, _TABLE),
        "once_a_step": lambda r: 100 * texts.once_a_step(r, _TABLE),
        "weights": lambda r: 100 * r["tables"]["paper-100b"]["step_price_share"],
        "grams.2": lambda r: 100 * r["seen_before"]["2"],
        "grams.4": lambda r: 100 * r["seen_before"]["4"],
        "shuffled.2": lambda r: 100 * r["shuffled_seen_before"]["2"],
        "shuffled.4": lambda r: 100 * r["shuffled_seen_before"]["4"],
    }
    found = {"texts.tokens": f"{e['other_texts']['configuration']['tokens']:,}"}
    return found | {f"texts.{key}": _spread(e, of) for key, of in numbers.items()}


def _spread(e: Evidence, of: Callable[[dict[str, Any]], float]) -> str:
    low, high = texts.spread(e["other_texts"], of)
    return f"{low:.2g} to {high:.2g}"
