"""Vector arithmetic on plain lists, written so that every value stays inside the tracer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engram_toy.tracer.tracked import Tracked

Vector = Sequence[Any]  # [H]
Matrix = Sequence[Vector]  # [rows][columns]


def dot(a: Vector, b: Vector) -> Any:
    """Inner product, summed from the left.

    Raises:
        ValueError: vectors of different lengths, or without a value.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"vectors of {len(a)} and {len(b)} values: an inner product needs equally many, one at least")
    if isinstance(a[0], Tracked):  # nearly every read of the models happens here: let the tracer log it at once
        total = a[0]._recorder.inner_product(a, b)
        if total is not NotImplemented:
            return total
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total = total + a[i] * b[i]
    return total


def linear(weight: Matrix, x: Vector, bias: Vector | None = None) -> list[Any]:
    """weight @ x + bias, which has a value for each row of the weight."""
    out = [dot(row, x) for row in weight]
    if bias is not None and len(bias) != len(out):
        raise ValueError(f"a bias of {len(bias)} values for {len(out)} rows of weights")
    return out if bias is None else [y + b for y, b in zip(out, bias)]


def rms_norm(x: Vector, weight: Vector, eps: float) -> list[Any]:
    """x / rms(x) * weight."""
    scale = (dot(x, x) / len(x) + eps) ** -0.5  # `math.sqrt` returns a plain number, whose later reads go unseen
    return [v * scale * w for v, w in zip(x, weight)]


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + math.e**-x)  # so does `math.exp`


def softmax(scores: Vector) -> list[Any]:
    """Weights that sum to one, of one score at least; the largest is subtracted first."""
    top = scores[0]
    for score in scores[1:]:
        if score > top:
            top = score
    powers = [math.e ** (score - top) for score in scores]
    total = powers[0]
    for power in powers[1:]:
        total = total + power
    return [power / total for power in powers]


def mix(weights: Vector, rows: Matrix) -> list[Any]:
    """Weighted sum of rows, column by column."""
    return [dot(weights, column) for column in zip(*rows)]


def copy(row: Vector) -> list[Any]:
    """A new value for each value of a row, equal to the bit."""
    return [+value for value in row]  # x + 0 would lose the sign of -0.0
