"""What the start page says of the verdict: one sentence, one figure, and what survives, what does not, and why.

All figures come from committed results; classes from the pure verdict function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.evidence.committed import STEP, Evidence, rounded_up
from bench.instruments.claim import LOSS_ABOVE, STRONG_BELOW, WALL_TIME_CLAIM, WIN_UP_TO, classify
from bench.price.table import verdict
from bench.rows.whole_model import MODELS

_MODEL = "dense-4b"  # the smaller of the paper's two
_PREFETCH = "offload_prefetch"
_FULL_WIDTH = 40.0  # the ratio at the right edge of the figure; 1 is the left edge, and the scale is logarithmic


def verdict_sentence(evidence: Evidence) -> str:
    """The verdict in one sentence."""
    lookup, block = (evidence.ratio("engram", name, _PREFETCH) for name in ("lookup", "block"))
    more = rounded_up(100 * evidence.prefetched_share(_MODEL))
    return (
        "**The claim survives at the model and not at the lookup**: priced by ByteDMD, rows from an offloaded and "
        f"prefetched table cost **{lookup:.1f} times** as much as from a resident one when nothing else is counted, "
        f"**{block:.2f} times** within a decoder block, and less than **{more} %** more within a step of "
        f"{MODELS[_MODEL].name} with {STEP} tokens, even if resident rows were free; copies made ahead saved nothing on "
        "any text that was priced."
    )


def verdict_figure(evidence: Evidence) -> str:
    """The price ratio of the prefetched table at every boundary, as bars with their class."""
    names = {"lookup": "the lookup alone", "layer": "the layer around it", "block": "the decoder block"}
    rows = [
        (text, evidence.ratio("engram", boundary, _PREFETCH), verdict(evidence.toy, "engram", boundary).label)
        for boundary, text in names.items()
    ]
    whole = 1 + evidence.prefetched_share(_MODEL)
    rows.append(("a whole model", whole, classify(whole, None).label))
    return bars("Price of the offloaded, prefetched table, divided by that of the resident table (logarithmic)", rows)


def bars(caption: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A figure in HTML, in the page's own colours and as wide as the screen: (what, ratio, class) per row."""
    places = {f"{at:g}×": _place(at) for at in (STRONG_BELOW, WIN_UP_TO, LOSS_ABOVE)}
    lines = "".join(f'<i style="left:{place}"></i>' for place in places.values())
    drawn = "".join(
        f'<div class="bar"><span class="what">{what}</span>'
        f'<span class="track"><span class="fill {label.lower()}" style="width:{_place(ratio)}"></span>{lines}</span>'
        f'<span class="value">{_shown(ratio)}× <strong class="badge {label.lower()}">{label}</strong></span></div>'
        for what, ratio, label in rows
    )
    scale = "".join(f'<b style="left:{place}">{at}</b>' for at, place in {"1×": "0%", **places}.items())
    axis = f'<div class="bar axis" aria-hidden="true"><span class="track">{scale}</span></div>'
    return f'<figure class="bars"><figcaption>{caption}</figcaption>{drawn}{axis}</figure>'


def _shown(ratio: float) -> str:
    """Three digits, or as many as tell the ratio from one."""
    return f"{ratio:.3g}" if ratio >= 1.01 else f"{ratio:.4f}"


def _place(ratio: float) -> str:
    share = math.log(max(ratio, 1)) / math.log(_FULL_WIDTH)
    return f"{100 * min(share, 1):.1f}%"


def verdict_cards(evidence: Evidence) -> str:
    """What survives, what does not, and why: three short cards, each resting on the same results."""
    lookup, layer, block = (evidence.ratio("engram", name, _PREFETCH) for name in ("lookup", "layer", "block"))
    labels = {name: verdict(evidence.toy, "engram", name).label for name in ("lookup", "layer", "block")}
    naive, hot = (evidence.ratio("engram", "lookup", f"offload_{name}") for name in ("naive", "hot"))
    cards = {
        "What survives": (
            f"The claim about the model. {100 * (layer - 1):.1f} % more data movement in the layer "
            f"({labels['layer']}), {100 * (block - 1):.1f} % in the block ({labels['block']}). With the paper's table "
            f"beside {MODELS[_MODEL].name}, all rows of a step cost {100 * evidence.step(_MODEL):.2g} % of what its "
            f"weights cost at {STEP} tokens a decode step, and reach {100 * WALL_TIME_CLAIM:g} % at "
            f"{evidence.crossing(_MODEL)} tokens."
        ),
        "What does not": (
            f"The claim about the lookup: {lookup:.1f} times the price ({labels['lookup']}), a number that the depth "
            f"chosen for the slow tier decides. Nor prefetching as an economy: it hides the wait, and {naive:.1f} "
            f"times without it become {lookup:.1f} with it; a copy for a single use can save something, and did not here."
        ),
        "Why": (
            "A row far down the stack is dear the first time it is read, whenever that happens; a copy made early is "
            f"one read more. Only rows that start near the top are cheaper ({hot:.1f} times with the hottest there). "
            "What place costs follows from the bytes above a table against its own: below less than its own size hardly "
            "anything, below much more a great deal. And a model reads so much else that neither shows."
        ),
    }
    return "\n\n".join(_card(title, text) for title, text in cards.items())


def _card(title: str, text: str) -> str:
    return f'<div class="card" markdown>\n**{title}**\n\n{text}\n</div>'
