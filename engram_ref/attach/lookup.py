"""Token ids in, a started fetch out: compress, hash with what came before, start to gather.

Ids are hashed where the tables want their row numbers: on the CPU, in one pass where it is a few of them, or on the
accelerator, where the CPU waits for nothing and one launch does it all, the history included
(`engram_ref.lookup.device`; two do, for a long prompt). All give the same rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_ref.attach.on_hand import OnHand
from engram_ref.attach.packing import Packing
from engram_ref.attach.step import give_back
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab, history_of_ids
from engram_ref.hashing.ngram import NgramHasher, TokenHistory
from engram_ref.hashing.plan import HashPlan
from engram_ref.histories.cache import CacheHistory
from engram_ref.ids import DEAD, check_ids
from engram_ref.layer import Engram
from engram_ref.lookup.device import DeviceLookup, can_fuse
from engram_ref.prefetch import Prefetcher
from engram_ref.tables.base import Pending, Ready
from engram_ref.vocab import CompressedVocab, map_digest

Room = Callable[[torch.Size, Iterable[int], Callable[[], Tensor]], Tensor | None]  # see `Staged.room`


class Source:
    """Where the rows of a step come from.

    Args:
        hasher: its device is where ids are wanted.
        vocab: as for `attach`.
        prefetcher: starts the fetches.
        form: of the layers, for padding.
        wait_at_once: let the current stream wait for what was started.

    Attributes:
        device: where ids are hashed.
        reads_on_cpu: whether the CPU needs the token ids, and so waits for the device that has them.
        token_ids: how many there are.

    Raises:
        ValueError: a vocabulary that the plan was not made for.
    """

    def __init__(
        self, hasher: NgramHasher | DeviceHasher, vocab: Any, prefetcher: Any, form: str, wait_at_once: bool
    ) -> None:
        self.plan: HashPlan = hasher.plan
        self.device = hasher.device if isinstance(hasher, DeviceHasher) else torch.device("cpu")
        self.prefetcher = prefetcher
        self._looks_up = not isinstance(prefetcher, OnHand)
        self._on_device = isinstance(hasher, DeviceHasher)
        self.reads_on_cpu = self._looks_up and not self._on_device
        self._hasher = hasher
        self._stand_in = DEAD if form == "v41" else self.plan.pad_compressed
        self._wait_at_once = wait_at_once and self._looks_up
        self._sent: tuple[Tensor, Any] | None = None  # where the last ids arrived that were sent for, and their event
        vocab = _as_vocab(vocab, self.plan)
        self.token_ids = self.plan.compressed_size if vocab is None else len(vocab.ids)
        self._on_cpu = None if self._on_device else vocab
        self._uploaded = DeviceVocab(vocab, self.device) if vocab is not None and self._on_device else None
        self._lookup = self._make_lookup()
        # The pass hashes for every layer of the plan, wanted or not.
        every = {layer.layer_id for layer in self.plan.layers} == getattr(prefetcher, "tables", {}).keys()
        self._in_one_pass = isinstance(prefetcher, Prefetcher) and self._on_cpu is not None and every

    def _make_lookup(self) -> DeviceLookup | None:
        """What does all in a launch or two, where it can."""
        if not (isinstance(self._hasher, DeviceHasher) and isinstance(self.prefetcher, Prefetcher)):
            return None
        if not self._hasher.fused or not can_fuse(self.prefetcher.tables):
            return None
        return DeviceLookup(self.plan, self.prefetcher.tables, self._uploaded, fused=True)

    def start(
        self,
        ids: Tensor,
        padding: Tensor | None,
        history: CacheHistory | None,
        room: Room | None = None,
        packing: Packing | None = None,
        waited_for: bool = False,
    ) -> tuple[Any, Pending | None]:
        """Begin to fetch the rows of all layers.

        Args:
            ids: token ids [B, T].
            padding: booleans [B, T], or None.
            history: of the sequences; it is read.
            room: gives the buffers that the rows of all layers are wanted in, if they are written by one launch.
            packing: how several sequences of one row are laid apart, or None; then the rows are of [B, W].
            waited_for: see `Prefetcher.start`.

        Returns:
            The fetch, and what is to be the history's `recent` after this step; None without a history.
        """
        if self._lookup is not None and packing is None:
            return self._look_up(self._lookup, ids.to(self.device), padding, history, room)
        hashed = None
        try:
            if packing is None and self._goes_in_one_pass(ids, waited_for) and (padding is None or not padding.any()):
                before = None if history is None else self._before(history)
                hashed = self.prefetcher.hash_tokens(ids.to(self.device).numpy(), self._on_cpu, before)
                compressed = torch.from_numpy(hashed.compressed)
            else:
                compressed = self.compress(ids, padding)
        except ValueError as error:
            if isinstance(self.prefetcher, Prefetcher):
                self.prefetcher.excuse(error)
            raise
        recent = None if history is None else Ready(history.followed_by(compressed))
        apart = compressed if packing is None else packing.spread(compressed).masked_fill(packing.apart, DEAD)
        fetch = None
        try:
            if hashed is not None:
                fetch = self.prefetcher.start_hashed(hashed, waited_for=waited_for)
            else:
                fetch = self._fetch(apart, history, waited_for)
            self._let_wait(fetch)
            return fetch, recent
        except BaseException:
            give_back(fetch)
            raise

    def _goes_in_one_pass(self, ids: Tensor, waited_for: bool) -> bool:
        """Not a prompt that the worker hashes while the model computes."""
        return self._in_one_pass and self.prefetcher.is_done_here(ids.numel(), waited_for)

    def send_for(self, ids: Tensor) -> Callable[[], Tensor] | None:
        """Have token ids copied to the CPU, which needs them, without waiting; what is returned waits for them.

        They stay until others are sent for. None where there is nothing to send for.
        """
        if not self.reads_on_cpu or ids.device.type != "cuda":
            return None
        if self._sent is None or self._sent[0].shape != ids.shape or self._sent[0].dtype != ids.dtype:
            with torch.inference_mode(False):  # written to in whatever mode a later step runs
                self._sent = torch.empty(ids.shape, dtype=ids.dtype, device="cpu", pin_memory=True), torch.cuda.Event()
        here, copied = self._sent  # page-locked memory and an event cost more to get than the copy does
        here.copy_(ids, non_blocking=True)
        copied.record(torch.cuda.current_stream(ids.device))  # which copies; the current device may be another

        def wait() -> Tensor:
            copied.synchronize()
            return here

        return wait

    def answer_of(self, shape: torch.Size) -> tuple[torch.Size, torch.dtype]:
        """Shape [L, B*T*C, D] and dtype of the rows that `answer` gives for token ids [B, T].

        Raises:
            ValueError: tables that the accelerator reads, of several formats, or none.
        """
        tables = getattr(self.prefetcher, "tables", {})
        formats = {table.format for table in tables.values()}
        if self._on_device or len(formats) != 1:
            raise ValueError("a step asks the CPU for the rows of tables that it gathers from, all of one format")
        (row_format,) = formats
        count = shape.numel() * len(self.plan.layers[0].primes)
        return torch.Size((len(tables), count, row_format.width)), row_format.dtype

    def answer(self, history: CacheHistory, ids: Tensor, values: Tensor) -> None:
        """Look up on the CPU, ask nothing of the accelerator, and let the history go on.

        Args:
            history: of the sequences.
            ids: token ids [B, T], on the CPU.
            values: takes the rows, [L, B*T*C, D], on the CPU; by layer as in `answered_layers`.
        """
        assert isinstance(self._hasher, NgramHasher)
        before = self._before(history)
        assert isinstance(before, TokenHistory)
        if self._in_one_pass and self._on_cpu is not None:
            found = self._hasher.from_tokens(ids.numpy(), self._on_cpu, before)
            compressed = found.compressed
            rows = {layer.layer_id: numbers for layer, numbers in zip(self.plan.layers, found.rows)}
        else:
            compressed = self.compress(ids).numpy()
            rows = {i: self._hasher(compressed, i, history=before) for i in self.answered_layers}
        for layer_id, out in zip(self.answered_layers, values):
            self.prefetcher.tables[layer_id].collect(torch.from_numpy(rows[layer_id].reshape(-1)), out)
        history.append(torch.from_numpy(compressed))

    @property
    def answered_layers(self) -> list[int]:
        """Layer ids in the order in which `answer` has them."""
        return list(self.prefetcher.tables)

    def _look_up(
        self,
        lookup: DeviceLookup,
        ids: Tensor,
        padding: Tensor | None,
        history: CacheHistory | None,
        room: Room | None,
    ) -> tuple[Any, Pending | None]:
        padding = None if padding is None else padding.to(self.device)
        out = (
            None if room is None else room(ids.shape, lookup.layer_ids, functools.partial(lookup.new_rows, *ids.shape))
        )

        def on_stream() -> tuple[dict[int, Tensor], Tensor]:
            for tensor in (ids, padding):
                if tensor is not None and tensor.is_cuda:  # the caller may let go of it
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            before = None if history is None else history.recent
            after = None if history is None else history.room_after(ids.shape[1])
            found = lookup(ids, before, after, padding, self._stand_in, out)
            return found.values, found.compressed if after is None else after

        fetch = None
        try:
            fetch, recent = self.prefetcher.start_lookup(on_stream)
            self._let_wait(fetch)
            if history is None:
                return fetch, None
            # Of a staged step, the model's stream waits at the blocks that read its rows, and for nothing before them:
            # ids that were advanced where they lie have been advanced by then.
            stays = room is not None and history.room_after(ids.shape[1]) is history.recent
            return fetch, Ready(history.recent) if stays else recent
        except BaseException:
            give_back(fetch)
            raise

    def _let_wait(self, fetch: Any) -> None:
        if self._wait_at_once:
            for pending in fetch.values():
                pending.wait()

    def compress(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Compressed ids, int64 [B, T]; padding as the form has it. Where nothing is looked up, nothing is read: 0."""
        if not self._looks_up:
            return torch.zeros(ids.shape, dtype=torch.int64, device=self.device)
        ids = ids.to(self.device)
        if padding is None:
            return self._compressed(ids)
        padding = padding.to(self.device)
        return self._compressed(ids.masked_fill(padding, 0)).masked_fill(padding, self._stand_in)

    def _compressed(self, ids: Tensor) -> Tensor:
        if self._uploaded is not None:
            return self._uploaded(ids)
        if self._on_cpu is not None:
            return torch.from_numpy(self._on_cpu(ids.numpy()))
        if not self._on_device:  # now, before any block has run: the worker would find out behind the first of them
            check_ids(ids.numpy(), self.token_ids, least=DEAD)
        return ids.to(torch.int64)

    def _fetch(self, compressed: Tensor, history: CacheHistory | None, waited_for: bool) -> Any:
        if not self._looks_up:
            return self.prefetcher.start(compressed)
        ids = compressed if self._on_device else compressed.numpy()
        before = None if history is None else self._before(history)
        if waited_for and isinstance(self.prefetcher, Prefetcher):
            return self.prefetcher.start(ids, before, waited_for=True)
        return self.prefetcher.start(ids, before)

    def _before(self, history: CacheHistory) -> TokenHistory | DeviceHistory:
        return history_of_ids(self.plan, history.context, self._on_device)

    def check(self) -> None:
        """Raise if a token id outside the vocabulary was met on the device."""
        if self._uploaded is not None:
            self._uploaded.check()
        if isinstance(self._hasher, DeviceHasher):
            self._hasher.check()
        if self._lookup is not None:
            self._lookup.check()


