"""One layer in a safetensors file, under the demo's parameter names: a checkpoint of the demo drops in.

    save_layer("engram.safetensors", fusion, values, plan.layer(1))
    engram = load_layer("engram.safetensors", config, plan.layer(1), placement="file")

Nothing is taken on trust: names, shapes, the offsets of the table and, where the file has them, all hash constants, the
pad and the digest of the vocabulary must be the plan's, because a table that is read with others gives wrong rows and
no error. For placement `file` the rows stay where they are; for every other one they are read once, into their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.config import EngramConfig
from engram_ref.devices import as_device
from engram_ref.files.conventions import DTYPES
from engram_ref.files.replacing import replacing
from engram_ref.files.stored_rows import ROW_DTYPES, StoredRows
from engram_ref.files.validated import Header
from engram_ref.files.writing import make_header
from engram_ref.fusion.demo import DemoFusion
from engram_ref.hashing.plan import LayerPlan
from engram_ref.layer import Engram, check_plan
from engram_ref.quoting import listed, quoted
from engram_ref.tables import RowFormat, make_table

TABLE = "multi_head_embedding.embedding.weight"
OFFSETS = "multi_head_embedding.offsets"
PLAN = "layer_plan"  # name of the hash constants in the file's metadata; the demo has none
_PIECE = 8 << 20  # bytes of one write


def save_layer(
    path: str | Path, fusion: DemoFusion, table_values: Tensor, layer_plan: LayerPlan, prefix: str = ""
) -> None:
    """Write a layer, complete or not at all.

    Args:
        path: the file to write.
        fusion: its weights.
        table_values: the rows [R, D], on any device, as `row_dtype` of the fusion's configuration.
        layer_plan: what the rows are addressed with.
        prefix: in front of every name, for instance "layers.3.engram.".

    Raises:
        ValueError: a layer of another form than the demo's, or a plan or a table of another geometry.
        OSError: it cannot be written; then nothing is left behind, and an older file stays.
    """
    _check_form(fusion.config)
    check_plan(fusion.config, layer_plan)
    table_format = RowFormat(table_values.dtype, table_values.shape[-1])
    _check_table("table_values", len(table_values), table_format, fusion.config, layer_plan)
    # The table comes last, so that only the header must be padded for its rows to begin on a page of their own.
    tensors = {OFFSETS: torch.tensor(layer_plan.offsets, device="cpu"), **fusion.named_views(), TABLE: table_values}
    metadata = {prefix + PLAN: layer_plan.to_json()}
    entries = {prefix + name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    header = make_header(entries, metadata)
    with replacing(Path(path)) as file:
        file.write(header)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                file.write(piece)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, some at a time, so that a large one needs no second place in memory."""
    rows = max(1, _PIECE * len(tensor) // max(1, tensor.nbytes))
    for piece in tensor.detach().split(rows):
        yield piece.cpu().contiguous().view(-1).view(torch.uint8).numpy().data  # as bytes: NumPy has no bfloat16


def load_layer(
    path: str | Path,
    config: EngramConfig,
    layer_plan: LayerPlan,
    placement: str = "device",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    prefix: str = "",
    sparse: bool = False,
    **options: Any,
) -> Engram:
    """Read a layer.

    Args:
        path: a safetensors file; with a prefix it may hold other tensors too.
        config: geometry, and how the rows are stored.
        layer_plan: what the rows were addressed with in training.
        placement: where the rows are to live.
        device: where the layer computes.
        dtype: of the fusion; None takes the file's.
        prefix: in front of every name.
        sparse: take holes in the file, where nothing was ever written, for zeros that are meant.
        options: those of `make_table`, for instance `hot=` row numbers.

    Raises:
        ValueError: another form than the demo's, missing or unexpected names, other shapes or dtypes than the
            configuration's, a table that belongs to another plan, or no safetensors file.
        OSError: the file cannot be opened.
    """
    device = as_device(device)
    _check_form(config)
    check_plan(config, layer_plan)
    stored = StoredRows.find(path, prefix + TABLE, sparse=sparse)
    _check_table(str(path), stored.rows, stored.format, config, layer_plan)
    fusion = DemoFusion(config, device="meta")  # names and shapes: no memory before the file is known to fit
    header = Header.read(path, sparse)
    _check_names(header, fusion, prefix)
    _check_shapes(header, fusion, prefix)
    _check_constants(header, layer_plan, prefix)
    fusion = fusion.to(dtype or _only_dtype(header, fusion, prefix)).to_empty(device=device)
    fusion.load_state_dict({name: header.read_tensor(prefix + name) for name in fusion.named_views()})
    return Engram(fusion, make_table(placement, stored, device, **options))


def _check_form(config: EngramConfig) -> None:
    if config.form != "demo":
        raise ValueError(
            f"a configuration of form {config.form!r}: a file under the demo's names holds a layer of form 'demo'"
        )


def _check_table(what: str, rows: int, row_format: RowFormat, config: EngramConfig, layer_plan: LayerPlan) -> None:
    needed = RowFormat.of(config)
    if (row_format.dtype, row_format.scaled) != (needed.dtype, needed.scaled):
        raise ValueError(
            f"{what}: rows of {row_format.dtype}, the configuration says {config.row_dtype}: "
            f"use config.replace(row_dtype={str(row_format.dtype).removeprefix('torch.')!r})"
        )
    if (rows, row_format.width) != (layer_plan.rows, needed.width):
        raise ValueError(
            f"{what}: a table of [{rows}, {row_format.width}]; this plan and configuration need "
            f"[{layer_plan.rows}, {needed.width}]"
        )


def _check_names(header: Header, fusion: DemoFusion, prefix: str) -> None:
    needed = {prefix + name for name in (*fusion.named_views(), TABLE, OFFSETS)}
    found = {name for name in header.tensors if name.startswith(prefix)}
    missing, unexpected = sorted(needed - found), sorted(found - needed)
    if missing or unexpected:
        raise ValueError(
            f"{header.path} is not a layer of this configuration: missing {listed(missing) or 'nothing'}; "
            f"unexpected {listed(unexpected) or 'nothing'}"
        )


def _check_shapes(header: Header, fusion: DemoFusion, prefix: str) -> None:
    for name, view in fusion.named_views().items():
        shape, needed = header.tensors[prefix + name].shape, tuple(view.shape)
        if shape != needed:
            raise ValueError(
                f"{header.path}: {prefix + name} has shape {quoted(shape)}; this configuration needs {needed}"
            )


def _check_constants(header: Header, layer_plan: LayerPlan, prefix: str) -> None:
    offsets = header.tensors[prefix + OFFSETS]
    needed = ("I64", (len(layer_plan.offsets),))  # looked at before it is read: a file may claim any size
    if (offsets.dtype, offsets.shape) != needed or header.read_tensor(offsets.name).tolist() != [*layer_plan.offsets]:
        raise ValueError(f"{header.path}: the table's offsets are not the plan's: it was hashed with other primes")
    recorded = header.metadata.get(prefix + PLAN)
    if recorded is not None:
        layer_plan.require_recorded(recorded, str(header.path))


def _only_dtype(header: Header, fusion: DemoFusion, prefix: str) -> torch.dtype:
    names = sorted({header.tensors[prefix + name].dtype for name in fusion.named_views()})
    dtype = DTYPES.get(names[0]) if len(names) == 1 else None
    if dtype not in ROW_DTYPES:
        raise ValueError(f"{header.path}: the weights are {', '.join(names)}: say which to compute in, with dtype=")
    return dtype
