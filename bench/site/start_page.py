"""What the start page says of the verdict: one sentence, one figure, and what survives, what does not, and why.

All figures come from the results of `bench/bytedmd_toy.py`; classes from the pure verdict function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.harness.table import find_run, verdict
from bench.harness.verdict import LOSS_ABOVE, STRONG_BELOW, WIN_UP_TO

_FULL_WIDTH = 40.0  # the ratio at the right edge of the figure; 1 is the left edge, and the scale is logarithmic


def price_ratio(results: dict[str, Any], boundary: str, variant: str = "offload_prefetch") -> float:
    """Price of a variant of Engram at one boundary, divided by that of the resident table."""
    run, resident = (find_run(results, "engram", boundary, name) for name in (variant, "resident"))
    return run["cost"] / resident["cost"]


def verdict_sentence(results: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    lookup, layer, block = (price_ratio(results, name) for name in ("lookup", "layer", "block"))
    return (
        f"Priced by ByteDMD, looking rows up in an offloaded table costs **{lookup:.1f} times** as much as in a "
        f"resident one, and prefetching does not make it cheaper; as part of the layer that uses them it costs "
        f"**{layer:.2f} times** as much, and as part of the decoder block **{block:.2f} times**."
    )


def verdict_figure(results: dict[str, Any]) -> str:
    """The price ratio of the prefetched table at every boundary, as bars with their class."""
    names = {"lookup": "the lookup alone", "layer": "the layer around it", "block": "the decoder block"}
    rows = [
        (text, price_ratio(results, boundary), verdict(results, "engram", boundary).label)
        for boundary, text in names.items()
    ]
    return bars("Price of the offloaded, prefetched table, divided by that of the resident table (logarithmic)", rows)


def bars(caption: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A figure in HTML, in the page's own colours and as wide as the screen: (what, ratio, class) per row."""
    places = {f"{at:g}×": _place(at) for at in (STRONG_BELOW, WIN_UP_TO, LOSS_ABOVE)}
    lines = "".join(f'<i style="left:{place}"></i>' for place in places.values())
    drawn = "".join(
        f'<div class="bar"><span class="what">{what}</span>'
        f'<span class="track"><span class="fill {label.lower()}" style="width:{_place(ratio)}"></span>{lines}</span>'
        f'<span class="value">{ratio:.3g}× <strong class="badge {label.lower()}">{label}</strong></span></div>'
        for what, ratio, label in rows
    )
    scale = "".join(f'<b style="left:{place}">{at}</b>' for at, place in {"1×": "0%", **places}.items())
    axis = f'<div class="bar axis" aria-hidden="true"><span class="track">{scale}</span></div>'
    return f'<figure class="bars"><figcaption>{caption}</figcaption>{drawn}{axis}</figure>'


def _place(ratio: float) -> str:
    share = math.log(max(ratio, 1)) / math.log(_FULL_WIDTH)
    return f"{100 * min(share, 1):.1f}%"


def verdict_cards(results: dict[str, Any]) -> str:
    """What survives, what does not, and why: three short cards, each resting on the same results."""
    lookup, layer, block = (price_ratio(results, name) for name in ("lookup", "layer", "block"))
    labels = {name: verdict(results, "engram", name).label for name in ("lookup", "layer", "block")}
    naive, hot = (price_ratio(results, "lookup", f"offload_{name}") for name in ("naive", "hot"))
    cards = {
        "What survives": (
            f"The claim at the scale of the model: {100 * (layer - 1):.1f} % more data movement in the layer "
            f"({labels['layer']}), {100 * (block - 1):.1f} % in the block ({labels['block']}). The reads of weights "
            "and activations that both placements share outweigh the rows."
        ),
        "What does not": (
            f"The claim for the lookup itself: {lookup:.1f} times the price ({labels['lookup']}). Prefetching hides "
            f"the wait, and costs more than fetching late: {naive:.1f} times without it."
        ),
        "Why": (
            "A row far down the stack is dear the first time it is read, whenever that happens. A copy made early is "
            "one read more. Only rows that start near the top are cheaper: with the hottest of them there, "
            f"{hot:.1f} times."
        ),
    }
    return "\n\n".join(_card(title, text) for title, text in cards.items())


def _card(title: str, text: str) -> str:
    return f'<div class="card" markdown>\n**{title}**\n\n{text}\n</div>'
