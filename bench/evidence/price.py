"""What the price says, from the committed results: the tables, sentences and values of the findings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product

from bench.evidence import published
from bench.evidence.committed import COMPARED_TOKENS, Evidence, rounded_up
from bench.instruments.claim import LEVELS, WALL_TIME_CLAIM, classify
from bench.instruments.words import aligned
from bench.price.table import find_run, verdict
from bench.rows import table as row_table
from bench.rows.cases import LAYOUTS
from bench.rows.table import TEXT, per_byte, percent, reuse
from bench.rows.whole_model import CONTEXTS, MODELS, STEP, shown
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
    """Every boundary with its price ratio and its class."""
    rows = [["boundary", "model", "against", "price ratio", "class"]]
    for model in TOYS:
        for boundary in BOUNDARIES:
            ratio = evidence.ratio(model, boundary, "offload_prefetch")
            label = verdict(evidence.toy, model, boundary).label
            if boundary == "lookup":  # its class is a choice: of the padding, and of how it ends
                label = named_class(evidence["lookup_range"], model)
            rows.append([boundary, f"toy, {model}", "resident", f"{ratio:.3f}", label])
    for model, experts in ANSWERED.values():
        rows += _published_size(evidence, shown(model, experts), model, experts)
    note = (
        "pinned: a table that stays above the weights at every step, held live .. compacted; none: no Engram at all\n"
        "copied: a step ahead, as all of a published model's rows are but where it says otherwise"
    )
    return f"{aligned(rows, left={0, 1, 2, 4})}\n\n{note}"


def _published_size(e: Evidence, name: str, model: str, experts: str) -> list[list[str]]:
    """A table of published size beside a model: against one that stays resident, and against no Engram."""
    lookups, wholes = zip(*(e.pinned(model, experts, layout) for layout in LAYOUTS))
    uncopied = [e.uncopied(model, experts, layout) for layout in LAYOUTS]
    found = []
    for boundary, ratios_of, digits in (
        ("its lookups, not copied", uncopied, ".3g"),
        ("its lookups, copied", lookups, ".3g"),
        ("whole model", wholes, ".5f"),
    ):
        labels = dict.fromkeys(classify(ratio, None).label for ratio in ratios_of)
        spread = " .. ".join(f"{ratio:{digits}}" for ratio in ratios_of)
        found.append([boundary, name, "pinned", spread, ", ".join(labels)])
    more = max(e.added(model, "in all", experts, layout) for layout in LAYOUTS)
    # An upper bound shows that the claim holds, and never that it fails.
    claim = f"under {100 * WALL_TIME_CLAIM:g} %" if more < WALL_TIME_CLAIM else "not decided"
    return [*found, ["whole model", name, "none", f"at most +{percent(more)}", claim]]


def layouts(evidence: Evidence, variants: tuple[str, ...] = VARIANTS) -> str:
    """Variants of the toy at every boundary: price, price per token, ratio, wall time, class."""
    rows = [["model", "boundary", "variant", "price", "per token", "ratio", "wall time, ms", "class"]]
    for model in TOYS:
        for boundary in BOUNDARIES:
            for variant in variants:
                run = find_run(evidence.toy, model, boundary, variant)
                median = 1000 * statistics.median(run["wall_time_s"])
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
        "rows_by_step": lambda: row_table.by_step_table(evidence.production, (1, 64, STEP, 16_384), STEP),
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
        found[f"sweep_{name}"] = lambda name=name: sweep_table.report(evidence.sweeps, name)  # type: ignore[misc]
    return found


def values(evidence: Evidence) -> dict[str, str]:
    """Single values of the finding's sentences, by name."""
    deep, shallow = (published.figure(f"question.depth_{tier}") for tier in ("offloaded", "resident"))
    known = {"bytedmd.tiers": f"{(deep / shallow) ** 0.5:.1f}", "step": f"{STEP}"}
    return known | _toy_values(evidence) | _sweep_values(evidence) | _row_values(evidence) | _model_values(evidence)


