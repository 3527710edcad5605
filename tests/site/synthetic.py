"""Made-up data of the right shape for the interactive pages: every class occurs, and no two points are alike."""

from __future__ import annotations

from typing import Any

AXES = {
    "padding": [0, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000],
    "share": [0.01, 0.03, 0.1, 0.3, 1],
    "hot": [0, 0.01, 0.03, 0.1, 0.3, 1],
    "compute": [0, 4, 8, 16, 32, 64],
}


def _price(padding: int, share: float, hot: float, compute: int, extra: float) -> int:
    shared = 600_000 + 40_000 * compute**2
    deep = 16_000 * share * (1 - hot) * (padding**0.5) * extra
    return round(shared + deep + 1000 * (1 + share) * extra * (padding > 0))


def grid() -> dict[str, Any]:
    """A grid as `bench/bytedmd_toy.py --sweep` writes it."""
    extras = {"resident": 0.0, "offload_naive": 1.0, "offload_prefetch": 1.07}
    prices = {
        name: [
            [[[_price(m, p, h, c, extra) for c in AXES["compute"]] for h in AXES["hot"]] for p in AXES["share"]]
            for m in AXES["padding"]
        ]
        for name, extra in extras.items()
    }
    return {"axes": AXES, "prices": prices}


def whole_model() -> dict[str, Any]:
    """The part of the production results that the second panel draws."""
    tokens = [1, 10, 100, 1000, 10_000, 100_000]
    curves = []
    for model, base, crossing in (
        ("Dense-4B", 1e-6, 30_000.0),
        ("Dense-8B", 4e-7, 75_000.0),
        ("V4.1-Flash", 2e-7, None),
    ):
        for mode in ("decode", "prefill"):
            for layout in ("held live", "compacted"):
                share = [base * n / (1 + base * n) * (0.5 if layout == "compacted" else 1) for n in tokens]
                curves.append(
                    {"model": model, "mode": mode, "table": "paper", "layout": layout, "tokens": tokens, "share": share,
                     "crossing_3_percent": crossing}
                )  # fmt: skip
    return {"whole_model": curves}
