"""Token ids in, rows of all layers out, without the CPU: what a decode step does where the GPU reads the tables.

    lookup = DeviceLookup(plan, {1: table_1, 15: table_15}, vocab)
    tail = lookup.new_tail(batch)                                   # what came before: nothing
    found = lookup(token_ids, before=tail, after=tail)              # [B, T]; the tail has moved on
    hidden = engram_1(hidden, Ready(found.values[1]))

On CUDA with Triton a step of decoding is one launch, however many layers: each program compresses, checks and hashes
for itself, then gathers and decodes its rows, and the last one advances the history (`engram_ref.lookup.kernels`). A
long prompt is two, as hashing once is then worth a launch. Neither needs anything of the CPU, and both write where the
next replay of a CUDA graph will write again: with static `token_ids`, `tail` and `out` a call can be captured.
Elsewhere torch's own operations and the tables do it, and give the same integers and the same bits.

A token id outside the vocabulary counts as DEAD; `check` raises it. On a CPU it is refused at once.

    python -m pytest tests/ref/lookup/test_device.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from engram_ref.hashing.device import DeviceHasher, Hashed
from engram_ref.hashing.device_ids import DeviceVocab
from engram_ref.hashing.plan import HashPlan
from engram_ref.ids import DEAD
from engram_ref.tables.base import Table, written_by_address
from engram_ref.vocab import CompressedVocab

# Up to about as many rows as there are programs of two that run at once on an H100 (132 processors, 32 programs each):
# then hashing anew in every program takes no longer than it takes one. Estimated; to be measured on a GPU.
ONE_LAUNCH_ROWS = 8192


class Found(NamedTuple):
    """What a lookup found.

    Attributes:
        values: of the rows, by layer id: [B*T*C, D].
        rows: row numbers, by layer id: [B, T, C].
        compressed: compressed ids, int64 [B, T].
    """

    values: dict[int, Tensor]
    rows: dict[int, Tensor]
    compressed: Tensor


class DeviceLookup:
    """The lookup of all layers of a model.

    Args:
        plan: of the hash.
        tables: by layer id, all of one row format, which want their row numbers on one device and deliver there
            (placement device or uva). They stay the caller's to close.
        vocab: token id -> compressed id; None where token ids are compressed already.
        fused: True for the kernels, False for torch operations, None for the kernels on CUDA where they can serve
            these tables.
        launches: of the kernels: 1 for the one that does all, 2 for one that hashes and one that gathers, None for
            whichever fits the batch.

    Attributes:
        fused: whether it is the kernels.

    Raises:
        ValueError: tables of several devices or formats, a table with fewer rows than the plan's layer, a vocabulary
            of another size, or kernels that are asked for and cannot serve.
    """

    def __init__(
        self,
        plan: HashPlan,
        tables: Mapping[int, Table],
        vocab: CompressedVocab | DeviceVocab | None = None,
        fused: bool | None = None,
        launches: int | None = None,
    ) -> None:
        if launches not in (None, 1, 2):
            raise ValueError(f"launches={launches!r}: give 1, 2, or None for whichever fits the batch")
        if plan.segment_end is not None:  # the kernel that does all does not know of ends of text
            if launches == 1:
                raise ValueError("launches=1: this plan's texts have an end that n-grams stop at; use 2 or None")
            launches = 2
        self._launches = launches
        self._tables = {layer.layer_id: tables[layer.layer_id] for layer in plan.layers if layer.layer_id in tables}
        _check_tables(plan, tables)
        self.plan = dataclasses.replace(plan, layers=tuple(plan.layer(layer_id) for layer_id in self._tables))
        first = next(iter(tables.values()))
        self.device, self.format = first.device, first.format
        why_not = _why_not_fused(list(self._tables.values()))
        if fused and why_not:
            raise ValueError(f"fused=True: {why_not}; use fused=False")
        self._hasher = DeviceHasher(self.plan, self.device, False if why_not else fused)
        self.fused = self._hasher.fused
        self._vocab = DeviceVocab(vocab, self.device) if isinstance(vocab, CompressedVocab) else vocab
        self._together = _together(self._tables, self.device) if self.fused else None
        if self.fused:
            from engram_ref.lookup.kernels import look_up  # needs Triton

            self._look_up = look_up
        self._counts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def layer_ids(self) -> list[int]:
        """Of the layers that are looked up, in the plan's order."""
        return list(self._tables)

    def new_tail(self, batch: int) -> Tensor:
        """The compressed ids before sequences that begin: DEAD, int64 [B, N-1]."""
        return torch.full((batch, self.plan.max_ngram - 1), DEAD, dtype=torch.int64, device=self.device)

    def new_rows(self, batch: int, length: int) -> Tensor:
        """A buffer for the values of token ids [B, T], to be given as `out`: [L, B*T*C, D]."""
        count = batch * length * len(self.plan.layers[0].primes)
        return torch.empty((len(self._tables), count, self.format.width), dtype=self.format.dtype, device=self.device)

    def __call__(
        self,
        token_ids: Tensor,
        before: Tensor | None = None,
        after: Tensor | None = None,
        dead: Tensor | None = None,
        stand_in: int = DEAD,
        out: Tensor | None = None,
    ) -> Found:
        """Look up the rows of a chunk, on the current stream.

        Args:
            token_ids, before, after, dead, stand_in: see `DeviceHasher.from_tokens`; `after` may be `before`, which is
                then advanced where it lies.
            out: [L, B*T*C, D], contiguous, to write the values into (`new_rows`); nobody may still be reading it.

        Raises:
            ValueError: as `DeviceHasher.from_tokens`; an `out` that does not fit; a table that was closed.
        """
        if self._together is not None:
            return self._by_kernels(self._together, token_ids, before, after, dead, stand_in, out)
        hashed = self._hasher.from_tokens(token_ids, self._vocab, before, after, dead, stand_in)
        out = self._room(token_ids, out)
        for table, wanted, values in zip(self._tables.values(), hashed.rows.flatten(1), out):
            table.start(wanted, values).wait()
        return self._found(out, hashed)

    def _by_kernels(
        self,
        tables: Any,
        token_ids: Tensor,
        before: Tensor | None,
        after: Tensor | None,
        dead: Tensor | None,
        stand_in: int,
        out: Tensor | None,
    ) -> Found:
        """In one launch or two, of `tables`, the rows of all layers."""

        def at_once(*arguments: Any, **named: Any) -> Tensor:
            nonlocal out
            out = self._room(token_ids, out)
            return self._look_up(tables, out, self._done(before, after), *arguments, **named)

        count = len(self._tables) * token_ids.numel() * len(self.plan.layers[0].primes)
        single = self._launches == 1 or (self._launches is None and count <= ONE_LAUNCH_ROWS)
        with ExitStack() as inside:
            for table in self._tables.values():
                inside.enter_context(table.inside())
                table.in_place()  # raises for one whose memory is gone
            hash_with = at_once if single else None
            hashed = self._hasher.from_tokens(token_ids, self._vocab, before, after, dead, stand_in, hash_with)
            if not single:
                out = self._room(token_ids, out)
                tables.gather(hashed.rows.flatten(1), out)
        assert out is not None
        for table in self._tables.values():
            table.count(out.shape[1])
        return self._found(out, hashed)

    def _done(self, before: Tensor | None, after: Tensor | None) -> Tensor | None:
        """The counts of programs that have read a tail which is advanced where it lies; a captured graph keeps them."""
        if before is None or after is None or before.data_ptr() != after.data_ptr():
            return None
        if after not in self._counts:
            self._counts[after] = torch.zeros(len(after), dtype=torch.int32, device=self.device)
        return self._counts[after]

    def _found(self, out: Tensor, hashed: Hashed) -> Found:
        return Found(dict(zip(self._tables, out)), dict(zip(self._tables, hashed.rows)), hashed.compressed)

    def _room(self, token_ids: Tensor, out: Tensor | None) -> Tensor:
        """Where the values go, checked."""
        if out is None:
            return self.new_rows(*token_ids.shape)
        shape = (len(self._tables), token_ids.numel() * len(self.plan.layers[0].primes), self.format.width)
        if tuple(out.shape) != shape or out.dtype != self.format.dtype or not out.is_contiguous():
            raise ValueError(
                f"out of shape {tuple(out.shape)}, {out.dtype}: these token ids need a contiguous {list(shape)}, "
                f"{self.format.dtype}: make it with new_rows"
            )
        if out.device.type != self.device.type:
            raise ValueError(f"out on {out.device}; this lookup delivers to {self.device}")
        return written_by_address(out)

    def check(self) -> None:
        """Wait for the device and raise if an id outside the vocabulary was met since the last check.

        Raises:
            ValueError: names one such id.
        """
        if self._vocab is not None:
            self._vocab.check()
        self._hasher.check()