def _toy_values(e: Evidence) -> dict[str, str]:
    asked = e.toy["configuration"]
    found = {
        **{f"toy.{name}": f"{asked[name]:,}" for name in ("seq_len", "d_model", "padding")},
        "toy.machine": "{0[cpu]}, {0[cpu_count]} cores".format(e.toy["environment"]),
        "toy.hot_share": f"{100 * asked['hot_share']:g}",
    }
    for model, boundary, variant in product(TOYS, BOUNDARIES, VARIANTS[1:]):
        key = f"toy.{model}.{boundary}.{variant.removeprefix('offload_')}"
        ratio = e.ratio(model, boundary, variant)
        found[key], found[f"{key}.more"] = f"{ratio:.3g}", f"{100 * (ratio - 1):.2g}"
    for model, count in product(TOYS, ("lookups", "distinct_rows")):
        found[f"toy.{model}.{count}"] = f"{e.toy['models'][model][count]:,}"
    return found


def _sweep_values(e: Evidence) -> dict[str, str]:
    points = {
        "padding.none": ("padding", 0), "padding.most": ("padding", 10**7),
        "tokens.least": ("tokens", 16), "tokens.most": ("tokens", 256),
        "reuse.uniform": ("reuse", "uniform"), "reuse.zipf": ("reuse", "zipf"), "reuse.text": ("reuse", "text"),
        "reuse.stdlib": ("reuse", "python-stdlib"),
        "wrong.none": ("wrong", 0.0), "wrong.half": ("wrong", 0.5),
    }  # fmt: skip
    found = {
        f"sweep.{key}": f"{e.swept(*point, 'engram', 'lookup', 'offload_prefetch'):.3g}"
        for key, point in points.items()
    }
    found["sweep.hot.tenth"] = f"{e.swept('hot', 0.1, 'engram', 'lookup', 'offload_hot'):.3g}"
    for boundary in ("layer", "block"):
        ratio = e.swept("padding", 10**7, "engram", boundary, "offload_prefetch")
        found[f"sweep.padding.{boundary}.most"] = f"{ratio:.3g}"
    for boundary, at, padding in (("layer", "less", 10**5), ("block", "most", 10**7)):
        ratio = e.swept("padding", padding, "engram", boundary, "offload_prefetch")
        found[f"sweep.padding.{boundary}.{at}.more"] = f"{100 * (ratio - 1):.2g}"
    found["sweep.points"] = f"{len(e.sweeps['points']):,}"
    found["sweep.cheaper_copies"] = f"{e.cheaper_copies()}"
    for level in LEVELS:
        found[f"cross.padding.{level:g}"] = f"{_crossing(e, 'padding', level):,.0f}"
    return found


def _crossing(e: Evidence, sweep: str, level: float) -> float:
    """Where the prefetched lookups of the toy's Engram cross a level, to two digits."""
    numbers = e.sweeps["sweeps"][sweep]["values"]
    found = sweep_table.crossings(numbers, ratios(e.sweeps, sweep, "engram", "lookup", "offload_prefetch"), level)
    if len(found) != 1 or found[0].at is None:
        raise ValueError(f"the sweep {sweep} crosses {level} {len(found)} times: the finding speaks of one place")
    return float(f"{found[0].at:.2g}")


def _row_values(e: Evidence) -> dict[str, str]:
    longest, tier, small_tier = e.longest("v41-flash"), e.tier("v41-flash", 0.1), e.tier("v41-flash", 0.01)
    by_value = e.longest("v41-flash", "compacted")  # reading value by value is dearer than reading rows
    found = {
        "rows.tokens": f"{longest['tokens']:,}",
        "rows.reads": f"{longest['reads'] / 1e6:,.0f}",
        "rows.tier_filled": percent(tier["tier_rows_filled"] / tier["tier_rows"]),
        "rows.tier_reads": percent(tier["reads_of_tier"] / tier["reads"]),
        "rows.small_tier_reads": percent(small_tier["reads_of_tier"] / small_tier["reads"]),
        "rows.compared": f"{COMPARED_TOKENS:,}",
        "rows.by_value": f"{100 * (by_value['price_by_value'] / by_value['price'] - 1):.4f}",
    }
    for stream, end in ((TEXT, ""), ("uniform", ".uniform"), ("zipf", ".zipf")):
        found[f"rows.v41-flash.reuse{end}"] = percent(reuse(e.compared("v41-flash", stream)))
    for stream, end in ((TEXT, ""), ("uniform", ".uniform")):
        found[f"rows.v41-flash.held.byte{end}"] = f"{per_byte(e.compared('v41-flash', stream)):,.0f}"
    for layout in LAYOUTS:
        key = f"rows.v41-flash.{layout.split()[0]}"
        for share in (0.01, 0.1):
            found[f"{key}.saved.{share:g}"] = percent(e.saved("v41-flash", share, layout))
        found[f"{key}.below.1e10"] = f"{e.placed('v41-flash', layout, 10**10):.3g}"
    return found


