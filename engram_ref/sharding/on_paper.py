"""The exchange of one fetch on paper: the bytes that a rank receives, and latency plus bytes over bandwidth.

    received = exchange_bytes(rows=64 * 24, ranks=8, row_bytes=264)     # one layer, 64 tokens of a rank
    exchange_seconds(LINKS["nvlink"], 8, received)

A fetch is three messages behind one another. Each costs what a collective costs before the first byte, something for
every other rank, and its bytes over the bandwidth of the link:

    message = base + hop + (P - 1) * per_peer + bytes / bandwidth

What an owner needs to gather rows is not in it. Bytes are those that `ShardPlan.bytes_received` gives beforehand and
that real runs have counted; latencies and bandwidths are figures that others published, each with its source. Torch is
not needed.

    python -m pytest tests/ref/sharding/test_on_paper.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engram_ref.sharding.plan import COUNT_BYTES, NOTICE_BYTES

ID_BYTES = 4  # of a row number; of tables with 2^31 rows or more it would be 8
MESSAGES = 3  # counts, row numbers, rows; notices travel beside them
# NCCL's own tuning table: base of a ring that sends whole buffers ("Simple"), and one hop of it.
BASE_S = 8.4e-6
# A small all-to-all of NCCL on 8 B300 takes 41 us (published by vLLM): what base and hop leave of it, for each peer.
PER_PEER_S = (41e-6 - 8.4e-6 - 3.4e-6) / 7


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


LINKS = {
    "nvlink": Link("NVLink 4", 450e9, 3.4e-6, 8, "NVIDIA H100 data sheet, 900 GB/s both ways"),
    "pcie": Link("PCIe 5.0 x16", 64e9, 5.7e-6, 8, "NVIDIA H100 data sheet, 128 GB/s both ways"),
    "ethernet": Link("400 Gb/s Ethernet", 50e9, 14.0e-6, 1024, "its name; one port a rank"),
}


class Received(NamedTuple):
    """Bytes that a rank receives from all others in one fetch; means, where shards are no whole columns."""

    ids: float
    rows: float
    control: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def exchange_bytes(rows: float, ranks: int, row_bytes: int) -> Received:
    """What a rank receives in one fetch of so many rows, every rank asking for as many; 0 of one rank alone.

    Of whole columns it is exact; of row ranges, the mean of evenly spread rows.

    Args:
        rows: that each rank asks for, of one table.
        ranks: that own it.
        row_bytes: of a stored row.
    """
    others = rows * (ranks - 1) / ranks
    return Received(others * ID_BYTES, others * row_bytes, float((ranks - 1) * (COUNT_BYTES + NOTICE_BYTES)))


def exchange_seconds(link: Link, ranks: int, received: Received) -> float:
    """How long the three messages of one fetch take; nothing for one rank alone."""
    if ranks == 1:
        return 0.0
    latency = BASE_S + link.hop_s + (ranks - 1) * PER_PEER_S
    return MESSAGES * latency + received.total / link.bytes_per_s
