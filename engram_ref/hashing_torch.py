"""From token ids to row indices on the device: for tables that the device reads by itself, so the CPU is left out.

`DeviceHasher` gives the indices of `engram_ref.hashing.NgramHasher` bit for bit, for all layers of a plan at once,
in one of two ways: plain torch operations, readable, on any device; or one Triton kernel. `DeviceVocab` and
`DeviceHistory` are the device's CompressedVocab and TokenHistory.

    vocab, hasher = DeviceVocab(vocab, "cuda"), DeviceHasher(plan, "cuda")
    rows = hasher(vocab(token_ids))         # {layer_id: [B, T, C]}
    ...
    vocab.check(), hasher.check()           # now and then: both wait for the device

Whether an id is in the vocabulary is known on the device; to ask at every call would stop the CPU until the
device has caught up. On CUDA a bad id is therefore remembered there, and `check` raises what it would have raised
at once; until then the id counts as DEAD, so that every index is one of the table's rows and no memory is misread.
On a CPU a bad id is refused at once.

    python -m pytest tests/ref/test_hashing_torch.py
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engram_ref.hashing import DEAD, INT32_MAX, INT64_MAX, HashPlan, LayerPlan

if TYPE_CHECKING:
    from engram_ref.vocab import CompressedVocab

_INTEGERS = (torch.int32, torch.int64)


class DeviceHasher:
    """Row indices of every position, for all layers of a plan.

    Args:
        plan: the integers to hash with.
        device: where the ids are and the indices are wanted.
        fused: True for the Triton kernel, False for torch operations, None for the kernel on CUDA where Triton
            is installed.

    Raises:
        ValueError: a kernel is asked for that cannot run here, or a multiplier is no 64-bit integer.
    """

    def __init__(self, plan: HashPlan, device: str | torch.device, fused: bool | None = None) -> None:
        largest = max(m for layer in plan.layers for m in layer.multipliers)
        if largest > INT64_MAX:
            raise ValueError(f"multiplier {largest} exceeds 2^63 - 1: torch has no integers for it; use NgramHasher")
        self.plan = plan
        self.device = torch.device(device)
        self._ids = _IdRange("compressed ids", DEAD, plan.compressed_size, self.device)
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


class DeviceHistory:
    """The last max_ngram - 1 compressed ids of each sequence, on a device; see `engram_ref.hashing.TokenHistory`.

    On CUDA `advance` takes ids as they are: a bad one that reaches a hash is reported by the hasher's `check`.
    """

    def __init__(self, plan: HashPlan, batch_size: int, device: str | torch.device) -> None:
        self._ids = _IdRange("compressed ids", DEAD, plan.compressed_size, torch.device(device))
        shape = (batch_size, plan.max_ngram - 1)
        self.ids = torch.full(shape, DEAD, dtype=torch.int64, device=device)  # [B, N-1], replaced, never written to

    def advance(self, compressed_ids: Tensor) -> None:
        """Append a chunk [B, T], T = 0 included, and keep what the next one needs."""
        if compressed_ids.ndim != 2 or len(compressed_ids) != len(self.ids):
            raise ValueError(
                f"chunk of shape {tuple(compressed_ids.shape)}; this history follows {len(self.ids)} sequences: [B, T]"
            )
        if compressed_ids.numel() == 0:
            return
        self._ids.check_batch(compressed_ids)
        if self._ids.device.type == "cpu":
            self._ids.admit(compressed_ids)
            self._ids.check()
        width = self.ids.shape[1]
        last = compressed_ids[:, -width:].to(torch.int64)
        self.ids = torch.cat([self.ids, last], dim=1)[:, -width:].contiguous()

    def copy(self) -> DeviceHistory:
        """An independent history in the same state."""
        return copy.copy(self)


class DeviceVocab:
    """A compressed vocabulary on a device: token id -> compressed id, by one gather from a map uploaded once."""

    def __init__(self, vocab: CompressedVocab, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._map = torch.tensor(vocab.ids, device=self.device)  # int64 [tokens]
        self._tokens = _IdRange("token ids", 0, len(vocab.ids), self.device)

    def __call__(self, token_ids: Tensor, dead: Tensor | None = None) -> Tensor:
        """Compressed ids of a batch, int64 [B, T].

        Args:
            token_ids: int32 or int64 [B, T] in 0 .. number of tokens - 1.
            dead: optional booleans [B, T]; where true the result is DEAD and the token id is not looked at.

        Raises:
            ValueError: wrong dtype, shape or device, an empty batch; an id outside the vocabulary at once on a CPU,
                from `check` on CUDA, until when it becomes DEAD.
        """
        self._tokens.check_batch(token_ids)
        if dead is not None:
            if dead.dtype != torch.bool or dead.shape != token_ids.shape or dead.device != token_ids.device:
                raise ValueError(
                    f"dead is {dead.dtype} {tuple(dead.shape)} on {dead.device}: "
                    f"give booleans of shape {tuple(token_ids.shape)} on {token_ids.device}"
                )
            token_ids = token_ids.masked_fill(dead, 0)
        good = self._tokens.admit(token_ids)
        self._tokens.check_now()
        if dead is not None:
            good = good & ~dead
        return torch.where(good, self._map[torch.where(good, token_ids, 0).to(torch.int64)], DEAD)

    def check(self) -> None:
        """Wait for the device and raise if a token id outside the vocabulary was met since the last check."""
        self._tokens.check()


class _IdRange:
    """The ids that may come, and one that came although it may not, kept on the device until somebody asks."""

    def __init__(self, what: str, least: int, size: int, device: torch.device) -> None:
        self.what = what
        self.least = least
        self.size = size
        self.device = device
        self.bad_id = torch.zeros(1, dtype=torch.int64, device=device)  # 0 is in every vocabulary: none came

    def check_batch(self, ids: Tensor) -> None:
        """Refuse what is no batch of ids on this device, whatever the ids are."""
        if ids.dtype not in _INTEGERS:
            raise ValueError(f"{self.what} of dtype {ids.dtype}: give int32 or int64")
        if ids.ndim != 2:
            raise ValueError(f"{self.what} of shape {tuple(ids.shape)}: give a batch of sequences, [B, T]")
        if ids.numel() == 0:
            raise ValueError(f"{self.what} of shape {tuple(ids.shape)}: an empty batch has nothing to look up")
        if ids.device != self.bad_id.device:
            raise ValueError(f"{self.what} on {ids.device}; they are wanted on {self.bad_id.device}: move them there")

    def admit(self, ids: Tensor) -> Tensor:
        """Which ids are in the vocabulary, booleans; of the others one is raised on a CPU, and remembered elsewhere."""
        good = (ids >= self.least) & (ids < self.size)
        wrong = torch.where(good, 0, ids).to(torch.int64)
        low, high = wrong.amin(), wrong.amax()
        found = torch.where(low < 0, low, high)
        if self.device.type == "cpu":  # not by way of `bad_id`: what several threads share may hold another's
            self._refuse(int(found))
        else:
            self.bad_id.copy_(torch.where(found == 0, self.bad_id, found))
        return good

    def check_now(self) -> None:
        """`check` where it costs no waiting: on a CPU."""
        if self.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise if a bad id was met, once."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # whatever stream met it
        wrong = int(self.bad_id)
        if wrong:
            self.bad_id.zero_()
        self._refuse(wrong)

    def _refuse(self, wrong: int) -> None:
        if wrong:
            raise ValueError(f"{self.what} contain {wrong}; the vocabulary has {self.least} .. {self.size - 1}")


class _Plain:
    """The definition, in torch operations: one order after the other, all heads of an order at once."""

    def __init__(self, plan: HashPlan, allowed: _IdRange) -> None:
        self.plan = plan
        self._ids = allowed
        self._layers = [(layer, *self._upload(layer)) for layer in plan.layers]

    def _upload(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        primes, offsets = (torch.tensor(x, device=self._ids.device) for x in (layer.primes, layer.offsets))
        return primes, offsets  # int64 [C] each

    def __call__(self, ids: Tensor, before: Tensor) -> dict[int, Tensor]:
        padded = torch.cat([before, ids], dim=1)  # [B, N-1 + T]
        padded = torch.where(self._ids.admit(padded), padded, DEAD)
        length = ids.shape[1]
        context = self.plan.max_ngram - 1
        shifts = []
        blocked = torch.zeros_like(ids, dtype=torch.bool)
        for s in range(self.plan.max_ngram):
            shifted = padded[:, context - s : context - s + length]  # ids at p - s
            blocked = blocked | (shifted == DEAD)
            shifts.append(torch.where(blocked, self.plan.pad_compressed, shifted))
        return {layer.layer_id: self._hash(layer, shifts, *constants) for layer, *constants in self._layers}

    def _hash(self, layer: LayerPlan, shifts: list[Tensor], primes: Tensor, offsets: Tensor) -> Tensor:
        heads = self.plan.heads
        rows = torch.empty((*shifts[0].shape, len(primes)), dtype=_row_dtype(layer), device=primes.device)  # [B, T, C]
        mix = shifts[0] * layer.multipliers[0]
        for s in range(1, self.plan.max_ngram):
            mix = mix ^ (shifts[s] * layer.multipliers[s])
            order = slice((s - 1) * heads, s * heads)
            rows[:, :, order] = mix[:, :, None] % primes[order] + offsets[order]
        return rows


class _Fused:
    """The same in one launch of a Triton kernel; in two where some layers' indices are int32 and others' int64."""

    def __init__(self, plan: HashPlan, allowed: _IdRange) -> None:
        self.plan = plan
        self._ids = allowed
        self._kernels = _import_kernels()
        if not self._kernels.can_run_on(allowed.device):
            raise ValueError(f"fused=True on {allowed.device}: the kernel needs a CUDA device; use fused=False")
        self._launches = []
        for dtype in _INTEGERS:
            layers = [layer for layer in plan.layers if _row_dtype(layer) == dtype]
            if layers:
                constants = self._kernels.pack_constants(layers, allowed.device)
                self._launches.append((dtype, [layer.layer_id for layer in layers], constants))

    def __call__(self, ids: Tensor, before: Tensor) -> dict[int, Tensor]:
        rows: dict[int, Tensor] = {}
        for dtype, layer_ids, constants in self._launches:
            hashed = self._kernels.hash_layers(self.plan, ids, before, constants, dtype, self._ids.bad_id)
            rows.update(zip(layer_ids, hashed))
        return {layer.layer_id: rows[layer.layer_id] for layer in self.plan.layers}


def _row_dtype(layer: LayerPlan) -> torch.dtype:
    return torch.int32 if layer.rows <= INT32_MAX else torch.int64


def _import_kernels() -> ModuleType:
    try:
        from engram_ref import kernels
    except ImportError as error:
        raise ValueError(f"the fused hash needs Triton ({error}): pip install triton, or use fused=False") from error
    return kernels


def _triton_is_there() -> bool:
    try:
        _import_kernels()
    except ValueError:
        return False
    return True
