"""A table by the name of its placement: the rows are moved to where they are to live, if they fit there."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engram_ref.devices import as_device
from engram_ref.rows.memory import HostMemory, require_bytes
from engram_ref.rows.rows import Rows, refuse_trained, refuse_wrapped
from engram_ref.sharding.agreement import agreed, group_device, require_same
from engram_ref.sharding.plan import Columns, ShardPlan
from engram_ref.tables.base import Table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.file import FileTable, StoredRows
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable, check_hot
from engram_ref.tables.laid import first_other_row, in_parts, laid, lay, len_of, widths_of
from engram_ref.tables.sharded import ShardedTable
from engram_ref.tables.shared import describe, shared_memory
from engram_ref.tables.uva import UvaTable, require_uva

PLACEMENTS = ("device", "host", "uva", "hot", "file", "sharded")
_NEEDS_HOT = "placement 'hot' needs hot=row numbers, and another placement behind it"


def make_table(
    placement: str,
    rows: Tensor | Rows | StoredRows,
    device: str | torch.device = "cpu",
    *,
    packed: bool | None = None,
    hot: Tensor | None = None,
    behind: str | None = None,
    shared: str | None = None,
    **options: Any,
) -> Table:
    """A table whose rows live where `placement` says and arrive on `device`.

    Args:
        placement: device, host, uva, hot, file or sharded.
        rows: plain values [R, D]; `Rows`, which may be fp8; or rows that lie in a safetensors file
            (`StoredRows.find`). They are copied to their new place; for `file` they stay where they are. fp8 rows that
            hold NaN are refused: here, or, where they stay in a file, when they are fetched.
        packed: of fp8 rows: True lays codes and scales of each row side by side, so that a row is one scattered read,
            False lays them apart; None leaves them as they are.
        hot: for `hot`, the row numbers to keep on the device (`most_frequent`).
        behind: for `hot`, also as what a rank of `sharded` owns, the placement of all the others (default: host).
        shared: for `host` and `uva`, a name: all processes of this machine that name it map one copy, which the first
            of them lays down (`engram_ref.tables.shared`).
        options: for `file`, also behind `hot`, those of `FileTable`; for `sharded`, which all ranks make together,
            those of `make_sharded`.

    Raises:
        ValueError: an unknown placement, one that this machine cannot serve, rows that do not fit, rows that require
            gradients, which copies do not pass back, or fp8 rows with a code or a scale that is NaN.
    """
    target = as_device(device)
    if placement == "sharded":
        return make_sharded(rows, target, packed=packed, hot=hot, behind=behind, shared=shared, **options)
    if placement not in PLACEMENTS:
        raise ValueError(f"no placement {placement!r}: use one of {', '.join(PLACEMENTS)}")
    if behind is not None and placement != "hot":
        raise ValueError(f"placement {placement!r} has no placement behind it: use placement 'hot', behind={behind!r}")
    if behind != "sharded":  # whose ranks must agree: what one of them refuses alone leaves the others waiting
        _require_types(rows, packed, hot)
        if isinstance(rows, Tensor):
            refuse_trained(rows)
    if placement == "hot":
        return _hot(rows, target, hot, behind or "host", {"packed": packed, "shared": shared, **options})
    if hot is not None:
        raise ValueError(f"placement {placement!r} keeps no hot rows: use placement 'hot', behind={placement!r}")
    if shared is not None and placement not in ("host", "uva"):
        raise ValueError(f"shared={shared!r}: placement {placement!r} has no memory to share, use host or uva")
    if placement == "file":
        return _in_file(rows, target, packed, options)
    if isinstance(rows, Rows):
        rows.refuse_nan()
    if options:
        raise ValueError(f"placement {placement!r} has no option {', '.join(options)}")
    if placement == "uva":
        require_uva(target, rows.nbytes)
    if placement == "device" and target.type == "cuda":
        return DeviceTable(_copy_to_device(rows, target, packed), checked=True)
    return _in_host_memory(placement, rows, target, packed, shared)


def _require_types(rows: Any, packed: Any, hot: Any) -> None:
    if not isinstance(rows, (Tensor, Rows, StoredRows)):
        raise ValueError(
            f"rows is a {type(rows).__name__}: give a tensor [rows, values per row], Rows, or StoredRows.find(path) of "
            "a file"
        )
    if isinstance(rows, Tensor) and (rows.layout != torch.strided or rows.is_meta):
        raise ValueError(f"rows is a tensor of layout {rows.layout} on {rows.device}: give a dense one with values")
    if isinstance(rows, Tensor):
        refuse_wrapped(rows)
    if isinstance(rows, Tensor) and not rows.is_floating_point():
        raise ValueError(f"rows is a tensor of {rows.dtype}: give a floating-point one, as bfloat16")
    if isinstance(rows, Tensor) and rows.ndim != 2:
        raise ValueError(f"rows of shape {tuple(rows.shape)}: a table is [rows, values per row]")
    if packed not in (None, True, False):
        raise ValueError(f"packed={packed!r}: use True, False or None")
    if packed is not None and (isinstance(rows, Tensor) or not rows.format.scaled):
        raise ValueError(f"packed={packed}: only fp8 rows have scales, to lie in one piece with their codes or apart")
    if hot is not None and not isinstance(hot, Tensor):
        raise ValueError(f"hot is a {type(hot).__name__}: give a tensor of row numbers, as most_frequent makes it")


def make_sharded(
    rows: Tensor | Rows | StoredRows,
    device: torch.device,
    *,
    plan: ShardPlan | None = None,
    group: Any = None,
    timeout: float = 600.0,
    owned: str = "host",
    hot: Tensor | None = None,
    same_tokens: bool = False,
    unique: bool = False,
    **options: Any,
) -> ShardedTable:
    """A table whose rows the ranks of a group own together; all of them call this, each with its own rows or all rows.

    Args:
        rows: as for `make_table`: all rows, of which this rank takes its own and looks at no others, or its own alone,
            which needs a plan.
        device: where fetched rows arrive.
        plan: which rank owns what; None gives each the same number of rows, of those that it was given: pieces of equal
            length would be taken for one small table on all ranks.
        group: of `torch.distributed`, for this table alone; None makes one of all ranks.
        timeout: of the new group: seconds that a rank waits for the others.
        owned: placement of the rows that this rank owns.
        same_tokens, unique: as for `ShardedTable`.
        hot: for owned="hot": row numbers of the whole table. The place of a hot tier is in front of a sharded table,
            though, make_table("hot", behind="sharded"), where a hit asks nobody.
        options: as for `make_table`, of the rows that this rank owns.

    Raises:
        ValueError: on all ranks, whatever one of them refuses: rows, plan, placement, or another rank's table.
        OSError: on all ranks, what a disk of one refuses.
        RankLost: a rank ended, or did not come in time.
    """
    _require_ranks()
    made = group is None
    with ExitStack() as undo:
        if made:
            group = dist.new_group(timeout=timedelta(seconds=timeout))
            undo.callback(dist.destroy_process_group, group)
        rank, where = dist.get_rank(group), device if group_device(group).type == "cuda" else torch.device("cpu")
        with agreed(group):
            _require_types(rows, options.get("packed"), hot)
            count = len_of(rows)
            plan = ShardPlan.even(count, dist.get_world_size(group)) if plan is None else plan
            own = _own_rows(rows, count, plan, rank, dist.get_world_size(group))
            hot = None if hot is None else check_hot(hot, plan.rows)  # each rank keeps its own, and sees no others
        require_same(group, plan.checksum, "plan of shards")
        with agreed(group):
            local = undo.enter_context(_make_own(owned, own, plan.first(rank), where, hot, options))
        table = ShardedTable(local, plan, group, device, same_tokens=same_tokens, unique=unique, own_group=made)
        undo.pop_all()
    return table


def shard_plan(layer: Columns, group: Any = None) -> ShardPlan:
    """The plan of whole columns of a layer, where they divide, for the ranks of a group; None: of all.

    Raises:
        ValueError: there are no ranks.
    """
    _require_ranks()
    return ShardPlan.of_layer(layer, dist.get_world_size(group))


def _require_ranks() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("placement 'sharded' needs torch.distributed: call dist.init_process_group, or run torchrun")


def _own_rows(rows: Tensor | Rows | StoredRows, count: int, plan: ShardPlan, rank: int, ranks: int) -> Any:
    """Those of one rank, if all were given; a slice, of which nothing is read or copied yet."""
    if plan.ranks != ranks:
        raise ValueError(f"a plan for {plan.ranks} ranks, and a group of {ranks}: make the plan for {ranks}")
    if isinstance(rows, Tensor) and rows.requires_grad:
        raise ValueError(
            "rows of a sharded table are not trained: gradients do not travel back to their owners; give rows.detach()"
        )
    first, last = plan.first(rank), plan.first(rank + 1)
    if count not in (plan.rows, last - first):
        raise ValueError(f"{count} rows on rank {rank}: give all {plan.rows} of the table, or its own {last - first}")
    if count == plan.rows:
        rows = rows[first:last] if isinstance(rows, Tensor) else rows.between(first, last)
    elif isinstance(rows, Rows):
        rows = Rows(rows.format, rows.parts, first)  # for messages
    return rows


def _make_own(
    owned: str, rows: Any, first: int, device: torch.device, hot: Tensor | None, options: dict[str, Any]
) -> Table:
    """The table of the rows that this rank owns, on the device whose memory the group moves."""
    if owned == "sharded" or options.get("shared") is not None:
        raise ValueError(
            f"owned={owned!r}, shared={options.get('shared')!r}: a rank's own rows are its own, in one table"
        )
    if hot is not None:
        inside = hot[(hot >= first) & (hot < first + len_of(rows))] - first
        if owned == "hot" and not len(inside):
            owned = options.pop("behind", None) or "host"  # none of them is here
        else:
            options = {**options, "hot": inside}
    return make_table(owned, rows, device, **options)


def _in_file(
    rows: Tensor | Rows | StoredRows, target: torch.device, packed: bool | None, options: dict[str, Any]
) -> FileTable:
    if not isinstance(rows, StoredRows):
        raise ValueError("placement 'file' needs rows that lie in a file: write them with save_rows first")
    if packed is not None:
        raise ValueError("placement 'file' leaves rows as they lie: save_rows(path, rows.packed()) lays them anew")
    unknown = options.keys() - {"threads", "direct"}
    if unknown:
        raise ValueError(f"placement 'file' has no option {', '.join(sorted(unknown))}: it has threads and direct")
    return FileTable(rows, target, **options)


def _hot(
    rows: Tensor | Rows | StoredRows, target: torch.device, hot: Tensor | None, behind: str, options: dict[str, Any]
) -> HotTable:
    if behind == "hot" or (hot is None and behind != "sharded"):
        raise ValueError(_NEEDS_HOT)
    with ExitStack() as undo:
        others = undo.enter_context(make_table(behind, rows, target, **options))
        if isinstance(others, ShardedTable):
            with agreed(others.group):
                if hot is None:
                    raise ValueError(_NEEDS_HOT)
                _require_types(rows, None, hot)
            assert hot is not None
            # They are read in pieces, in each of which all ranks take part; which rows they are may differ.
            require_same(others.group, str(hot.numel()), "number of hot rows")
        assert hot is not None
        table = HotTable(others, hot)
        undo.pop_all()
    return table


def _copy_to_device(rows: Tensor | Rows | StoredRows, device: torch.device, packed: bool | None) -> Rows:
    require_bytes(rows.nbytes, device)
    if isinstance(rows, Tensor):
        return Rows.of(rows.detach().to(device, copy=True, memory_format=torch.contiguous_format))
    found = in_parts(rows.read() if isinstance(rows, StoredRows) else rows, packed)
    return Rows(found.format, tuple(part.to(device, copy=True) for part in found.parts))


def _in_host_memory(
    placement: str, rows: Tensor | Rows | StoredRows, target: torch.device, packed: bool | None, shared: str | None
) -> Table:
    with ExitStack() as undo:
        if shared is None:
            memory = undo.enter_context(HostMemory(rows.nbytes))
            lay(rows, memory.bytes, packed)
        else:
            memory = undo.enter_context(
                shared_memory(
                    shared,
                    rows.nbytes,
                    describe(rows, widths_of(rows, packed)),
                    lambda new: lay(rows, new.bytes, packed),
                    lambda fd: first_other_row(rows, fd, packed),
                )
            )
        table = adopt(placement, laid(rows, memory.bytes, packed), target, memory)
        undo.pop_all()
    return table


def adopt(placement: str, rows: Rows, device: torch.device, memory: HostMemory) -> Table:
    """A table of rows, none of them NaN, that lie in the memory in which they are to stay."""
    if device.type == "cuda":
        memory.pin()  # after the rows came: a copy from a device could not reach over two pieces
    if placement == "device":
        return DeviceTable(rows, memory, checked=True)
    return (HostTable if placement == "host" else UvaTable)(rows, device, memory, checked=True)
