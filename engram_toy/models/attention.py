"""Causal self-attention with one head, on plain lists: the rest of the decoder block around a lookup."""

from __future__ import annotations

from typing import Any, NamedTuple

from engram_toy.functional import Matrix, dot, linear, mix, softmax


class AttentionWeights(NamedTuple):
    """Projections [H][H], without bias."""

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix


def attention(hidden: Matrix, weights: AttentionWeights) -> list[list[Any]]:
    """Each position attends to itself and what came before: [T][H] -> [T][H]."""
    scale = len(hidden[0]) ** -0.5
    keys: list[list[Any]] = []  # [H] each, of the positions so far
    values: list[list[Any]] = []
    out = []
    for x in hidden:
        query = linear(weights.query, x)  # [H]
        keys.append(linear(weights.key, x))
        values.append(linear(weights.value, x))
        attended = mix(softmax([dot(query, key) * scale for key in keys]), values)  # [H]
        out.append(linear(weights.output, attended))
    return out
