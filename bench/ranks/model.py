"""The exchange of one step on paper, for every link, phase and number of ranks, and the window before a block.

    model_table()       # seconds until the first layer's rows are there, and the window in which they would hide

Formula and figures of links are those of `engram_ref.sharding.on_paper`, as in `engram-place`; bytes are held against
real runs.
"""

from __future__ import annotations

from typing import Any

from bench.instruments.claim import PUBLISHED_WINDOW_S
from engram_ref.config import EngramConfig
from engram_ref.place.formulas import block_seconds
from engram_ref.rows.format import RowFormat
from engram_ref.sharding.on_paper import LINKS, Received, exchange_bytes, exchange_seconds

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # as far as the link's group reaches
# Compute before the second block of a prefill: a block of a 4B-class decoder, at half of an H100's dense bfloat16 rate.
BLOCK_PARAMETERS = 101e6
FLOPS = 0.5 * 989e12
PHASES = {"decode": (1, 8, 64, 512), "prefill": (1024, 4096)}  # tokens a rank and step


def layer_bytes(tokens: int, ranks: int, config: EngramConfig) -> Received:
    """What a rank receives in the fetch of one layer."""
    # Layers are exchanged one behind the other: the window before the first must hide that one's exchange alone.
    return exchange_bytes(tokens * config.columns, ranks, RowFormat.of(config).row_bytes)


def window_seconds(phase: str, tokens: int) -> float:
    """Compute before the second block."""
    return PUBLISHED_WINDOW_S if phase == "decode" else block_seconds(BLOCK_PARAMETERS, tokens, FLOPS)


def model_table() -> list[dict[str, Any]]:
    """The exchange of every link, phase, number of tokens and of ranks, as entries of a results file."""
    config = EngramConfig.preset("v41-flash")
    layers = len(config.layer_ids)
    found: list[dict[str, Any]] = []
    for link in LINKS.values():
        for phase, counts in PHASES.items():
            for tokens in counts:
                for ranks in (ranks for ranks in RANKS if ranks <= link.most_ranks):
                    # Bytes are shown of all layers, as real runs count them; seconds are the first layer's alone.
                    received = layer_bytes(tokens, ranks, config)
                    found.append(
                        {
                            "link": link.name,
                            "phase": phase,
                            "tokens": tokens,
                            "ranks": ranks,
                            "ids_bytes": layers * received.ids,
                            "rows_bytes": layers * received.rows,
                            "seconds": exchange_seconds(link, ranks, received),
                            "window_s": window_seconds(phase, tokens),
                        }
                    )
    return found
