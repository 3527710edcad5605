"""Energy of moving rows, by the tier that they come from: ranges that others published, and no measurement.

    joules(TIERS["host"], rows=3072, row_bytes=264)      # (least, most)

Figures of different years, processes and boundaries: orders of magnitude. `docs/findings/published.json` has them with
their sources; a test holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAGE = 4096  # bytes: the least that an SSD moves
_PICO = 1e-12
Range = tuple[float, float]

# pJ per bit, but for random reads of an SSD: pJ per page. By the ids of the published figures.
FIGURES: dict[str, Range] = {
    "hbm": (3.44, 4.3),  # HBM3E (SK hynix), HBM2 3.92 (O'Connor et al.), HBM2E
    "host": (7.0, 41.0),  # LPDDR5 (AI and Memory Wall figures) .. DDR, a whole access, 45 nm (Horowitz)
    "pcie_elsewhere": (5.0, 15.0),  # a PCIe link, weak sources
    "nvme_random_io": (1e7, 1e7),  # 25 W at 2.5 M reads of 4 KiB per second (Samsung PM1743)
}


@dataclass(frozen=True)
class Tier:
    """A place that rows come from.

    Attributes:
        per_bit: least and most pJ for each bit that is asked for.
        per_page: least and most pJ for each page that is read.
    """

    per_bit: Range
    per_page: Range = (0.0, 0.0)


def _plus(a: Range, b: Range) -> Range:
    return a[0] + b[0], a[1] + b[1]


TIERS = {
    "device": Tier(FIGURES["hbm"]),
    "memory": Tier(FIGURES["host"]),  # read by the CPU that computes: no link
    "host": Tier(_plus(FIGURES["host"], FIGURES["pcie_elsewhere"])),
    # The link carries the row, the drive reads pages.
    "file": Tier(FIGURES["pcie_elsewhere"], FIGURES["nvme_random_io"]),
    "link": Tier(FIGURES["pcie_elsewhere"]),  # as much as a link within a machine, at least
}


def pages_per_row(row_bytes: int) -> float:
    """Pages that a row lies on, on average over the rows of a table that begins at a page."""
    # Rows start at all multiples of their greatest common divisor with a page, equally often.
    starts = range(0, PAGE, math.gcd(row_bytes, PAGE))
    return sum((start + row_bytes - 1) // PAGE + 1 for start in starts) / len(starts)


def joules(tier: Tier, rows: float, row_bytes: int) -> Range:
    """Least and most energy of fetching so many rows."""
    pages = pages_per_row(row_bytes)
    low, high = (8 * row_bytes * bit + pages * page for bit, page in zip(tier.per_bit, tier.per_page))
    return rows * low * _PICO, rows * high * _PICO
