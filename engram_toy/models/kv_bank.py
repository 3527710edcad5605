"""A bank of key and value rows, attended over by name: the second model.

Engram has no such bank. The question that this project answers was first asked about one ("a KV memory
bank split into two tiers"), so it is priced beside Engram: each position attends over the bank rows that its
n-gram lookup names. A row holds H key values, then H value values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from engram_toy.functional import Matrix, Vector, dot, linear, mix, softmax


class BankWeights(NamedTuple):
    """Projections [H][H], without bias."""

    query: Matrix
    output: Matrix


def kv_bank(hidden: Matrix, lookups: Iterable[Sequence[Vector]], weights: BankWeights) -> list[list[Any]]:
    """What the bank adds to the residual stream: [T][H]; `lookups` gives the rows [C][2H] of each position."""
    width = len(hidden[0])
    scale = width**-0.5
    out = []
    for x, rows in zip(hidden, lookups):
        query = linear(weights.query, x)  # [H]
        scores = [dot(query, row[:width]) * scale for row in rows]  # [C]
        attended = mix(softmax(scores), [row[width:] for row in rows])  # [H]
        out.append(linear(weights.output, attended))
    return out
