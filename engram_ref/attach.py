"""Engram in a model of transformers: attach it, use the model as before, detach it.

    with attach(model, {1: engram}, plan, vocab) as attached:       # engram: an `Engram`, e.g. from `build_engram`
        model.generate(input_ids, max_new_tokens=20)

`model` is any decoder that has a list of blocks (Llama, Qwen3, ...) and one residual stream (hc_mult=1). Where the
decoder begins, token ids are compressed and hashed, once for all Engram layers, and every fetch starts; before block L
the rows of layer L are joined and its gated update is added to the residual stream. `detach` removes all of it.

Schedule: `background=True` fetches while the blocks before L compute; `False` waits at the decoder's entry for what it
started there (the naive schedule). Another source of rows can stand in: `prefetcher=` takes anything with the
Prefetcher's `start`, for instance an `OnHand` (no lookup at all). `observer` is told the time of each stage; `wait` is
the exposed one.

Padding: positions that the attention mask masks. In the demo's form they are the compressed pad id, as everything
before a sequence is, and nothing of them enters the convolution; in the form v41 they are DEAD, and the stream passes
them bit for bit. So a row that is padded on the left gives what it gives alone.

Caches: history (the last compressed ids, and the convolution's past) lives in the transformers cache itself
(`engram_ref.cache_history`) and is compared with its length before each step.

CUDA graphs and full-graph compilation: a graph cannot hash on the CPU. Inside `with attached.staging():` a forward
starts nothing; it reads rows from buffers that stay where they are, and `attached.stage(input_ids, cache)` before the
forward, or before the replay of a captured one, fills them.

    with attached.staging():
        attached.stage(ids, cache)                                  # and so before every replay
        with torch.cuda.graph(graph):
            logits = model(ids, past_key_values=cache).logits

One forward of a model at a time; the layers' own parameters stay outside the model (`engram.parameters()`).
"""

from __future__ import annotations

