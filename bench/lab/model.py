"""What is priced: one attention head over a bank of key and value rows, which hashed n-grams name; plain Python only.

All variants read the same rows of the same bank and give the same output. What differs is where the bank starts on the
stack, above the padding or below it, and whether the rows of the next position are copied one position ahead.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Vector = Sequence[Any]
Matrix = Sequence[Vector]

VARIANTS = ("resident", "offload_naive", "offload_prefetch")
BOUNDARIES = ("lookup", "attention")


def rows_named(tokens: Sequence[int], columns: int, rows: int) -> list[list[int]]:
    """Row numbers [T][C]: half of the columns hash the last two tokens, half the last three, each in its own way."""
    named = []
    for at in range(len(tokens)):
        position = []
        for column in range(columns):
            mixed = 0
            # 2 for the first half of the columns, 3 for the second.
            for back in range(2 + 2 * column // columns):
                token = tokens[at - back] if at >= back else 0
                # An odd factor, another one for each column and place; + 1, so that token 0 counts, too.
                mixed ^= (token + 1) * (0x9E3779B1 + 2 * (7919 * column + 104729 * back))
            position.append(mixed % rows)
        named.append(position)
    return named


def matrix(seed: str, rows: int, columns: int) -> list[list[float]]:
    """Numbers between -1 and 1."""
    draw = random.Random(seed)
    return [[draw.uniform(-1.0, 1.0) for _ in range(columns)] for _ in range(rows)]


def dot(a: Vector, b: Vector) -> Any:
    """Inner product, from the left."""
    # Not from 0, as `sum` would: a sum with a constant is one more read.
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:]):
        total = total + x * y
    return total


def attend(x: Vector, keys_and_values: Matrix, query: Matrix, output: Matrix) -> list[Any]:
    """The residual stream [H] of one position after one head over the rows [C][2H] that its n-grams name."""
    width = len(x)
    asked = [dot(row, x) for row in query]
    scores = [dot(asked, row[:width]) * width**-0.5 for row in keys_and_values]
    powers = [math.e**score for score in scores]  # stays in the tracer, as math.exp would not
    total = powers[0]
    for power in powers[1:]:
        total = total + power
    mixed = [dot([p / total for p in powers], column) for column in zip(*(row[width:] for row in keys_and_values))]
    return [a + dot(row, mixed) for a, row in zip(x, output)]


def delivered(
    bank: dict[int, Vector], named: Sequence[Sequence[int]], fetched: frozenset[int]
) -> Iterator[list[Vector]]:
    """The rows of one position after the other; of `fetched` ones, copies that were made one position ahead."""
    staged: list[list[Vector]] = []
    for position in named:
        # +, which keeps every bit: x + 0 would lose the sign of -0.0.
        staged.append([[+value for value in bank[row]] if row in fetched else bank[row] for row in position])
        if len(staged) > 1:
            yield staged.pop(0)
    yield from staged


def program(
    boundary: str, variant: str, named: Sequence[Sequence[int]], offloaded: frozenset[int], rows: int
) -> Callable[..., Any]:
    """The function that is traced; see `arguments`. It returns the padding, which is live for that reason alone."""
    moved = frozenset() if variant == "resident" else offloaded
    kept = [row for row in range(rows) if row not in moved]
    fetched = moved if variant == "offload_prefetch" else frozenset()

    def forward(above: Matrix, hidden: Matrix, query: Matrix, output: Matrix, padding: Vector, below: Matrix) -> Any:
        bank = dict(zip(kept, above))
        bank.update(zip(sorted(moved), below))  # by number, as `arguments` lays them down
        found = []
        for x, position in zip(hidden, delivered(bank, named, fetched)):
            if boundary == "attention":
                found.append(attend(x, position, query, output))
            else:  # the lookup alone: the values of a position are summed
                total = position[0][0]
                for value in [value for row in position for value in row][1:]:
                    total = total + value
                found.append([total])
        return found, padding

    return forward


def arguments(
    variant: str, offloaded: frozenset[int], bank: Matrix, hidden: Matrix, head: Sequence[Matrix], padding: int
) -> tuple[Any, ...]:
    """In the order of the stack, the first on top: kept rows, stream, weights, padding, offloaded rows."""
    moved = frozenset() if variant == "resident" else offloaded
    above = [row for number, row in enumerate(bank) if number not in moved]
    below = [row for number, row in enumerate(bank) if number in moved]
    return above, hidden, head[0], head[1], [0.0] * padding, below
