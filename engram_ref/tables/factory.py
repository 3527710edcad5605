"""A table by the name of its placement: the rows are moved to where they are to live, if they fit there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from engram_ref.devices import as_device
from engram_ref.rows.memory import HostMemory, require_bytes
from engram_ref.rows.rows import Rows
from engram_ref.tables.base import Table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.file import FileTable, StoredRows
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable
from engram_ref.tables.uva import UvaTable, require_uva

PLACEMENTS = ("device", "host", "uva", "hot", "file")


def make_table(
    placement: str,
    rows: Tensor | Rows | StoredRows,
    device: str | torch.device = "cpu",
    *,
    packed: bool | None = None,
    hot: Tensor | None = None,
    behind: str = "host",
    **options: Any,
) -> Table:
    """A table whose rows live where `placement` says and arrive on `device`.

    Args:
        placement: device, host, uva, hot or file.
        rows: plain values [R, D]; `Rows`, which may be fp8; or rows that lie in a safetensors file
            (`StoredRows.find`). They are copied to their new place; for `file` they stay where they are. fp8 rows that
            hold NaN are refused: here, or, where they stay in a file, when they are fetched.
        packed: of fp8 rows: True lays codes and scales of each row side by side, so that a row is one scattered read,
            False lays them apart; None leaves them as they are.
        hot: for `hot`, the row numbers to keep on the device (`most_frequent`).
        behind: for `hot`, the placement of all the others.
        options: for `file`, also behind `hot`, those of `FileTable`.

    Raises:
        ValueError: an unknown placement, one that this machine cannot serve, rows that do not fit, or fp8 rows with a
            code or a scale that is NaN.
    """
    target = as_device(device)
    if placement not in PLACEMENTS:
        raise ValueError(f"no placement {placement!r}: use one of {', '.join(PLACEMENTS)}")
    _require_types(rows, packed, hot)
    if placement == "hot":
        return _hot(rows, target, hot, behind, {"packed": packed, **options})
    if hot is not None:
        raise ValueError(f"placement {placement!r} keeps no hot rows: use placement 'hot', behind={placement!r}")
    if placement == "file":
        if not isinstance(rows, StoredRows):
            raise ValueError("placement 'file' needs rows that lie in a file: write them with save_rows first")
        if packed is not None:
            raise ValueError("placement 'file' leaves rows as they lie: save_rows(path, rows.packed()) lays them anew")
        unknown = options.keys() - {"threads", "direct"}
        if unknown:
            raise ValueError(f"placement 'file' has no option {', '.join(sorted(unknown))}: it has threads and direct")
        return FileTable(rows, target, **options)
    if isinstance(rows, Rows):
        rows.refuse_nan()
    if options:
        raise ValueError(f"placement {placement!r} has no option {', '.join(options)}")
    if placement == "uva":
        require_uva(target, rows.nbytes)
    if placement == "device" and target.type == "cuda":
        return DeviceTable(_copy_to_device(rows, target, packed), checked=True)
    return _in_host_memory(placement, rows, target, packed)


def _require_types(rows: Any, packed: Any, hot: Any) -> None:
    if not isinstance(rows, (Tensor, Rows, StoredRows)):
        raise ValueError(
            f"rows is a {type(rows).__name__}: give a tensor [rows, values per row], Rows, or StoredRows.find(path) of "
            "a file"
        )
    if isinstance(rows, Tensor) and (rows.layout != torch.strided or rows.is_meta):
        raise ValueError(f"rows is a tensor of layout {rows.layout} on {rows.device}: give a dense one with values")
    if isinstance(rows, Tensor) and rows.ndim != 2:
        raise ValueError(f"rows of shape {tuple(rows.shape)}: a table is [rows, values per row]")
    if packed not in (None, True, False):
        raise ValueError(f"packed={packed!r}: use True, False or None")
    if hot is not None and not isinstance(hot, Tensor):
        raise ValueError(f"hot is a {type(hot).__name__}: give a tensor of row numbers, as most_frequent makes it")


def _hot(
    rows: Tensor | Rows | StoredRows, target: torch.device, hot: Tensor | None, behind: str, options: dict[str, Any]
) -> HotTable:
    if hot is None or behind == "hot":
        raise ValueError("placement 'hot' needs hot=row numbers, and another placement behind it")
    with ExitStack() as undo:
        others = undo.enter_context(make_table(behind, rows, target, **options))
        table = HotTable(others, hot)
        undo.pop_all()
    return table


def _copy_to_device(rows: Tensor | Rows | StoredRows, device: torch.device, packed: bool | None) -> Rows:
    require_bytes(rows.nbytes, device)
    if isinstance(rows, Tensor):
        return Rows.of(rows.detach().to(device, copy=True, memory_format=torch.contiguous_format))
    found = _laid(rows.read() if isinstance(rows, StoredRows) else rows, packed)
    return Rows(found.format, tuple(part.to(device, copy=True) for part in found.parts))


def _in_host_memory(
    placement: str, rows: Tensor | Rows | StoredRows, target: torch.device, packed: bool | None
) -> Table:
    with ExitStack() as undo:
        memory = undo.enter_context(HostMemory(rows.nbytes))
        found = _copy_to_host(rows, memory, packed)
        if target.type == "cuda":
            memory.pin()  # after the rows came: a copy from a device could not reach over two pieces
        if placement == "device":
            table: Table = DeviceTable(found, memory, checked=True)
        else:
            table = (HostTable if placement == "host" else UvaTable)(found, target, memory, checked=True)
        undo.pop_all()
    return table


def _copy_to_host(rows: Tensor | Rows | StoredRows, memory: HostMemory, packed: bool | None) -> Rows:
    """The rows in new memory, laid as wanted."""
    if isinstance(rows, Tensor):
        values = memory.bytes.view(rows.dtype).view(rows.shape)
        return Rows.of(values.copy_(rows.detach()))
    widths = [rows.format.row_bytes] if packed else rows.format.split_bytes
    if packed is None:
        widths = rows.widths if isinstance(rows, StoredRows) else [part.shape[1] for part in rows.parts]
    count = rows.rows if isinstance(rows, StoredRows) else len(rows)
    pieces = memory.bytes.split([count * width for width in widths])  # one behind the other
    found = Rows(rows.format, tuple(piece.view(count, width) for piece, width in zip(pieces, widths)))
    if isinstance(rows, StoredRows):
        rows.read_into(found.parts)
    else:
        for part, given in zip(found.parts, _laid(rows, packed).parts):
            part.copy_(given)
    return found


def _laid(rows: Rows, packed: bool | None) -> Rows:
    if packed is None:
        return rows
    return rows.packed() if packed else rows.split()
