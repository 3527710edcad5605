"""The n-gram table of a transformers model (Qwen3.8-Flash-Next), behind any placement.

    with offload_table(model, "host") as offloaded:                 # a model that was loaded with its table
        print(offloaded.freed_bytes)                                # by the device that they were freed on
        model.generate(input_ids, max_new_tokens=20)

    with without_table():                                           # or one that never builds it
        model = Qwen4ExpForCausalLM.from_pretrained(folder)
    with offload_table(model, "file", rows=QwenFolder.open(folder).stored_rows()):
        model.generate(input_ids, max_new_tokens=20)

The model has the layer; what it gets is a place for the table. Where the text model begins, the row numbers are
computed and every fetch starts; where the class looks rows up, they are joined and their numbers compared with those
that the class has computed by itself. What cannot be known at the entry (embeddings without token ids, a block that is
recomputed in the backward pass, more threads than buffers) is fetched where it is looked up. The logits are those of
the untouched model, bit for bit, and caches may be cropped, reordered and copied as ever. The rows are not trained
while they are away, `state_dict` is without them, and on exit the very parameters that were taken out are put back,
with the same bytes.

    python -m pytest tests/ref/attach/test_offload.py
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from engram_ref.attach.blocks import cache_among, named_arguments
from engram_ref.attach.hooks import Hook
from engram_ref.attach.step import give_back
from engram_ref.attach.versions import tell_untested
from engram_ref.config import EngramConfig
from engram_ref.files.stored_rows import StoredRows
from engram_ref.hashing.device import DeviceHasher, DeviceHistory
from engram_ref.hashing.ngram import NgramHasher, TokenHistory
from engram_ref.hashing.plan import HashPlan
from engram_ref.prefetch import LEAST_BUFFERS, Fetch, Prefetcher
from engram_ref.prefetch.fetch import Observer
from engram_ref.rows.rows import Rows
from engram_ref.tables import Table, make_table
from engram_ref.tables.host import HostTable

Source = Tensor | Rows | StoredRows
_MODULE = "transformers.models.qwen4_exp.modeling_qwen4_exp"
_TOKEN_STATE = 2  # of a cache: where the class keeps the last token ids
_COMPARED = 1 << 16  # rows that are compared, or put back, at once
_TABLE_NAME = r"ngram_embedding\.(shard_\d+\.)?weight"


def offload_table(
    model: nn.Module,
    placement: str = "host",
    rows: Source | Mapping[int, Source] | None = None,
    *,
    prefetch: bool = True,
    buffers: int = LEAST_BUFFERS,
    observer: Observer | None = None,
    **options: Any,
) -> OffloadedTable:
    """Take the table out of a model and put one of ours behind it.

    Args:
        model: a `Qwen4ExpForCausalLM`, or another one around a `Qwen4ExpTextModel`.
        placement: device, host, uva, hot or file (`make_table`).
        rows: of the table, by block where there are several; None takes the model's own. Those of a model that has
            its own must be equal to them.
        prefetch: start to fetch where the model begins; False fetches where the class looks rows up.
        buffers: fetches that may be in flight.
        observer: told how long hash, gather and wait took (see `Prefetcher`).
        options: those of `make_table`, for instance `hot=` row numbers.

    Raises:
        ValueError: no such table in the model, or one that is away already; no rows, rows of another shape, or others
            than the model's; a placement that this machine cannot serve.
    """
    tell_untested()
    text = _text_model(model)
    embeddings = {i: layer.ple.ple_embedding for i, layer in enumerate(text.layers) if layer.ple is not None}
    if not embeddings:
        raise ValueError("this model has no n-gram table: its configuration has no ple_layer_ids")
    plan = _plan_of(text, embeddings)
    given = rows if isinstance(rows, Mapping) else dict.fromkeys(embeddings, rows)
    if given.keys() != embeddings.keys() or (rows is not None and given is not rows and len(embeddings) > 1):
        raise ValueError(f"rows for blocks {list(given)}: give a mapping with those of blocks {list(embeddings)}")
    with torch.inference_mode(False), ExitStack() as undo:  # what is made here is used in whatever mode the model runs
        tables = {}
        for block, embedding in embeddings.items():
            device = text.layers[block].ple.key_proj.weight.device
            table = _make_table(embedding, given[block], placement, device, options)
            tables[block] = undo.enter_context(table)
            _check_table(block, embedding, tables[block], plan, given[block] is not None)
        made = OffloadedTable(text, embeddings, tables, plan, prefetch, buffers, observer)
        undo.pop_all()
    try:
        made._put_in()
        return made  # in here: until the caller has it, nobody else could restore it
    except BaseException:
        made._take_out()
        raise


class OffloadedTable:
    """A table that is away from its model; made and put in by `offload_table`, a context manager that brings it back.

    Attributes:
        tables: by block.
        plan: constants of the hash.
        freed_bytes: of the model's parameters, by device; nothing where the table uses them as they lie, or where they
            were never built.
        prefetched, late: lookups whose rows were under way, and those that began only then.
    """

    def __init__(
        self,
        text: Any,
        embeddings: Mapping[int, Any],
        tables: Mapping[int, Table],
        plan: HashPlan,
        prefetch: bool,
        buffers: int,
        observer: Observer | None,
    ) -> None:
        self.tables = dict(tables)
        self.plan = plan
        self.prefetched = self.late = 0
        self._named = named_arguments(text)
        self._prefetcher = _prefetcher(plan, self.tables, buffers, observer) if prefetch else None
        self._room = threading.Semaphore(buffers)
        self._steps: dict[int, Fetch] = {}  # begun and not ended, by thread
        self._differs: Tensor | None = None  # on an accelerator: whether a row number was another
        self._seats = [
            _Seat(one, one.ngram_embedding, _Lookup(self, block, one.ngram_embedding, tables[block].device))
            for block, one in embeddings.items()
        ]
        self.freed_bytes: dict[str, int] = {}
        self._hooks = [Hook(text, self._begin), Hook(text, self._end, behind=True)]

    def _put_in(self) -> None:
        """Take the model's places; until now there is nothing of us in it."""
        for hook in self._hooks:
            hook.stand()
        for seat in self._seats:
            seat.take()
        with torch.inference_mode(False):
            # Last of all, because from here on the tables have the only copy.
            for seat, table in zip(self._seats, self.tables.values()):
                for device, nbytes in seat.free(table).items():
                    self.freed_bytes[device] = self.freed_bytes.get(device, 0) + nbytes

    def restore(self) -> None:
        """Put the table back into the model and make everything as it was. Calling it again does nothing.

        Raises:
            RuntimeError: another thread is inside of a forward; then nothing has been done.
            ValueError: what `check` had to say.
        """
        if not self._hooks:
            return
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        if alive & self._steps.keys():
            raise RuntimeError("another thread is inside of a forward of this model: let it end before restore()")
        self._take_out()

    def _take_out(self) -> None:
        """Give the model back what was taken of it, and close what is ours; if interrupted, to be called again."""
        with torch.inference_mode(False):  # the parameter is to be trained, in whatever mode it is brought back
            for seat, table in zip(self._seats, self.tables.values()):
                seat.bring_back(table)
        for hook in self._hooks:
            hook.remove()
        try:
            for thread in list(self._steps):
                self._drop(thread)
            self.check()
        finally:
            if self._prefetcher is not None:
                self._prefetcher.close()
            for table in self.tables.values():
                table.close()
            self._hooks.clear()

    def counters(self) -> dict[int, dict[str, int]]:
        """By block, what was asked of its table so far: see `Table.counters`."""
        return {block: table.counters() for block, table in self.tables.items()}

    def check(self) -> None:
        """Wait for an accelerator, and raise what only it knows; `restore` does it, too.

        Raises:
            ValueError: the class looked up other rows than those that were fetched.
        """
        if self._differs is not None and bool(self._differs):
            self._differs.zero_()
            raise ValueError(_other_rows("some rows", "others"))

    def __enter__(self) -> OffloadedTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("a model whose table is offloaded cannot be copied or pickled: restore() first")

    # --- what a forward does ---------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The text model begins: start to fetch, if the token ids are known and there is room."""
        thread = threading.get_ident()
        self._drop(thread)
        given = self._named(args, kwargs)
        ids = given.get("ple_input_ids")
        ids = given.get("input_ids") if ids is None else ids
        if self._prefetcher is None or ids is None or not self._room.acquire(blocking=False):
            return
        try:
            ids = _without_padding(ids, given.get("attention_mask"), self.plan.pad_compressed)
            self._steps[thread] = self._start(self._prefetcher, ids, cache_among(given))
        except BaseException:
            self._room.release()
            raise

    def _start(self, prefetcher: Prefetcher, ids: Tensor, cache: Any) -> Fetch:
        before = None if cache is None else _ids_before(cache, next(iter(self.tables)))
        device = prefetcher.hasher.device if isinstance(prefetcher.hasher, DeviceHasher) else torch.device("cpu")
        ids = ids.to(device, torch.int64)
        history: Any = None
        if before is not None:
            on_cpu = device.type == "cpu"
            history = TokenHistory(self.plan, len(ids)) if on_cpu else DeviceHistory(self.plan, len(ids), device)
            # [B, N-1], copied: the class writes its new ids over them.
            recent = before[:, 1 - self.plan.max_ngram :].to(device, torch.int64, copy=True).contiguous()
            history.ids = recent.numpy() if on_cpu else recent
        return prefetcher.start(ids.numpy() if device.type == "cpu" else ids, history)

    @torch.compiler.disable
    def look_up(self, block: int, numbers: Tensor) -> Tensor:
        """The rows [B, T, C, D] of the numbers [B, T, C] that the class has computed."""
        table = self.tables[block]
        fetch = self._steps.get(threading.get_ident())
        if fetch is None:
            self.late += 1
            values = table.start(numbers.reshape(-1).to(table.index_device)).wait()
        else:
            self.prefetched += 1
            join: Any = fetch[block]
            values = join.wait()
            self._compare(join.row_numbers, numbers.reshape(-1))
            if torch.is_grad_enabled():
                values = values.clone()  # gradients need them after the fetch's buffer has been filled again
        return values.view(*numbers.shape, table.format.width)

    def _compare(self, fetched: Tensor, wanted: Tensor) -> None:
        """Refuse other rows than those that were fetched; on an accelerator `check` does it."""
        if fetched.shape != wanted.shape:
            raise ValueError(_other_rows(f"{len(wanted)} rows", f"{len(fetched)}"))
        differs = fetched.to(wanted.device, non_blocking=True) != wanted
        if wanted.device.type != "cpu":
            differs = differs.any()
            self._differs = differs if self._differs is None else self._differs | differs
        elif bool(differs.any()):
            at = int(differs.nonzero()[0])
            raise ValueError(_other_rows(f"row {int(wanted[at])}", f"row {int(fetched[at])}"))

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fetch = self._steps.get(threading.get_ident())
        if fetch is None:
            return
        if output is None:  # an error, which is raised
            return self._drop(threading.get_ident())
        try:
            fetch.release()
        finally:
            self._forget(threading.get_ident())

    def _drop(self, thread: int) -> None:
        """Forget a forward of a thread that an exception ended."""
        fetch = self._steps.get(thread)
        if fetch is not None:
            try:
                give_back(fetch)
            finally:
                self._forget(thread)

    def _forget(self, thread: int) -> None:
        del self._steps[thread]
        self._room.release()


