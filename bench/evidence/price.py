"""What the price says, from the committed results: the tables, sentences and values of the findings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from bench.evidence import published
from bench.evidence.committed import COMPARED_TOKENS, STEP, Evidence, rounded_up
from bench.instruments.claim import WALL_TIME_CLAIM, classify
from bench.instruments.timing import summary
from bench.instruments.words import aligned
from bench.price.table import find_run, noise_floor, verdict, wall_text
from bench.rows import table as row_table
from bench.rows.table import LAYOUTS, TABLES, TEXT, per_byte, percent, reuse
from bench.rows.whole_model import CONTEXTS, shown
from bench.sweeps import table as sweep_table
from bench.sweeps.lookup_range import named_class
from bench.sweeps.points import SWEEPS
from bench.sweeps.table import ratios
from engram_toy.models.layouts import VARIANTS
from engram_toy.models.programs import BOUNDARIES
from engram_toy.models.programs import MODELS as TOYS

# Whole models that the answer names, with whose experts a step reads.
ANSWERED = {
    "dense-4b": ("dense-4b", ""),
    "dense-8b": ("dense-8b", ""),
    "v41-flash": ("v41-flash", "expected"),
    "v41-flash.one": ("v41-flash", "one"),
}


def halves(evidence: Evidence) -> str:
    """Every boundary with its price ratio, its class, and the wall time measured with it."""
    rows = [["boundary", "model", "against", "price ratio", "class", "wall time of the same program"]]
    for model in TOYS:
        for boundary in BOUNDARIES:
            runs = [find_run(evidence.toy, model, boundary, name) for name in ("offload_prefetch", "resident")]
            wall = wall_text(runs[0], runs[1], noise_floor(evidence.toy, model, boundary))
            label = verdict(evidence.toy, model, boundary).label
            if boundary == "lookup":  # its class is a choice: of the padding, and of how it ends
                label = named_class(evidence["lookup_range"], model)
            rows.append(
                [boundary, f"toy, {model}", "resident", f"{runs[0]['cost'] / runs[1]['cost']:.3f}", label, wall]
            )
    for model, experts in ANSWERED.values():
        rows += _published_size(evidence, shown(model, experts), model, experts)
    machine = evidence.toy["environment"]
    note = f"wall time of the toy on: {machine['cpu']}, {machine['cpu_count']} cores\n"
    note += "pinned: a table that stays above the weights at every step, held live .. compacted; none: no Engram at all"
    return f"{aligned(rows, left={0, 1, 2, 4, 5})}\n\n{note}"


def _published_size(e: Evidence, name: str, model: str, experts: str) -> list[list[str]]:
    """A table of published size beside a model: against one that stays resident, and against no Engram."""
    pairs = [e.pinned(model, experts, layout) for layout in LAYOUTS]
    found = []
    for boundary, ratios_of, digits in zip(("its lookups", "whole model"), zip(*pairs), (".3g", ".5f")):
        labels = dict.fromkeys(classify(ratio, None).label for ratio in ratios_of)
        spread = " .. ".join(f"{ratio:{digits}}" for ratio in ratios_of)
        found.append([boundary, name, "pinned", spread, ", ".join(labels), "-"])
    more = max(e.added(model, "in all", experts, layout) for layout in LAYOUTS)
    under = "under" if more < WALL_TIME_CLAIM else "over"
    said = [f"+{percent(more)}", f"{under} {100 * WALL_TIME_CLAIM:g} %", "see the finding on wall time"]
    return [*found, ["whole model", name, "none", *said]]


def layouts(evidence: Evidence, variants: tuple[str, ...] = VARIANTS) -> str:
    """Variants of the toy at every boundary: price, price per token, ratio, wall time, class."""
    rows = [["model", "boundary", "variant", "price", "per token", "ratio", "wall time, ms", "class"]]
    for model in TOYS:
        for boundary in BOUNDARIES:
            for variant in variants:
                run = find_run(evidence.toy, model, boundary, variant)
                median = 1000 * summary(run["wall_time_s"])["median"]
                label = "BASELINE" if variant == "resident" else verdict(evidence.toy, model, boundary, variant).label
                ratio = f"{evidence.ratio(model, boundary, variant):.3f}"
                price, each = f"{run['cost']:,}", f"{run['cost_per_token']:,.0f}"
                rows.append([model, boundary, variant, price, each, ratio, f"{median:.1f}", label])
    return aligned(rows, left={0, 1, 2, 7})


def blocks(evidence: Evidence) -> dict[str, Callable[[], str]]:
    """The marked blocks of the finding, by name."""
    found: dict[str, Callable[[], str]] = {
        "verdict_halves": lambda: halves(evidence),
        "toy_layouts": lambda: layouts(evidence),
        "toy_variants": lambda: layouts(evidence, VARIANTS[:3]),  # those that were asked for
        "sweep_crossings": lambda: sweep_table.crossing_report(evidence.sweeps),
        "rows_scale": lambda: row_table.scale_table(evidence.production_and_qwen),
        "rows_scale_short": lambda: row_table.scale_table(evidence.production_and_qwen, COMPARED_TOKENS, (TEXT,)),
        "rows_hot": lambda: row_table.hot_table(evidence.production),
        "rows_place": lambda: row_table.place_table(evidence.production),
        "rows_copies": lambda: row_table.copies_table(evidence.production),
        "rows_whole_model": lambda: row_table.whole_model_table(evidence.production_and_qwen),
        "rows_baselines": lambda: row_table.baseline_table(evidence.production_and_qwen, STEP),
        "rows_complete": lambda: row_table.complete_table(evidence.production, STEP),
        "rows_steady": lambda: row_table.steady_table(evidence.production, STEP),
    }
    for name in SWEEPS:
        found[f"sweep_{name}"] = partial(_sweep_report, evidence, name)
    return {name: partial(_fenced, table) for name, table in found.items()}


def _sweep_report(evidence: Evidence, name: str) -> str:
    return sweep_table.report(evidence.sweeps, name)


def _fenced(table: Callable[[], str]) -> str:
    return f"```text\n{table()}\n```"


def values(evidence: Evidence) -> dict[str, Callable[[], str]]:
    """Single values of the finding's sentences, by name."""
    found = _toy_values(evidence) | _sweep_values(evidence) | _row_values(evidence) | _model_values(evidence)
    deep, shallow = (published.figure(f"question.depth_{tier}") for tier in ("offloaded", "resident"))
    found["bytedmd.tiers"] = partial(_say, "{:.1f}", lambda: (deep / shallow) ** 0.5)
    found["step"] = partial(_say, "{}", lambda: STEP)
    return found


