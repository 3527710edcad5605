"""One forward of the decoder: what was started for it, and what each block needs of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engram_ref.attach.packing import Packing
from engram_ref.fusion.base import ShortConvHistory
from engram_ref.histories.cache import CacheHistory
from engram_ref.histories.places import Prompts
from engram_ref.prefetch import FetchError
from engram_ref.tables.base import Pending


class ForBlock(NamedTuple):
    """What a block needs."""

    rows: Tensor  # [B*T*C, D]
    past: ShortConvHistory | None
    padding: Tensor | None  # [B, T]
    packing: Packing | None = None  # then rows and padding are of the W positions that sequences are laid apart to
    prompts: Prompts | None = None  # which take places once the step has ended


@dataclass(frozen=True)
class Step:
    """A step that has begun.

    Attributes:
        fetch: by layer id, what to wait for.
        shape: of the token ids, [B, T].
        recent: of the history once the step has ended; None without one.
        history: of the sequences; None where nothing comes after this step.
        padding: booleans [B, T], or None.
        packing: how several sequences of one row are laid apart, or None; then padding and rows are, too.
        borders: booleans [B, T], where sequences begin behind others in one row, or None.
        counted: the cache, if its own count of positions is relied on.
        recomputed: blocks may be computed again in the backward pass, hooks included.
        joined: layers with a past whose blocks have begun.
    """

    fetch: Any
    shape: torch.Size
    recent: Pending | None
    history: CacheHistory | None
    padding: Tensor | None
    recomputed: bool = False
    packing: Packing | None = None
    borders: Tensor | None = None
    counted: Any = None
    joined: set[int] = field(default_factory=set)

    def past(self, layer_id: int) -> ShortConvHistory | None:
        """Of the convolution of a layer, if it has one."""
        if self.history is None or self.packing is not None:
            return None
        return self.history.convolutions.get(layer_id)

    def for_block(self, layer_id: int, hidden: Tensor) -> ForBlock:
        """Wait for the rows of a layer; `hidden` is the residual stream [B, T, H] before its block."""
        if hidden.shape[:2] != self.shape:
            raise ValueError(f"a residual stream of {tuple(hidden.shape)} for token ids of {tuple(self.shape)}")
        past = self.past(layer_id)
        note_joined(self.joined, layer_id, past)
        rows = self.fetch[layer_id].wait()
        if rows.device.type == "cpu" and (torch.is_grad_enabled() or self.recomputed) and not rows.requires_grad:
            rows = rows.clone()  # gradients need them after the fetch's buffer has been filled again
        padding = None if self.padding is None else self.padding.to(hidden.device)
        packing = None if self.packing is None else self.packing.to(hidden.device)
        prompts = self.history if isinstance(self.history, Prompts) else None
        return ForBlock(rows, past, padding, packing, prompts)

    def end(self) -> None:
        """Give the fetch back, and let the history go on."""
        self.fetch.release()
        if self.history is not None:
            assert self.recent is not None
            self.history.go_on(self.recent, self.shape[1])
            self.history.packed = self.packing is not None
            self.history.end()


def note_joined(joined: set[int], layer_id: int, past: ShortConvHistory | None) -> None:
    """A block of a forward begins.

    Raises:
        ValueError: it has begun before in this one, and the layer has a past, which each time would advance.
    """
    if past is None:
        return
    if layer_id in joined:
        raise ValueError(
            f"block {layer_id} runs several times in one forward, each of which the layer's convolution would take for "
            "new positions: use_cache=False, a form without convolution, or another block"
        )
    joined.add(layer_id)


def give_back(fetch: Any) -> None:
    """Release a fetch that an error has made useless, if there is one; what is wrong with it besides is not raised."""
    # Whoever keeps the exception, as a console does, keeps all that the functions had which it has ended.
    if fetch is not None:
        with suppress(FetchError):
            fetch.release()
