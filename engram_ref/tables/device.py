"""Rows in the memory of the device that uses them: the resident table, which every other placement is held against.

On a CPU the compiled gather fetches them. On CUDA a fetch is one kernel on the current stream, which decodes fp8 rows
on the way (without Triton, torch's own operations do it); which stream that is, is the schedule's business. Rows that
are being trained are fetched so that gradients reach them.

    with DeviceTable(weights) as table:
        values = table.start(rows).wait()
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from engram_ref.rows.decoding import kernels_for
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows, has_memory, rows_of_table
from engram_ref.tables.base import Pending, Ready, Table, check_out, check_rows, check_shape
from engram_ref.tables.in_place import InPlace
from engram_ref.tables.staging import Delivery


class DeviceTable(Table):
    """A table in the memory of its device.

    Args:
        rows: plain values [R, D], contiguous, or `Rows`; they are used as they are. If values require gradients, rows
            fetched while gradients are on pass them back, and after `values.data = ...` the new ones are fetched.
        memory: what they lie in; it is closed with the table.
        checked: fp8 rows were searched for NaN just now, and are not searched again.

    Attributes:
        weight: the values that the rows are, where they are trained; else None.

    Raises:
        ValueError: fp8 rows with a code or a scale that is NaN.
    """

    placement = "device"
    _reads_from = "device"

    def __init__(self, rows: Tensor | Rows, memory: HostMemory | None = None, *, checked: bool = False) -> None:
        self.weight = rows if isinstance(rows, Tensor) and rows.requires_grad else None  # [R, D]
        rows = rows_of_table(rows.detach() if isinstance(rows, Tensor) else rows, checked)
        super().__init__(len(rows), rows.format, rows.device, rows.device)
        self.trained = self.weight is not None
        self._rows: Rows | None = rows
        self._memory = memory
        kernels = kernels_for(rows.device)
        self._in_place = None if kernels is None else InPlace(rows, rows.device, kernels)
        gathered = rows.device.type == "cpu" and self._in_place is None
        self._delivery = Delivery(rows.device, rows.format) if gathered else None

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Fetch now, on the current stream.

        On CUDA the row of a number outside the table is bytes 0xFF, and the number is raised later, by this fetch's
        `wait`, the next `start` or `close`. Without Triton it stops the device with an assertion, as where rows are
        fetched to be trained.
        """
        with self._users.here():
            pending = self._start(self._open(), rows, out)
            self.count(len(rows))
            return pending

    def _start(self, table: Rows, rows: Tensor, out: Tensor | None) -> Pending:
        if self._delivery is None:
            check_shape(rows, self.index_device)  # not the numbers, for which the CPU would have to wait
        else:
            rows = check_rows(rows, self.rows)
        trained = self.weight
        if trained is not None and not torch.is_grad_enabled() and unpack_dual(trained).tangent is None:
            trained = None
        if self._delivery is not None and trained is None:
            return self._delivery.take(table, rows, out)  # which looks at `out`
        if out is not None:
            check_out(out, len(rows), self.format, self.device)
        if trained is not None:
            if out is not None:
                raise ValueError("out= given for rows that pass gradients back: leave it out, or use torch.no_grad()")
            # It keeps the numbers for backward(), and may be given an array's, which torch does not see written to.
            return Ready(F.embedding(rows.clone(), trained))
        if self._in_place is not None:
            self._in_place.admit(rows)
            return self._in_place.checked(Ready(self._in_place.read(rows, out)))
        if not self.format.scaled:
            return Ready(torch.index_select(table.values(), 0, rows, out=out))
        found = [torch.index_select(part, 0, rows) for part in table.parts]  # uint8 [N, w] each
        return Ready(self.format.decode(torch.cat(found, dim=1), out))

    def _open(self) -> Rows:
        self._require_open()
        assert self._rows is not None
        if self.weight is not None and not self._are_here(self.weight):
            self._follow(self.weight)
        return self._rows

    def _are_here(self, values: Tensor) -> bool:
        """Whether the rows are these values still, and their memory was not given back."""
        assert self._rows is not None
        here = values.data_ptr() == self._rows.parts[0].data_ptr()
        like = values.shape == (self.rows, self.format.width) and values.dtype == self.format.dtype
        return here and like and values.is_contiguous() and has_memory(values)

    def _follow(self, values: Tensor) -> None:
        """Rows that are trained lie elsewhere now: `values.data = ...`, as an average of weights is swapped in."""
        if values.device != self.device or len(values) != self.rows:
            raise ValueError(
                f"this table was made of {self.rows} rows on {self.device}, its weight has {len(values)} on "
                f"{values.device} now: make a new DeviceTable of it"
            )
        self._rows = Rows(self.format, (self.format.encode(values),))
        if self._in_place is not None:
            self._in_place.table = self._rows

    def in_place(self) -> Rows | None:
        """The rows; None where they are trained, as no kernel passes gradients back."""
        return None if self.trained else self._open()

    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored, uint8 [N, row_bytes], in host memory."""
        with self._users.here():
            return self._open().take(check_rows(rows, self.rows))

    def _held(self) -> dict[str, int]:
        return {"device": 0 if self._rows is None else self._rows.nbytes}

    def _give_back(self) -> None:
        in_place, self._in_place = self._in_place, None
        self._rows = self.weight = None
        if self._memory is not None:
            self._memory.close()
        if in_place is not None:
            in_place.finish()
            in_place.check()
