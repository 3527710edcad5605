"""A table by the name of its placement: the rows are moved to where they are to live, if they fit there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from engram_ref.tables.base import RowFormat, Table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.file import FileTable, StoredRows
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable
from engram_ref.tables.memory import HostMemory, require_bytes
from engram_ref.tables.uva import UvaTable, require_uva

PLACEMENTS = ("device", "host", "uva", "hot", "file")


def make_table(
    placement: str,
    rows: Tensor | StoredRows,
    device: str | torch.device = "cpu",
    *,
    hot: Tensor | None = None,
    behind: str = "host",
    **options: Any,
) -> Table:
    """A table whose rows live where `placement` says and arrive on `device`.

    Args:
        placement: device, host, uva, hot or file.
        rows: [R, D], or rows that lie in a safetensors file (`StoredRows.find`). They are copied to their new place;
            for `file` they stay where they are.
        hot: for `hot`, the row numbers to keep on the device (`most_frequent`).
        behind: for `hot`, the placement of all the others.
        options: for `file`, also behind `hot`, those of `FileTable`.

    Raises:
        ValueError: an unknown placement, one that this machine cannot serve, or rows that do not fit.
    """
    target = _device(device)
    if placement not in PLACEMENTS:
        raise ValueError(f"no placement {placement!r}: use one of {', '.join(PLACEMENTS)}")
    if isinstance(rows, Tensor) and rows.ndim != 2:
        raise ValueError(f"rows of shape {tuple(rows.shape)}: a table is [rows, values per row]")
    if placement == "hot":
        return _hot(rows, target, hot, behind, options)
    if hot is not None:
        raise ValueError(f"placement {placement!r} keeps no hot rows: use placement 'hot', behind={placement!r}")
    if placement == "file":
        if not isinstance(rows, StoredRows):
            raise ValueError("placement 'file' needs rows that lie in a file: write them with save_rows first")
        return FileTable(rows, target, **options)
    if options:
        raise ValueError(f"placement {placement!r} has no option {', '.join(options)}")
    if placement == "uva":
        require_uva(target, rows.nbytes)
    if placement == "device" and target.type == "cuda":
        return DeviceTable(_copy_to_device(rows, target))
    return _in_host_memory(placement, rows, target)


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: use 'cpu' or 'cuda'") from error
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(target)!r}: use 'cpu' or 'cuda'")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(target)!r}: torch sees no CUDA device on this machine; use 'cpu'")
    return target


def _hot(
    rows: Tensor | StoredRows, target: torch.device, hot: Tensor | None, behind: str, options: dict[str, Any]
) -> HotTable:
    if hot is None or behind == "hot":
        raise ValueError("placement 'hot' needs hot=row numbers, and another placement behind it")
    with ExitStack() as undo:
        others = undo.enter_context(make_table(behind, rows, target, **options))
        table = HotTable(others, hot)
        undo.pop_all()
    return table


def _copy_to_device(rows: Tensor | StoredRows, device: torch.device) -> Tensor:
    require_bytes(rows.nbytes, device)
    if isinstance(rows, StoredRows):
        return rows.read().to(device)
    return rows.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def _in_host_memory(placement: str, rows: Tensor | StoredRows, target: torch.device) -> Table:
    with ExitStack() as undo:
        memory = undo.enter_context(HostMemory(rows.nbytes))
        values = _copy_to_host(rows, memory)
        if target.type == "cuda":
            memory.pin()  # after the rows came: a copy from a device could not reach over two pieces
        if placement == "device":
            table: Table = DeviceTable(values, memory)
        else:
            table = (HostTable if placement == "host" else UvaTable)(values, target, memory)
        undo.pop_all()
    return table


def _copy_to_host(rows: Tensor | StoredRows, memory: HostMemory) -> Tensor:
    if isinstance(rows, StoredRows):
        raw = memory.bytes.view(rows.rows, rows.format.row_bytes)
        rows.read_into(raw)
        return rows.format.decode(raw)
    row_format = RowFormat(rows.dtype, rows.shape[1])
    raw = memory.bytes.view(len(rows), row_format.row_bytes)
    raw.copy_(row_format.encode(rows.detach().contiguous()))
    return row_format.decode(raw)
