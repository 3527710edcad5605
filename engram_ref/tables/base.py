"""What every placement of a table has in common: row format, the pending fetch, the interface, the checks.

A table says where its rows live and hands out pending fetches; when a fetch starts is the business of a
schedule (`engram_ref.prefetch`). To a table a row is `row_bytes` opaque bytes; only the row format knows how
they become values.

    pending = table.start(rows)     # rows: [N] row numbers, integers, repeats allowed, N = 0 included
    values = pending.wait()         # [N, D] on table.device, equal to the bit for every placement

Row numbers are given where `table.index_device` says: on the CPU for tables that the CPU gathers from, on the
accelerator for tables that it reads by itself. Several threads may fetch from one table, and close it: closing waits
for the fetches that are being started, and none starts afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engram_ref.rows.format import RowFormat
from engram_ref.rows.gather import are_below
from engram_ref.threads.users import Users

if TYPE_CHECKING:
    from engram_ref.rows.rows import Rows

_NUMBERS = (torch.int32, torch.int64)  # what row numbers may be
_CPU = torch.device("cpu")
# Handing a fetch to a thread costs 60 to 300 us (docs/hardware.md), most where it must be woken, and stretches what the
# caller computes meanwhile by all that the thread does in Python. Rows of up to this many bytes are gathered in less.
INLINE_BYTES = 64 * 1024


class Pending(Protocol):
    """A fetch that has been started."""

    def wait(self) -> Tensor:
        """The rows, [N, D], safe to use on the current stream; raises what went wrong in the fetch."""
        ...


@dataclass(frozen=True)
class Ready:
    """A fetch that was done when it was started."""

    values: Tensor

    def wait(self) -> Tensor:
        """The rows, [N, D]."""
        return self.values


class Table(ABC):
    """Rows that live somewhere.

    Attributes:
        rows: how many there are.
        format: what a row's bytes mean.
        device: where fetched rows arrive.
        index_device: where `start` wants the row numbers.
        waits: whether `start` mostly waits (for a disk), so that even a small one is worth a thread.
        trained: whether fetched rows pass gradients back, so that they cannot be put into a given buffer.
    """

    placement: str
    waits = False
    trained = False
    _reads_from = "host"
    _delivery: Any = None  # a Delivery (`staging`, which imports this file), where the CPU gathers rows

    def __init__(self, rows: int, row_format: RowFormat, device: torch.device, index_device: torch.device) -> None:
        self.rows = rows
        self.format = row_format
        self.device = device
        self.index_device = index_device
        self._users = Users("this table")
        self._asked = 0  # rows, by all fetches so far

    @abstractmethod
    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Begin to fetch.

        Args:
            rows: row numbers [N], int32 or int64, on `index_device`.
            out: [N, D] on `device` to write into instead of new memory; nobody may still be reading it. To torch's
                `backward`, slices of one tensor are written to together.

        Raises:
            ValueError: a row number outside 0 .. rows - 1, the wrong dtype, shape or device, or a closed table.
        """

    def ask(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """As `start`, but of what would have to be waited for as much as can be is left to `wait`: for small fetches.

        Args and errors: as for `start`; what goes wrong later, `wait` raises.
        """
        return self.start(rows, out)

    def bring(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """As `start`, for whoever waits at once: a copy goes behind what its own stream has, not on a side stream.

        Nothing could overlap with it, and changing streams costs the CPU more than a small copy costs the device.

        Args and errors: as for `start`.
        """
        return self.start(rows, out)

    def collect(self, rows: Tensor, out: Tensor) -> None:
        """Gather values into host memory, in the caller's thread, and ask nothing of an accelerator.

        Args:
            rows: row numbers [N], as for `start`, on the CPU.
            out: [N, D] there.

        Raises:
            ValueError: as `start`, and of a table whose rows are not in host memory.
        """
        raise ValueError(f"the rows of a {self.placement} table are not collected by the CPU alone: use placement host")

    @property
    def inline_rows(self) -> int:
        """Rows that whoever wants them asks for by himself, as it takes less time than to give them to a thread."""
        return 0 if self.waits else INLINE_BYTES // self.format.row_bytes

    @abstractmethod
    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored, without haste: uint8 [N, row_bytes], in host memory.

        Args:
            rows: row numbers [N], as for `start`, on the CPU.
        """

    def in_place(self) -> Rows | None:
        """The rows where a kernel on `device` can read them by their addresses; None where only the table can.

        Raises:
            ValueError: the table was closed.
        """
        return None

    def excuse(self, error: BaseException) -> None:  # noqa: B027, most tables belong to one process
        """Whoever cannot even ask for rows says so here, instead of `start`: other processes may be waiting for it.

        Args:
            error: why; the caller raises it, unless it is raised here, in the words that all processes use.
        """

    def bytes_held(self) -> dict[str, int]:
        """Bytes of the table by place: `device`, `host` and `disk`; staging memory is not counted."""
        return {"device": 0, "host": 0, "disk": 0, **self._held()}

    @abstractmethod
    def _held(self) -> dict[str, int]: ...

    def count(self, rows: int) -> None:
        """Note that so many rows were asked for; also for whoever reads the table's memory in its place."""
        with self._users.alone:
            self._asked += rows

    def counters(self) -> dict[str, int]:
        """What was asked for since the table was made, in numbers that only grow; rates follow from differences.

        `rows` were asked for, repeats included; `row_hits` of them were in the memory of the device. `bytes_device`,
        `bytes_host` and `bytes_disk` are what was read there for them. What the replay of a captured graph reads, no
        CPU sees, and it is not counted.
        """
        nbytes = self._asked * self.format.row_bytes
        on_device = self._reads_from == "device"
        return counted(self._asked, self._asked if on_device else 0, **{self._reads_from: nbytes})

    @property
    def bytes_copied(self) -> int:
        """Bytes that copies have brought from host memory to an accelerator, for all fetches so far."""
        return 0 if self._delivery is None else self._delivery.bytes_copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            f"a {self.placement} table of Engram is neither copied nor pickled: two layers may read one table; to keep "
            "its rows use save_layer(path, fusion, rows, plan) or save_rows(path, rows), and load_layer or make_table"
        )

    def trim(self) -> None:
        """Give back staging memory; the next fetch makes it anew."""
        if self._delivery is not None:
            self._delivery.trim()

    def inside(self) -> Any:
        """To be held by `with` while somebody else reads the table's memory: closing waits for it."""
        return self._users.here()

    def close(self) -> None:
        """Wait for fetches that other threads are starting, and give back everything; again, it does nothing.

        Raises:
            RuntimeError: called from within a fetch of this table.
            ValueError: a bad row number that a kernel met and nobody has heard of yet; the table is closed.
        """
        self._users.close()
        with self._users.here(), self._users.alone:  # others may close it, too
            self._give_back()

    def _give_back(self) -> None:
        """Give back everything: nobody uses it."""
        self.trim()

    def _require_open(self) -> None:
        if self._users.closed:
            raise ValueError("this table was closed: its memory is gone")

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def counted(rows: int, hits: int, device: int = 0, host: int = 0, disk: int = 0) -> dict[str, int]:
    """Counters of a table under their names."""
    return {"rows": rows, "row_hits": hits, "bytes_device": device, "bytes_host": host, "bytes_disk": disk}


def check_shape(rows: Tensor, index_device: torch.device) -> None:
    """Refuse what is not a vector of row numbers on the device that gathers."""
    if rows.dtype not in _NUMBERS or rows.ndim != 1:
        raise ValueError(f"row numbers of shape {tuple(rows.shape)}, {rows.dtype}: give a vector of int32 or int64")
    if rows.device.type != index_device.type:
        raise ValueError(f"row numbers on {rows.device}; this table looks them up on {index_device}: move them there")


def check_rows(rows: Tensor, count: int) -> Tensor:
    """Row numbers on the CPU, checked and contiguous.

    Raises:
        ValueError: wrong dtype, shape or device, or a row number outside 0 .. count - 1.
    """
    check_shape(rows, _CPU)
    rows = rows.contiguous()
    if not are_below(rows, count):
        low, high = int(rows.min()), int(rows.max())
        raise ValueError(f"row {low if low < 0 else high} does not exist; the table has rows 0 .. {count - 1}")
    return rows


def check_out(out: Tensor, count: int, row_format: RowFormat, device: torch.device) -> Tensor:
    """A caller's buffer that is about to be written to, refused unless the rows of one fetch fit it exactly."""
    if tuple(out.shape) != (count, row_format.width) or out.dtype != row_format.dtype or not out.is_contiguous():
        raise ValueError(
            f"out of shape {tuple(out.shape)}, {out.dtype}: {count} rows need a contiguous "
            f"[{count}, {row_format.width}], {row_format.dtype}"
        )
    if out.device.type != device.type:
        raise ValueError(f"out on {out.device}; this table delivers to {device}")
    return written_by_address(out)


def written_by_address(out: Tensor) -> Tensor:
    """Treat a buffer as torch's own functions treat their `out`, before something writes to it that torch cannot see.

    Raises:
        ValueError: it requires gradients, which would pass through the write as if nothing had been written.
    """
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires gradients, and rows written into it pass none back: give out.detach()")
    torch.autograd.graph.increment_version(out)  # a backward() that needs what it held raises, and is not wrong
    return out
