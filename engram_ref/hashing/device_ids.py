"""Ids on a device: the vocabulary that compresses them, the last ones of each sequence, and those that may not come.

`DeviceVocab` and `DeviceHistory` are the device's CompressedVocab and TokenHistory. On a CPU an id outside the
vocabulary is refused at once. On CUDA it is remembered, and `check` raises it; until then it counts as DEAD.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.devices import as_device
from engram_ref.hashing.ngram import TokenHistory
from engram_ref.hashing.plan import HashPlan
from engram_ref.ids import DEAD

if TYPE_CHECKING:
    from engram_ref.vocab import CompressedVocab

INTEGERS = (torch.int32, torch.int64)


def _known_at_once(device: torch.device) -> bool:
    """Whether looking at a value makes nobody wait."""
    return device.type == "cpu"


class IdRange:
    """The ids that may come, and the extremes of those that came, kept on the device until somebody asks."""

    def __init__(self, what: str, least: int, size: int, device: torch.device) -> None:
        self.what = what
        self.least = least
        self.size = size
        self.device = device
        self.met = torch.zeros(2, dtype=torch.int64, device=device)  # lowest, highest; 0 is in every vocabulary

    def check_batch(self, ids: Tensor) -> None:
        """Refuse what is no batch of ids on this device, whatever the ids are."""
        if ids.dtype not in INTEGERS:
            raise ValueError(f"{self.what} of dtype {ids.dtype}: give int32 or int64")
        if ids.ndim != 2:
            raise ValueError(f"{self.what} of shape {tuple(ids.shape)}: give a batch of sequences, [B, T]")
        if ids.numel() == 0:
            raise ValueError(f"{self.what} of shape {tuple(ids.shape)}: an empty batch has nothing to look up")
        if ids.device != self.met.device:
            raise ValueError(f"{self.what} on {ids.device}; they are wanted on {self.met.device}: move them there")

    def admit(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest ids that may come, int64, and which of these came; others are raised on a CPU, or by `check`."""
        ids = ids.to(torch.int64)
        low, high = ids.aminmax()
        if _known_at_once(self.device):  # not by way of `met`: what several threads share may hold another's
            self._refuse([int(low), int(high)])
        else:  # to ask at every call would stop the CPU until the device has caught up
            torch.minimum(self.met[0], low, out=self.met[0])
            torch.maximum(self.met[1], high, out=self.met[1])
        nearest = ids.clamp(self.least, self.size - 1)
        return nearest, nearest == ids

    def check_now(self) -> None:
        """`check` where it costs no waiting: on a CPU."""
        if _known_at_once(self.device):
            self.check()

    def check(self) -> None:
        """Raise if a bad id was met, once."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # whatever stream met it
        met = self.met.tolist()
        if any(met):
            self.met.zero_()
        self._refuse(met)

    def _refuse(self, met: list[int]) -> None:
        for wrong in met:
            if not self.least <= wrong < self.size:
                raise ValueError(f"{self.what} contain {wrong}; the vocabulary has {self.least} .. {self.size - 1}")


class DeviceVocab:
    """A compressed vocabulary on a device: token id -> compressed id, by one gather from a map uploaded once."""

    def __init__(self, vocab: CompressedVocab, device: str | torch.device) -> None:
        self.device = as_device(device)
        self.size = len(vocab)
        self.map = torch.tensor(vocab.ids, device=self.device)  # int64 [tokens]
        self.allowed = IdRange("token ids", 0, len(vocab.ids), self.device)

    def __call__(self, token_ids: Tensor, dead: Tensor | None = None) -> Tensor:
        """Compressed ids of a batch, int64 [B, T].

        Args:
            token_ids: int32 or int64 [B, T] in 0 .. number of tokens - 1.
            dead: optional booleans [B, T]; where true the result is DEAD and the token id is not looked at.

        Raises:
            ValueError: wrong dtype, shape or device, an empty batch; an id outside the vocabulary at once on a CPU,
                from `check` on CUDA, until when it becomes DEAD.
        """
        self.check_batch(token_ids, dead)
        return self.look_up(token_ids, dead, DEAD)

    def look_up(self, token_ids: Tensor, dead: Tensor | None, stand_in: int) -> Tensor:
        """The same without looking at what is given, and with any compressed id where `dead` is true."""
        if dead is not None:
            token_ids = token_ids.masked_fill(dead, 0)
        nearest, good = self.allowed.admit(token_ids)
        compressed = torch.where(good, self.map[nearest], DEAD)  # [B, T]
        return compressed if dead is None else compressed.masked_fill_(dead, stand_in)

    def check_batch(self, token_ids: Tensor, dead: Tensor | None) -> None:
        """Refuse what is no batch of token ids on this device, or no mask of it."""
        self.allowed.check_batch(token_ids)
        if dead is not None and (
            dead.dtype != torch.bool or dead.shape != token_ids.shape or dead.device != token_ids.device
        ):
            raise ValueError(
                f"dead is {dead.dtype} {tuple(dead.shape)} on {dead.device}: "
                f"give booleans of shape {tuple(token_ids.shape)} on {token_ids.device}"
            )

    def check(self) -> None:
        """Wait for the device and raise if a token id outside the vocabulary was met since the last check."""
        self.allowed.check()


class DeviceHistory:
    """The last max_ngram - 1 compressed ids of each sequence, on a device; see `engram_ref.hashing.TokenHistory`.

    On CUDA `advance` takes ids as they are: a bad one that reaches a hash is reported by the hasher's `check`.
    """

    def __init__(self, plan: HashPlan, batch_size: int, device: str | torch.device) -> None:
        self._ids = IdRange("compressed ids", DEAD, plan.compressed_size, as_device(device))
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
        width = self.ids.shape[1]
        last = compressed_ids[:, -width:].to(torch.int64)
        self.ids = torch.cat([self.ids, last], dim=1)[:, -width:].contiguous()

    def copy(self) -> DeviceHistory:
        """An independent history in the same state."""
        return copy.copy(self)


def history_of_ids(plan: HashPlan, ids: Tensor, on_device: bool) -> TokenHistory | DeviceHistory:
    """What came before, by its last compressed ids [B, N-1], for a hasher on their device or for one of arrays."""
    if on_device:
        history = DeviceHistory(plan, len(ids), ids.device)
        history.ids = ids.contiguous()
        return history
    before = TokenHistory(plan, len(ids))
    before.ids = ids.contiguous().numpy()
    return before
