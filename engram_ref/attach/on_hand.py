"""Rows that are there already: what a model costs with Engram when nothing is looked up.

    attached = attach(model, {1: engram}, plan, vocab, prefetcher=OnHand({1: engram}))

It stands where a `Prefetcher` stands and gives the same rows to every batch of a size, without hashing and without a
fetch. So a run with it has the projections, the gate and the convolution, and no lookup: Engram's own compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch

from engram_ref.layer import Engram
from engram_ref.tables import Pending
from engram_ref.tables.base import Ready


class OnHand:
    """Rows of N(0, 1), made once for each batch size and kept on the device.

    Args:
        engrams: the layers, by layer id; of their tables only the format and the device are used.
    """

    def __init__(self, engrams: Mapping[int, Engram]) -> None:
        self._engrams = dict(engrams)
        self._rows: dict[tuple[int, int], torch.Tensor] = {}

    def start(self, ids: Any, history: Any = None) -> HandedOut:
        """Rows for as many tokens as there are ids [B, T], whatever they are."""
        batch, length = ids.shape
        return HandedOut({layer_id: Ready(self._of(layer_id, batch * length)) for layer_id in self._engrams})

    def _of(self, layer_id: int, tokens: int) -> torch.Tensor:
        rows = self._rows.get((layer_id, tokens))
        if rows is None:
            engram = self._engrams[layer_id]
            table = engram.table
            generator = torch.Generator(table.device).manual_seed(layer_id)
            shape = (tokens * engram.fusion.config.columns, table.format.width)  # [B*T*C, D]
            with torch.inference_mode(False):  # a later step may need gradients of what is made of them
                rows = torch.randn(shape, generator=generator, device=table.device).to(table.format.dtype)
            self._rows[layer_id, tokens] = rows
        return rows


class HandedOut(dict[int, Pending]):
    """By layer id something that need not be waited for."""

    def release(self) -> None:
        """Nothing was borrowed."""
