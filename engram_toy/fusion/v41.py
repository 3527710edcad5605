"""The twin of DeepSeek-V4.1-Flash's Engram layer: scaled rows -> one projection -> gate, one position at a time.

One projection without bias makes a key for each residual copy and one value for all. Key and stream are normalised
and compared, a sigmoid of the signed square root of the result gates the value, and the gated value is added to the
stream. There is no convolution. Names as in `engram_ref.fusion.v41`; the demo's form is `engram_toy.fusion.demo`.

    stream = engram_v41(hidden, lookups, weights)           # the stream after the layer, not an update to it

A row here is what is stored, as numbers: D codes, then one scale for each 32 of them (`engram_toy.fp8.numbers`). So a
traced lookup reads every code once and every scale 32 times, and an element is one stored byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from engram_toy.fp8 import dequantise
from engram_toy.functional import Matrix, Vector, dot, linear, sigmoid
from engram_toy.fusion.demo import floored_root

NORM_EPS = 1e-20  # of DeepSeek-V4.1-Flash


class V41Weights(NamedTuple):
    """Weights of one layer as nested lists; names as in the checkpoint."""

    wkv_weight: Matrix  # [(G+1)*H][C*D], key_0 | ... | key_{G-1} | value
    q_weight: Matrix  # [G][H], of the stream
    k_weight: Matrix  # [G][H], of the keys


def embed(rows: Sequence[Vector]) -> list[Any]:
    """The values of one position's rows side by side: [C*D], from [C] rows of D codes and D/32 scales."""
    return [value for row in rows for value in dequantise(row)]


def gate(key: Vector, stream: Vector, gain: Vector) -> Any:
    """How far the looked-up value is let through to one copy; all three [H], `gain` the product of both gains."""
    scale = _inverse_rms(stream) * _inverse_rms(key)
    similarity = dot([x * g for x, g in zip(stream, gain)], key) * scale / len(key) ** 0.5
    return sigmoid(signed_sqrt(similarity))


def _inverse_rms(x: Vector) -> Any:
    return (dot(x, x) / len(x) + NORM_EPS) ** -0.5


def signed_sqrt(x: Any) -> Any:
    """sqrt(max(|x|, GATE_FLOOR)) with the sign of x; that of a zero counts, too."""
    root = floored_root(x)
    return -root if is_negative(x) else root


def is_negative(x: Any) -> bool:
    """Whether the sign bit of x is set."""
    if x < 0:
        return True
    # Of zeros alone no comparison tells: `copysign` calls `float(x)`, which the tracer counts as an escape.
    return not x > 0 and math.copysign(1.0, x) < 0


def add_gated(e: Vector, stream: Matrix, gains: Matrix, weights: V41Weights) -> list[list[Any]]:
    """stream_g + gate_g * value for each residual copy: [G][H], from the values `e` [C*D]."""
    width = len(stream[0])
    packed = linear(weights.wkv_weight, e)  # [(G+1)*H]
    *keys, value = [packed[start : start + width] for start in range(0, len(packed), width)]  # [H] each
    out = []
    for x, key, gain in zip(stream, keys, gains):
        opening = gate(key, x, gain)
        out.append([h + opening * v for h, v in zip(x, value)])
    return out


def engram_v41(
    hidden: Sequence[Matrix],
    lookups: Iterable[Sequence[Vector]],
    weights: V41Weights,
    dead: Sequence[bool] | None = None,
) -> list[list[list[Any]]]:
    """The residual stream after the layer: [T][G][H].

    Args:
        hidden: residual stream before it, [T][G][H].
        lookups: per position its C rows; taken one position at a time.
        dead: per position whether it is no text; then its rows are not read and its stream passes through untouched.
    """
    gains = [[q * k for q, k in zip(*pair)] for pair in zip(weights.q_weight, weights.k_weight)]  # [G][H]
    out = []
    for position, (stream, rows) in enumerate(zip(hidden, lookups)):
        passes = dead is not None and dead[position]
        out.append(list(map(list, stream)) if passes else add_gated(embed(rows), stream, gains, weights))
    return out
