"""The table that a model of transformers has itself (Qwen3.8-Flash-Next): where it is, what is in it, out and back in.

Everything that is known of the class stands here: its modules' names, what it keeps in a cache, and the plan that its
hash must be.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor, nn

from engram_ref.config import EngramConfig
from engram_ref.files.stored_rows import StoredRows
from engram_ref.hashing.plan import HashPlan
from engram_ref.rows.rows import Rows, refuse_wrapped
from engram_ref.tables import Table, make_table
from engram_ref.tables.host import HostTable

GivenRows = Tensor | Rows | StoredRows
_MODULE = "transformers.models.qwen4_exp.modeling_qwen4_exp"
_TOKEN_STATE = 2  # of a cache: where the class keeps the last token ids
_COMPARED = 1 << 16  # rows that are compared, or put back, at once
_TABLE_NAME = r"ngram_embedding\.(shard_\d+\.)?weight"


def text_model(model: nn.Module) -> Any:
    """The one module of the class in a model.

    Raises:
        ValueError: there is none, or more than one, or this transformers has no such class.
    """
    kind = _modeling().Qwen4ExpTextModel
    found = [module for module in model.modules() if isinstance(module, kind)]
    if len(found) != 1:
        raise ValueError(
            f"a {type(model).__name__} with {len(found)} text models of the class qwen4_exp: give one that has one"
        )
    return found[0]


def _modeling() -> ModuleType:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise ValueError(f"this transformers has no qwen4_exp ({error}): pip install 'transformers>=5.17'") from None


def plan_of(text: Any, embeddings: Mapping[int, Any]) -> HashPlan:
    """The plan, computed by ourselves from what the class was built with; its primes must be the class's."""
    for block, embedding in embeddings.items():
        _require_own(block, embedding.ngram_embedding)
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
        if list(layer.primes) != embedding.head_vocab_sizes or layer.rows != embedding.ngram_embedding.num_embeddings:
            raise ValueError(
                f"block {block}: the class has a table of {embedding.ngram_embedding.num_embeddings} rows, the plan of "
                f"its configuration one of {layer.rows}: this transformers hashes otherwise than the tested ones"
            )
    return plan


def _require_own(block: int, table: nn.Module) -> None:
    """Refuse what stands in the table's place and is not what the class, or `without_table`, has put there."""
    if isinstance(table, Lookup):
        raise ValueError(f"the table of block {block} is offloaded already: restore() that one first")
    if not isinstance(getattr(table, "_orig_mod", table), (nn.Embedding, _Absent)):  # torch.compile's is as good
        kind = type(table)
        raise ValueError(
            f"the table of block {block} is wrapped in a {kind.__module__}.{kind.__name__}, as by adapters: leave it "
            "out of them, or unload them first"
        )


def ids_before(cache: Any, block: int) -> Tensor | None:
    """The last token ids that the class keeps in a cache, of shape (batch, places); None before the first."""
    # Read there, they follow whatever is done to the cache.
    # `cache.get_conv_state` says the same, but not before transformers 5.23.
    return cache.layers[block].conv_states[_TOKEN_STATE] if cache.has_previous_state(block, _TOKEN_STATE) else None


def table_for(
    embedding: Any, rows: GivenRows | None, placement: str, device: torch.device, options: dict[str, Any]
) -> Table:
    """A table behind a placement, of the rows that are given or of the model's own.

    Raises:
        ValueError: there are neither, the model is not loaded, or is sharded, or as `make_table`.
    """
    weight = embedding.ngram_embedding.weight
    if device.type == "meta":
        raise ValueError("the weights of this model are not loaded: load everything but the table first")
    if rows is None and weight.is_meta:
        raise ValueError("the table's weights are not in this model: give rows=, for instance folder.stored_rows()")
    refuse_wrapped(weight)  # also where rows are given, which are compared with it
    if rows is not None:
        return make_table(placement, rows, device, **options)
    own = weight.detach()
    if placement == "host" and own.device.type == "cpu" and not options:
        return _OwnMemory(own, device)
    return make_table(placement, own, device, **options)


def check_table(block: int, embedding: Any, table: Table, plan: HashPlan, given: bool) -> None:
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


@dataclass
class Seat:
    """A place in the model, and the table that belongs there.

    Attributes:
        embedding: the class's module around it.
        table: the module that was there.
        lookup: what takes its place.
        was: shape and device of the weights that were let go, and whether they were made in inference mode.
    """

    embedding: Any
    table: Any
    lookup: Lookup
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


class Lookup(nn.Module):
    """What stands in the model where its table was, and tells of what is done to the model without its rows."""

    def __init__(self, look_up: Callable[[int, Tensor], Tensor], block: int, table: Any, device: torch.device) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.weight = torch.empty(
            0, table.embedding_dim, dtype=table.weight.dtype, device=device
        )  # asked for its place
        self._dtype = self.weight.dtype  # as the model's has become since
        self._look_up = look_up
        self._block = block

    def forward(self, numbers: Tensor) -> Tensor:
        """Rows [B, T, C, D] of the numbers [B, T, C]."""
        if self._dtype != self.weight.dtype:
            raise ValueError(
                f"the model was made {self._dtype} while its n-gram table is offloaded, whose rows stay "
                f"{self.weight.dtype}: make it that again, or restore() the table and change the dtype then"
            )
        return self._look_up(self._block, numbers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lookup:
        """`to`, `double` and their like; told at the next lookup, not in the midst of a model that is half of it."""
        self._dtype = fn(self.weight).dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *given: Any) -> None:
        # `save_pretrained` would write a checkpoint that loads, with new rows for those it has not.
        warnings.warn(
            f"the n-gram table of block {self._block} is offloaded, so its rows are not in this state_dict, nor in a "
            "checkpoint made of it: restore() it before you save",
            stacklevel=2,
        )
        super()._save_to_state_dict(*given)


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

    try:
        kind.__init__ = build_without
        parent._keys_to_ignore_on_load_unexpected = [*(ignored or []), _TABLE_NAME]
        yield
    finally:
        kind.__init__, parent._keys_to_ignore_on_load_unexpected = build, ignored


class _Absent(nn.Module):
    """What `without_table` builds in place of a table."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, width
        self.weight = torch.empty(rows, width, dtype=dtype, device="meta")

    def forward(self, numbers: Tensor) -> Tensor:
        raise RuntimeError("this model was loaded without its n-gram table: offload_table(model, placement, rows=...)")
