"""Made-up data of the right shape for the interactive pages: every class occurs, and no two points are alike."""

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
    below = [[share * (1 - hot) for hot in AXES["hot"]] for share in AXES["share"]]
    stream = {"name": "made up", "sha256": "0" * 64, "tokens": 1000, "start": 0}
    return {"axes": AXES, "prices": prices, "share_below": below, "stream": stream, "configuration": {"seq_len": 32}}


def production() -> dict[str, Any]:
    """The records of `bench/production.py` that the second panel draws: the more tokens, the dearer the rows."""
    records = [
        {
            "part": "whole_model", "table": table, "experts": "", "context": 0, "asked_tokens": 9, "row_bytes": 160,
            "mode": mode, "stream": stream, "layout": layout,
            "tokens_per_step": tokens, "steps": 4, "table_rows": rows, "weights_step_price": 10**12,
            "offload_naive": 4 * tokens * cost // (2 if layout == "compacted" else 1),
        }
        for table, rows, cost in (("dense-4b", 1_250_000_000, 10**6), ("v41-flash", 768_022_850, 10**4))
        for mode in ("decode", "prefill")
        for stream in ("text", "uniform")
        for layout in ("held live", "compacted")
        for tokens in (1, 1000, 100_000)
    ]  # fmt: skip
    return {"records": [*records, {"part": "hot"}]}
