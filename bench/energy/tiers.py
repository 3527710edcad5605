"""What a row costs by where it comes from: published energies, as ranges, times the bytes or the pages that move.

    hbm, *others = tiers(published)                            # from a function that gives a published range by its id
    rows_energy(others[-1], hbm, fetched=8192, read=8192, row_bytes=160)    # joules of a step, (least, most)
    crossings(...)                                   # tokens a step at which rows reach 3 % of the weights' energy

The weights of a step come from HBM, each once. These are sums of figures that others published of devices and links, of
different years and boundaries: an estimate of orders of magnitude, and no measurement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.instruments.claim import WALL_TIME_CLAIM
from engram_ref.place.energy import Range, pages_per_row

_PICO = 1e-12


@dataclass(frozen=True)
class Tier:
    """A place that rows come from.

    Attributes:
        name: as shown.
        per_bit: least and most pJ for each bit that is asked for; (0, 0) where pages are charged.
        per_page: least and most pJ for each page that is read.
    """

    name: str
    per_bit: Range
    per_page: Range = (0.0, 0.0)

    def row(self, row_bytes: int) -> Range:
        """Joules of fetching one row."""
        pages = pages_per_row(row_bytes)
        low, high = (8 * row_bytes * bit + pages * page for bit, page in zip(self.per_bit, self.per_page))
        return low * _PICO, high * _PICO


def tiers(published: Callable[[str], Range]) -> list[Tier]:
    """All tiers, from the closest to the farthest.

    Args:
        published: least and most of a published figure, by its id.
    """
    hbm = [published(f"energy.{name}") for name in ("hbm2", "hbm2e", "hbm3e")]
    link = published("energy.pcie_elsewhere")
    rate, random = published("energy.nvme_rate_per_watt"), published("energy.nvme_random_io")
    sequential = tuple(
        1e12 / (mb * 1e6) / 8 for mb in reversed(rate)
    )  # MB/s per W -> pJ per bit: the most is the least
    return [
        Tier("HBM", (min(low for low, _ in hbm), max(high for _, high in hbm))),
        Tier("host LPDDR5 over PCIe", _plus(published("energy.lpddr5"), link)),
        Tier("host DDR over PCIe", _plus(published("energy.ddr"), link)),
        Tier("NVMe SSD, in sequence", (sequential[0], sequential[1])),
        Tier("NVMe SSD, random rows", (0.0, 0.0), (random[0] * 1e6, random[1] * 1e6)),  # uJ -> pJ
    ]


def _plus(a: Range, b: Range) -> Range:
    return a[0] + b[0], a[1] + b[1]


def weights_energy(nbytes: int, hbm: Tier) -> Range:
    """Joules of reading the weights of a step once."""
    return 8 * nbytes * hbm.per_bit[0] * _PICO, 8 * nbytes * hbm.per_bit[1] * _PICO


def rows_energy(tier: Tier, hbm: Tier, fetched: float, read: float, row_bytes: int) -> Range:
    """Joules of the rows of a step: those fetched from their tier, and the other reads from HBM."""
    # A row that has been fetched already, where that is counted, is read again from HBM.
    low, high = (fetched * far + (read - fetched) * near for far, near in zip(tier.row(row_bytes), hbm.row(row_bytes)))
    return low, high


def crossings(
    tier: Tier,
    hbm: Tier,
    weight_bytes: Callable[[float], int],
    row_bytes: int,
    rows_per_token: int,
    fetched: dict[int, float],
) -> tuple[float | None, float | None]:
    """Tokens a step at which the rows reach 3 % of the weights' energy: at the earliest, and at the latest.

    Args:
        weight_bytes: tokens a step -> bytes of weights that it reads.
        fetched: tokens a step -> share of the row reads that are fetched from the tier, ascending. Between two sizes
            the share is a straight line in the logarithm of the size, below the first and above the last it is theirs.

    Returns:
        The earliest is where the tier is at its dearest and HBM at its cheapest. None where it lies beyond a thousand
        times the last size. Beyond the last size the share is held, and really falls, so that a crossing there comes
        later than said.
    """
    found = []
    for end in (1, 0):  # dearest tier, then cheapest
        # For HBM itself both are one medium, so that its figure cancels.
        near = hbm.per_bit[end] if tier == hbm else hbm.per_bit[1 - end]
        bit, far_row = near * _PICO, tier.row(row_bytes)[end]

        def share(tokens: float, bit: float = bit, far_row: float = far_row) -> float:
            fetch = _between(fetched, tokens)
            rows = tokens * rows_per_token * (fetch * far_row + (1 - fetch) * 8 * row_bytes * bit)
            return rows / (8 * weight_bytes(tokens) * bit)

        found.append(first_crossing(share, WALL_TIME_CLAIM, 1000.0 * max(fetched)))
    return found[0], found[1]


def _between(shares: dict[int, float], tokens: float) -> float:
    sizes = sorted(shares)
    if tokens <= sizes[0]:
        return shares[sizes[0]]
    for a, b in itertools.pairwise(sizes):
        if tokens <= b:
            part = math.log(tokens / a) / math.log(b / a)
            return shares[a] + part * (shares[b] - shares[a])
    return shares[sizes[-1]]


def first_crossing(share: Callable[[float], float], level: float, most: float) -> float | None:
    """The first size at which a share reaches the level; None if that is beyond `most`.

    Sizes are tried from the smallest on, a twentieth apart, and the first interval that holds a crossing is halved.
    """
    # No bisection from the start: the share need not grow throughout, as at small steps the experts that are read grow
    # faster than the rows.
    low, high = 0.0, 0.5  # of a token: where rows reach the level below one, that is said
    while share(high) < level:
        low, high = high, 1.05 * high
        if low > most:
            return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) >= level else (middle, high)
    return high