class _Lookup(nn.Module):
    """What stands in the model where its table was."""

    def __init__(self, owner: OffloadedTable, block: int, table: Any, device: torch.device) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.weight = torch.empty(
            0, table.embedding_dim, dtype=table.weight.dtype, device=device
        )  # asked for its place
        self._owner = owner
        self._block = block

    def forward(self, numbers: Tensor) -> Tensor:
        return self._owner.look_up(self._block, numbers)


class _Absent(nn.Module):
    """What `without_table` builds in place of a table."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, width
        self.weight = torch.empty(rows, width, dtype=dtype, device="meta")

    def forward(self, numbers: Tensor) -> Tensor:
        raise RuntimeError("this model was loaded without its n-gram table: offload_table(model, placement, rows=...)")


@dataclass
class _Seat:
    """A place in the model, and the table that belongs there.

    Attributes:
        embedding: the class's module around it.
        table: the module that was there.
        lookup: what takes its place.
        was: shape and device of the weights that were let go, and whether they were made in inference mode.
    """

    embedding: Any
    table: Any
    lookup: _Lookup
    was: tuple[torch.Size, torch.device, bool] | None = None

    def take(self) -> None:
        """Put the lookup where the table was; its parameter keeps all that is in it."""
        self.embedding.ngram_embedding = self.lookup

    def free(self, table: Table) -> dict[str, int]:
        """Let the parameter's bytes go, unless the new table uses them; how many those were, by device."""
        weight = self.table.weight
        if weight.is_meta or isinstance(table, _OwnMemory):
            return {}
        self.was = weight.shape, weight.device, weight.is_inference()
        nbytes = weight.nbytes
        weight.data = weight.data.new_empty(0)
        return {str(self.was[1]): nbytes}

    def bring_back(self, table: Table) -> None:
        """The parameter with all its bytes, in its place."""
        if self.was is not None:
            weight, (shape, device, inference) = self.table.weight, self.was
            with torch.inference_mode(inference):  # a parameter keeps for good what it was made in
                data = torch.empty(shape, dtype=weight.dtype, device=device)
                for numbers in torch.arange(len(data), device="cpu").split(_COMPARED):
                    data[numbers[0] : numbers[-1] + 1] = table.stored(numbers).view(weight.dtype).to(device)
                weight.data = data
            self.was = None
        self.embedding.ngram_embedding = self.table


