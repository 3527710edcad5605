"""The twin of `engram_ref.hashing`: compressed ids to row indices in plain integers.

The plan arrives as data, `json.loads(HashPlan.to_json())`, so that nothing is computed twice and nothing
is imported from the reference. `hash_columns` takes the constants as arguments: a tracer can watch them.

    hasher = NgramHasher(json.loads(plan_json))
    rows = hasher(compressed_ids, layer_id=1)          # list of T lists of C row indices
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

DEAD = -1  # compressed id of a position that must not be looked up (an image token)


def hash_columns(
    compressed_ids: Sequence[Any],
    multipliers: Sequence[Any],
    primes: Sequence[Any],
    offsets: Sequence[Any] | None,
    pad_compressed: Any,
    before: Sequence[Any] = (),
    segment_end: Any = None,
) -> list[list[Any]]:
    """Row indices of one sequence, `[T][C]`.

    Args:
        compressed_ids: T integers, DEAD where a position is not looked up.
        multipliers: one per shift, N in all.
        primes, offsets: one per column, order by order; `offsets` None for indices within a column.
        before: the N - 1 ids before the sequence; nothing for its start.
        segment_end: the id that closes a segment, which no later position sees beyond; None where no id does.
    """
    context = len(multipliers) - 1
    heads = len(primes) // context
    # Before the start: as behind a dead position, this shift and every older one are the pad.
    ids = [*(before or [DEAD] * context), *compressed_ids]
    # Once an id: a comparison is a read, and each id is looked back at N - 1 times.
    dead = [bool(c == DEAD) for c in ids]
    rows = []  # [T][C]
    for position in range(context, len(ids)):
        row = []
        mix: Any = None
        blocked = False  # once true, for all older shifts, too
        for s, multiplier in enumerate(multipliers):
            blocked = blocked or dead[position - s]
            if segment_end is not None and s:  # a position's own id does not end what it belongs to
                blocked = blocked or bool(ids[position - s] == segment_end)
            term = (pad_compressed if blocked else ids[position - s]) * multiplier
            if s == 0:  # no column of single tokens: the shortest n-gram has two
                mix = term
                continue
            mix = mix ^ term  # needs no mask: of a plan, no product exceeds 2^63 - 1
            for column in range((s - 1) * heads, s * heads):
                index = mix % primes[column]
                row.append(index if offsets is None else index + offsets[column])
        rows.append(row)
    return rows


class NgramHasher:
    """Row indices by a plan (the dictionary that `HashPlan.to_json` writes).

    Raises:
        ValueError: an empty sequence, an id outside the vocabulary, or a layer that the plan does not have.
    """

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.plan = plan

    def layer(self, layer_id: int) -> Mapping[str, Any]:
        """The constants of one layer: multipliers, primes, offsets."""
        for layer in self.plan["layers"]:
            if layer["layer_id"] == layer_id:
                return layer
        raise ValueError(f"layer_id={layer_id}: this plan has layers {[x['layer_id'] for x in self.plan['layers']]}")

    def __call__(
        self,
        compressed_ids: Sequence[int],
        layer_id: int,
        offsets: bool = True,
        history: TokenHistory | None = None,
    ) -> list[list[int]]:
        """Row indices of one sequence, `[T][C]`; `history` is read, not advanced."""
        layer = self.layer(layer_id)
        _check_ids(compressed_ids, self.plan["compressed_size"])
        return hash_columns(
            compressed_ids,
            layer["multipliers"],
            layer["primes"],
            layer["offsets"] if offsets else None,
            self.plan["pad_compressed"],
            history.ids if history else (),
            self.plan.get("segment_end"),
        )


class TokenHistory:
    """The last N - 1 compressed ids of one sequence, carried from chunk to chunk; advance it once per chunk."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.ids = [DEAD] * (plan["max_ngram"] - 1)
        self._size = plan["compressed_size"]

    def advance(self, compressed_ids: Sequence[int]) -> None:
        """Append a chunk, an empty one included, and keep what the next one needs; ids are checked as in hashing."""
        if compressed_ids:
            _check_ids(compressed_ids, self._size)
        self.ids = [*self.ids, *compressed_ids][-len(self.ids) :]  # a chunk may be shorter than what is kept

    def copy(self) -> TokenHistory:
        """An independent history in the same state."""
        return copy.deepcopy(self)


def _check_ids(ids: Sequence[int], size: int) -> None:
    if not ids:
        raise ValueError("no compressed ids: an empty sequence has nothing to look up")
    for c in ids:
        if isinstance(c, bool) or not isinstance(c, int):  # bool is an int
            raise ValueError(f"compressed ids contain {c!r}: give integers")
        if not DEAD <= c < size:
            raise ValueError(f"compressed ids contain {c}; the vocabulary has {DEAD} .. {size - 1}")
