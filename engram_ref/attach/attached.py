"""Attach Engram layers to a decoder, detach them, and what a forward does in between.

Three kinds of hooks do everything. Before the decoder: start the fetches. Before a block: join its rows and add its
update. After the decoder: give the fetch back, and let the history go on. They run outside of compiled code; a graph
that must not be interrupted reads staged rows.
"""

from __future__ import annotations

import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from engram_ref.attach.blocks import (
    Given,
    cache_in,
    check_arguments,
    check_layers,
    find_blocks,
    is_on_accelerator,
    length_of,
    reader,
    recurs,
    tell_apart,
    tell_larger,
)
from engram_ref.attach.checkpointing import hooks_run_again, is_checkpointed
from engram_ref.attach.exposed import Place, Waits
from engram_ref.attach.graphs import keep_address
from engram_ref.attach.hooks import Hook, forget_compiled, refuse_twice
from engram_ref.attach.lookup import Room, Source, make_hasher
from engram_ref.attach.on_hand import OnHand
from engram_ref.attach.packing import (
    Packing,
    borders_of,
    is_flash,
    refuse_numbered,
    require_apart,
    require_continued,
)
from engram_ref.attach.padding import chosen, columns_of, padding_in, padding_of, require_columns
from engram_ref.attach.staging import StagedSteps
from engram_ref.attach.step import ForBlock, Step, give_back
from engram_ref.attach.versions import tell_untested
from engram_ref.fusion.base import ShortConvHistory
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.ngram import NgramHasher
from engram_ref.hashing.plan import HashPlan
from engram_ref.histories.cache import CacheHistory, LengthsOnDevice, convolved
from engram_ref.histories.following import follow, history_of, unfollow
from engram_ref.histories.places import Places
from engram_ref.layer import Engram
from engram_ref.prefetch import LEAST_BUFFERS, Prefetcher
from engram_ref.prefetch.fetch import Observer
from engram_ref.recording import ADVICE, is_exported, is_recorded
from engram_ref.tables.base import Ready
from engram_ref.vocab import CompressedVocab

_PATIENCE = 60.0  # seconds that a thread waits for the forwards of others to end, before it takes what there is


def attach(
    model: nn.Module,
    engrams: Mapping[int, Engram],
    plan: HashPlan | NgramHasher | DeviceHasher,
    vocab: CompressedVocab | Any = None,
    *,
    background: bool = True,
    buffers: int = LEAST_BUFFERS,
    observer: Observer | None = None,
    exposed: Waits | None = None,
    prefetcher: Any = None,
) -> Attached:
    """Put Engram layers into a decoder of transformers.

    Args:
        model: a decoder, or a model around one (`...ForCausalLM`).
        engrams: the layer that goes before each block, by the block's number, which is the layer id of the hash.
        plan: constants of the hash, or a hasher that has them.
        vocab: token id -> compressed id; also a plain array of compressed ids, or None where token ids are compressed.
        background: fetch while earlier blocks compute; False waits for every fetch where it was started.
        buffers: fetches that may be in flight; of more threads that run the model, some wait for others.
        observer: told how long hash, gather and wait took (see `Prefetcher`).
        exposed: notes how long the model waited: an `ExposedTime`, or what has its `around`, such as a clock of
            one's own.
        prefetcher: where rows come from instead of a new `Prefetcher`; it stays the caller's to close.

    Raises:
        ValueError: no list of blocks in the model, a layer that does not fit it, a block that has one already, or a
            vocabulary that does not fit the plan.
    """
    tell_untested()
    decoder, blocks = find_blocks(model)
    engrams = check_arguments(engrams, plan, buffers, observer, exposed, prefetcher)
    check_layers(model, blocks, engrams, plan if isinstance(plan, HashPlan) else plan.plan)
    refuse_twice(blocks, engrams)
    with torch.inference_mode(False), ExitStack() as undo:  # what is made is written to in whatever mode the model runs
        hasher = make_hasher(plan, engrams, prefetcher)
        if prefetcher is not None and observer is not None:
            raise ValueError("an observer and a prefetcher: give the observer to the prefetcher")
        own = None
        if prefetcher is None:
            tables = {layer_id: engram.table for layer_id, engram in engrams.items()}
            prefetcher = own = undo.enter_context(Prefetcher(hasher, tables, buffers, background, observer))
        form = next(iter(engrams.values())).fusion.config.form
        source = Source(hasher, vocab, prefetcher, form, not background)
        made = Attached(model, decoder, blocks, engrams, source, exposed, own, buffers)
        undo.pop_all()
    try:
        if not isinstance(prefetcher, OnHand):
            tell_larger(decoder, made.token_ids)
        made._put_in()
        return made  # in here: until the caller has it, nobody else could detach it
    except BaseException:
        made._take_out()
        raise