import inspect
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_ref.cache_history import CacheHistory, follow, history_of, unfollow
from engram_ref.fusion import DemoFusion, ShortConvHistory
from engram_ref.hashing import DEAD, HashPlan, NgramHasher, TokenHistory
from engram_ref.hashing_torch import DeviceHasher, DeviceHistory, DeviceVocab
from engram_ref.layer import Engram
from engram_ref.on_hand import OnHand
from engram_ref.padding import padding_of
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
        prefetcher: where rows come from instead of a new `Prefetcher`; it stays the caller's to close.

    Raises:
        ValueError: no list of blocks in the model, a layer that does not fit it, or a vocabulary that does not fit the
            plan.
    """
    decoder, blocks = find_blocks(model)
    _check_layers(model, blocks, engrams)
    hasher = plan if isinstance(plan, (NgramHasher, DeviceHasher)) else _make_hasher(plan, engrams)
    tables = {layer_id: engram.table for layer_id, engram in engrams.items()}
    own = None if prefetcher is not None else Prefetcher(hasher, tables, buffers, background, observer)
    source = _Source(hasher, _Compress.of(vocab, hasher), own or prefetcher, wait_at_once=not background)
    return Attached(decoder, blocks, engrams, source, own)


def find_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder in a model, and its list of blocks.

    Raises:
        ValueError: there is none, or more than one.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} has no configuration of transformers: give a model of transformers")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count and child not in inside:
                found.append((module, child))
                inside.update(child.modules())
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {count} blocks; Engram goes into a decoder that has "
            "one: give the decoder itself (model.model)"
        )
    return found[0]


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
        source: _Source,
        own: Prefetcher | None,
    ) -> None:
        self.decoder = decoder
        self.engrams = dict(engrams)
        self.prefetcher = source.prefetcher
        self._blocks = blocks
        self._source = source
        self._own = own
        self._key = secrets.token_hex(8)
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._step: _Step | None = None
        self._staged: _Staged | None = None
        self._signature = inspect.signature(decoder.forward)
        self._handles = [decoder.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for layer_id in self.engrams:
            hook = self._before(layer_id)
            self._handles.append(blocks[layer_id].register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._leave, with_kwargs=True))

    def detach(self) -> None:
        """Make the model what it was. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cache in list(self._caches):
            unfollow(cache, self._key)
        self._caches.clear()
        self._drop()
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # --- a forward, seen by its hooks ------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._staged is None:
            self._begin(args, kwargs)

    @torch.compiler.disable
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._drop()
        given = self._signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        given = {**given.get("kwargs", {}), **given} if args else given
        ids, cache = _ids_and_cache(given)
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.decoder.config, "use_cache", False)
        self._step = self._start(ids, cache, given.get("attention_mask"), bool(use_cache) or cache is not None)

    def _start(self, ids: Tensor, cache: Any, mask: Any, remember: bool) -> _Step:
        """Begin to fetch for token ids [B, T]."""
        history = self._history(ids, cache) if remember else None
        past = 0 if history is None else history.length
        padding = padding_of(mask, len(ids), ids.shape[1], past)
        compressed = self._source.compress(ids, padding, self._form)
        fetch = self._source.start(compressed, history)
        if history is not None:
            history.open = True
        return _Step(fetch, ids.shape, compressed, history, padding)

    @property
    def _form(self) -> str:
        return next(iter(self.engrams.values())).fusion.config.form

    def _history(self, ids: Tensor, cache: Any) -> CacheHistory:
        """Of this cache, at its present length."""
        past = 0 if cache is None else int(cache.get_seq_length())
        history = None if cache is None else history_of(cache, self._key)
        if history is None:
            if past:
                raise ValueError(
                    f"a cache of {past} positions that Engram has not seen: begin with an empty one, or let the "
                    "attached model fill it"
                )
            convolutions = {i: e.fusion for i, e in self.engrams.items() if isinstance(e.fusion, DemoFusion)}
            convolutions = {i: fusion for i, fusion in convolutions.items() if fusion.reach}
            history = CacheHistory(self._source.plan, len(ids), self._source.device, convolutions)
            if cache is not None:
                self._follow(cache, history)
        history.settle(past)
        if history.batch_size != len(ids):
            raise ValueError(f"{len(ids)} sequences with a cache of {history.batch_size}: give each its own cache")
        return history

    def _follow(self, cache: Any, history: CacheHistory) -> None:
        follow(cache, self._key, history)
        self._caches.add(cache)

    def _before(self, layer_id: int) -> Callable[..., Any]:
        """The hook of one block: its input, the residual stream, with the update added."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (self._insert(layer_id, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._insert(layer_id, kwargs["hidden_states"])}

        return hook

    def _insert(self, layer_id: int, hidden: Tensor) -> Tensor:
        if self._staged is not None:
            rows, history, padding = self._staged.at(layer_id)
        else:
            rows, history, padding = self._join(layer_id, hidden)
        return self.engrams[layer_id](hidden, Ready(rows), history, padding=padding)

    @torch.compiler.disable
    def _join(self, layer_id: int, hidden: Tensor) -> tuple[Tensor, ShortConvHistory | None, Tensor | None]:
        if self._step is None:
            raise RuntimeError(f"block {layer_id} ran outside of a forward of its decoder: call the model as a whole")
        return self._step.rows(layer_id, hidden)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._staged is None:
            self._end(output)

    @torch.compiler.disable
    def _end(self, output: Any) -> None:
        step, self._step = self._step, None
        assert step is not None
        step.fetch.release()
        if step.history is None:
            return
        step.finish()
        cache = _cache_in(output)
        if cache is not None and history_of(cache, self._key) is None and cache.get_seq_length() == step.history.length:
            self._follow(cache, step.history)

    def _drop(self) -> None:
        """Forget a forward that an exception ended."""
        step, self._step = self._step, None
        if step is not None:
            step.fetch.release()

    # --- rows in buffers that stay where they are ------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Attached]:
        """Inside, forwards start nothing: each reads what the last `stage` before it has laid down."""
        self._staged = _Staged()
        try:
            yield self
        finally:
            self._staged = None

    def stage(self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None) -> None:
        """Fetch the rows of a step, and lay them down for the forward, or the graph's replay, that follows.

        Args:
            input_ids, past_key_values, attention_mask: as the forward will get them.

        Raises:
            RuntimeError: outside of `staging`.
        """
        if self._staged is None:
            raise RuntimeError("stage() outside of staging(): write `with attached.staging():` around it")
        step = self._start(input_ids, past_key_values, attention_mask, past_key_values is not None)
        self._staged.fill(step, self.engrams)
        step.fetch.release()
        if step.history is not None:
            step.finish()


@dataclass
class _Step:
    """One forward: what was started for it."""

    fetch: Any
    shape: torch.Size
    compressed: Tensor
    history: CacheHistory | None
    padding: Tensor | None

    def rows(self, layer_id: int, hidden: Tensor) -> tuple[Tensor, ShortConvHistory | None, Tensor | None]:
        """What block `layer_id` needs: rows, the convolution's past, and where padding is."""
        if hidden.shape[:2] != self.shape:
            raise ValueError(f"a stream of {tuple(hidden.shape)} for token ids of {tuple(self.shape)}")
        values = self.fetch[layer_id].wait()  # [B*T*C, D]
        if values.device.type == "cpu" and torch.is_grad_enabled() and not values.requires_grad:
            values = values.clone()  # the buffer is filled again before gradients have passed
        past = None if self.history is None else self.history.convolutions.get(layer_id)
        padding = None if self.padding is None else self.padding.to(hidden.device)
        return values, past, padding

    def finish(self) -> None:
        """The positions of this forward are past."""
        assert self.history is not None
        self.history.append(self.compressed)
        self.history.open = False