def _say(pattern: str, function: Callable[..., Any], *arguments: Any) -> str:
    return pattern.format(function(*arguments))


def _toy_values(e: Evidence) -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {}
    for model, boundary, variant in product(TOYS, BOUNDARIES, VARIANTS[1:]):
        key = f"toy.{model}.{boundary}.{variant.removeprefix('offload_')}"
        found[key] = partial(_say, "{:.3g}", e.ratio, model, boundary, variant)
    for boundary in BOUNDARIES:
        arguments = ("engram", boundary, "offload_prefetch", "bytedmd_toy_v41")
        found[f"toy_v41.{boundary}"] = partial(_say, "{:.3g}", e.ratio, *arguments)
    for name in ("seq_len", "d_model", "padding", "repeats"):
        found[f"toy.{name}"] = partial(_say, "{:,}", lambda name: e.toy["configuration"][name], name)
    found["toy.machine"] = partial(_say, "{0[cpu]}, {0[cpu_count]} cores", lambda: e.toy["environment"])
    found["toy.hot_share"] = partial(_say, "{:g}", lambda: 100 * e.toy["configuration"]["hot_share"])
    for model, count in product(TOYS, ("lookups", "distinct_rows")):
        found[f"toy.{model}.{count}"] = partial(_say, "{:,}", lambda m, c: e.toy["models"][m][c], model, count)
    return found


