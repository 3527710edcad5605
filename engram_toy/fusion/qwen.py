"""The twin of Qwen3.8-Flash-Next's layer: rows -> gate -> short convolution, one position at a time.

The demo's layer (`engram_toy.fusion.demo`) but for its projections, which have no bias, and its norms. The caller adds
the result to the residual stream. Source: transformers' class `qwen4_exp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from engram_toy.functional import Matrix, Vector, linear, rms_norm
from engram_toy.fusion.demo import embed, gate, short_conv

NORM_EPS = 1e-6  # of the published configuration


class QwenWeights(NamedTuple):
    """Weights of one layer as nested lists; names as in the checkpoint, the copies stacked."""

    key_proj: Sequence[Matrix]  # [G][H][C*D]
    value_proj: Matrix  # [H][C*D]
    norm_key: Matrix  # [G][H], each less 1
    norm_query: Matrix  # [G][H], each less 1
    norm_conv: Matrix  # [G][H], each less 1
    conv1d: Sequence[Matrix]  # [G][H][K]

    @property
    def short_conv_conv(self) -> Sequence[Matrix]:
        """The taps under the demo's name."""
        return self.conv1d


def centered_norm(x: Vector, weight: Vector, eps: float) -> list[Any]:
    """x / rms(x) * (1 + weight)."""
    return rms_norm(x, [1.0 + w for w in weight], eps)  # gains are stored as their distance from 1


def gated_value(e: Vector, hidden: Matrix, weights: QwenWeights, eps: float) -> list[list[Any]]:
    """gate_g * V(e) for each residual copy: [G][H]."""
    value = linear(weights.value_proj, e)  # [H]
    out = []
    for g, stream in enumerate(hidden):
        key = centered_norm(linear(weights.key_proj[g], e), weights.norm_key[g], eps)
        opening = gate(key, centered_norm(stream, weights.norm_query[g], eps))
        out.append([opening * v for v in value])
    return out


def engram_qwen(
    hidden: Sequence[Matrix],
    lookups: Iterable[Sequence[Vector]],
    weights: QwenWeights,
    dilation: int,
    eps: float = NORM_EPS,
) -> list[list[list[Any]]]:
    """What the layer adds to the residual stream: [T][G][H].

    Args:
        hidden: residual stream, [T][G][H].
        lookups: per position its C rows of D values; taken one position at a time.
        dilation: of the convolution; the longest n-gram.
        eps: of the three norms.
    """
    out = []
    past: list[list[list[Any]]] = []
    for stream, rows in zip(hidden, lookups):
        value = gated_value(embed(rows), stream, weights, eps)
        past.append([centered_norm(v, norm, eps) for v, norm in zip(value, weights.norm_conv)])
        convolved = short_conv(past, weights, dilation)
        out.append([[a + b for a, b in zip(v, c)] for v, c in zip(value, convolved)])
    return out