@dataclass
class _Staged:
    """The buffers of staged steps, by their shape, and the last step."""

    buffers: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    current: dict[int, tuple[Tensor, ShortConvHistory | None, Tensor | None]] = field(default_factory=dict)

    def fill(self, step: _Step, engrams: Mapping[int, Engram]) -> None:
        """Lay down a step."""
        for layer_id, engram in engrams.items():
            values = step.fetch[layer_id].wait().to(engram.fusion.dtype)
            rows = self._lay(("rows", layer_id, *step.shape), values)
            past = None if step.history is None else step.history.convolutions.get(layer_id)
            padding = step.padding
            if padding is not None:
                padding = self._lay(("padding", *step.shape), padding.to(values.device))
            self.current[layer_id] = rows, past, padding

    def _lay(self, key: tuple[Any, ...], values: Tensor) -> Tensor:
        buffer = self.buffers.get(key)
        if buffer is None:
            buffer = self.buffers[key] = torch.empty_like(values)
        return buffer.copy_(values)

    def at(self, layer_id: int) -> tuple[Tensor, ShortConvHistory | None, Tensor | None]:
        """What block `layer_id` reads."""
        if layer_id not in self.current:
            raise RuntimeError("nothing is staged: call stage(input_ids, cache) before the forward")
        return self.current[layer_id]


@dataclass(frozen=True)
class _Compress:
    """Token ids on any device to compressed ids where they are hashed."""

    vocab: CompressedVocab | None
    device: torch.device
    on_device: DeviceVocab | None

    @classmethod
    def of(cls, vocab: Any, hasher: NgramHasher | DeviceHasher) -> _Compress:
        """From what the user gave."""
        if vocab is not None and not isinstance(vocab, CompressedVocab):
            array = np.asarray(vocab, dtype=np.int64)
            vocab = CompressedVocab(array, int(array.max()) + 1, "")
        if vocab is not None and len(vocab) != hasher.plan.compressed_size:
            raise ValueError(
                f"a vocabulary of {len(vocab)} compressed ids for a plan of {hasher.plan.compressed_size}: "
                "build the plan from this vocabulary"
            )
        device = hasher.device if isinstance(hasher, DeviceHasher) else torch.device("cpu")
        uploaded = DeviceVocab(vocab, device) if vocab is not None and isinstance(hasher, DeviceHasher) else None
        return cls(vocab, device, uploaded)

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 [B, T] on the hasher's device."""
        ids = ids.to(self.device)
        if self.vocab is None:
            return ids.to(torch.int64)
        return torch.from_numpy(self.vocab(ids.numpy())) if self.on_device is None else self.on_device(ids)


