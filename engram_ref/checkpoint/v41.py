"""Layers of a DeepSeek-V4.1 checkpoint, loaded from where it lies.

    folder = ModelFolder.open("/models/DeepSeek-V4.1-Flash")
    engram = load_layer_v41(folder, layer_id=1, placement="file", device="cuda")
    hidden = engram(hidden, NgramHasher(folder.plan)(compressed, layer_id=1))

`ModelFolder` has checked names, shapes and sizes. For placement `file` the rows stay in the checkpoint; for every other
one they are read once, into their place. The projection is decoded, or kept in fp8 as it is.

    python -m pytest tests/ref/checkpoint/test_v41.py
"""

from __future__ import annotations

from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch

from engram_ref.checkpoint.folder import ModelFolder, read_entry, tensor_name
from engram_ref.devices import as_device
from engram_ref.fusion.projection import check_fp8
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.layer import Engram
from engram_ref.tables import make_table
from engram_ref.tables.factory import shard_plan

FUSION_PARTS = ("wkv.weight", "wkv.scale", "q_weight", "k_weight")


def load_layer_v41(
    folder: ModelFolder,
    layer_id: int,
    placement: str = "file",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    **options: Any,
) -> Engram:
    """One Engram layer.

    Args:
        folder: the checkpoint.
        layer_id: decoder layer, one of its configuration's.
        placement: where the rows are to live.
        device: where the layer computes.
        dtype: of the fusion; the checkpoint's gains are bfloat16.
        fp8: keep the projection as codes and scales.
        options: those of `make_table`, for instance `hot=` row numbers. For `sharded`, also behind a hot tier, the plan
            is that of whole columns, unless another one is given.

    Raises:
        ValueError: no such layer, a file that was changed since the folder was opened, a weight that is NaN, or rows
            that do not fit.
    """
    fusion = load_fusion_v41(folder, layer_id, device, dtype, fp8)
    # Behind a hot tier, too, the rows are shared out by whole columns.
    if "sharded" in (placement, options.get("behind")) and "plan" not in options:
        options["plan"] = shard_plan(folder.plan.layer(layer_id), options.get("group"))
    return Engram(fusion, make_table(placement, folder.stored_rows(layer_id), device, **options))


def load_fusion_v41(
    folder: ModelFolder,
    layer_id: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
) -> V41Fusion:
    """The projection and the gains of one layer; arguments and errors as `load_layer_v41`."""
    device = as_device(device)
    entries = {part: folder.tensor(layer_id, part) for part in FUSION_PARTS}
    state = {part: read_entry(entry, folder.sparse, "ModelFolder.open") for part, entry in entries.items()}
    try:
        check_fp8(state["wkv.weight"], state["wkv.scale"], tensor_name(layer_id, "wkv."))
    except ValueError as error:
        raise ValueError(f"{entries['wkv.weight'].path}: {error}; download it again") from error
    # Made without values: all of them are the checkpoint's.
    fusion = V41Fusion(folder.config, "meta", dtype, fp8).to_empty(device=device)
    fusion.load_state_dict(state)
    return fusion
