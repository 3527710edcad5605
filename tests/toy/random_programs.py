"""Random programs for a ByteDMD tracer: drawn by hypothesis, for the literal oracle and, if there, the original.

What: straight-line programs over nested lists: arithmetic, comparisons, branches, conversions, stores, repeated
operands, aliased arguments; results in lists, tuples and dicts. More of them than the suite has time for:

    python -m tests.fuzz --only programs
"""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

BINARY = ("add", "sub", "mul", "lt", "eq", "radd", "rsub", "max", "divmod", "pow", "and")
UNARY = ("neg", "abs", "copy", "index", "branch", "sum", "store", "alias", "drop")
STEPS = st.lists(
    st.tuples(st.sampled_from(BINARY + UNARY), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40
)
SHAPES = st.tuples(st.lists(st.lists(st.integers(-9, 9), max_size=4), min_size=1, max_size=4), st.integers(-9, 9))
RETURNED = st.lists(st.integers(0, 60), max_size=6)


def program(steps: list[tuple[str, int, int]], returned: list[int]) -> Callable[[Any, Any, Any], Any]:
    """A function of a matrix, one of its rows again, and a number."""

    def function(matrix: Any, row: Any, number: Any) -> Any:
        values = [number, *row, *(x for line in matrix for x in line)]
        for name, i, j in steps:
            _step(name, values, matrix, i % len(values), j % len(values))
        chosen = [values[i % len(values)] for i in returned]
        return chosen[:2], tuple(chosen[2:4]), {"nothing live": chosen[4:]}

    return function


def _step(name: str, values: list[Any], matrix: Any, i: int, j: int) -> None:
    a, b = values[i], values[j]
    if name == "store":
        line = matrix[i % len(matrix)]
        if line:
            line[j % len(line)] = a
    elif name == "alias":
        matrix[i % len(matrix)] = matrix[j % len(matrix)]
    elif name == "drop":
        values[i] = 1
    elif name == "branch":
        values.append(a + 1 if a else b)
    elif name == "divmod":
        values.extend(divmod(a, 7) if i % 2 else divmod(a, (b & 3) + 1))
    elif name == "sum":
        values.append(sum(values[i : i + 3]))
    else:
        values.append(_OPERATIONS[name](a, b))
    values[-1] = values[-1] % 1009  # stays small, and is one more read


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "radd": lambda a, b: 3 + a,
    "rsub": lambda a, b: 3 - a,
    "max": lambda a, b: max(a, b),
    "pow": lambda a, b: pow(a, 2) + pow(a, 3, 11),
    "and": lambda a, b: a & b,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: abs(a),
    "copy": lambda a, b: +a,
    "index": lambda a, b: [5, 6, 7][a & 1],
}


def arguments(shape: tuple[list[list[int]], int], aliased: int) -> tuple[Any, ...]:
    """The matrix, one of its rows as an argument of its own, and the number."""
    matrix = [list(line) for line in shape[0]]
    return matrix, matrix[aliased % len(matrix)], shape[1]