def _sweep_values(e: Evidence) -> dict[str, Callable[[], str]]:
    points = {
        "padding.none": ("padding", 0), "padding.most": ("padding", 10**7),
        "tokens.least": ("tokens", 16), "tokens.most": ("tokens", 256),
        "reuse.uniform": ("reuse", "uniform"), "reuse.zipf": ("reuse", "zipf"), "reuse.text": ("reuse", "text"),
        "reuse.stdlib": ("reuse", "python-stdlib"),
        "wrong.none": ("wrong", 0.0), "wrong.half": ("wrong", 0.5),
        "definition.two-stack": ("definition", "two-stack"),
        "seed.1": ("seed", 1), "seed.2": ("seed", 2),
        "share.least": ("share", 0.01), "share.tenth": ("share", 0.1),
    }  # fmt: skip
    found: dict[str, Callable[[], str]] = {}
    for key, (sweep, value) in points.items():
        arguments = (sweep, value, "engram", "lookup", "offload_prefetch")
        found[f"sweep.{key}"] = partial(_say, "{:.3g}", e.swept, *arguments)
    two_stack = partial(e.swept, "definition", "two-stack", "engram", "lookup", "offload_prefetch")
    found["class.definition.two-stack"] = lambda: classify(two_stack(), None).label
    for key, share in (("all", 1.0), ("tenth", 0.1)):
        found[f"sweep.hot.{key}"] = partial(_say, "{:.3g}", e.swept, "hot", share, "engram", "lookup", "offload_hot")
    for boundary in ("layer", "block"):
        arguments = ("padding", 10**7, "engram", boundary, "offload_prefetch")
        found[f"sweep.padding.{boundary}.most"] = partial(_say, "{:.3g}", e.swept, *arguments)
    found["sweep.points"] = partial(_say, "{:,}", lambda: len(e.sweeps["points"]))
    found["sweep.cheaper_copies"] = partial(_say, "{}", e.cheaper_copies)
    for level in sweep_table.LEVELS:
        found[f"cross.padding.{level:g}"] = partial(_say, "{:,.0f}", _crossing, e, "padding", level)
    return found


def _crossing(e: Evidence, sweep: str, level: float) -> float:
    """Where the prefetched lookups of the toy's Engram cross a level, to two digits."""
    numbers = e.sweeps["sweeps"][sweep]["values"]
    found = sweep_table.crossings(numbers, ratios(e.sweeps, sweep, "engram", "lookup", "offload_prefetch"), level)
    if len(found) != 1 or found[0].at is None:
        raise ValueError(f"the sweep {sweep} crosses {level} {len(found)} times: the finding speaks of one place")
    return float(f"{found[0].at:.2g}")


def _row_values(e: Evidence) -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {
        "rows.tokens": partial(_say, "{:,}", lambda: e.longest("v41-flash")["tokens"]),
        "rows.reads": partial(_say, "{:,.0f}", lambda: e.longest("v41-flash")["reads"] / 1e6),
        "rows.tier_filled": lambda: percent(_filled(e.tier("v41-flash", 0.1))),
        "rows.tier_reads": lambda: percent(_served(e.tier("v41-flash", 0.1))),
        "rows.small_tier_reads": lambda: percent(_served(e.tier("v41-flash", 0.01))),
        "rows.compared": partial(_say, "{:,}", lambda: COMPARED_TOKENS),
        "rows.by_value": partial(_say, "{:.4f}", lambda: 100 * _by_value(e.longest("v41-flash", "compacted"))),
    }
    for table in TABLES:
        for stream, key in ((TEXT, "reuse"), ("uniform", "reuse.uniform"), ("zipf", "reuse.zipf")):
            found[f"rows.{table}.{key}"] = partial(_percent, lambda *a: reuse(e.compared(*a)), table, stream)
    for table, layout in product(TABLES, LAYOUTS):
        key = f"rows.{table}.{layout.split()[0]}"
        for stream, end in ((TEXT, ""), ("uniform", ".uniform")):
            byte = partial(_say, "{:,.0f}", lambda *a: per_byte(e.compared(*a)), table, stream, layout)
            found[f"{key}.byte{end}"] = byte
        found[f"{key}.first"] = partial(_percent, lambda *a: _first(e.longest(*a)), table, layout)
        for share in (0.001, 0.01, 0.1):
            found[f"{key}.saved.{share:g}"] = partial(_percent, e.saved, table, share, layout)
        for exponent in (6, 9, 10, 11, 12):
            found[f"{key}.below.1e{exponent}"] = partial(_say, "{:.3g}", e.placed, table, layout, 10**exponent)
    return found