@dataclass(frozen=True)
class _Source:
    """Where rows come from: compress, hash, fetch."""

    hasher: NgramHasher | DeviceHasher
    token_map: _Compress
    prefetcher: Any
    wait_at_once: bool

    @property
    def plan(self) -> HashPlan:
        return self.hasher.plan

    @property
    def device(self) -> torch.device:
        return self.token_map.device

    def compress(self, ids: Tensor, padding: Tensor | None, form: str) -> Tensor:
        """Compressed ids [B, T]; padding as the form has it. Where nothing is looked up, the ids stay as they are."""
        if isinstance(self.prefetcher, OnHand):
            return ids.to(torch.int64)
        if padding is None:
            return self.token_map(ids)
        padding = padding.to(self.device)
        stand_in = DEAD if form == "v41" else self.plan.pad_compressed
        return self.token_map(ids.to(self.device).masked_fill(padding, 0)).masked_fill(padding, stand_in)

    def start(self, compressed: Tensor, history: CacheHistory | None) -> Any:
        """Begin to fetch; wait at once if that is the schedule."""
        on_device = isinstance(self.hasher, DeviceHasher)
        fetch = self.prefetcher.start(compressed if on_device else compressed.numpy(), self._before(history, on_device))
        if self.wait_at_once:
            for pending in fetch.values():
                pending.wait()
        return fetch

    def _before(self, history: CacheHistory | None, on_device: bool) -> TokenHistory | DeviceHistory | None:
        if history is None or isinstance(self.prefetcher, OnHand):
            return None
        if on_device:
            before = DeviceHistory(self.plan, history.batch_size, self.device)
            before.ids = history.context.contiguous()
            return before
        past = TokenHistory(self.plan, history.batch_size)
        past.ids = history.context.contiguous().numpy()
        return past


def _make_hasher(plan: HashPlan, engrams: Mapping[int, Engram]) -> NgramHasher | DeviceHasher:
    device = next(iter(engrams.values())).table.index_device
    return NgramHasher(plan) if device.type == "cpu" else DeviceHasher(plan, device)


def _check_layers(model: Any, blocks: nn.ModuleList, engrams: Mapping[int, Engram]) -> None:
    if not engrams:
        raise ValueError("no Engram layers: give at least one, by the number of the block that it goes before")
    hidden = model.config.get_text_config().hidden_size
    for layer_id, engram in engrams.items():
        config = engram.fusion.config
        if not 0 <= layer_id < len(blocks):
            raise ValueError(f"layer {layer_id}: the model has blocks 0 .. {len(blocks) - 1}")
        if config.hidden != hidden or config.hc_mult != 1:
            raise ValueError(
                f"an Engram layer for {config.hc_mult} x {config.hidden} values; the residual stream of this model is "
                f"1 x {hidden}: build it from a configuration with hc_mult=1 and hidden={hidden}"
            )


def _ids_and_cache(given: Mapping[str, Any]) -> tuple[Tensor, Any]:
    ids = given.get("input_ids")
    if ids is None:
        raise ValueError(
            "inputs_embeds without input_ids: Engram looks rows up by token ids; pass input_ids, or detach Engram first"
        )
    cache = given.get("past_key_values")
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ValueError(f"past_key_values of type {type(cache).__name__}: give a Cache of transformers")
    return ids, cache


def _cache_in(output: Any) -> Any:
    """The cache that a decoder gave back, if any."""
    cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
    return cache if hasattr(cache, "get_seq_length") else None
