"""How rows that the CPU gathers reach the device: at once on a CPU, through pinned staging and a side stream on CUDA.

Two staging buffers at least: while one is being copied, the next fetch gathers into the other. Three lines, numbered
below, keep copies apart from what is before and behind them. Take away any and rows come out wrong, now and then: the
tests do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram_ref.devices import side_stream
from engram_ref.rows.decoding import gather_values
from engram_ref.rows.format import RowFormat
from engram_ref.rows.gather import gather_parts
from engram_ref.rows.memory import HUGE_PAGE, HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables.base import Pending, Ready, check_out
from engram_ref.threads.errands import require_here
from engram_ref.threads.users import Users

Fill = Callable[[Tensor], object]  # writes the stored rows of one fetch into uint8 [N, row_bytes]
STAGING_BUFFERS = 2
# The CPU decodes so many bytes of fp8 rows in less time than it takes to launch a kernel that does; from there on, what
# counts is that they are half as many bytes as their values.
CPU_DECODED_BYTES = 64 * 1024
_FRESH_BYTES = 32 << 20  # from here the C library takes new pages for every allocation, 4 KiB at a time


def is_decoded_here(row_format: RowFormat, count: int) -> bool:
    """Whether the CPU decodes so many rows while it gathers them, so that values cross instead of what is stored."""
    return row_format.scaled and count * row_format.row_bytes <= CPU_DECODED_BYTES


def crossing_bytes(row_format: RowFormat, count: int) -> int:
    """Bytes of a fetch of so many rows that are copied to an accelerator."""
    decoded = is_decoded_here(row_format, count)
    return count * (row_format.width * row_format.dtype.itemsize if decoded else row_format.row_bytes)


def collect(table: Rows, rows: Tensor, values: Tensor) -> None:
    """Gather rows of a table in memory into values [N, D] in memory, decoded in the same pass."""
    if table.format.scaled:
        gather_values(table.parts, rows, values)
    else:
        gather_parts(table.parts, rows, values.view(torch.uint8))


class Delivery:
    """Brings rows to one device.

    Args:
        device: where they are wanted.
        row_format: of the table.
        buffers: staging buffers, two at least; a CPU needs none.

    Attributes:
        bytes_copied: to an accelerator, so far.
    """

    def __init__(self, device: torch.device, row_format: RowFormat, buffers: int = STAGING_BUFFERS) -> None:
        if buffers < STAGING_BUFFERS:
            raise ValueError(f"buffers={buffers}: with fewer than {STAGING_BUFFERS} nothing overlaps")
        self.device = device
        self.format = row_format
        self._cuda = device.type == "cuda"
        self._stream: Any = side_stream(device) if self._cuda else None
        self._slots = [_Slot() for _ in range(buffers)] if self._cuda else []
        self._users = Users("the staging of this table")
        self._turn = 0
        self.bytes_copied = 0

    def send(self, count: int, fill: Fill, out: Tensor | None = None, beside: bool = True) -> Pending:
        """Let `fill` write `count` stored rows, and start them on their way.

        Args:
            beside: copy on the side stream; False: behind what the current stream has (`Table.bring`).
        """
        if out is not None:
            check_out(out, count, self.format, self.device)
        if self._cuda:
            return self._send_to_gpu(count, fill, out, beside)
        values = self.empty(count) if out is None else out
        if not self.format.scaled:
            fill(values.view(torch.uint8))
            return Ready(values)
        raw = torch.empty((count, self.format.row_bytes), dtype=torch.uint8, device="cpu")
        fill(raw)
        return Ready(self.format.decode(raw, values))

    def take(self, table: Rows, rows: Tensor, out: Tensor | None = None, beside: bool = True) -> Pending:
        """Gather rows of a table in memory, and start them on their way; on a CPU, straight to where they are wanted.

        Decoded in the same pass, unless they are many and go to an accelerator. `beside`: see `send`.
        """
        count = rows.shape[0]  # len(rows) takes three times as long
        if out is not None:
            check_out(out, count, self.format, self.device)
        if self._cuda:
            return self._take_to_gpu(table, rows, count, out, beside)
        values = self.empty(count) if out is None else out
        collect(table, rows, values)
        return Ready(values)

    def _take_to_gpu(self, table: Rows, rows: Tensor, count: int, out: Tensor | None, beside: bool) -> Arriving:
        parts, dtype = table.parts, self.format.dtype
        if not is_decoded_here(self.format, count):
            return self._send_to_gpu(count, lambda staged: gather_parts(parts, rows, staged), out, beside)
        fill: Fill = lambda staged: gather_values(parts, rows, staged.view(dtype))  # noqa: E731
        return self._send_to_gpu(count, fill, out, beside, decoded=True)

    def empty(self, count: int) -> Tensor:
        """New memory for the rows of a fetch."""
        nbytes = count * self.format.width * self.format.dtype.itemsize
        if self.device.type == "cpu" and nbytes >= _FRESH_BYTES:
            return HostMemory(nbytes).bytes.view(self.format.dtype).view(count, self.format.width)
        return torch.empty((count, self.format.width), dtype=self.format.dtype, device=self.device)

    def _send_to_gpu(self, count: int, fill: Fill, out: Tensor | None, beside: bool, decoded: bool = False) -> Arriving:
        """`decoded`: what `fill` writes are the bytes of values, not of stored rows."""
        if out is not None and beside:
            out.record_stream(self._stream)  # whoever lets go of it, its memory is kept for the copy
        row_bytes = self.format.width * self.format.dtype.itemsize if decoded else self.format.row_bytes
        with self._users.here(), self._users.alone:  # one thread at a time has the turn
            slot = self._next_slot()
            staged = slot.room(count, row_bytes)
            fill(staged)
            stream = self._stream if beside else torch.cuda.current_stream(self.device)
            try:
                with torch.cuda.stream(stream) if beside else nullcontext():
                    values = self._copy(staged, out, self.format.scaled and not decoded)
                    copied = torch.cuda.Event()
                    copied.record(stream)
            except BaseException:
                stream.synchronize()  # a copy that nobody else will wait for may be reading the buffer
                raise
            slot.copied = copied
            return Arriving(values, copied, stream)

    def _copy(self, staged: Tensor, out: Tensor | None, encoded: bool) -> Tensor:
        """Start the copy of a filled buffer on the current stream; the values, there once it has ended."""
        values = self.empty(staged.shape[0]) if out is None else out
        # Bytes that cross, [N, row_bytes] as stored, or [N, D * itemsize] where the CPU has decoded them.
        raw = torch.empty_like(staged, device=self.device) if encoded else values.view(torch.uint8)
        raw.copy_(staged, non_blocking=True)
        if encoded:
            self.format.decode(raw, values)
        self.bytes_copied += staged.nbytes
        return values

    def _next_slot(self) -> _Slot:
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        slot.finish()  # 1: the copy that reads the buffer has ended before it is filled again
        return slot

    def trim(self) -> None:
        """Unpin and free the staging buffers."""
        with self._users.here(), self._users.alone:
            for slot in self._slots:
                slot.free()


class _Slot:
    """One pinned staging buffer."""

    def __init__(self) -> None:
        self.memory: HostMemory | None = None
        self._room: Tensor | None = None  # as it was last asked for, which decode steps do time and again
        self.copied: Any = None  # torch.cuda.Event, of the copy that last read it

    def finish(self) -> None:
        """Wait until the buffer may be written again."""
        if self.copied is not None:
            self.copied.synchronize()

    def room(self, count: int, row_bytes: int) -> Tensor:
        """The beginning of the buffer, uint8 [count, row_bytes]; it grows to a multiple of a huge page when it must."""
        if self._room is None or self._room.shape != (count, row_bytes):
            self._room = self._grown(count * row_bytes).view(count, row_bytes)
        return self._room

    def _grown(self, nbytes: int) -> Tensor:
        held = 0 if self.memory is None else self.memory.nbytes
        if self.memory is None or held < nbytes:
            self.free()
            with torch.inference_mode(False):  # written to in whatever mode a later fetch runs
                # Doubled at least: to grow stops the device.
                memory = HostMemory(-(-max(nbytes, 2 * held, 1) // HUGE_PAGE) * HUGE_PAGE)
            memory.pin(piece=memory.nbytes)  # one copy does not reach over two pieces
            self.memory = memory
        return self.memory.bytes[:nbytes]

    def free(self) -> None:
        """Wait for the copy, and give the buffer back."""
        self.finish()
        if self.memory is not None:
            self.memory.close()
        self.memory = self._room = self.copied = None


@dataclass(frozen=True)
class Arriving:
    """Rows on their way on a stream, in memory of that stream; None: on one that nobody else uses."""

    values: Tensor
    arrived: Any  # torch.cuda.Event
    stream: Any = None  # torch.cuda.Stream

    def wait(self) -> Tensor:
        """The rows; the current stream waits for them, the CPU does not."""
        stream = torch.cuda.current_stream(self.values.device)
        if self.stream is None or stream != self.stream:  # torch finds that no stream differs from None
            stream.wait_event(self.arrived)  # 2: whoever uses the rows does so behind their copy
            self.values.record_stream(stream)  # 3: and their memory is not recycled before that
        return self.values


class Once:
    """Rows that whoever waits for them first puts together; he may be reading them while others wait for them, too."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._lock, self._process = threading.Lock(), os.getpid()
        self._found: Pending | None = None

    def wait(self) -> Tensor:
        """The rows, [N, D]; what goes wrong is raised each time.

        Raises:
            RuntimeError: somebody puts them together in the process that this is a fork of.
        """
        if self._found is None:
            self._process = require_here(self._lock, self._process)
            with self._lock:
                if self._found is None:  # nor after an error or Ctrl-C, by which nobody has got them
                    self._found = _found(self._pending.wait())
        return self._found.wait()


def _found(values: Tensor) -> Pending:
    """Rows that the current stream has, or will have: the streams of others wait for it."""
    if values.device.type != "cuda":
        return Ready(values)
    stream = torch.cuda.current_stream(values.device)
    return Arriving(values, stream.record_event(), stream)