def _percent(function: Callable[..., float], *arguments: Any) -> str:
    return percent(function(*arguments))


def _model_values(e: Evidence) -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {}
    for name, (model, experts) in ANSWERED.items():
        key = f"model.{name}"
        for stream, end in ((TEXT, ""), ("uniform", ".random")):
            found[f"{key}{end}"] = partial(_hundredths, e.step, model, experts, stream)
            for mode in ("decode", "prefill"):
                found[f"{key}.{mode}.crossing{end}"] = partial(e.crossing, model, experts, stream, mode)
        for part in ("copied", "own weights", "buried", "in all"):
            found[f"{key}.{part.replace(' ', '_')}"] = partial(_hundredths, e.added, model, part, experts)
        found[f"{key}.more"] = partial(_more, e, model, experts)
        for layout in LAYOUTS:
            for place, (what, digits) in enumerate((("lookup", "{:.3g}"), ("model", "{:.5f}"))):
                arguments = (e, model, experts, layout, place)
                found[f"{key}.{what}.{layout.split()[0]}"] = partial(_say, digits, _against_pinned, *arguments)
                found[f"{key}.{what}.{layout.split()[0]}.class"] = partial(_class_against_pinned, *arguments)
    for model, context in product(("dense-4b", "dense-8b"), CONTEXTS[1:]):
        found[f"model.{model}.context.{context}"] = partial(_cached, e, model, context)
    found["least_steps"] = partial(_say, "{}", e.least_steps)
    found["context.short"] = partial(_say, "{:,}", lambda: CONTEXTS[1])
    for kind in ("prefetch_stands", "prefetch_one_use"):
        found[f"copies.{kind}.least"] = partial(_say, "{:+.1f}", lambda k: 100 * min(e.copies(k)), kind)
        found[f"copies.{kind}.most"] = partial(_say, "{:+.1f}", lambda k: 100 * max(e.copies(k)), kind)
    return found


def _hundredths(function: Callable[..., float], *arguments: Any) -> str:
    """A share in per cent to two digits, without the sign."""
    return f"{100 * function(*arguments):.2g}"


def _against_pinned(e: Evidence, model: str, experts: str, layout: str, place: int) -> float:
    return e.pinned(model, experts, layout)[place]


def _class_against_pinned(*arguments: Any) -> str:
    return classify(_against_pinned(*arguments), None).label


def _cached(e: Evidence, model: str, context: int) -> str:
    """What Engram adds to a step that reads keys and values of so many tokens for each sequence, in per cent."""
    return f"{100 * row_table.additions(e.model_step(model, context=context))['in all']:.2g}"


def _first(record: dict[str, Any]) -> float:
    """Share of the price that first reads of rows make."""
    return sum(record["price_by_depth"]["first"].values()) / record["price"]


def _by_value(record: dict[str, Any]) -> float:
    """By how much reading value by value is dearer than reading rows, as a share."""
    return record["price_by_value"] / record["price"] - 1


def _filled(record: dict[str, Any]) -> float:
    return record["tier_rows_filled"] / record["tier_rows"]


def _served(record: dict[str, Any]) -> float:
    return record["reads_of_tier"] / record["reads"]


def _more(e: Evidence, model: str, experts: str) -> str:
    return rounded_up(100 * e.prefetched_share(model, experts))
