"""Rows in host memory: gathered by the CPU, and brought to the device through pinned staging.

with HostTable(weights, torch.device("cuda")) as table:
    pending = table.start(rows)     # the CPU gathers, in this thread; the copy goes its own way
    values = pending.wait()         # the current stream waits for the copy, the CPU does not
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram_ref.devices import as_device
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows, rows_of_table
from engram_ref.tables.base import Pending, Table, check_out, check_rows
from engram_ref.tables.staging import Delivery, collect


class HostTable(Table):
    """A table in host memory.

    Args:
        rows: on the CPU; plain values [R, D], contiguous, or `Rows`. They are used as they are.
        device: where fetched rows are wanted.
        memory: what they lie in; it is closed with the table.
        checked: fp8 rows were searched for NaN just now, and are not searched again.

    Raises:
        ValueError: rows on another device, a device that is neither the CPU nor CUDA, rows that require gradients, or
            fp8 rows with a code or a scale that is NaN.
    """

    placement = "host"

    def __init__(
        self,
        rows: Tensor | Rows,
        device: str | torch.device,
        memory: HostMemory | None = None,
        *,
        checked: bool = False,
    ) -> None:
        cpu = torch.device("cpu")
        if rows.device != cpu:
            raise ValueError(f"rows on {rows.device}: a host table has them on the CPU; use placement device")
        rows = rows_of_table(rows, checked)
        super().__init__(len(rows), rows.format, as_device(device), cpu)
        self._rows: Rows | None = rows
        self._memory = memory
        self._delivery = Delivery(self.device, rows.format)

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Gather, and start the copy to the device."""
        return self._take(rows, out, beside=True)

    def bring(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """The same, on the current stream."""
        return self._take(rows, out, beside=False)

    def _take(self, rows: Tensor, out: Tensor | None, beside: bool) -> Pending:
        with self._users.here():
            table, rows = self._open(), check_rows(rows, self.rows)
            self.count(len(rows))
            return self._delivery.take(table, rows, out, beside)

    def collect(self, rows: Tensor, out: Tensor) -> None:
        """See `Table.collect`; fp8 rows are decoded in the same pass."""
        with self._users.here():
            table, rows = self._open(), check_rows(rows, self.rows)
            check_out(out, len(rows), self.format, self.index_device)
            self.count(len(rows))
            collect(table, rows, out)

    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored, uint8 [N, row_bytes], in host memory."""
        with self._users.here():
            return self._open().take(check_rows(rows, self.rows))

    def _open(self) -> Rows:
        self._require_open()
        assert self._rows is not None
        return self._rows

    def _held(self) -> dict[str, int]:
        return {"host": 0 if self._rows is None else self._rows.nbytes}

    def _give_back(self) -> None:
        self.trim()
        self._rows = None
        if self._memory is not None:
            self._memory.close()
