"""What the start page says of the verdict: one sentence, and what survives, what does not, and why.

All figures come from the results of `bench/bytedmd_toy.py`; classes from the pure verdict function.
"""

from __future__ import annotations

from typing import Any

from bench.harness.table import find_run, verdict


def price_ratio(results: dict[str, Any], boundary: str, variant: str = "offload_prefetch") -> float:
    """Price of a variant of Engram at one boundary, divided by that of the resident table."""
    run, resident = (find_run(results, "engram", boundary, name) for name in (variant, "resident"))
    return run["cost"] / resident["cost"]


def verdict_sentence(results: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    lookup, layer, block = (price_ratio(results, name) for name in ("lookup", "layer", "block"))
    return (
        f"Priced by ByteDMD, looking rows up in an offloaded table costs **{lookup:.1f} times** as much as in a resident "
        f"one, and prefetching does not make it cheaper; as part of the layer that uses them it costs "
        f"**{layer:.2f} times** as much, and as part of the decoder block **{block:.2f} times**."
    )


def verdict_cards(results: dict[str, Any]) -> str:
    """What survives, what does not, and why: three short cards, each resting on the same results."""
    lookup, layer, block = (price_ratio(results, name) for name in ("lookup", "layer", "block"))
    labels = {name: verdict(results, "engram", name).label for name in ("lookup", "layer", "block")}
    naive, hot = (price_ratio(results, "lookup", f"offload_{name}") for name in ("naive", "hot"))
    cards = {
        "What survives": (
            f"The claim at the scale of the model: {100 * (layer - 1):.1f} % more data movement in the layer "
            f"({labels['layer']}), {100 * (block - 1):.1f} % in the block ({labels['block']}). The reads of weights and "
            "activations that both placements share outweigh the rows."
        ),
        "What does not": (
            f"The claim for the lookup itself: {lookup:.1f} times the price ({labels['lookup']}). Prefetching hides the "
            f"wait, and costs more than fetching late: {naive:.1f} times without it."
        ),
        "Why": (
            "A row far down the stack is dear the first time it is read, whenever that happens. A copy made early is one "
            f"read more. Only rows that start near the top are cheaper: with the hottest of them there, {hot:.1f} times."
        ),
    }
    return "\n\n".join(_card(title, text) for title, text in cards.items())


def _card(title: str, text: str) -> str:
    return f'<div class="card" markdown>\n**{title}**\n\n{text}\n</div>'
