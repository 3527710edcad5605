"""What becomes of the rows that a lookup delivers: it decides how much else is live, and with it the lookup's price.

    returned                 every delivered value is returned, and so stays live, above all table rows of later reads
    dropped                  they are forgotten at once
    row sums                 each row is summed, the sums are forgotten
    position sum             the rows of a position are summed together, the sum is forgotten
    position sum, returned   that sum is returned: one value a position stays live

A layer sums products of all values of a position, keeps what comes out, and never looks at the rows again. The last
ending is nearest to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from engram_toy.functional import Vector

ENDINGS = ("returned", "dropped", "row sums", "position sum", "position sum, returned")
NEAREST = ENDINGS[-1]  # to what a layer does

Deliver = Callable[[Sequence[Vector]], list[Any]]


def ended(ending: str, deliver: Deliver, lookups: Iterable[Sequence[Vector]]) -> list[Any]:
    """Deliver the rows of one position after the other and end as said; what is returned of them.

    Args:
        deliver: the rows [C][D] of a position as new values.

    Raises:
        ValueError: no such ending.
    """
    if ending not in ENDINGS:
        raise ValueError(f"no ending {ending!r}: use one of {'; '.join(ENDINGS)}")
    kept = []
    for rows in lookups:
        if ending == "row sums":
            for row in rows:
                total(deliver([row]))
            continue
        delivered = deliver(rows)
        if ending == "returned":
            kept.append(delivered)
        elif ending.startswith("position sum"):
            of_position = total(delivered)
            if ending == NEAREST:
                kept.append(of_position)
    return kept


def total(values: Vector) -> Any:
    """The sum of at least one value, from the left."""
    found = values[0]
    for value in values[1:]:
        found = found + value
    return found
