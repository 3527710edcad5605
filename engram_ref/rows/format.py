"""How the bytes of one stored row become its values.

row_format = RowFormat.of(config)
values = row_format.decode(raw)             # raw: uint8 [N, row_bytes] -> [N, D]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engram_ref.config import SCALE_BLOCK, EngramConfig
from engram_ref.rows import fp8
from engram_ref.rows.decoding import dequantise_rows


@dataclass(frozen=True)
class RowFormat:
    """How the bytes of one stored row become its values.

    Attributes:
        dtype: of the values that a fetch delivers.
        width: how many there are (D).
        scaled: stored as e4m3 codes and one e8m0 scale for each 32 of them, first all codes, then all scales; the
            values are bfloat16. Otherwise the values lie there as they are.

    Raises:
        ValueError: rows of no value, or scaled rows of another dtype or of a width that is not made of whole blocks.
    """

    dtype: torch.dtype
    width: int
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"rows of {self.width} values: a row has one at least")
        if self.scaled and (self.dtype != torch.bfloat16 or self.width % SCALE_BLOCK):
            raise ValueError(
                f"scaled rows of {self.width} values, {self.dtype}: "
                f"they are bfloat16 and a multiple of {SCALE_BLOCK} wide"
            )

    @classmethod
    def of(cls, config: EngramConfig) -> RowFormat:
        """The format of a configuration's rows."""
        if config.row_dtype == "float8_e4m3fn":
            return cls(torch.bfloat16, config.row_width, scaled=True)
        return cls(getattr(torch, config.row_dtype), config.row_width)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row, its scales included."""
        if self.scaled:
            return self.width + self.width // SCALE_BLOCK
        return self.width * self.dtype.itemsize

    @property
    def split_bytes(self) -> tuple[int, ...]:
        """Bytes of a row's codes and of its scales, where they lie apart; of plain rows, which have one part, all."""
        return (self.width, self.width // SCALE_BLOCK) if self.scaled else (self.row_bytes,)

    def decode(self, raw: Tensor, out: Tensor | None = None) -> Tensor:
        """Values [N, D] of stored rows [N, row_bytes] uint8; plain rows without `out` are a view, nothing is copied.

        Args:
            raw: contiguous.
            out: [N, D], contiguous, on the same device, to write into.
        """
        if self.scaled:
            return dequantise_rows(raw, self.width, out)
        return raw.view(self.dtype) if out is None else out.copy_(raw.view(self.dtype))

    def encode(self, values: Tensor) -> Tensor:
        """Stored rows [R, row_bytes] uint8 of values [R, D]; of plain rows a view, scaled ones are quantised.

        Raises:
            ValueError: another dtype or width, or rows that do not lie one after the other.
        """
        if values.dtype != self.dtype or values.ndim != 2 or values.shape[1] != self.width:
            raise ValueError(
                f"rows of shape {tuple(values.shape)}, {values.dtype}: "
                f"this table has [rows, {self.width}], {self.dtype}"
            )
        if not values.is_contiguous():
            raise ValueError("the rows of a table must lie one after the other: give rows.contiguous()")
        if self.scaled:
            return torch.cat([part.view(torch.uint8) for part in fp8.quantise(values.detach())], dim=1)
        return values.detach().view(torch.uint8)
