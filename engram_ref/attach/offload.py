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
while they are away, `state_dict` is without them and warns, and on exit the very parameters that were taken out are put
back, with the same bytes.

    python -m pytest tests/ref/attach/test_offload.py
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from engram_ref.attach.blocks import cache_among, named_arguments, unwrapped
from engram_ref.attach.hooks import Hook
from engram_ref.attach.own_table import GivenRows, Lookup, Seat, check_table, ids_before, plan_of, table_for, text_model
from engram_ref.attach.step import give_back
from engram_ref.attach.versions import tell_untested
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import history_of_ids
from engram_ref.hashing.ngram import NgramHasher
from engram_ref.hashing.plan import HashPlan
from engram_ref.prefetch import LEAST_BUFFERS, Fetch, Prefetcher
from engram_ref.prefetch.fetch import Observer
from engram_ref.tables import Table


def offload_table(
    model: nn.Module,
    placement: str = "host",
    rows: GivenRows | Mapping[int, GivenRows] | None = None,
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
    text = text_model(model)
    embeddings = {i: layer.ple.ple_embedding for i, layer in enumerate(text.layers) if layer.ple is not None}
    if not embeddings:
        raise ValueError("this model has no n-gram table: its configuration has no ple_layer_ids")
    plan = plan_of(text, embeddings)
    given = rows if isinstance(rows, Mapping) else dict.fromkeys(embeddings, rows)
    if given.keys() != embeddings.keys() or (rows is not None and given is not rows and len(embeddings) > 1):
        raise ValueError(f"rows for blocks {list(given)}: give a mapping with those of blocks {list(embeddings)}")
    with torch.inference_mode(False), ExitStack() as undo:  # what is made here is used in whatever mode the model runs
        tables = {}
        for block, embedding in embeddings.items():
            device = text.layers[block].ple.key_proj.weight.device
            table = table_for(embedding, given[block], placement, device, options)
            tables[block] = undo.enter_context(table)
            check_table(block, embedding, tables[block], plan, given[block] is not None)
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
        self._buffers = buffers
        self._steps: dict[int, Fetch | None] = {}  # by thread, what was begun and not ended; None until it is begun
        self._differs: Tensor | None = None  # on an accelerator: whether a row number was another
        self._seats = [
            Seat(one, one.ngram_embedding, Lookup(self.look_up, block, one.ngram_embedding, tables[block].device))
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

    def __exit__(self, *error: object) -> None:
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
        if self._prefetcher is None or ids is None or not self._takes_room(thread):
            return
        # Inside of torch.func every tensor that is made is wrapped, and has no address that compiled code could read.
        with torch._C._DisableFuncTorch():
            ids = _without_padding(ids, given.get("attention_mask"), self.plan.pad_compressed)
            self._steps[thread] = self._start(self._prefetcher, ids, cache_among(given))

    def _takes_room(self, thread: int) -> bool:
        """Whether there is room for a thread's step, which it has until `_drop`."""
        # Counted by who has it: a counter would stay wrong for good where Ctrl-C comes behind its change.
        self._steps[thread] = None
        if len(self._steps) > self._buffers:
            del self._steps[thread]
        return thread in self._steps

    def _start(self, prefetcher: Prefetcher, ids: Tensor, cache: Any) -> Fetch:
        before = None if cache is None else ids_before(cache, next(iter(self.tables)))
        on_device = isinstance(prefetcher.hasher, DeviceHasher)
        device = next(iter(self.tables.values())).index_device
        ids, history = ids.to(device, torch.int64), None
        if before is not None:
            # [B, N-1], copied: the class writes its new ids over them.
            recent = before[:, 1 - self.plan.max_ngram :].to(device, torch.int64, copy=True)
            history = history_of_ids(self.plan, recent, on_device)
        return prefetcher.start(ids if on_device else ids.numpy(), history)

    @torch.compiler.disable
    def look_up(self, block: int, numbers: Tensor) -> Tensor:
        """The rows [B, T, C, D] of the numbers [B, T, C] that the class has computed."""
        with torch._C._DisableFuncTorch():
            values = self._values(block, unwrapped("input_ids", numbers).reshape(-1))
        return values.view(*numbers.shape, self.tables[block].format.width)

    def _values(self, block: int, numbers: Tensor) -> Tensor:
        """The rows [B*T*C, D] of the numbers, fetched already or now."""
        table = self.tables[block]
        fetch = self._steps.get(threading.get_ident())
        if fetch is None:
            self.late += 1
            return table.start(numbers.to(table.index_device)).wait()
        self.prefetched += 1
        join: Any = fetch[block]
        values = join.wait()
        self._compare(join.row_numbers, numbers)
        # Gradients need them after the fetch's buffer has been filled again.
        return values.clone() if torch.is_grad_enabled() else values

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
        if fetch is None or output is None:  # an error, which is raised
            return self._drop(threading.get_ident())
        try:
            fetch.release()
        except BaseException:
            self._drop(threading.get_ident())
            raise
        del self._steps[threading.get_ident()]

    def _drop(self, thread: int) -> None:
        """Forget a forward of a thread, and give back its fetch if that has not been done."""
        try:
            give_back(self._steps.get(thread))
        finally:
            self._steps.pop(thread, None)


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
