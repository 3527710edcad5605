"""Which rank owns which rows of a table, and how many bytes an exchange of them must move.

    plan = ShardPlan.of_layer(hash_plan.layer(1), ranks=4)      # whole columns where they divide, as 24 by 4
    plan = ShardPlan.even(rows=1_000_003, ranks=4)              # row ranges; some may be empty
    plan.first(rank), plan.size(rank)

A token reads one row of every column. Where each rank owns equally many whole columns, every token therefore asks every
owner for equally many rows, whatever it says: `bytes_received` is exact before anything has run.

    python -m pytest tests/ref/sharding/test_plan.py
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MOST_RANKS = 1 << 16  # an owner takes 16 bits where rows are sorted by it
COUNT_BYTES = 16  # a count, and whether the rank is idle; both int64
NOTICE_BYTES = 256  # what a rank says of its part: nothing, or an error in so many bytes that everybody knows how many
_INT32_MAX = 2**31 - 1


class Columns(Protocol):
    """What must be known of a layer's table: a `LayerPlan` of the hash, of which nothing else is."""

    @property
    def layer_id(self) -> int:
        """Of the decoder layer."""
        ...

    @property
    def primes(self) -> tuple[int, ...]:
        """Rows of each column."""
        ...

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each column."""
        ...

    @property
    def rows(self) -> int:
        """Of the table: those of its columns, and perhaps some behind them that no token reads."""
        ...

    def to_json(self) -> str:
        """All that its rows depend on."""
        ...


@dataclass(frozen=True)
class Traffic:
    """What one rank received from the others, in bytes; what stays on a rank is not counted.

    Attributes:
        fetches: in which it took part.
        ids: row numbers that others asked it for.
        rows: stored rows that others sent it.
        control: how many are asked for, and whether all went well.
    """

    fetches: int = 0
    ids: int = 0
    rows: int = 0
    control: int = 0

    @property
    def payload(self) -> int:
        """Row numbers and rows."""
        return self.ids + self.rows

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.fetches + other.fetches, self.ids + other.ids, self.rows + other.rows, self.control + other.control
        )


@dataclass(frozen=True)
class ShardPlan:
    """Contiguous rows of a table for each rank.

    Attributes:
        bounds: the first row of each rank, and behind them the number of all rows.
        columns: rows of one token that each rank owns; 0 where shards are ranges without regard to columns.
        table: what the rows are, as text (the hash constants of a layer); part of the checksum.

    Raises:
        ValueError: bounds that do not rise from 0, or too many ranks.
    """

    bounds: tuple[int, ...]
    columns: int = 0
    table: str = ""

    def __post_init__(self) -> None:
        if not 2 <= len(self.bounds) <= MOST_RANKS + 1:
            raise ValueError(f"bounds of {len(self.bounds) - 1} ranks: there are 1 .. {MOST_RANKS}")
        if self.bounds[0] != 0 or any(low > high for low, high in itertools.pairwise(self.bounds)):
            raise ValueError(f"bounds {self.bounds[:8]}: give rising row numbers, from 0 to the number of all rows")

    @classmethod
    def even(cls, rows: int, ranks: int, table: str = "") -> ShardPlan:
        """Ranges of equally many rows, or one more; of fewer rows than ranks, some are empty."""
        _check_ranks(ranks)
        return cls(tuple(rows * rank // ranks for rank in range(ranks + 1)), 0, table)

    @classmethod
    def of_layer(cls, layer: Columns, ranks: int) -> ShardPlan:
        """Whole columns where they divide by the ranks, otherwise ranges of rows.

        The last rank also owns the rows behind all columns, to which a table is filled up.

        Raises:
            ValueError: columns that do not lie one behind the other.
        """
        _check_ranks(ranks)
        starts = tuple(itertools.accumulate(layer.primes, initial=0))
        if layer.offsets != starts[:-1]:
            raise ValueError(
                f"layer {layer.layer_id}: its columns do not lie one behind the other: use ShardPlan.even(rows, ranks)"
            )
        columns, rest = divmod(len(layer.primes), ranks)
        if rest or not columns:
            return cls.even(layer.rows, ranks, layer.to_json())
        return cls((*starts[:-1:columns], layer.rows), columns, layer.to_json())

    @property
    def ranks(self) -> int:
        """How many share the rows."""
        return len(self.bounds) - 1

    @property
    def rows(self) -> int:
        """How many there are on all ranks."""
        return self.bounds[-1]

    @property
    def id_bytes(self) -> int:
        """Of a row number on its way to the owner."""
        return 4 if self.rows <= _INT32_MAX else 8

    @property
    def checksum(self) -> str:
        """SHA-256 of everything here, in hexadecimal digits: ranks with another one speak of another table."""
        content = {"bounds": self.bounds, "columns": self.columns, "table": self.table}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def first(self, rank: int) -> int:
        """Number of the first row of a rank."""
        return self.bounds[rank]

    def size(self, rank: int) -> int:
        """How many rows it owns."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def bytes_received(self, rank: int, tokens: Sequence[int], row_bytes: int) -> Traffic:
        """What a rank receives in one fetch of whole tokens, without `control`.

        Args:
            rank: which.
            tokens: of every rank.
            row_bytes: of a stored row.

        Raises:
            ValueError: shards that are no whole columns: what an owner is asked for depends on the tokens then.
        """
        if not self.columns or len(tokens) != self.ranks:
            raise ValueError(
                f"tokens of {len(tokens)} ranks, {self.ranks} own {self.columns or 'no'} whole columns each: bytes are "
                "known beforehand for the tokens of every rank, where each owns whole columns"
            )
        others = sum(tokens) - tokens[rank]
        asked = tokens[rank] * self.columns * (self.ranks - 1)
        return Traffic(1, others * self.columns * self.id_bytes, asked * row_bytes)


def _check_ranks(ranks: int) -> None:
    if not 1 <= ranks <= MOST_RANKS:
        raise ValueError(f"ranks={ranks}: there are 1 .. {MOST_RANKS}")
