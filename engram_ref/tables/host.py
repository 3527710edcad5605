"""Rows in host memory: gathered by the CPU, and brought to the device through pinned staging.

with HostTable(weights, torch.device("cuda")) as table:
    pending = table.start(rows)     # the CPU gathers, in this thread; the copy goes its own way
    values = pending.wait()         # the current stream waits for the copy, the CPU does not
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram_ref.tables.base import Pending, RowFormat, Table, check_rows
from engram_ref.tables.delivery import Delivery
from engram_ref.tables.gather import gather
from engram_ref.tables.memory import HostMemory


class HostTable(Table):
    """A table in host memory.

    Args:
        values: the rows [R, D] on the CPU, contiguous; they are used as they are.
        device: where fetched rows are wanted.
        memory: what `values` lies in; it is closed with the table.
    """

    placement = "host"

    def __init__(self, values: Tensor, device: str | torch.device, memory: HostMemory | None = None) -> None:
        cpu = torch.device("cpu")
        if values.device != cpu:
            raise ValueError(f"rows on {values.device}: a host table has them on the CPU; use placement device")
        row_format = RowFormat(values.dtype, values.shape[-1])
        self._raw: Tensor | None = row_format.encode(values)  # [R, row_bytes]
        super().__init__(len(values), row_format, torch.device(device), cpu)
        self._memory = memory
        self._delivery = Delivery(self.device, row_format)

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Gather, and start the copy to the device."""
        raw = self._raw
        if raw is None:
            raise ValueError("this table was closed: its memory is gone")
        rows = check_rows(rows, self.rows)
        return self._delivery.send(len(rows), lambda staged: gather(raw, rows, staged), out)

    def _held(self) -> dict[str, int]:
        return {"host": 0 if self._raw is None else self._raw.nbytes}

    @property
    def bytes_copied(self) -> int:
        """Bytes that copies have brought from host memory to an accelerator, for all fetches so far."""
        return self._delivery.bytes_copied

    def trim(self) -> None:
        """Give the staging buffers back."""
        self._delivery.trim()

    def close(self) -> None:
        """Give back staging buffers and memory."""
        self.trim()
        self._raw = None
        if self._memory is not None:
            self._memory.close()