def _model_values(e: Evidence) -> dict[str, str]:
    found: dict[str, str] = {}
    dearer: list[float] = []  # per cent that copies a step ahead add to the lookups
    for name, (model, experts) in ANSWERED.items():
        key = f"model.{name}"
        for stream, end in ((TEXT, ""), ("uniform", ".random")):
            found[f"{key}{end}"] = _hundredths(e.step(model, experts, stream))
            for mode in ("decode", "prefill"):
                found[f"{key}.{mode}.crossing{end}"] = e.crossing(model, experts, stream, mode)
        for part in ("copied", "own weights", "buried", "in all"):
            found[f"{key}.{part.replace(' ', '_')}"] = _hundredths(e.added(model, part, experts))
        record = e.model_step(model, experts)
        found[f"{key}.read_gb"] = f"{record['read_bytes'] / 1e9:.3g}"
        found[f"{key}.claim_gb"] = f"{row_table.claim_weights(record) / 1e9:.2g}"
        found[f"{key}.more"] = rounded_up(100 * e.prefetched_share(model, experts))
        for layout in LAYOUTS:
            judged = (e.uncopied(model, experts, layout), *e.pinned(model, experts, layout))
            for ratio, what, digits in zip(judged, ("uncopied", "lookup", "model"), (".3g", ".3g", ".5f")):
                found[f"{key}.{what}.{layout.split()[0]}"] = f"{ratio:{digits}}"
                found[f"{key}.{what}.{layout.split()[0]}.class"] = classify(ratio, None).label
            dearer.append(100 * (e.pinned(model, experts, layout)[0] / e.uncopied(model, experts, layout) - 1))
    found["copies.step"] = f"{min(dearer):.0f} to {max(dearer):.0f}"
    flash = MODELS["v41-flash"]
    if flash.experts is None:
        raise ValueError("V4.1-Flash has experts")
    dense = flash.all_bytes - flash.experts.nbytes
    found["model.v41-flash.one.most_gb"] = f"{(dense + flash.experts.touched(1)) / 1e9:.3g}"
    for model, tokens, layout in product(("dense-4b", "dense-8b"), (1, 64, 16_384), LAYOUTS):
        ratio = e.uncopied(model, layout=layout, tokens=tokens)
        found[f"model.{model}.uncopied.{layout.split()[0]}.{tokens}"] = f"{ratio:.3g}"
        found[f"model.{model}.uncopied.{layout.split()[0]}.{tokens}.class"] = classify(ratio, None).label
    found["model.dense-8b.uncopied.compacted.later"] = f"{e.uncopied_later('dense-8b', 'compacted'):.3g}"
    found["model.dense-4b.random.in_proportion"] = e.in_proportion("dense-4b")
    short = e.model_step("dense-4b", context=CONTEXTS[1])  # a step reads keys and values of as many tokens, too
    found[f"model.dense-4b.context.{CONTEXTS[1]}"] = _hundredths(row_table.additions(short)["in all"])
    found["context.short.gb"] = f"{(short['read_bytes'] - MODELS['dense-4b'].decode_bytes) / 1e9:.0f}"
    found["model.dense-4b.second_half"] = _hundredths(e.second_half("dense-4b"))
    found["least_steps"] = f"{e.least_steps()}"
    found["context.short"] = f"{CONTEXTS[1]:,}"
    for kind in ("prefetch_stands", "prefetch_one_use"):
        for end, of in (("least", min), ("most", max)):
            found[f"copies.{kind}.{end}"] = f"{100 * of(e.copies(kind)):+.1f}"
    return found


def _hundredths(share: float) -> str:
    """A share in per cent to two digits, without the sign."""
    return f"{100 * share:.2g}"
