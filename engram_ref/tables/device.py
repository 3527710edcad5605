"""Rows in the memory of the device that uses them: the resident table, which every other placement is held against.

On a CPU the compiled gather fetches them. On CUDA a fetch is one kernel on the current stream; which stream that
is, is the schedule's business. Rows that are being trained are fetched so that gradients reach them.

    with DeviceTable(weights) as table:
        values = table.start(rows).wait()
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_ref.tables.base import Pending, Ready, RowFormat, Table, check_out, check_rows, check_shape
from engram_ref.tables.delivery import Delivery
from engram_ref.tables.gather import gather
from engram_ref.tables.memory import HostMemory


class DeviceTable(Table):
    """A table in the memory of its device.

    Args:
        values: the rows [R, D], contiguous; they are used as they are. If they require gradients, rows fetched
            while gradients are on pass them back.
        memory: what `values` lies in; it is closed with the table.
    """

    placement = "device"

    def __init__(self, values: Tensor, memory: HostMemory | None = None) -> None:
        row_format = RowFormat(values.dtype, values.shape[-1])
        row_format.encode(values)  # refuses what is not a table
        super().__init__(len(values), row_format, values.device, values.device)
        self._values: Tensor | None = values
        self._memory = memory
        self._delivery = Delivery(values.device, row_format) if values.device.type == "cpu" else None

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Fetch now, on the current stream.

        On CUDA a row number outside the table stops the device with an assertion of the kernel's: to look at the
        numbers beforehand, the CPU would have to wait for them.
        """
        values = self._values
        if values is None:
            raise ValueError("this table was closed: its memory is gone")
        if self._delivery is None:
            check_shape(rows, self.index_device)
        else:
            rows = check_rows(rows, self.rows)
        if out is not None:
            check_out(out, len(rows), self.format, self.device)
        if values.requires_grad and torch.is_grad_enabled():
            if out is not None:
                raise ValueError("out= given for rows that pass gradients back: leave it out, or use torch.no_grad()")
            return Ready(F.embedding(rows, values))
        if self._delivery is None:
            return Ready(torch.index_select(values.detach(), 0, rows, out=out))
        raw = self.format.encode(values)
        return self._delivery.send(len(rows), lambda arrived: gather(raw, rows, arrived), out)

    def _held(self) -> dict[str, int]:
        return {"device": 0 if self._values is None else self._values.nbytes}

    def close(self) -> None:
        """Let go of the rows."""
        self._values = None
        if self._memory is not None:
            self._memory.close()
