"""Where the parts of fp8 rows lie: packed as they are given, padded to whole lines, or codes and scales apart.

with Layouts(rows, device) as layouts:
    codes, scales = layouts["padded"]       # uint8 [R, 256] and [R, 8], views of rows 384 bytes apart
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from bench.reads.methods import PADDED
from bench.reads.requests import WIDTH
from engram_ref.config import SCALE_BLOCK
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows

_PIECE = 1 << 20  # rows copied at a time; of scales, 8 MiB: what is locked at a time is a multiple


class Layouts(AbstractContextManager["Layouts"]):
    """Rows in other layouts, each made when it is first asked for; a context manager that gives their memory back.

    Args:
        rows: packed fp8 rows, codes of 256 bytes, in host memory.
        device: reads them in place.

    Raises:
        ValueError: rows of another kind.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        if len(rows.parts) != 1 or not rows.format.scaled or rows.format.width != WIDTH:
            raise ValueError(
                f"rows of {rows.format.row_bytes} B, {rows.format.dtype}, in {len(rows.parts)} parts: other ways to "
                f"read are for packed fp8 rows of {WIDTH} values"
            )
        self.rows, self.device = rows, device
        self._stack = ExitStack()
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes and scales, [R, 256] and [R, 8] bytes with strides of their own; both begin with a line."""
        if name not in self._made:
            self._made[name] = getattr(self, f"_{name}")()
        return self._made[name]

    def _packed(self) -> tuple[Tensor, Tensor]:
        return _parted(self.rows.parts[0])

    def _padded(self) -> tuple[Tensor, Tensor]:
        return _parted(self._copied(self.rows.parts[0], PADDED))

    def _split(self) -> tuple[Tensor, Tensor]:
        codes, scales = self["packed"]
        return self._copied(codes, codes.shape[1]), self._copied(scales, scales.shape[1])

    def _scales_there(self) -> tuple[Tensor, Tensor]:
        codes, scales = self["split"]
        there = torch.empty_like(scales, device=self.device)
        for first in range(0, len(scales), _PIECE):  # one copy may not span two page-locked regions
            there[first : first + _PIECE].copy_(scales[first : first + _PIECE])
        return codes, there

    def _copied(self, part: Tensor, stride: int) -> Tensor:
        """A part of each row in pinned memory of its own, so many bytes from row to row: uint8 [R, stride]."""
        memory = self._stack.enter_context(HostMemory(len(part) * stride))
        target = memory.bytes.view(-1, stride)
        words = target[:, : part.shape[1]].view(torch.int64)
        for first in range(0, len(part), _PIECE):
            words[first : first + _PIECE].copy_(part[first : first + _PIECE].view(torch.int64))
        if self.device.type == "cuda":
            memory.pin()  # after the first touch, which many threads share
        return target

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._stack.close()


def _parted(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, :WIDTH], rows[:, WIDTH : WIDTH + WIDTH // SCALE_BLOCK]
