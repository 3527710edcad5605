"""The twin of the demo's Engram layer: rows -> gate -> short convolution, one position at a time.

For each residual copy g: the rows' key K_g(e) is compared with the residual stream, a sigmoid of the signed
square root of their normalised inner product gates the value V(e), and a short causal convolution over time
is added. The caller adds the result to the residual stream, before attention.
Source: the public demo `deepseek-ai/Engram`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from engram_toy.functional import Matrix, Vector, copy, dot, linear, rms_norm, sigmoid

NORM_EPS = 2.0**-52  # the framework's default for float64
CONV_NORM_EPS = 1e-5  # of the demo
GATE_FLOOR = 1e-6  # under the square root: in the code of the demo and of V4.1, not in the paper


class EngramWeights(NamedTuple):
    """Weights of one layer as nested lists; names as in the demo's checkpoint, the copies stacked."""

    key_projs_weight: Sequence[Matrix]  # [G][H][C*D]
    key_projs_bias: Matrix  # [G][H]
    value_proj_weight: Matrix  # [H][C*D]
    value_proj_bias: Vector  # [H]
    norm1: Matrix  # [G][H], of the keys
    norm2: Matrix  # [G][H], of the queries
    short_conv_norms: Matrix  # [G][H]
    short_conv_conv: Sequence[Matrix]  # [G][H][K]


def embed(rows: Sequence[Vector]) -> list[Any]:
    """The rows of one position side by side, as new values: [C*D]."""
    return [value for row in rows for value in copy(row)]


def gate(key: Vector, query: Vector) -> Any:
    """How far the looked-up value is let through: sigmoid of the signed square root of <key, query>/sqrt(H)."""
    return sigmoid(signed_sqrt(dot(key, query) / len(key) ** 0.5))


def signed_sqrt(x: Any) -> Any:
    """sign(x) * sqrt(max(|x|, GATE_FLOOR)), with sign(0) = 0."""
    root = floored_root(x)
    if x > 0:
        return root
    return -root if x < 0 else root * 0.0  # a zero that the tracer still sees


def floored_root(x: Any) -> Any:
    """sqrt(max(|x|, GATE_FLOOR))."""
    magnitude = abs(x)
    if magnitude < GATE_FLOOR:
        magnitude = magnitude * 0.0 + GATE_FLOOR  # a constant that the tracer still sees
    return magnitude**0.5


def gated_value(e: Vector, hidden: Matrix, weights: EngramWeights) -> list[list[Any]]:
    """gate_g * V(e) for each residual copy: [G][H]."""
    value = linear(weights.value_proj_weight, e, weights.value_proj_bias)  # [H]
    out = []
    for g, stream in enumerate(hidden):
        key = linear(weights.key_projs_weight[g], e, weights.key_projs_bias[g])  # [H]
        opening = gate(rms_norm(key, weights.norm1[g], NORM_EPS), rms_norm(stream, weights.norm2[g], NORM_EPS))
        out.append([opening * v for v in value])
    return out


def short_conv(past: Sequence[Matrix], weights: EngramWeights | Any, dilation: int) -> list[list[Any]]:
    """SiLU of the causal depthwise convolution at the last position of `past` [t+1][G][H]; gives [G][H].

    `past` holds normalised values. Taps that reach before the start of the sequence read nothing.
    """
    out = []
    for g, kernels in enumerate(weights.short_conv_conv):
        # [H] each, K of them or as many as there are; the position's own first.
        taps = [past[-1 - back][g] for back in range(0, len(past), dilation)][: len(kernels[0])]
        row = []
        for h, kernel in enumerate(kernels):
            total = kernel[-1] * taps[0][h]
            for k in range(1, len(taps)):
                total = total + kernel[-1 - k] * taps[k][h]
            row.append(total * sigmoid(total))
        out.append(row)
    return out


def engram(
    hidden: Sequence[Matrix], lookups: Iterable[Sequence[Vector]], weights: EngramWeights, dilation: int
) -> list[list[list[Any]]]:
    """What the layer adds to the residual stream: [T][G][H].

    Args:
        hidden: residual stream, [T][G][H].
        lookups: per position its C rows of D values; taken one position at a time.
        dilation: of the convolution; the longest n-gram. A layer without taps (K = 0) has no convolution.
    """
    out = []
    past: list[list[list[Any]]] = []
    has_conv = bool(weights.short_conv_conv)
    for stream, rows in zip(hidden, lookups):
        value = gated_value(embed(rows), stream, weights)
        if has_conv:
            past.append([rms_norm(v, norm, CONV_NORM_EPS) for v, norm in zip(value, weights.short_conv_norms)])
            convolved = short_conv(past, weights, dilation)
            value = [[a + b for a, b in zip(v, c)] for v, c in zip(value, convolved)]
        out.append(value)
    return out