def can_fuse(tables: Mapping[int, Table]) -> bool:
    """Whether the kernels serve these tables."""
    return _why_not_fused(list(tables.values())) is None


def _why_not_fused(tables: list[Table]) -> str | None:
    """What keeps the kernels from reading these tables, if anything does."""
    try:
        from engram_ref import gpu
    except ImportError as error:
        return f"Triton is missing ({error})"
    rows = [table.in_place() for table in tables]
    for table, found in zip(tables, rows):
        if found is None:
            return f"a table of placement {table.placement} whose rows no kernel can read"
    if not gpu.can_run_on(tables[0].device):
        return f"the kernels need a CUDA device, not {tables[0].device}"
    if len({len(found.parts) for found in rows if found is not None}) > 1:
        return "some tables have codes and scales apart and others together"
    return None


def _check_tables(plan: HashPlan, tables: Mapping[int, Table]) -> None:
    if not tables:
        raise ValueError("no tables: give the table of each layer, by layer id")
    first = next(iter(tables.values()))
    for layer_id, table in tables.items():
        if table.index_device.type != table.device.type:
            raise ValueError(
                f"a {table.placement} table of layer {layer_id} wants row numbers on {table.index_device}: the CPU "
                "looks them up; use a Prefetcher"
            )
        if (table.format, table.device) != (first.format, first.device):
            raise ValueError(
                f"layer {layer_id} has {table.format} on {table.device}, another one {first.format} on "
                f"{first.device}: one lookup serves tables that are alike"
            )
        if table.rows < plan.layer(layer_id).rows:
            raise ValueError(
                f"a table of {table.rows} rows for layer {layer_id}, whose hash has {plan.layer(layer_id).rows}: "
                "make the table for this plan"
            )


def _together(tables: Mapping[int, Table], device: torch.device) -> Any:
    from engram_ref.rows import kernels

    rows = [found for found in (table.in_place() for table in tables.values()) if found is not None]
    row_format = rows[0].format
    return kernels.LayerRows([found.parts for found in rows], row_format.scaled, row_format.width, device)
