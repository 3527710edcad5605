"""The whole layer from row numbers on: rows of a table become an update to the residual stream.

    engram = build_engram(config, plan.layer(1))
    rows = NgramHasher(plan)(compressed_ids, layer_id=1)            # [B, T, C]
    hidden = hidden + engram(hidden, rows)                          # fetched now, and waited for
    hidden = hidden + engram(hidden, fetch[1])                      # or when a `Prefetcher` began before

The update is added before the decoder block's attention. A table is not a module and not moved by `.to()`: it is made
for the device on which its rows are wanted. To train the rows, keep them: `Engram(fusion, DeviceTable(weight))` with a
`weight` that requires gradients, and give it to the optimizer beside `engram.parameters()`.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from engram_ref.config import EngramConfig
from engram_ref.fusion import DemoFusion, ShortConvHistory
from engram_ref.hashing import LayerPlan
from engram_ref.tables import Pending, RowFormat, Table, make_table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.filling import fill_normal
from engram_ref.tables.host import HostTable
from engram_ref.tables.memory import HostMemory
from engram_ref.tables.uva import UvaTable

FRESH_PLACEMENTS = ("device", "host", "uva")


class Engram(nn.Module):
    """A fusion and the table that its rows come from.

    Args:
        fusion: gate and short convolution.
        table: of this layer; it stays the caller's to close.

    Raises:
        ValueError: rows of another width.
    """

    def __init__(self, fusion: DemoFusion, table: Table) -> None:
        super().__init__()
        if table.format.width != fusion.config.row_width:
            raise ValueError(f"rows of {table.format.width} values; this layer needs {fusion.config.row_width}")
        self.fusion = fusion
        self.table = table

    def forward(
        self, hidden: Tensor, rows: Tensor | np.ndarray | Pending, history: ShortConvHistory | None = None
    ) -> Tensor:
        """What is to be added to the residual stream.

        Args:
            hidden: residual stream, [B, T, G, H], or [B, T, H] where there is one copy.
            rows: row numbers [B, T, C], which are fetched now, or the fetch of them that was started before.
            history: what came before this chunk; it is read and advanced.

        Returns:
            As `hidden`.

        Raises:
            ValueError: wrong shape, dtype or device, or a row that does not exist.
        """
        config = self.fusion.config
        plain = hidden.ndim == 3 and config.hc_mult == 1
        stream = hidden.unsqueeze(2) if plain else hidden
        if stream.ndim != 4:
            raise ValueError(
                f"hidden of shape {tuple(hidden.shape)}; this layer needs [B, T, {config.hc_mult}, {config.hidden}]"
            )
        update = self.fusion(self._look_up(rows, stream), stream, history)
        return update.squeeze(2) if plain else update

    def _look_up(self, rows: Tensor | np.ndarray | Pending, stream: Tensor) -> Tensor:
        """The rows of every position side by side, [B, T, C*D], in the fusion's dtype."""
        config = self.fusion.config
        batch, length = stream.shape[:2]
        shape = (batch, length, config.columns)
        if isinstance(rows, (Tensor, np.ndarray)):
            if tuple(rows.shape) != shape:
                raise ValueError(f"row numbers of shape {tuple(rows.shape)}; hidden needs {shape}")
            rows = self.table.start(torch.as_tensor(rows).reshape(-1).to(self.table.index_device))
        values = rows.wait()  # [B*T*C, D]
        if tuple(values.shape) != (batch * length * config.columns, config.row_width):
            raise ValueError(
                f"a fetch of {tuple(values.shape)} values; hidden needs the rows of {shape} "
                f"and {config.row_width} values each"
            )
        if values.device.type != stream.device.type:
            raise ValueError(f"rows on {values.device}, hidden on {stream.device}: make the table for that device")
        return values.view(batch, length, config.embedding_width).to(self.fusion.dtype)


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
    if placement not in FRESH_PLACEMENTS:
        raise ValueError(f"placement {placement!r}: a new table is made as one of {', '.join(FRESH_PLACEMENTS)}")
    fusion = DemoFusion(config, "meta", dtype).to_empty(device="cpu")
    fusion.reset_parameters(torch.Generator().manual_seed(seed))
    fusion = fusion.to(device)
    with ExitStack() as undo:
        row_format = RowFormat.of(config)
        memory = undo.enter_context(HostMemory(layer_plan.rows * row_format.row_bytes))
        values = row_format.decode(memory.bytes.view(layer_plan.rows, row_format.row_bytes))  # [R, D]
        if init:
            fill_normal(values, seed)
        if placement == "device" and fusion.device.type != "cpu":
            return Engram(fusion, make_table(placement, values, device))  # copied; the memory is not needed any more
        engram = Engram(fusion, _adopt(placement, values, fusion.device, memory))
        undo.pop_all()
    return engram


def _adopt(placement: str, values: Tensor, device: torch.device, memory: HostMemory) -> Table:
    """A table of rows that lie where they are to stay."""
    if device.type == "cuda":
        memory.pin()
    if placement == "device":
        return DeviceTable(values, memory)
    return (HostTable if placement == "host" else UvaTable)(values, device, memory)


def check_plan(config: EngramConfig, layer_plan: LayerPlan) -> None:
    """Refuse a plan that was not made for this configuration."""
    if layer_plan.layer_id not in config.layer_ids or len(layer_plan.primes) != config.columns:
        raise ValueError(
            f"a plan of layer {layer_plan.layer_id} with {len(layer_plan.primes)} columns; this configuration has "
            f"layers {config.layer_ids} with {config.columns}: build the plan from the same configuration"
        )
