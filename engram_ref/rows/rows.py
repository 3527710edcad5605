"""The rows of a table in memory: their format, and the parts in which their bytes lie.

    rows = Rows.of(values)                      # [R, D] plain values: one part
    rows = Rows.from_packed(raw)                # fp8, uint8 [R, D + D/32]: one part, codes before scales
    rows = Rows.from_split(codes, scales)       # fp8, [R, D] and [R, D/32]: two parts, as in a checkpoint

A stored row is its parts side by side, so every placement fetches it part by part and delivers the same bytes. Packed
rows are one scattered read, split rows are two; `packed` and `split` make one of the other.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engram_ref.config import SCALE_BLOCK
from engram_ref.rows import fp8
from engram_ref.rows.format import RowFormat
from engram_ref.rows.gather import gather_parts
from engram_ref.rows.nan_check import refuse_nan

_CHECKED = 1 << 18  # rows that are looked at together


@dataclass(frozen=True)
class Rows:
    """Rows in memory.

    Attributes:
        format: what a row's bytes mean.
        parts: uint8 [R, w] each, contiguous, on one device; their widths add up to the bytes of a row.
        first: number of the first of them in its table, for messages; not 0 where they are some of its rows.

    Raises:
        ValueError: parts that do not make up whole rows, or that have no memory of their own.
    """

    format: RowFormat
    parts: tuple[Tensor, ...]
    first: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            refuse_wrapped(part)
        widths = tuple(part.shape[1] if part.ndim == 2 else 0 for part in self.parts)
        whole = widths in ((self.format.row_bytes,), self.format.split_bytes)
        same = len({(len(part), part.device, part.dtype) for part in self.parts}) == 1
        if not whole or not same or self.parts[0].dtype != torch.uint8:
            raise ValueError(
                f"parts of shape {[tuple(part.shape) for part in self.parts]}: rows of {self.format.row_bytes} B are "
                f"one part, or {self.format.split_bytes} B each, uint8, on one device"
            )
        if not all(part.is_contiguous() for part in self.parts):
            raise ValueError("the rows of a table must lie one after the other: give contiguous parts")
        if not all(has_memory(part) for part in self.parts):
            raise ValueError("rows whose memory was given back: their storage has been resized to fewer bytes")

    @classmethod
    def of(cls, values: Tensor) -> Rows:
        """Plain rows [R, D]; nothing is copied.

        Raises:
            ValueError: values that require gradients, of another shape, or that do not lie one after the other.
        """
        refuse_trained(values)
        row_format = RowFormat(values.dtype, values.shape[-1])
        return cls(row_format, (row_format.encode(values),))

    @classmethod
    def from_packed(cls, raw: Tensor) -> Rows:
        """fp8 rows, uint8 [R, D + D/32], codes before scales; nothing is copied.

        Raises:
            ValueError: another shape or dtype, or a code or scale that is NaN.
        """
        blocks, rest = divmod(raw.shape[-1], SCALE_BLOCK + 1)
        if raw.ndim != 2 or raw.dtype != torch.uint8 or rest or not blocks:
            raise ValueError(
                f"packed rows of shape {tuple(raw.shape)}, {raw.dtype}: give uint8 [rows, bytes], "
                f"{SCALE_BLOCK} codes and one scale for each block of a row"
            )
        rows = cls(RowFormat(torch.bfloat16, blocks * SCALE_BLOCK, scaled=True), (raw,))
        rows.refuse_nan()
        return rows

    @classmethod
    def from_split(cls, codes: Tensor, scales: Tensor) -> Rows:
        """fp8 rows, float8_e4m3fn [R, D] and float8_e8m0fnu [R, D/32]; nothing is copied.

        Raises:
            ValueError: other shapes or dtypes, or a code or scale that is NaN.
        """
        fp8.check_pair(codes, scales)
        if codes.ndim != 2:
            raise ValueError(f"codes of shape {tuple(codes.shape)}: a table is [rows, width]")
        row_format = RowFormat(torch.bfloat16, codes.shape[1], scaled=True)
        rows = cls(row_format, (codes.view(torch.uint8), scales.view(torch.uint8)))
        rows.refuse_nan()
        return rows

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * self.format.row_bytes

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.parts[0].device

    def take(self, numbers: Tensor) -> Tensor:
        """The bytes of some rows, uint8 [N, row_bytes], in host memory; the numbers, on the CPU, were checked."""
        if self.device.type == "cpu":
            out = torch.empty((len(numbers), self.format.row_bytes), dtype=torch.uint8, device="cpu")
            gather_parts(self.parts, numbers, out)
            return out
        numbers = numbers.to(self.device)
        return torch.cat([part.index_select(0, numbers) for part in self.parts], dim=1).cpu()

    def packed(self) -> Rows:
        """The same rows in one part; themselves if they are."""
        if len(self.parts) == 1:
            return self
        return Rows(self.format, (torch.cat(self.parts, dim=1),))

    def split(self) -> Rows:
        """The same rows, codes and scales apart; themselves if they are, or if they have no scales."""
        widths = list(self.format.split_bytes)
        if len(self.parts) == len(widths):
            return self
        return Rows(self.format, tuple(part.contiguous() for part in self.parts[0].split(widths, dim=1)))

    def values(self) -> Tensor:
        """All values, [R, D]; plain rows are a view."""
        return self.format.decode(self.packed().parts[0])

    def between(self, first: int, last: int) -> Rows:
        """The rows from `first` on and before `last`; nothing is copied."""
        return Rows(self.format, tuple(part[first:last] for part in self.parts), self.first + first)

    def refuse_nan(self, before: int = 0) -> None:
        """Refuse fp8 rows with a code or scale that is NaN: no table is shipped with one, so the bytes are not rows.

        Args:
            before: how many rows the table has before these, for the message.

        Raises:
            ValueError: there is one; the message names its row.
        """
        if not self.format.scaled:
            return
        codes = (self.format.width, 0)  # how many bytes of each part are codes; the others are scales
        for first in range(0, len(self), _CHECKED):
            number = functools.partial(operator.add, self.first + before + first)
            for part, count in zip(self.parts, codes):
                piece = part[first : first + _CHECKED]
                if piece.is_cpu or fp8.has_nan(piece[:, :count], piece[:, count:]):  # on an accelerator looked at there
                    refuse_nan("these rows", piece.cpu().numpy(), count, number)


def has_memory(values: Tensor) -> bool:
    """Whether contiguous values lie within their storage, which whoever shards parameters may have resized."""
    end = values.storage_offset() * values.itemsize + values.nbytes
    return not len(values) or end <= values.untyped_storage().nbytes()


def refuse_wrapped(values: Tensor) -> None:
    """Refuse a tensor that is made of others, as those of a sharded model are.

    Raises:
        ValueError: it is one.
    """
    # It has no address, and what is compiled here reads by address.
    if is_traceable_wrapper_subclass(values):
        raise ValueError(
            f"rows that are a {type(values).__name__}, made of other tensors: give a plain one of all rows, as "
            "full_tensor() makes it; a model's own table is offloaded before the model is sharded, or never built "
            "(without_table) and given as rows="
        )


def refuse_trained(values: Tensor) -> None:
    """Refuse values that ask for gradients where none reach them: they would stay as they are, without a word.

    Raises:
        ValueError: they do.
    """
    if values.requires_grad:
        raise ValueError(
            "rows that require gradients, and a table that passes none back: give them to DeviceTable(weight), which "
            "trains them, or give weight.detach()"
        )


def rows_of_table(rows: Tensor | Rows, checked: bool) -> Rows:
    """What somebody gives a table to use as it is: plain values [R, D], or `Rows`.

    Args:
        checked: whether fp8 rows were searched for NaN just now; they are searched here otherwise, 30 ns a row.

    Raises:
        ValueError: fp8 rows with a code or a scale that is NaN, or values that require gradients.
    """
    rows = rows if isinstance(rows, Rows) else Rows.of(rows)
    if not checked:
        rows.refuse_nan()
    return rows
