"""From token ids to row indices on the device: for tables that the device reads by itself, so the CPU is left out.

`DeviceHasher` gives the indices of `engram_ref.hashing.NgramHasher` bit for bit, for all layers of a plan at once,
in one of two ways: plain torch operations, readable, on any device; or one Triton kernel.

    vocab, hasher = DeviceVocab(vocab, "cuda"), DeviceHasher(plan, "cuda")
    rows = hasher(vocab(token_ids))         # {layer_id: [B, T, C]}
    hashed = hasher.from_tokens(token_ids, vocab, before=tail, after=tail)      # the same, and the history: one launch
    ...
    vocab.check(), hasher.check()           # now and then: both wait for the device

An id outside the vocabulary counts as DEAD until `check` raises it (`engram_ref.hashing.device_ids`), so that every
index is one of the table's rows and no memory is misread.

    python -m pytest tests/ref/hashing/test_device.py
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.devices import as_device
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab, IdRange
from engram_ref.hashing.plan import INT32_MAX, HashPlan, LayerPlan
from engram_ref.ids import DEAD


class DeviceHasher:
    """Row indices of every position, for all layers of a plan.

    Args:
        plan: the integers to hash with.
        device: where the ids are and the indices are wanted.
        fused: True for the Triton kernel, False for torch operations, None for the kernel on CUDA where Triton
            is installed.

    Raises:
        ValueError: a kernel is asked for that cannot run here.
    """

    def __init__(self, plan: HashPlan, device: str | torch.device, fused: bool | None = None) -> None:
        self.plan = plan
        self.device = as_device(device)
        self._ids = IdRange("compressed ids", DEAD, plan.compressed_size, self.device)
        self._nothing = torch.full((1, plan.max_ngram - 1), DEAD, dtype=torch.int64, device=self.device)
        if fused is None:
            fused = self.device.type == "cuda" and _triton_is_there()
        self.fused = fused
        self._way = _Fused(plan, self._ids) if fused else _Plain(plan, self._ids)

    def __call__(self, compressed_ids: Tensor, history: DeviceHistory | None = None) -> dict[int, Tensor]:
        """Hash compressed ids [B, T] into row indices [B, T, C] of every layer, offsets added.

        Args:
            compressed_ids: int32 or int64 in 0 .. compressed_size - 1, or DEAD (-1), on the hasher's device.
            history: what came before this chunk; it is read, not advanced.

        Returns:
            By layer_id; int32 where the layer's table has at most 2^31 - 1 rows, else int64.

        Raises:
            ValueError: wrong dtype, shape or device, an empty batch; an id outside the vocabulary at once on a CPU,
                from `check` on CUDA.
        """
        self._ids.check_batch(compressed_ids)
        rows = self._way(compressed_ids, self._before(compressed_ids, history))
        self._ids.check_now()
        return rows

    def from_tokens(
        self,
        token_ids: Tensor,
        vocab: DeviceVocab | None = None,
        before: Tensor | None = None,
        after: Tensor | None = None,
        dead: Tensor | None = None,
        stand_in: int = DEAD,
        hash_with: Callable[..., Tensor] | None = None,
    ) -> Hashed:
        """Compress, hash for all layers and advance: one launch of the kernel, which a CUDA graph can capture.

        Args:
            token_ids: int32 or int64 [B, T], with any strides, on the hasher's device.
            vocab: on that device; None where the token ids are compressed already.
            before: the compressed ids before this chunk, int64 [B, W] with W >= N - 1, DEAD where there are none; each
                row contiguous. None where sequences begin.
            after: int64 [B, W'], contiguous: takes the last ids of `before` and the chunk together. It may be `before`
                itself, as a graph that is replayed needs it.
            dead: booleans [B, T]; where true the token id is not looked at, and `stand_in` is its compressed id.
            stand_in: DEAD, or a compressed id.
            hash_with: takes the kernel's place, with the arguments and the result of
                `engram_ref.hashing.kernels.hash_layers`; for one that does more. Torch's operations have no such place.

        Raises:
            ValueError: as for a call; an id outside the vocabulary counts as DEAD until `check` raises it, here and in
                the vocabulary.
        """
        self._check_tokens(token_ids, vocab, dead, stand_in)
        self._check_tails(token_ids, before, after)
        if before is None:
            before = self._nothing.expand(len(token_ids), -1)
        way = self._way
        if hash_with is not None:
            assert isinstance(way, _Fused)
            hashed = way.from_tokens(token_ids, vocab, before, after, dead, stand_in, hash_with)
        else:
            hashed = way.from_tokens(token_ids, vocab, before, after, dead, stand_in)
        if vocab is not None:
            vocab.allowed.check_now()
        self._ids.check_now()
        return hashed

    def _check_tokens(self, ids: Tensor, vocab: DeviceVocab | None, dead: Tensor | None, stand_in: int) -> None:
        if vocab is None:
            self._ids.check_batch(ids)
        else:
            vocab.check_batch(ids, dead)
            if vocab.size != self.plan.compressed_size:
                raise ValueError(
                    f"a vocabulary of {vocab.size} compressed ids; the plan was made for {self.plan.compressed_size}: "
                    "build it from this vocabulary"
                )
        if not DEAD <= stand_in < self.plan.compressed_size:
            raise ValueError(
                f"stand_in={stand_in}: give DEAD ({DEAD}) or a compressed id, below {self.plan.compressed_size}"
            )

    def _check_tails(self, ids: Tensor, before: Tensor | None, after: Tensor | None) -> None:
        context = self.plan.max_ngram - 1
        for name, tail, least in (("before", before, context), ("after", after, 1)):
            if tail is None:
                continue
            if tail.dtype != torch.int64 or tail.ndim != 2 or len(tail) != len(ids) or tail.shape[1] < least:
                raise ValueError(
                    f"{name} is {tail.dtype} {tuple(tail.shape)}; {len(ids)} sequences of this plan need int64 "
                    f"[{len(ids)}, {least} or more]"
                )
            if tail.device != ids.device:
                raise ValueError(f"{name} is on {tail.device}; the ids are on {ids.device}: make it there")
            if tail.stride(1) != 1 or (tail is after and not tail.is_contiguous()):
                raise ValueError(f"{name} of strides {tail.stride()}: its ids must lie one after the other")
        if after is None:
            return
        in_place = before is not None and before.is_contiguous() and _extent(before) == _extent(after)
        if _overlap(after, ids) or (before is not None and not in_place and _overlap(after, before)):
            raise ValueError("after shares memory with what is read: give `before` itself, or memory of its own")

    def _before(self, ids: Tensor, history: DeviceHistory | None) -> Tensor:
        if history is None:
            return self._nothing.expand(len(ids), -1)
        if history.ids.device != ids.device:
            raise ValueError(f"a history on {history.ids.device}; the ids are on {ids.device}: make it there")
        if history.ids.shape != (len(ids), self.plan.max_ngram - 1):
            raise ValueError(
                f"a history of {tuple(history.ids.shape)}; {len(ids)} sequences of this plan need "
                f"{(len(ids), self.plan.max_ngram - 1)}: make one with DeviceHistory(plan, batch_size, device)"
            )
        if ids.device.type == "cuda":  # the history may be advanced, and these ids let go, before they have been read
            history.ids.record_stream(torch.cuda.current_stream(ids.device))
        return history.ids

    def check(self) -> None:
        """Wait for the device and raise if an id outside the vocabulary was hashed since the last check.

        Raises:
            ValueError: names one such id.
        """
        self._ids.check()


class Hashed(NamedTuple):
    """What `DeviceHasher.from_tokens` found.

    Attributes:
        rows: row indices [L, B, T, C], layers in the plan's order; int32 where every layer's table has at most
            2^31 - 1 rows, else int64.
        compressed: compressed ids, int64 [B, T].
    """

    rows: Tensor
    compressed: Tensor


class _Plain:
    """The definition, in torch operations: one order after the other, all heads of an order at once."""

    def __init__(self, plan: HashPlan, allowed: IdRange) -> None:
        self.plan = plan
        self._ids = allowed
        self._layers = [(layer, *self._upload(layer)) for layer in plan.layers]

    def _upload(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        primes, offsets = (torch.tensor(x, device=self._ids.device) for x in (layer.primes, layer.offsets))
        return primes, offsets  # int64 [C] each

    def __call__(self, ids: Tensor, before: Tensor) -> dict[int, Tensor]:
        padded = self._admitted(torch.cat([before, ids], dim=1))  # [B, N-1 + T]
        length = ids.shape[1]
        context = self.plan.max_ngram - 1
        shifts = []  # N times [B, T]
        blocked = torch.zeros_like(ids, dtype=torch.bool)
        for s in range(self.plan.max_ngram):
            shifted = padded[:, context - s : context - s + length]  # ids at p - s
            blocked = blocked | (shifted == DEAD)
            if s and self.plan.segment_end is not None:  # a position's own id does not end what it belongs to
                blocked = blocked | (shifted == self.plan.segment_end)
            shifts.append(torch.where(blocked, self.plan.pad_compressed, shifted))
        return {layer.layer_id: self._hash(layer, shifts, *constants) for layer, *constants in self._layers}

    def _admitted(self, ids: Tensor) -> Tensor:
        """Ids, DEAD for those that are none."""
        nearest, good = self._ids.admit(ids)
        return torch.where(good, nearest, DEAD)

    def from_tokens(
        self,
        token_ids: Tensor,
        vocab: DeviceVocab | None,
        before: Tensor,
        after: Tensor | None,
        dead: Tensor | None,
        stand_in: int,
    ) -> Hashed:
        if vocab is not None:
            ids = vocab.look_up(token_ids, dead, stand_in)
        else:
            ids = token_ids.to(torch.int64) if dead is None else token_ids.to(torch.int64).masked_fill(dead, stand_in)
        ids = self._admitted(ids)  # where a bad id is refused at once, nothing has been advanced
        rows = self(ids, before[:, before.shape[1] - (self.plan.max_ngram - 1) :])
        if after is not None:
            kept = after.shape[1]
            missing = before.new_full((len(ids), max(0, kept - before.shape[1] - ids.shape[1])), DEAD)
            after.copy_(torch.cat([missing, before, ids], dim=1)[:, -kept:])
        dtype = _widest(self.plan)
        return Hashed(torch.stack([x.to(dtype) for x in rows.values()]), ids)

    def _hash(self, layer: LayerPlan, shifts: list[Tensor], primes: Tensor, offsets: Tensor) -> Tensor:
        heads = self.plan.heads
        rows = torch.empty((*shifts[0].shape, len(primes)), dtype=_row_dtype(layer), device=primes.device)  # [B, T, C]
        mix = shifts[0] * layer.multipliers[0]  # [B, T]
        for s in range(1, self.plan.max_ngram):
            mix = mix ^ (shifts[s] * layer.multipliers[s])
            order = slice((s - 1) * heads, s * heads)
            rows[:, :, order] = mix[:, :, None] % primes[order] + offsets[order]  # [B, T, heads]
        return rows


class _Fused:
    """The same in one launch of a Triton kernel, all layers in the widest of their dtypes."""

    def __init__(self, plan: HashPlan, allowed: IdRange) -> None:
        self.plan = plan
        self._ids = allowed
        self._kernels = _import_kernels()
        if not self._kernels.can_run_on(allowed.device):
            raise ValueError(f"fused=True on {allowed.device}: the kernel needs a CUDA device; use fused=False")
        self._constants = self._kernels.pack_constants(plan.layers, allowed.device)
        self._dtype = _widest(plan)

    def __call__(self, ids: Tensor, before: Tensor) -> dict[int, Tensor]:
        rows = self._kernels.hash_layers(self.plan, ids, before, self._constants, self._dtype, self._ids.met)
        return {layer.layer_id: x.to(_row_dtype(layer)) for layer, x in zip(self.plan.layers, rows)}

    def from_tokens(
        self,
        token_ids: Tensor,
        vocab: DeviceVocab | None,
        before: Tensor,
        after: Tensor | None,
        dead: Tensor | None,
        stand_in: int,
        hash_with: Callable[..., Tensor] | None = None,
    ) -> Hashed:
        compressed = torch.empty(token_ids.shape, dtype=torch.int64, device=token_ids.device)
        rows = (hash_with or self._kernels.hash_layers)(
            self.plan,
            token_ids,
            before,
            self._constants,
            self._dtype,
            self._ids.met,
            vocab=None if vocab is None else vocab.map,
            met_tokens=None if vocab is None else vocab.allowed.met,
            mask=dead,
            stand_in=stand_in,
            compressed=compressed,
            after=after,
        )
        return Hashed(rows, compressed)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and behind its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _overlap(one: Tensor, other: Tensor) -> bool:
    (first, end), (other_first, other_end) = _extent(one), _extent(other)
    return first < other_end and other_first < end


def _row_dtype(layer: LayerPlan) -> torch.dtype:
    return torch.int32 if layer.rows <= INT32_MAX else torch.int64


def _widest(plan: HashPlan) -> torch.dtype:
    return max(map(_row_dtype, plan.layers), key=lambda dtype: dtype.itemsize)


def _import_kernels() -> ModuleType:
    try:
        from engram_ref.hashing import kernels
    except ImportError as error:
        raise ValueError(f"the fused hash needs Triton ({error}): pip install triton, or use fused=False") from error
    return kernels


def _triton_is_there() -> bool:
    try:
        _import_kernels()
    except ValueError:
        return False
    return True