def make_hasher(
    plan: HashPlan | NgramHasher | DeviceHasher, engrams: Mapping[int, Engram], prefetcher: Any
) -> NgramHasher | DeviceHasher:
    """The hasher that was given, or the prefetcher's own, or one where the tables want their row numbers.

    Raises:
        ValueError: they want them in different places.
    """
    if not isinstance(plan, HashPlan):
        return plan
    if hasattr(prefetcher, "hasher"):
        return prefetcher.hasher
    devices = {engram.table.index_device for engram in engrams.values()}
    if len({device.type for device in devices}) > 1:
        raise ValueError("some tables are gathered from by the CPU and some by the accelerator: place them alike")
    device = devices.pop()
    return NgramHasher(plan) if device.type == "cpu" else DeviceHasher(plan, device)


def _as_vocab(vocab: Any, plan: HashPlan) -> CompressedVocab | None:
    """What the user gave, checked against the plan."""
    if vocab is None:
        return None
    if not isinstance(vocab, CompressedVocab):
        ids = vocab.cpu().numpy() if isinstance(vocab, Tensor) else np.asarray(vocab)
        if ids.dtype.kind not in "iuf":
            raise ValueError(
                f"vocab is a {type(vocab).__name__}: give a CompressedVocab, as CompressedVocab.from_tokenizer makes "
                "it, or one compressed id per token id"
            )
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size == 0 or ids.min() < 0:
            raise ValueError(f"a vocabulary of {ids.dtype} {ids.shape}: give one compressed id per token id")
        if ids.max() >= plan.compressed_size:
            raise ValueError(
                f"compressed id {ids.max()} in the vocabulary; the plan has 0 .. {plan.compressed_size - 1}"
            )
        vocab = CompressedVocab(ids.astype(np.int64), plan.compressed_size, map_digest(ids))
    plan.require_vocab(vocab)
    return vocab
