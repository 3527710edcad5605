"""Attach Engram layers to a decoder, detach them, and what a forward does in between.

Three kinds of hooks do everything. Before the decoder: start the fetches. Before a block: join its rows and add its
update. After the decoder: give the fetch back, and let the history go on. They run outside of compiled code; a graph
that must not be interrupted reads staged rows.
"""

from __future__ import annotations

import secrets
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from engram_ref.attach.blocks import Given, cache_in, check_layers, find_blocks, reader
from engram_ref.attach.exposed import ExposedTime, Place
from engram_ref.attach.history import CacheHistory, LengthsOnDevice, follow, history_of, unfollow
from engram_ref.attach.padding import padding_of
from engram_ref.attach.recomputed import Recomputed, hooks_run_again, is_checkpointed
from engram_ref.attach.source import Room, Source, make_hasher
from engram_ref.attach.staged import Staged, keep_address
from engram_ref.attach.step import ForBlock, Step, give_back
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing_torch import DeviceHasher
from engram_ref.layer import Engram
from engram_ref.prefetch import LEAST_BUFFERS, Observer, Prefetcher
from engram_ref.tables.base import Ready
from engram_ref.vocab import CompressedVocab


def attach(
    model: nn.Module,
    engrams: Mapping[int, Engram],
    plan: HashPlan | NgramHasher | DeviceHasher,
    vocab: CompressedVocab | Any = None,
    *,
    background: bool = True,
    buffers: int = LEAST_BUFFERS,
    observer: Observer | None = None,
    exposed: ExposedTime | None = None,
    prefetcher: Any = None,
) -> Attached:
    """Put Engram layers into a decoder of transformers.

    Args:
        model: a decoder, or a model around one (`...ForCausalLM`).
        engrams: the layer that goes before each block, by the block's number, which is the layer id of the hash.
        plan: constants of the hash, or a hasher that has them.
        vocab: token id -> compressed id; also a plain array of compressed ids, or None where token ids are compressed.
        background: fetch while earlier blocks compute; False waits for every fetch where it was started.
        buffers: fetches that may be in flight.
        observer: told how long hash, gather and wait took (see `Prefetcher`).
        exposed: notes how long the model waited.
        prefetcher: where rows come from instead of a new `Prefetcher`; it stays the caller's to close.

    Raises:
        ValueError: no list of blocks in the model, a layer that does not fit it, or a vocabulary that does not fit the
            plan.
    """
    decoder, blocks = find_blocks(model)
    check_layers(model, blocks, engrams, plan if isinstance(plan, HashPlan) else plan.plan)
    hasher = make_hasher(plan, engrams, prefetcher)
    form = next(iter(engrams.values())).fusion.config.form
    if prefetcher is not None:
        if observer is not None:
            raise ValueError("an observer and a prefetcher: give the observer to the prefetcher")
        return Attached(decoder, blocks, engrams, Source(hasher, vocab, prefetcher, form, not background), exposed)
    tables = {layer_id: engram.table for layer_id, engram in engrams.items()}
    own = Prefetcher(hasher, tables, buffers, background, observer)
    try:
        return Attached(decoder, blocks, engrams, Source(hasher, vocab, own, form, not background), exposed, own)
    except BaseException:
        own.close()
        raise


