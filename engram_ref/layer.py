"""The whole layer from row numbers on: the residual stream before it becomes the stream after it.

    engram = build_engram(config, plan.layer(1))
    rows = NgramHasher(plan)(compressed_ids, layer_id=1)            # [B, T, C]
    hidden = engram(hidden, rows)                                   # fetched now, and waited for
    hidden = engram(hidden, fetch[1])                               # or when a `Prefetcher` began before

It stands before the decoder block's attention. `make_fusion` picks what is done with the rows by the configuration's
form. A table is not a module and not moved by `.to()`: it is made for the device on which its rows are wanted. To train
the rows, keep them: `Engram(fusion, DeviceTable(weight))` with a `weight` that requires gradients, and give it to the
optimizer beside `engram.parameters()`.

`engram.state_dict()` has the weights of the fusion and not the rows, which `save_layer` (`engram_ref.checkpoint`)
writes with them. A deep copy has weights of its own and reads the same table; a layer is not pickled. It calls
`fusion.add_to`, not `fusion(...)`, so hooks on the fusion, such as those of `torch.nn.utils.prune`, do not run; torch's
parametrizations do.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import numpy as np
import torch
from torch import Tensor, nn

from engram_ref.config import EngramConfig
from engram_ref.devices import as_device
from engram_ref.fusion.base import Fusion, ShortConvHistory
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing.plan import LayerPlan
from engram_ref.recording import ADVICE, is_recorded
from engram_ref.rows.filling import fill_normal
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables import Pending, RowFormat, Table, make_table
from engram_ref.tables.base import Ready
from engram_ref.tables.factory import adopt

FRESH_PLACEMENTS = ("device", "host", "uva")
# Scaled rows that are drawn and encoded together; of 32 values or more, they are whole chunks for `fill_normal`.
_ENCODED = 1 << 14


class Engram(nn.Module):
    """A fusion and the table that its rows come from.

    Args:
        fusion: what is done with the rows (`make_fusion`).
        table: of this layer; it stays the caller's to close.

    Raises:
        ValueError: rows of another width.
    """

    def __init__(self, fusion: Fusion, table: Table) -> None:
        super().__init__()
        if table.format.width != fusion.config.row_width:
            raise ValueError(f"rows of {table.format.width} values; this layer needs {fusion.config.row_width}")
        self.fusion = fusion
        self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> Engram:
        """A layer with weights of its own and the same table.

        Raises:
            ValueError: rows that are trained, which two layers would both change.
        """
        if self.table.trained:
            raise ValueError(
                "an Engram layer whose rows are trained: build the copy from rows of its own, "
                "Engram(copy.deepcopy(engram.fusion), DeviceTable(weight.detach().clone().requires_grad_()))"
            )
        memo[id(self.table)] = self.table
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor | np.ndarray | Pending,
        history: ShortConvHistory | None = None,
        dead: Tensor | np.ndarray | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the layer.

        Args:
            hidden: residual stream, [B, T, G, H], or [B, T, H] where there is one copy.
            rows: row numbers [B, T, C], which are fetched now, or the fetch of them that was started before.
            history: of the demo's convolution, what came before this chunk; it is read and advanced.
            dead: in the form v41, booleans [B, T], `compressed_ids == DEAD`; where true the stream passes through bit
                for bit.
            padding: booleans [B, T], true where a batch is filled up: nothing of these positions reaches another one.

        Returns:
            As `hidden`.

        Raises:
            ValueError: wrong shape, dtype or device, a row that does not exist, or an argument that the form does not
                know.
        """
        config = self.fusion.config
        plain = hidden.ndim == 3 and config.hc_mult == 1
        stream = hidden.unsqueeze(2) if plain else hidden  # [B, T, G, H]
        if stream.ndim != 4:
            raise ValueError(
                f"hidden of shape {tuple(hidden.shape)}; this layer needs [B, T, {config.hc_mult}, {config.hidden}]"
            )
        if isinstance(dead, np.ndarray):
            dead = torch.from_numpy(dead).to(stream.device)
        stream = self.fusion.add_to(stream, self._look_up(rows, stream), history, dead, padding)
        return stream.squeeze(2) if plain else stream

    def _look_up(self, rows: Tensor | np.ndarray | Pending, stream: Tensor) -> Tensor:
        """The rows of every position side by side, [B, T, C*D], in the fusion's dtype."""
        config = self.fusion.config
        batch, length = stream.shape[:2]
        shape = (batch, length, config.columns)
        # Rows that are there already are tensors of the program; a table on meta has no rows to keep.
        fetched = not isinstance(rows, Ready) and self.table.device.type != "meta"
        if fetched and not torch.compiler.is_dynamo_compiling() and is_recorded():
            raise ValueError(ADVICE)
        if isinstance(rows, (Tensor, np.ndarray)):
            if tuple(rows.shape) != shape:
                raise ValueError(f"row numbers of shape {tuple(rows.shape)}; hidden needs {shape}")
            rows = self.table.start(torch.as_tensor(rows, device=self.table.index_device).reshape(-1))
        values = rows.wait()  # [B*T*C, D]
        if tuple(values.shape) != (batch * length * config.columns, config.row_width):
            raise ValueError(
                f"a fetch of {tuple(values.shape)} values; hidden needs the rows of {shape} "
                f"and {config.row_width} values each"
            )
        if values.device.type != stream.device.type:
            raise ValueError(f"rows on {values.device}, hidden on {stream.device}: make the table for that device")
        # Gradients need the rows after a fetch in flight has given its buffer back, which compiled code then writes to.
        lent = values.device.type == "cpu" and not isinstance(rows, Ready) and not values.requires_grad
        keep = lent and torch.is_grad_enabled()
        return values.view(batch, length, config.embedding_width).to(self.fusion.dtype, copy=keep)


