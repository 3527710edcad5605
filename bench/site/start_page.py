"""What the start page says of the verdict: one sentence, one figure, and three lines, in per cent throughout.

All figures come from committed results; classes from the pure verdict function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.evidence.committed import Evidence, rounded_up
from bench.evidence.ranges import energy_span, layer_classes, lookup_floors, lookup_span, text_spread
from bench.instruments.claim import LOSS_ABOVE, STRONG_BELOW, WALL_TIME_CLAIM, WIN_UP_TO, classify
from bench.price.table import verdict
from bench.rows.cases import LAYOUTS
from bench.rows.table import claim_weights
from bench.rows.whole_model import MODELS, STEP

_MODEL = "dense-4b"  # the smaller of the paper's two
_PREFETCH = "offload_prefetch"
_FULL_WIDTH = 40.0  # the ratio at the right edge of the figure; 1 is the left edge, and the scale is logarithmic


def verdict_sentence(evidence: Evidence) -> str:
    """The verdict in one sentence.

    Raises:
        ValueError: the padding of the sweep does not decide at the toy's layer and block, which the sentence says.
    """
    paddings = evidence.sweeps["sweeps"]["padding"]["values"]
    for boundary in ("layer", "block"):
        swept = [evidence.swept("padding", padding, "engram", boundary, _PREFETCH) for padding in paddings]
        if not min(swept) < 1 + WALL_TIME_CLAIM < max(swept):
            raise ValueError(f"no padding decides at the toy's {boundary}: mend the sentences that say so")
    more = rounded_up(100 * evidence.prefetched_share(_MODEL))
    return (
        f"**By the paper's {100 * WALL_TIME_CLAIM:g} % the claim survives at the model and not at the lookup; at the "
        "toy's layer and block the padding decides, which we chose**: in ByteDMD's price, an offloaded and prefetched "
        f"table makes a step of {MODELS[_MODEL].name} with {STEP} tokens of Python sources less than **{more} %** "
        "dearer than a resident one, even if resident rows were free. The classes below go by thresholds that came "
        "with the question, far above that."
    )


def verdict_figure(evidence: Evidence) -> str:
    """The price ratio of the prefetched table at every boundary, as bars with their class."""
    names = {"lookup": "the toy's lookup alone", "layer": "the layer around it", "block": "its decoder block"}
    rows = [
        (text, evidence.ratio("engram", boundary, _PREFETCH), verdict(evidence.toy, "engram", boundary).label)
        for boundary, text in names.items()
    ]
    whole = max(evidence.pinned(_MODEL, layout=layout)[1] for layout in LAYOUTS)
    rows.append((f"{MODELS[_MODEL].name}, {STEP} tokens", whole, classify(whole, None).label))
    return bars("What the offloaded, prefetched table adds to the price of a resident one (logarithmic)", rows)


def bars(caption: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A figure in HTML, in the page's own colours and as wide as the screen: (what, ratio, class) per row."""
    places = {added(at): _place(at) for at in (STRONG_BELOW, WIN_UP_TO, LOSS_ABOVE)}
    lines = "".join(f'<i style="left:{place}"></i>' for place in places.values())
    drawn = "".join(
        f'<div class="bar"><span class="what">{what}</span>'
        f'<span class="track"><span class="fill {label.lower()}" style="width:{_place(ratio)}"></span>{lines}</span>'
        f'<span class="value">{added(ratio)} <strong class="badge {label.lower()}">{label}</strong></span></div>'
        for what, ratio, label in rows
    )
    scale = "".join(f'<b style="left:{place}">{at}</b>' for at, place in {"0 %": "0%", **places}.items())
    axis = f'<div class="bar axis" aria-hidden="true"><span class="track">{scale}</span></div>'
    return f'<figure class="bars"><figcaption>{caption}</figcaption>{drawn}{axis}</figure>'


def added(ratio: float) -> str:
    """What a ratio adds, in per cent to two digits, or whole where there are more."""
    share = 100 * (ratio - 1)
    return f"+{share:,.0f} %" if share >= 100 else f"+{share:.2g} %"


def _place(ratio: float) -> str:
    share = math.log(max(ratio, 1)) / math.log(_FULL_WIDTH)
    return f"{100 * min(share, 1):.1f}%"


def verdict_lines(evidence: Evidence) -> str:
    """What survives, what does not, and where it turns: three lines, all in per cent, no number twice."""
    e, name = evidence, MODELS[_MODEL].name
    least, most = lookup_span(e)
    # Without the plus.
    floors, of_v41 = (" to ".join(added(floor)[1:] for floor in lookup_floors(e, form)) for form in ("engram", "v41"))
    most_placed = added(max(e.pinned(_MODEL, layout=layout)[0] for layout in LAYOUTS))[1:]
    claim = f"{100 * WALL_TIME_CLAIM:g} %"
    added_in_all, one = (e.added(*which) for which in ((_MODEL, "in all"), ("v41-flash", "in all", "one")))
    weights = f"{claim_weights(e.model_step('v41-flash', 'one')) / 1e9:.2g}"
    lines = {
        "What survives": (
            f"the claim about the model. All of Engram makes that step at most {100 * added_in_all:.2g} % dearer than "
            f"none. Its rows, not copied, reach {claim} at {e.crossing(_MODEL)} "
            f"tokens a step from a cold start (of random ids at {e.in_proportion(_MODEL)}, in proportion); on other "
            f"texts they are {text_spread(e)} % of the weights. The layer is a {layer_classes(e)} under every "
            "definition."
        ),
        "What does not": (
            f"the claim about the lookup. Offloading makes the toy's {added(least)[1:]} to {added(most)[1:]} dearer, "
            f"by padding and the rows' fate; {name}'s at that step up to {most_placed}. Foresight spares no first "
            f"read: the bound under every memory manager is {floors} higher offloaded (V4.1's form: {of_v41})."
        ),
        "Where it turns": (
            f"if all tokens choose the same experts, Engram makes V4.1-Flash's step at most {added(1 + one)[1:]} "
            f"dearer; under {claim} if it reads over {weights} GB of weights: open. As *energy*, by published "
            f"figures, {name}'s rows reach {claim} of what reading its weights from HBM takes (a small part of the "
            f"board's) at {energy_span(e, 'NVMe SSD, random rows')} tokens a step from random rows of an SSD, "
            f"{energy_span(e, 'host DDR over PCIe')} from host DDR."
        ),
    }
    return "\n".join(f"- **{title}**: {text}" for title, text in lines.items())