class _OwnMemory(HostTable):
    """A table in host memory whose rows are the parameter's own, where they lie."""


@contextmanager
def without_table() -> Iterator[None]:
    """Inside, models of this class are built without their table, and `from_pretrained` does not read it.

    For one thread at a time: while it lasts, every such model in this process is built so.
    """
    modeling = _modeling()
    kind, parent = modeling.Qwen4ExpTextNGramEmbedding, modeling.Qwen4ExpPreTrainedModel
    build, ignored = kind.__init__, parent._keys_to_ignore_on_load_unexpected

    def build_without(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        table = self.ngram_embedding
        self.ngram_embedding = _Absent(table.num_embeddings, table.embedding_dim, table.weight.dtype)

    kind.__init__ = build_without
    parent._keys_to_ignore_on_load_unexpected = [*(ignored or []), _TABLE_NAME]
    try:
        yield
    finally:
        kind.__init__, parent._keys_to_ignore_on_load_unexpected = build, ignored


def _modeling() -> ModuleType:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise ValueError(f"this transformers has no qwen4_exp ({error}): pip install 'transformers>=5.17'") from None


def _ids_before(cache: Any, block: int) -> Tensor | None:
    """The last token ids that the class keeps in a cache, of shape (batch, places); None before the first."""
    # Read there, they follow whatever is done to the cache.
    # `cache.get_conv_state` says the same, but not before transformers 5.23.
    return cache.layers[block].conv_states[_TOKEN_STATE] if cache.has_previous_state(block, _TOKEN_STATE) else None


def _text_model(model: nn.Module) -> Any:
    kind = _modeling().Qwen4ExpTextModel
    found = [module for module in model.modules() if isinstance(module, kind)]
    if len(found) != 1:
        raise ValueError(
            f"a {type(model).__name__} with {len(found)} text models of the class qwen4_exp: give one that has one"
        )
    return found[0]


def _plan_of(text: Any, embeddings: Mapping[int, Any]) -> HashPlan:
    """The plan, computed by ourselves from what the class was built with; its primes must be the class's."""
    one = next(iter(embeddings.values()))
    config = EngramConfig(
        layer_ids=tuple(embeddings),
        max_ngram=one.ngram_size,
        heads=one.heads_per_ngram,
        row_width=one.ngram_embedding.embedding_dim,
        table_size_per_order=(one.ngram_vocab_size_base,) * (one.ngram_size - 1),
        hidden=text.config.hidden_size,
        hc_mult=text.config.hc_count,
        kernel_size=text.config.ple_conv_kernel_size,
        pad_id=one.eos_token_id,
        seed=one.seed,
        form="qwen",
        compressed_size=one.unigram_vocab_size,
        rows_multiple=text.config.make_ngram_vocab_size_divisible_by,
        norm_eps=text.config.rms_norm_eps,
    )
    plan = HashPlan.build(config, one.unigram_vocab_size, one.eos_token_id)
    for layer, (block, embedding) in zip(plan.layers, embeddings.items()):
        if isinstance(embedding.ngram_embedding, _Lookup):
            raise ValueError(f"the table of block {block} is offloaded already: restore() that one first")
        if list(layer.primes) != embedding.head_vocab_sizes or layer.rows != embedding.ngram_embedding.num_embeddings:
            raise ValueError(
                f"block {block}: the class has a table of {embedding.ngram_embedding.num_embeddings} rows, the plan of "
                f"its configuration one of {layer.rows}: this transformers hashes otherwise than the tested ones"
            )
    return plan


def _make_table(
    embedding: Any, rows: Source | None, placement: str, device: torch.device, options: dict[str, Any]
) -> Table:
    weight = embedding.ngram_embedding.weight
    if device.type == "meta":
        raise ValueError("the weights of this model are not loaded: load everything but the table first")
    if rows is None and weight.is_meta:
        raise ValueError("the table's weights are not in this model: give rows=, for instance folder.stored_rows()")
    if rows is not None:
        return make_table(placement, rows, device, **options)
    own = weight.detach()
    if placement == "host" and own.device.type == "cpu" and not options:
        return _OwnMemory(own, device)
    return make_table(placement, own, device, **options)


def _check_table(block: int, embedding: Any, table: Table, plan: HashPlan, given: bool) -> None:
    """Refuse rows that are not this layer's."""
    weight = embedding.ngram_embedding.weight
    needed = (plan.layer(block).rows, weight.shape[1], weight.dtype)
    if (table.rows, table.format.width, table.format.dtype) != needed:
        raise ValueError(
            f"rows for block {block}: {table.rows} of {table.format.width} values, {table.format.dtype}; the model "
            f"has {needed[0]} of {needed[1]}, {needed[2]}"
        )
    if weight.is_meta or not given:
        return
    for numbers in torch.arange(table.rows, device="cpu").split(_COMPARED):
        own = weight.detach()[numbers[0] : numbers[-1] + 1].cpu().contiguous().view(torch.uint8)
        stored = table.stored(numbers)
        if stored.shape != own.shape or not torch.equal(stored, own):
            raise ValueError(
                f"rows for block {block} differ from the model's own, between {int(numbers[0])} and "
                f"{int(numbers[-1])}: use the checkpoint that the model was loaded from"
            )


def _prefetcher(plan: HashPlan, tables: Mapping[int, Table], buffers: int, observer: Observer | None) -> Prefetcher:
    device = next(iter(tables.values())).index_device
    hasher = NgramHasher(plan) if device.type == "cpu" else DeviceHasher(plan, device)
    return Prefetcher(hasher, tables, buffers, observer=observer)


def _without_padding(ids: Tensor, mask: Any, eos: int) -> Tensor:
    """Token ids as the class hashes them: the end of text where a batch is filled up."""
    if isinstance(mask, Mapping):
        mask = mask.get("linear_attention")
    if mask is None or mask.ndim != 2 or ids.shape[1] == 1:  # a chunk of one token is not filled up
        return ids
    return torch.where(mask[:, -ids.shape[1] :].to(ids.device, torch.bool), ids, eos)


def _other_rows(wanted: str, fetched: str) -> str:
    return (
        f"the model looks up {wanted} where {fetched} were fetched at its entry: its token ids or its cache are not "
        "those of the call; use offload_table(prefetch=False)"
    )
