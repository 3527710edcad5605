"""Rows in pinned host memory that a GPU kernel reads in place: no gather on the CPU, no staging copy.

The row numbers are on the device already, and the rows cross the bus one by one as the kernel asks for them.
It runs on a side stream of its own, after whatever made the row numbers.

A row number outside the table is not read. The CPU learns of it from a word in pinned memory that the kernel
writes to: whichever comes first after the kernel has run, the next `start`, a `wait` or `close`, raises it.

    with make_table("uva", weights, device="cuda") as table:
        values = table.start(rows).wait()
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engram_ref.tables.base import Pending, Ready, RowFormat, Table, check_out, check_rows, check_shape
from engram_ref.tables.delivery import Arriving
from engram_ref.tables.memory import PIN_PIECE, HostMemory

_CAN_USE_HOST_POINTER = 91  # cuda.h: CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM


class UvaTable(Table):
    """A table in host memory for a GPU that reads it in place.

    Args:
        values: the rows [R, D], contiguous, page-locked.
        device: a CUDA device; "cpu" only in Triton's interpreter, for tests.
        memory: what `values` lies in; it is closed with the table.

    Raises:
        ValueError: this machine cannot serve the placement, or the memory is not page-locked.
    """

    placement = "uva"

    def __init__(self, values: Tensor, device: str | torch.device, memory: HostMemory | None = None) -> None:
        target = torch.device(device)
        row_format = RowFormat(values.dtype, values.shape[-1])
        raw = row_format.encode(values)  # [R, row_bytes]
        self._kernels = require_uva(target, raw.nbytes)
        self._raw: Tensor | None = raw
        self._memory = memory
        self._cuda = target.type == "cuda"
        if self._cuda and not _is_page_locked(raw):
            raise ValueError("placement uva reads page-locked memory, this is not: use HostMemory or pin_memory()")
        super().__init__(len(values), row_format, target, target)
        self._stream: Any = torch.cuda.Stream(target) if self._cuda else None
        self._bad_row = torch.zeros(1, dtype=torch.int64, pin_memory=self._cuda)  # 0, which exists, for none

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Begin to read; a bad row number of this fetch is raised later, and its row is bytes 0xFF until then."""
        check_shape(rows, self.index_device)
        if out is not None:
            check_out(out, len(rows), self.format, self.device)
        if self._raw is None:
            raise ValueError("this table was closed: its memory is gone")
        self._raise_bad_row()
        if not self.rows:
            check_rows(rows.cpu(), 0)  # no row can stand for "none" here
        fetch = self._start_on_gpu(rows.contiguous(), out) if self._cuda else self._interpret(rows.contiguous(), out)
        return _Unchecked(fetch, self._raise_bad_row)

    def _start_on_gpu(self, rows: Tensor, out: Tensor | None) -> Arriving:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # it made the row numbers
        with torch.cuda.stream(self._stream):
            values = self._gather(rows, out)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        for tensor in (rows, values):
            tensor.record_stream(self._stream)  # whoever lets go of it, its memory is kept for the kernel
        return Arriving(values, arrived)

    def _interpret(self, rows: Tensor, out: Tensor | None) -> Ready:
        return Ready(self._gather(rows, out))

    def _gather(self, rows: Tensor, out: Tensor | None) -> Tensor:
        values = out
        if values is None:
            values = torch.empty((len(rows), self.format.width), dtype=self.format.dtype, device=self.device)
        self._kernels.gather_rows(self._raw, rows, values.view(torch.uint8), self._bad_row)
        return values

    def _raise_bad_row(self) -> None:
        bad = int(self._bad_row)
        if bad:
            self._bad_row.zero_()
            raise ValueError(
                f"row {bad} does not exist; the table has rows 0 .. {self.rows - 1} (asked for in this fetch or before)"
            )

    def _held(self) -> dict[str, int]:
        return {"host": 0 if self._raw is None else self._raw.nbytes}

    def close(self) -> None:
        """Wait for the kernels, give the memory back, and raise a bad row number that nobody has heard of yet."""
        if self._cuda:
            torch.cuda.synchronize(self.device)
        self._raw = None
        if self._memory is not None:
            self._memory.close()
        self._raise_bad_row()


@dataclass(frozen=True)
class _Unchecked:
    """A fetch whose row numbers only the device has seen."""

    fetch: Pending
    check: Callable[[], None]

    def wait(self) -> Tensor:
        """The rows, [N, D]; raises what the device is known to have found wrong by now."""
        values = self.fetch.wait()
        self.check()
        return values


def require_uva(device: torch.device, nbytes: int) -> ModuleType:
    """The kernels, where this machine can serve the placement with a table of so many bytes.

    Raises:
        ValueError: no CUDA device, no Triton, or a table of several pieces that a GPU would not see as one.
    """
    missing = f"this machine cannot serve placement uva: needs a CUDA device and Triton, not {device}"
    try:
        from engram_ref import kernels
    except ImportError as error:
        raise ValueError(f"{missing} without Triton ({error}): pip install triton, or use placement host") from error
    if not kernels.can_run_on(device):
        raise ValueError(f"{missing}; use placement host")
    if device.type == "cuda" and nbytes > PIN_PIECE and not _host_addresses_serve():
        raise ValueError(
            "this machine cannot serve placement uva: needs GPUs that read host memory at the CPU's addresses, "
            f"as memory is page-locked in pieces of {PIN_PIECE:,} B; use placement host, or a table of one piece"
        )
    return kernels


def _is_page_locked(raw: Tensor) -> bool:
    """Whether the first and the last byte are. A tensor's own `is_pinned` asks about its storage, which may begin
    before the tensor does: before what was registered."""
    ends = (raw.data_ptr(), raw.data_ptr() + raw.nbytes - 1) if raw.nbytes else ()
    return all(torch.frombuffer((ctypes.c_char * 1).from_address(x), dtype=torch.uint8).is_pinned() for x in ends)


def _host_addresses_serve() -> bool:
    """Whether every visible GPU reads registered host memory at the CPU's addresses.

    Only then is memory that was registered piece by piece one stretch for a kernel too. If one visible GPU cannot,
    the driver gives all of them other addresses, and those of the pieces need not follow one another.
    """
    driver, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    for index in range(torch.cuda.device_count()):
        gpu = ctypes.c_int()
        error = driver.cuDeviceGet(ctypes.byref(gpu), index)
        error = error or driver.cuDeviceGetAttribute(ctypes.byref(answer), _CAN_USE_HOST_POINTER, gpu)
        if error or not answer.value:
            return False
    return True
