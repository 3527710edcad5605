"""Rows in pinned host memory that a GPU kernel reads in place: no gather on the CPU, no staging copy.

The row numbers are on the device already, and the rows cross the bus one by one as the kernel asks for them; fp8 rows
cross it as they are stored and are decoded by the kernel. It runs on a side stream of its own, after whatever made the
row numbers. What becomes of a row number outside the table is said in `engram_ref.tables.in_place`.

    with make_table("uva", weights, device="cuda") as table:
        values = table.start(rows).wait()
"""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engram_ref.devices import side_stream
from engram_ref.rows.memory import PIN_PIECE, HostMemory
from engram_ref.rows.rows import Rows, rows_of_table
from engram_ref.tables.base import Pending, Ready, Table, check_out, check_rows, check_shape
from engram_ref.tables.in_place import InPlace
from engram_ref.tables.staging import Arriving

_CAN_USE_HOST_POINTER = 91  # cuda.h: CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM


class UvaTable(Table):
    """A table in host memory for a GPU that reads it in place.

    Args:
        rows: page-locked; plain values [R, D], contiguous, or `Rows`. They are used as they are.
        device: a CUDA device; "cpu" only in Triton's interpreter, for tests.
        memory: what they lie in; it is closed with the table.
        checked: fp8 rows were searched for NaN just now, and are not searched again.

    Raises:
        ValueError: this machine cannot serve the placement, the memory is not page-locked, rows require gradients, or
            fp8 rows have a code or a scale that is NaN.
    """

    placement = "uva"

    def __init__(
        self,
        rows: Tensor | Rows,
        device: str | torch.device,
        memory: HostMemory | None = None,
        *,
        checked: bool = False,
    ) -> None:
        target = torch.device(device)
        kernels = require_uva(target, rows.nbytes)
        rows = rows_of_table(rows, checked)
        self._cuda = target.type == "cuda"
        if self._cuda and not all(_is_page_locked(part) for part in rows.parts):
            raise ValueError("placement uva reads page-locked memory, this is not: use HostMemory or pin_memory()")
        super().__init__(len(rows), rows.format, target, target)
        self._in_place: InPlace | None = InPlace(rows, target, kernels)
        self._memory = memory
        self._addressable: bool | None = None  # asked once: the driver answers slowly
        self._stream: Any = side_stream(target) if self._cuda else None

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Begin to read; a bad row number of this fetch is raised later, and its row is bytes 0xFF until then."""
        check_shape(rows, self.index_device)
        if out is not None:
            check_out(out, len(rows), self.format, self.device)
        with self._users.here():
            table = self._open()
            table.admit(rows)
            self.count(len(rows))
            fetch = self._start_on_gpu(table, rows.contiguous(), out) if self._cuda else Ready(table.read(rows, out))
            return table.checked(fetch)

    def _open(self) -> InPlace:
        self._require_open()
        assert self._in_place is not None
        return self._in_place

    def _start_on_gpu(self, table: InPlace, rows: Tensor, out: Tensor | None) -> Arriving:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # it made the row numbers
        for tensor in (rows,) if out is None else (rows, out):
            tensor.record_stream(self._stream)  # whoever lets go of it, its memory is kept for the kernel
        with torch.cuda.stream(self._stream):
            values = table.read(rows, out)  # new memory is this stream's
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return Arriving(values, arrived)

    def in_place(self) -> Rows | None:
        """The rows; None on a GPU that has other addresses for host memory."""
        rows = self._open().table
        if self._addressable is None:
            self._addressable = not self._cuda or _host_addresses_serve()
        return rows if self._addressable else None

    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored, uint8 [N, row_bytes], in host memory."""
        with self._users.here():
            return self._open().table.take(check_rows(rows, self.rows))

    def _held(self) -> dict[str, int]:
        return {"host": 0 if self._in_place is None else self._in_place.table.nbytes}

    def _give_back(self) -> None:
        table, self._in_place = self._in_place, None
        if table is not None:
            table.finish()
        if self._memory is not None:
            self._memory.close()
        if table is not None:
            table.check()


def require_uva(device: torch.device, nbytes: int) -> ModuleType:
    """The kernels, where this machine can serve the placement with a table of so many bytes.

    Raises:
        ValueError: no CUDA device, no Triton, or a table of several pieces that a GPU would not see as one.
    """
    missing = f"this machine cannot serve placement uva: needs a CUDA device and Triton, not {device}"
    try:
        from engram_ref import gpu
        from engram_ref.rows import kernels
    except ImportError as error:
        raise ValueError(f"{missing} without Triton ({error}): pip install triton, or use placement host") from error
    if not gpu.can_run_on(device):
        raise ValueError(f"{missing}; use placement host")
    if device.type == "cuda" and nbytes > PIN_PIECE and not _host_addresses_serve():
        raise ValueError(
            "this machine cannot serve placement uva: needs GPUs that read host memory at the CPU's addresses, "
            f"as memory is page-locked in pieces of {PIN_PIECE:,} B; use placement host, or a table of one piece"
        )
    return kernels


def _is_page_locked(raw: Tensor) -> bool:
    """Whether the first and the last byte are."""
    # A tensor's own `is_pinned` asks about its storage, which may begin before what was registered does.
    ends = (raw.data_ptr(), raw.data_ptr() + raw.nbytes - 1) if raw.nbytes else ()
    return all(torch.frombuffer((ctypes.c_char * 1).from_address(x), dtype=torch.uint8).is_pinned() for x in ends)


def _host_addresses_serve() -> bool:
    """Whether every visible GPU reads registered host memory at the CPU's addresses."""
    # Only then is memory that was registered piece by piece one stretch for a kernel too. If one visible GPU cannot,
    # the driver gives all of them other addresses, and those of the pieces need not follow one another.
    driver, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    for index in range(torch.cuda.device_count()):
        gpu = ctypes.c_int()
        error = driver.cuDeviceGet(ctypes.byref(gpu), index)
        error = error or driver.cuDeviceGetAttribute(ctypes.byref(answer), _CAN_USE_HOST_POINTER, gpu)
        if error or not answer.value:
            return False
    return True
