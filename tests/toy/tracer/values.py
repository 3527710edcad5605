"""Values for tests of traced runs: a named tuple, a list with a method, a frozen dataclass."""

import dataclasses
from collections import namedtuple

Pair = namedtuple("Pair", "x y")


class Row(list):
    """A list with a method, and an attribute beside its items."""

    unit = "m"

    def total(self):
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Point:
    x: object
    y: object
