"""Layers of a Qwen3.8-Flash-Next checkpoint, loaded from where it lies.

    folder = QwenFolder.open("/models/Qwen3.8-Flash-Next")
    engram = load_layer_qwen(folder, layer_id=1, placement="file", device="cuda")
    hidden = engram(hidden, NgramHasher(folder.plan)(token_ids, layer_id=1))

`QwenFolder` has checked names, shapes and constants. For placement `file` the rows stay in the checkpoint; for every
other one they are read once, into their place. To put the table behind transformers' own model, see
`engram_ref.attach.offload_table`.

    python -m pytest tests/ref/checkpoint/test_qwen_folder.py
"""

from __future__ import annotations

from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch

from engram_ref.checkpoint.folder import read_entry
from engram_ref.checkpoint.qwen_folder import FUSION_PARTS, QwenFolder
from engram_ref.devices import as_device
from engram_ref.fusion.qwen import QwenFusion
from engram_ref.layer import Engram
from engram_ref.tables import make_table


def load_layer_qwen(
    folder: QwenFolder,
    layer_id: int,
    placement: str = "file",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Engram:
    """One layer.

    Args:
        folder: the checkpoint.
        layer_id: decoder layer, counted from 0.
        placement: where the rows are to live.
        device: where the layer computes.
        dtype: of the weights; None takes the checkpoint's.
        options: those of `make_table`, for instance `hot=` row numbers.

    Raises:
        ValueError: no such layer, a file that was changed since the folder was opened, or rows that do not fit.
    """
    device = as_device(device)
    entries = folder.tensors[folder.plan.layer(layer_id).layer_id]
    state = {name: read_entry(entries[name], folder.sparse, "QwenFolder.open") for name in FUSION_PARTS}
    # Made without values: all of them are the checkpoint's.
    fusion = QwenFusion(folder.config, "meta", dtype or state[FUSION_PARTS[0]].dtype).to_empty(device=device)
    fusion.load_state_dict(state)
    return Engram(fusion, make_table(placement, folder.stored_rows(layer_id), device, **options))