class Attached:
    """Engram layers that are in a model; made by `attach`, a context manager that detaches.

    Attributes:
        decoder: the module whose input are token ids.
        engrams: the layers, by block.
        prefetcher: where rows come from.
    """

    def __init__(
        self,
        decoder: nn.Module,
        blocks: nn.ModuleList,
        engrams: Mapping[int, Engram],
        source: Source,
        exposed: ExposedTime | None = None,
        own: Prefetcher | None = None,
    ) -> None:
        self.decoder = decoder
        self.engrams = dict(engrams)
        self.prefetcher = source.prefetcher
        self._blocks = blocks
        self._source = source
        self._exposed = exposed
        self._own = own
        self._key = secrets.token_hex(8)
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lengths = LengthsOnDevice()
        self._recomputed = Recomputed()
        self._step: Step | None = None
        self._staged: Staged | None = None  # inside of `staging`
        self._stagings: dict[bool, Staged] = {}  # by overlap; captured graphs read their buffers as long as we live
        self._read = reader(decoder)
        self._handles = [decoder.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for layer_id in self.engrams:
            self._handles.append(blocks[layer_id].register_forward_pre_hook(self._before(layer_id), with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._leave, always_call=True))
        _forget_compiled()

    def detach(self) -> None:
        """Make the model what it was. Calling it again does nothing.

        Raises:
            ValueError: what `check` had to say.
        """
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _forget_compiled()
        for cache in list(self._caches):
            unfollow(cache, self._key)
        self._caches.clear()
        self._recomputed.clear()
        self._stagings.clear()
        try:
            self._drop()
            self.check()
        finally:
            if self._own is not None:
                self._own.close()

    def check(self) -> None:
        """Wait for the device, and raise what only it knows; for long runs, now and then. `detach` does it, too.

        Raises:
            ValueError: a token id outside the vocabulary, or a cache that differs from its history.
        """
        self._source.check()
        self._lengths.check()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # --- the hooks -------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._staged is None:
            self._begin(args, kwargs)
        elif not torch.compiler.is_compiling():
            self._compare_staged(args, kwargs)

    def _before(self, layer_id: int) -> Callable[..., Any]:
        """The hook of one block: its input, the residual stream, with the update added."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (self._add(layer_id, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._add(layer_id, kwargs["hidden_states"])}

        return hook

    def _add(self, layer_id: int, hidden: Tensor) -> Tensor:
        """The residual stream [B, T, H] after the layer."""
        needed = self._join(layer_id, hidden) if self._staged is None else self._staged.at(layer_id)
        return self.engrams[layer_id](hidden, Ready(needed.rows), needed.past, padding=needed.padding)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._staged is None:
            self._end(output)

    # --- what they do ----------------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._drop()
        with self._waiting("start"):
            self._step = self._start(self._read(args, kwargs))

    def _start(self, given: Given, room: Room | None = None) -> Step:
        """Begin to fetch for token ids [B, T], into `room` where the source can."""
        again = is_checkpointed(self.decoder, self._blocks)
        use_cache = given.use_cache
        if use_cache is None:
            use_cache = bool(getattr(self.decoder.config, "use_cache", False))
        past = self._past_length(given)
        if again and past:
            raise ValueError(
                f"gradient checkpointing with a cache of {past} positions, which it does not read: leave the cache out"
            )
        history = self._history(given, past) if (use_cache or given.cache is not None) and not again else None
        padding = padding_of(given.mask, len(given.ids), given.ids.shape[1], past)
        again = again and torch.is_grad_enabled() and hooks_run_again(self._blocks)
        fetch, recent = self._source.start(given.ids, padding, history, room)
        try:
            if history is not None:
                history.open = True
            return Step(fetch, given.ids.shape, recent, history, padding, again)
        except BaseException:
            give_back(fetch)
            raise

    def _past_length(self, given: Given) -> int:
        """Positions before this step, which is where `cache_position` begins, or else as many as the cache holds."""
        if given.cache is None:
            return 0
        length = given.cache.get_seq_length() if given.position is None else given.position[0]
        history = history_of(given.cache, self._key)
        if history is None or self._source.reads_on_cpu or not _is_on_accelerator(length):
            return int(length)
        self._lengths.compare(length, history.length)
        return history.length

    def _history(self, given: Given, past: int) -> CacheHistory:
        """What came before this step."""
        batch, cache = len(given.ids), given.cache
        history = None if cache is None else history_of(cache, self._key)
        if history is None and past:
            raise ValueError(
                f"a cache of {past} positions that Engram has not seen: begin with an empty one, or let the model fill "
                "it while Engram is attached"
            )
        if history is None or (past == 0 and history.batch_size != batch):
            history = CacheHistory(self._source.plan, batch, self._source.device, self.engrams)
            if cache is not None:
                self._follow(cache, history)
        history.settle(past)
        if history.batch_size != batch:
            raise ValueError(f"{batch} sequences with a cache of {history.batch_size}: the batch must stay the same")
        return history

    def _follow(self, cache: Any, history: CacheHistory) -> None:
        follow(cache, self._key, history)
        self._caches.add(cache)
        for past in history.convolutions.values():
            keep_address(past.values)

    @torch.compiler.disable
    def _join(self, layer_id: int, hidden: Tensor) -> ForBlock:
        step = self._step
        if step is None:
            needed = self._recomputed.take(layer_id, hidden)
            if needed is None:
                raise RuntimeError(f"block {layer_id} ran by itself: call the whole model, or detach Engram first")
            return needed
        with self._waiting(layer_id):
            needed = step.for_block(layer_id, hidden)
        if step.recomputed:
            self._recomputed.keep(layer_id, hidden, needed)
        return needed

    @torch.compiler.disable
    def _end(self, output: Any) -> None:
        if output is None:
            return self._drop()
        step, self._step = self._step, None
        assert step is not None
        step.end()
        cache = None if step.history is None else cache_in(output)
        if cache is None or history_of(cache, self._key) is not None:
            return
        assert step.history is not None
        if cache.get_seq_length() == step.history.length:
            self._follow(cache, step.history)

    def _drop(self) -> None:
        """Forget a forward that an exception ended."""
        step, self._step = self._step, None
        if step is not None:
            give_back(step.fetch)

    def _waiting(self, place: Place) -> Any:
        return nullcontext() if self._exposed is None else self._exposed.around(place)

    # --- rows in buffers that stay where they are ------------------------------------------------

    @contextmanager
    def staging(self, overlap: bool = False) -> Iterator[Attached]:
        """Inside, forwards start nothing: each reads what the last `stage` before it has laid down.

        A graph that was captured in one staging may be replayed in another, until Engram is detached.

        Args:
            overlap: on CUDA, let the graph itself wait for the rows, just before the block that needs them.

        Raises:
            ValueError: overlap without CUDA.
        """
        if overlap not in self._stagings:
            self._stagings[overlap] = Staged(next(iter(self.engrams.values())).fusion.device, overlap)
        self._staged = self._stagings[overlap]
        self._staged.forget()
        try:
            yield self
        finally:
            self._staged = None

    def stage(self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None) -> None:
        """Fetch the rows of a step, and lay them down for the forward, or the graph's replay, that follows.

        Args:
            input_ids, past_key_values, attention_mask: as the forward will get them; a mask for all steps of a shape
                or for none.

        Raises:
            RuntimeError: outside of `staging`.
            ValueError: as the forward would raise.
        """
        if self._staged is None:
            raise RuntimeError("stage() outside of staging(): write `with attached.staging():` around it")
        given = Given(input_ids, past_key_values, attention_mask, None, past_key_values is not None)
        as_stored = all(engram.fusion.dtype == engram.table.format.dtype for engram in self.engrams.values())
        step = self._start(given, self._staged.room if as_stored else None)
        try:
            self._staged.fill(step, self.engrams)
        except BaseException:
            give_back(step.fetch)
            if step.history is not None:
                step.history.open = False  # no block has run, so the cache is as it was
            raise
        step.end()

    @torch.compiler.disable
    def _compare_staged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward that runs as it is written, not as part of a graph, must be the one that was staged."""
        assert self._staged is not None
        given = self._read(args, kwargs)
        if given.ids.shape != self._staged.shape:
            raise ValueError(f"token ids of {tuple(given.ids.shape)}; staged were {self._staged.shape}: stage() first")
        history = None if given.cache is None else history_of(given.cache, self._key)
        if history is None:
            return
        length = given.cache.get_seq_length() + given.ids.shape[1]
        if _is_on_accelerator(length):
            if not torch.cuda.is_current_stream_capturing():
                self._lengths.compare(length, history.length)
        elif int(length) != history.length:
            raise ValueError(
                f"a step that ends at position {int(length)}; staged was one that ends at {history.length}: call "
                "stage() once before every forward"
            )


def _is_on_accelerator(length: Any) -> bool:
    """Whether the CPU would have to wait to know it."""
    return isinstance(length, Tensor) and length.device.type != "cpu"


def _forget_compiled() -> None:
    """Code that torch.compile has made of a model does not notice that hooks came or went: it is to be made anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
