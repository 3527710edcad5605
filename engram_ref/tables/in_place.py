"""Rows that a kernel reads where they lie, by numbers that only the device has seen.

What `UvaTable` and, on CUDA, `DeviceTable` have in common. Nobody but the kernel looks at the row numbers, so a
row number outside the table is not read: the kernel writes it to a word in pinned memory, and whichever comes first
after it has run, the next `start`, a `wait` or `close`, raises it.

    rows = InPlace(table, device, kernels)
    values = rows.read(numbers)                 # [N, D], on the current stream
    pending = rows.checked(Ready(values))       # its wait raises a bad number that is known by then

    python -m pytest tests/ref/tables/test_in_place.py
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from engram_ref.rows.rows import Rows
from engram_ref.tables.base import Pending, check_rows


class InPlace:
    """Rows for a kernel, and the word for a bad number.

    Args:
        table: in memory that the device can read.
        device: where the numbers are and the values are wanted.
        kernels: `engram_ref.rows.kernels`, which run there.
    """

    def __init__(self, table: Rows, device: torch.device, kernels: ModuleType) -> None:
        self.table = table
        self.device = device
        self._kernels = kernels
        self._bad_row = _BadRow(len(table), device)

    def admit(self, numbers: Tensor) -> None:
        """Before a fetch: raise a bad number of an earlier one; of an empty table, wait and raise this one's."""
        self.check()
        if not len(self.table):
            check_rows(numbers.cpu(), 0)  # no row can stand for "none" here

    def read(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Values [N, D] of some rows, on the current stream; those of a bad number are bytes 0xFF."""
        row_format = self.table.format
        if out is None:
            out = torch.empty((len(numbers), row_format.width), dtype=row_format.dtype, device=self.device)
        if row_format.scaled:
            self._kernels.gather_scaled(self.table.parts, numbers.contiguous(), out, self._bad_row.word)
        else:
            raw = self.table.parts[0]
            self._kernels.gather_rows(raw, numbers.contiguous(), out.view(torch.uint8), self._bad_row.word)
        return out

    def checked(self, fetch: Pending) -> Pending:
        """The fetch, with a look at the word when it is waited for."""
        return _Checked(fetch, self._bad_row)

    def check(self) -> None:
        """Raise a bad number that the device is known to have met, once."""
        self._bad_row.check()

    def finish(self) -> None:
        """Wait for the kernels: nobody reads the rows any more, and `check` knows everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _BadRow:
    """Where a kernel writes a row number that the table does not have."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        # 0, which exists, stands for none.
        self.word = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")

    def check(self) -> None:
        bad = int(self.word)
        if bad:
            self.word.zero_()
            raise ValueError(
                f"row {bad} does not exist; the table has rows 0 .. {self.rows - 1} (asked for in this fetch or before)"
            )


@dataclass(frozen=True)
class _Checked:
    """A fetch whose row numbers only the device has seen; it does not keep the table alive."""

    fetch: Pending
    bad_row: _BadRow

    def wait(self) -> Tensor:
        """The rows, [N, D]; raises what the device is known to have found wrong by now."""
        values = self.fetch.wait()
        self.bad_row.check()
        return values