class Attached(StagedSteps):
    """Engram layers that are in a model; made and put in by `attach`, a context manager that detaches.

    Attributes:
        decoder: the module whose input are token ids.
        engrams: the layers, by block.
        prefetcher: where rows come from.
        token_ids: how many the vocabulary has.
        index_device: where token ids are hashed.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        blocks: nn.ModuleList,
        engrams: Mapping[int, Engram],
        source: Source,
        exposed: Waits | None,
        own: Prefetcher | None,
        buffers: int,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.engrams = dict(engrams)
        self.prefetcher = source.prefetcher
        self.token_ids = source.token_ids
        self.index_device = source.device
        self._source = source
        self._exposed = exposed
        self._not_trained_yet: Any = weakref.ref(model)  # until the first forward that is trained
        self._own = own
        self._key = secrets.token_hex(8)
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lengths = LengthsOnDevice()
        # Given to blocks that are going to be computed again, by layer and address of the input: it is the same memory
        # then, as the checkpoint keeps it alive. A newer input in the same memory means that the older is gone.
        self._recomputed: dict[tuple[int, int], ForBlock] = {}
        self._steps: dict[int, Step] = {}  # begun and not ended, by thread
        self._turn = threading.Condition()  # steps of several threads begin one after the other
        self._buffers = sys.maxsize if own is None else buffers
        self._reach = max(getattr(engram.fusion, "reach", 0) for engram in self.engrams.values())
        self._device = next(iter(self.engrams.values())).fusion.device
        self._recurs = recurs(blocks, decoder.config)
        self._list = next(path for path, module in decoder.named_modules() if module is blocks)
        self._read = reader(decoder)
        self._hooks = [Hook(decoder, self._enter)]
        self._hooks += [Hook(blocks[layer_id], self._before(layer_id), layer_id) for layer_id in self.engrams]
        self._hooks.append(Hook(decoder, self._leave, behind=True))

    def _put_in(self) -> None:
        """Let the model call the hooks; until now there is nothing of us in it."""
        for hook in self._hooks:
            hook.stand()
        forget_compiled()

    def detach(self) -> None:
        """Make the model what it was. Calling it again does nothing.

        Raises:
            RuntimeError: another thread is inside of a forward; then nothing has been done.
            ValueError: what `check` had to say.
        """
        if not self._hooks:
            return
        self._refuse_inside()
        self._take_out()

    def _take_out(self) -> None:
        """Remove the hooks, as many of them as stand, and close what is ours; if interrupted, to be called again."""
        for hook in self._hooks:
            hook.remove()
        forget_compiled()
        for cache in list(self._caches):
            unfollow(cache, self._key)
        self._caches.clear()
        self._recomputed.clear()
        try:
            for thread in list(self._steps):
                self._drop(thread)
            self.check()
        finally:
            self._close_stagings()
            if self._own is not None:
                self._own.close()
            self._hooks.clear()

    def _refuse_inside(self) -> None:
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        if alive & self._steps.keys():
            raise RuntimeError("another thread is inside of a forward of this model: let it end before detach()")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("what attach() gave cannot be copied or pickled: attach Engram to the other model anew")

    def counters(self) -> dict[int, dict[str, int]]:
        """By block, what was asked of its table so far: see `Table.counters`."""
        return {layer_id: engram.table.counters() for layer_id, engram in self.engrams.items()}

    def check(self) -> None:
        """Wait for the device, and raise what only it knows; for long runs, now and then. `detach` does it, too.

        Raises:
            ValueError: a token id outside the vocabulary, or a cache that differs from its history.
            CallError: a step asked for rows and did not get them.
        """
        self._settle_with_device()
        self._source.check()
        self._lengths.check()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    # --- the hooks -------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._staged is None:
            if is_recorded():
                raise ValueError(ADVICE)
            self._begin(module, args, kwargs)
        elif torch.compiler.is_dynamo_compiling() or is_exported():
            self._joined = set()  # a new one, so that a graph does not depend on which blocks ran in the last forward
        else:
            self._compare_staged(args, kwargs)

    def _before(self, layer_id: int) -> Callable[..., Any]:
        """The hook of one block: its input, the residual stream, with the update added."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (self._add(layer_id, args[0], args[1:], kwargs), *args[1:]), kwargs
            hidden = self._add(layer_id, kwargs["hidden_states"], args, kwargs)
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _add(self, layer_id: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The residual stream [B, T, H] after the layer; what else the block gets says whom it attends to."""
        if self._staged is None:
            needed = self._join(layer_id, hidden, args, kwargs)
        else:
            needed = self._laid_down(self._staged, layer_id)
        engram, rows = self.engrams[layer_id], Ready(needed.rows)
        if needed.prompts is not None:
            needed.prompts.keep_convolved(layer_id, engram, hidden, needed.rows)
        if needed.packing is None:
            return engram(hidden, rows, needed.past, padding=needed.padding)
        return needed.packing.pick(engram(needed.packing.spread(hidden), rows, padding=needed.padding))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._staged is None:
            self._end(output)
        elif self._entered:
            self._leave_staged(output)

    # --- what they do ----------------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        self._drop(thread)
        given = self._read(args, kwargs)
        not_trained_yet = self._not_trained_yet  # read once: other threads may begin at the same time
        if not_trained_yet is not None and module.training and torch.is_grad_enabled():
            self._not_trained_yet, model = None, not_trained_yet()
            tell_apart(module if model is None else model, self.engrams)
        # Inside of torch.func every tensor that is made is wrapped, and has no address that compiled code could read.
        with torch._C._DisableFuncTorch(), self._waiting("start"), self._turn:
            # A thread that never ends its step does not stop the others for good: without a buffer they are refused.
            self._turn.wait_for(lambda: len(self._steps) < self._buffers, timeout=_PATIENCE)
            self._steps[thread] = self._start(given, module)

    def _start(self, given: Given, decoder: Any, room: Room | None = None, waited_for: bool = False) -> Step:
        self._settle()  # who answers has the places
        blocks = decoder.get_submodule(self._list)
        self._require_hooks(blocks)
        history = history_of(given.cache, self._key)
        again, padding, packing, borders, counted = False, None, None, None, None
        if isinstance(history, Places):
            history = history.next_step(given.ids.shape)
        else:
            again = is_checkpointed(decoder, blocks)
            use_cache = given.use_cache
            if use_cache is None:
                use_cache = bool(getattr(decoder.config, "use_cache", False))
            past = self._past_length(given.cache, history)
            if again and past:
                raise ValueError(
                    f"gradient checkpointing with a cache of {past} positions, which it does not read: leave the cache "
                    "out"
                )
            cached = use_cache or given.cache is not None
            if given.ids.shape[1] > 1 and given.mask is not None:
                refuse_numbered(given.mask)
            require_columns(given.mask, len(given.ids), given.ids.shape[1], past)
            borders = borders_of(given, past, cached, decoder.config, self._recurs)
            history = self._history(given, past, history) if cached and not again else None
            padding = self._padding(given, past, history)
            packing = None if borders is None else Packing(borders.to(self._source.device), max(1, self._reach))
            again = again and torch.is_grad_enabled() and hooks_run_again(blocks)
            counted = given.cache
        fetch = None
        try:
            fetch, recent = self._source.start(given.ids, padding, history, room, packing, waited_for)
            if history is not None:
                history.begin()
            if packing is not None:
                padding = packing.lay_padding(padding)
            return Step(fetch, given.ids.shape, recent, history, padding, again, packing, borders, counted)
        except BaseException:
            give_back(fetch)
            raise

    def _require_hooks(self, blocks: nn.ModuleList) -> None:
        """Refuse to start what nobody would join."""
        for hook in self._hooks:
            at = hook.layer_id
            if at is not None and not (at < len(blocks) and hook.stands_in(blocks[at])):
                raise ValueError(f"block {at} was replaced since attach(): detach Engram, and attach it to this model")

    def _padding(self, given: Given, past: int, history: CacheHistory | None) -> Tensor | None:
        """Where the chunk is padding, [B, T], or None; what begins anew behind the cache is refused."""
        batch, length = given.ids.shape
        recent = None if history is None or not past else history.recent[:, -past:]
        columns = columns_of(given.mask, length, past, 0 if recent is None else recent.shape[1])
        if columns is None:
            return None
        brought = length == 1 and self._source.reads_on_cpu
        if brought:  # one operation instead of twenty; the CPU waits for the token ids anyway
            columns = columns.cpu()
        if recent is not None and self._may_look_at(given):
            require_continued(columns, recent, self._source.plan.pad_compressed, past)
        padding = padding_in(columns, batch, length)
        # The layers need not look either where there is none; but a graph has padding in every step, or in no step.
        return None if brought and self._staged is None and not padding.any() else padding

    def _may_look_at(self, given: Given) -> bool:
        """Whether the CPU may look into the mask: not where a step of one token runs without it."""
        return given.ids.shape[1] > 1 or self._source.reads_on_cpu or not is_on_accelerator(chosen(given.mask))

    def _past_length(self, cache: Any, history: CacheHistory | None) -> int:
        """Positions before this step: as many as the cache holds."""
        if cache is None:
            return 0
        length = length_of(cache)
        if history is None or self._source.reads_on_cpu or not is_on_accelerator(length):
            return int(length)
        self._lengths.compare(length, history.length)
        return history.length

    def _history(self, given: Given, past: int, history: CacheHistory | None) -> CacheHistory:
        """What came before this step: as the cache carries it, or a new one."""
        batch, cache = len(given.ids), given.cache
        if history is None and past:
            raise ValueError(
                f"a cache of {past} positions that Engram has not seen: begin with an empty one, let the model fill it "
                "while Engram is attached, or tell with remember(cache, input_ids) what is in it"
            )
        if history is None or (past == 0 and history.batch_size != batch and not history.open):
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
    def _join(self, layer_id: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForBlock:
        step = self._steps.get(threading.get_ident())
        if step is None:
            needed = self._recomputed.pop((layer_id, hidden.data_ptr()), None)
            if needed is None:
                raise RuntimeError(
                    f"block {layer_id} ran by itself: call the whole model, in one thread, or detach Engram first; "
                    "blocks that are to be computed again are wrapped for it before attach()"
                )
            return needed
        if step.borders is not None:
            flash = is_flash(self.decoder.config)
            require_apart(step.borders, f"block {layer_id}", args, kwargs, flash)
        with self._waiting(layer_id):
            needed = step.for_block(layer_id, hidden)
        if step.recomputed:
            self._recomputed[layer_id, hidden.data_ptr()] = needed
        return needed

    @torch.compiler.disable
    def _end(self, output: Any) -> None:
        thread = threading.get_ident()
        if output is None:
            return self._drop(thread)
        step = self._steps[thread]
        try:
            with torch._C._DisableFuncTorch():
                step.end()
        except BaseException:
            self._drop(thread)
            raise
        self._forget(thread)
        if step.history is not None:
            self._check_followed(step, step.history, cache_in(output))

    def _check_followed(self, step: Step, history: CacheHistory, cache: Any) -> None:
        """A step has ended: let its cache carry the history, and refuse one that does not count along."""
        if step.counted is not None:
            cache = step.counted
        elif cache is None or history_of(cache, self._key) is not None:
            return
        length = length_of(cache)
        # At the next step, too small a count would pass for a cache that was cropped, or emptied.
        if not is_on_accelerator(length) and int(length) != history.length:
            if step.counted is None and self.decoder.training:
                return  # the model's own, of which LayerDrop has left the first block out: nothing goes on with it
            raise ValueError(
                f"a {type(cache).__name__} that counts {int(length)} positions after {history.length}, so that Engram "
                "cannot follow it: use_cache=False"
            )
        if history_of(cache, self._key) is None:
            self._follow(cache, history)

    def _drop(self, thread: int) -> None:
        """Forget a forward of a thread, and give back its fetch if that has not been done."""
        step = self._steps.get(thread)
        if step is None:
            return
        try:
            give_back(step.fetch)  # one error has been raised already
        finally:
            self._forget(thread)

    def _forget(self, thread: int) -> None:
        """A thread's step is over, its fetch given back: another thread may begin."""
        del self._steps[thread]
        with self._turn:
            self._turn.notify_all()

    def _waiting(self, place: Place) -> Any:
        return nullcontext() if self._exposed is None else self._exposed.around(place)

    # --- a cache that was filled elsewhere ---------------------------------------------------------

    def remember(
        self,
        cache: Any,
        input_ids: Tensor,
        convolutions: Mapping[int, ShortConvHistory] | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        """Say what came before a cache that was filled elsewhere, or before Engram was attached this time.

        The next forward with this cache goes on behind it, as if Engram had seen all of it.

        Args:
            cache: of transformers, with one position at least.
            input_ids: the token ids of its last positions, [B, R]: max_ngram - 1 at least, or as many as it holds. For
                as many as there are beyond, the cache can be cropped.
            convolutions: by layer id, the past of every layer that has a convolution; a forward advances it.
            attention_mask: of the cache's positions, [B, length], where some hold padding.

        Raises:
            ValueError: an empty cache, too few ids or more than it holds, or layers with a convolution other than those
                that are given one.
        """
        length, least = int(length_of(cache)), self._source.plan.max_ngram - 1
        if length < 1:
            raise ValueError("an empty cache, before which nothing came: give it to the forward as it is")
        if input_ids.ndim != 2 or not min(length, least) <= input_ids.shape[1] <= length:
            raise ValueError(
                f"token ids of shape {tuple(input_ids.shape)} for a cache of {length} positions: give the last "
                f"{min(length, least)} of every sequence at least, [B, R], and none beyond the cache"
            )
        history = CacheHistory(self._source.plan, len(input_ids), self._source.device, self.engrams)
        self._require_convolutions(convolutions or {})
        history.convolutions.update(convolutions or {})
        padding = padding_of(attention_mask, len(input_ids), input_ids.shape[1], length - input_ids.shape[1])
        history.append(self._source.compress(input_ids, padding))
        history.length = length
        if input_ids.shape[1] < length:  # the sequence did not begin there, so nothing is known of what came before
            history.recent = history.recent[:, least:]
        self._follow(cache, history)

    def _require_convolutions(self, given: Mapping[int, ShortConvHistory]) -> None:
        needed = convolved(self.engrams)
        if sorted(given) != sorted(needed):
            raise ValueError(
                f"the past of the convolutions of layers {sorted(given)}; those of {sorted(needed)} have "
                "one: give a ShortConvHistory for each of them"
            )

    def seat(self, cache: Any, places: Places) -> None:
        """Let the rows of a cache be places, to which sequences come and which they leave: see `Places`.

        From now on a forward with this cache is of prompts that `places` has admitted, or of one chunk for every place.
        Neither the positions that the cache counts nor the mask are looked at; each place is at a position of its own,
        and `position_ids` and mask say to the model which.

        Raises:
            ValueError: places whose ids are on another device than `index_device`, or layers with a convolution other
                than those that it has the past of.
        """
        if places.recent.device.type != self.index_device.type:
            raise ValueError(
                f"places on {places.recent.device}; ids are hashed on {self.index_device}: make them there"
            )
        self._require_convolutions(places.convolutions)
        self._follow(cache, places)
