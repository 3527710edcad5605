"""The exchange of one step on paper: latency plus bytes over bandwidth, from figures that others published.

    model_table()                       # every link, phase and number of ranks: seconds, and the window before a block

A fetch is three messages behind one another: counts, row numbers, rows (notices travel beside them). Each costs what a
collective costs before the first byte, something for every other rank, and its bytes over the bandwidth of the link:

    message = base + hop + (P - 1) * per_peer + bytes / bandwidth

What an owner needs to gather rows is not in it; every other placement pays that as well. Bytes are the plan's own
(`ShardPlan.bytes_received`), which real runs are held against. Beside the figures stands where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engram_ref.config import EngramConfig
from engram_ref.rows.format import RowFormat
from engram_ref.sharding.agreement import NOTICE_BYTES
from engram_ref.sharding.exchange import COUNT_BYTES

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ID_BYTES = 4
# NCCL's own tuning table, in microseconds: base of a ring that sends whole buffers ("Simple"), and one hop of it.
BASE_S = 8.4e-6
# A small all-to-all of NCCL on 8 B300 takes 41 us (published by vLLM): what base and hop leave of it, for each peer.
PER_PEER_S = (41e-6 - 8.4e-6 - 3.4e-6) / 7
# Compute before the second block. Decode: published for layer 2 (arXiv 2603.10087). Prefill: two operations for each
# parameter in one block of a 4B-class decoder, at half of an H100's dense bfloat16 rate.
DECODE_WINDOW_S = 56e-6
BLOCK_PARAMETERS = 101e6
FLOPS = 0.5 * 989e12


@dataclass(frozen=True)
class Link:
    """A wire between two ranks.

    Attributes:
        name: for a reader.
        bytes_per_s: one way, for one rank.
        hop_s: what one hop adds, by NCCL's tuning table.
        most_ranks: that it connects.
        source: of the bandwidth.
    """

    name: str
    bytes_per_s: float
    hop_s: float
    most_ranks: int
    source: str


LINKS = (
    Link("NVLink 4", 450e9, 3.4e-6, 8, "NVIDIA H100 data sheet, 900 GB/s both ways"),
    Link("PCIe 5.0 x16", 64e9, 5.7e-6, 8, "NVIDIA H100 data sheet, 128 GB/s both ways"),
    Link("400 Gb/s Ethernet", 50e9, 14.0e-6, 1024, "its name; one port a rank"),
)
PHASES = {"decode": (1, 8, 64, 512), "prefill": (1024, 4096)}  # tokens a rank and step


def step_bytes(tokens: int, ranks: int, config: EngramConfig) -> tuple[float, float]:
    """Bytes of row numbers and of rows that a rank receives in one step, all layers together.

    Of whole columns it is exact; of row ranges, the mean of evenly spread rows.
    """
    rows = tokens * config.columns * len(config.layer_ids) * (ranks - 1) / ranks
    return rows * ID_BYTES, rows * RowFormat.of(config).row_bytes


def exchange_seconds(link: Link, tokens: int, ranks: int, config: EngramConfig) -> float:
    """One fetch of all layers together, three messages."""
    ids, rows = step_bytes(tokens, ranks, config)
    control = (ranks - 1) * (COUNT_BYTES + NOTICE_BYTES)
    latency = BASE_S + link.hop_s + (ranks - 1) * PER_PEER_S
    return 3 * latency + (ids + rows + control) / link.bytes_per_s


def window_seconds(phase: str, tokens: int) -> float:
    """Compute before the second block."""
    return DECODE_WINDOW_S if phase == "decode" else 2 * BLOCK_PARAMETERS * tokens / FLOPS


def model_table(preset: str = "v41-flash") -> list[dict[str, Any]]:
    """The exchange of every link, phase, number of tokens and of ranks, as entries of a results file."""
    config = EngramConfig.preset(preset)
    found: list[dict[str, Any]] = []
    for link in LINKS:
        for phase, counts in PHASES.items():
            for tokens in counts:
                for ranks in (ranks for ranks in RANKS if ranks <= link.most_ranks):
                    ids, rows = step_bytes(tokens, ranks, config)
                    found.append(
                        {
                            "link": link.name,
                            "phase": phase,
                            "tokens": tokens,
                            "ranks": ranks,
                            "ids_bytes": ids,
                            "rows_bytes": rows,
                            "seconds": exchange_seconds(link, tokens, ranks, config),
                            "window_s": window_seconds(phase, tokens),
                        }
                    )
    return found