def build_engram(
    config: EngramConfig,
    layer_plan: LayerPlan,
    placement: str = "device",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init: bool = True,
) -> Engram:
    """A new layer, its rows drawn from N(0, 1) as an `nn.Embedding` draws them.

    Args:
        config: geometry; rows are stored in its `row_dtype`.
        layer_plan: of this layer; it has the number of rows.
        placement: device, host or uva. For the others there must be rows first: see `make_table` and `load_layer`.
        device: where the layer computes.
        dtype: of the fusion.
        seed: of rows and weights.
        init: False leaves the rows zero.

    Raises:
        ValueError: a plan of another geometry, a placement that this cannot make, or rows that do not fit.
    """
    check_plan(config, layer_plan)
    device = as_device(device)
    if placement not in FRESH_PLACEMENTS:
        raise ValueError(
            f"placement {placement!r}: a new table is made as one of {', '.join(FRESH_PLACEMENTS)}; for others save "
            "its rows and load them: make_table"
        )
    fusion = make_fusion(config, "meta", dtype).to_empty(device="cpu")
    fusion.reset_parameters(torch.Generator().manual_seed(seed))
    fusion = fusion.to(device)
    with ExitStack() as undo:
        row_format = RowFormat.of(config)
        memory = undo.enter_context(HostMemory(layer_plan.rows * row_format.row_bytes))
        rows = Rows(row_format, (memory.bytes.view(layer_plan.rows, row_format.row_bytes),))
        if init:
            _fill(rows, seed)
        if placement == "device" and fusion.device.type != "cpu":
            return Engram(fusion, make_table(placement, rows, device))  # copied; the memory is not needed any more
        engram = Engram(fusion, adopt(placement, rows, fusion.device, memory))  # what `encode` gave is numbers
        undo.pop_all()
    return engram


def _fill(rows: Rows, seed: int) -> None:
    """Draw all rows, which are in one part."""
    (raw,) = rows.parts  # [R, row_bytes]
    if not rows.format.scaled:
        return fill_normal(rows.values(), seed)
    for first in range(0, len(rows), _ENCODED):  # a few at a time: drawn and encoded they take far more memory
        piece = raw[first : first + _ENCODED]
        values = torch.empty((len(piece), rows.format.width), dtype=rows.format.dtype, device="cpu")
        fill_normal(values, seed, start=first * rows.format.width)
        piece.copy_(rows.format.encode(values))


def check_plan(config: EngramConfig, layer_plan: LayerPlan) -> None:
    """Refuse a plan that was not made for this configuration."""
    columns, longest = len(layer_plan.primes), len(layer_plan.multipliers)
    if layer_plan.layer_id not in config.layer_ids or (columns, longest) != (config.columns, config.max_ngram):
        raise ValueError(
            f"a plan of layer {layer_plan.layer_id} with {columns} columns, n-grams up to {longest}; this "
            f"configuration has layers {config.layer_ids} with {config.columns}, n-grams up to {config.max_ngram}: "
            "build the plan from the same configuration"
        )
