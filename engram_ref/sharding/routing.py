"""From row numbers to the ranks that own the rows, and from their answers back.

    route = route_rows(numbers, plan)       # numbers [N], in the order that the caller wants
    route.ids                               # [M], those for rank 0 first, then those for rank 1, ...
    answers[route.places]                   # [N, ...], answers [M, ...] in the order of `ids`

DEAD is no row number: positions without a lookup read the rows of the pad id, as they do from every table.

    python -m pytest tests/ref/sharding/test_plan.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram_ref.sharding.plan import ShardPlan


@dataclass(frozen=True)
class Route:
    """Row numbers by owner.

    Attributes:
        ids: [M], as they go over the wire.
        counts: how many of them each rank owns.
        places: [N], where the row that was asked for stands among the M answers.
    """

    ids: np.ndarray
    counts: list[int]
    places: np.ndarray


def route_rows(numbers: np.ndarray, plan: ShardPlan, unique: bool = False) -> Route:
    """Sort row numbers by owner.

    Args:
        numbers: [N], checked.
        plan: who owns what.
        unique: ask for each row once, however often it is wanted.
    """
    wire = np.int32 if plan.id_bytes == 4 else np.int64
    bounds = np.asarray(plan.bounds[1:-1], dtype=np.int64)
    if unique:
        ids, places = np.unique(numbers, return_inverse=True)  # in rising order, so by owner, too
        return Route(ids.astype(wire), _counts(np.searchsorted(bounds, ids, side="right"), plan), places.reshape(-1))
    owners = np.searchsorted(bounds, numbers, side="right").astype(np.uint16)  # 16 bits: sorted by counting
    order = np.argsort(owners, kind="stable")  # equal requests give equal messages on every machine
    places = np.empty(len(numbers), dtype=np.int64)
    places[order] = np.arange(len(numbers))
    return Route(numbers[order].astype(wire), _counts(owners, plan), places)


def _counts(owners: np.ndarray, plan: ShardPlan) -> list[int]:
    return np.bincount(owners, minlength=plan.ranks).tolist()
