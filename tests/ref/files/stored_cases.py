"""Tables in files for tests: rows of every size and layout, and what a fetch must bring, bit for bit.

Plain rows are random bytes, so that NaN with any payload, -0.0 and denormals are among the values; fp8 rows are random
bytes without the NaN that is refused.
"""

import functools
from pathlib import Path

import torch

from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import make_header, save_rows
from engram_ref.rows.format import RowFormat
from engram_ref.rows.fp8 import CODE_DTYPE, NAN_CODE, NAN_SCALE, SCALE_DTYPE
from engram_ref.rows.rows import Rows

R = 701
FORMATS = {  # row bytes that divide a page, straddle two, three, and every odd size
    "2 B": RowFormat(torch.float16, 1),
    "10 B": RowFormat(torch.bfloat16, 5),
    "256 B": RowFormat(torch.float32, 64),
    "264 B": RowFormat(torch.float64, 33),
    "4096 B": RowFormat(torch.float32, 1024),
    "8200 B": RowFormat(torch.float64, 1025),
}
FP8 = ("packed", "split", "two files")
CASES = (*FORMATS, *FP8)


def random_bytes(rows: int, width: int) -> torch.Tensor:
    """Always the same ones for one shape, uint8 [rows, width]."""
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))


def random_values(row_format: RowFormat, rows: int = R) -> torch.Tensor:
    """Random bytes, as values [rows, D]."""
    return row_format.decode(random_bytes(rows, row_format.row_bytes))


@functools.cache
def random_codes(rows: int = R, width: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, width] and scales [rows, width / 32], any but NaN."""
    codes, scales = random_bytes(rows, width).numpy(), random_bytes(rows, width // 32).numpy()
    codes -= (codes & NAN_CODE) == NAN_CODE
    scales -= scales == NAN_SCALE
    return torch.from_numpy(codes).view(CODE_DTYPE), torch.from_numpy(scales).view(SCALE_DTYPE)


@functools.cache
def random_content(case: str, rows: int = R) -> Rows:
    """The rows of a case; they are handed out to all tests and must not be changed."""
    if case in FORMATS:
        return Rows.of(random_values(FORMATS[case], rows))
    split = Rows.from_split(*random_codes(rows))
    return split.packed() if case == "packed" else split


def random_rows(count: int, rows: int = R) -> torch.Tensor:
    """Row numbers [count]."""
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(count))


def store(folder: Path, case: str, content: torch.Tensor | Rows) -> StoredRows:
    """Write rows as the case says, and find them."""
    if case != "two files":
        save_rows(folder / "table.safetensors", content)
        return StoredRows.find(folder / "table.safetensors")
    assert isinstance(content, Rows)
    codes, scales = content.split().parts
    # As in the shards of a checkpoint: other tensors stand before, and rows lie anywhere on a page.
    write_tensors(
        folder / "1.safetensors", {"a": torch.zeros(13, dtype=torch.uint8), "w.weight": codes.view(CODE_DTYPE)}
    )
    write_tensors(
        folder / "2.safetensors", {"b": torch.zeros(7, dtype=torch.uint8), "w.scale": scales.view(SCALE_DTYPE)}
    )
    return StoredRows.find(folder / "1.safetensors", "w.weight", scale_path=folder / "2.safetensors")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with these tensors in this order, the first of them on a page of its own."""
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    content = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
    path.write_bytes(make_header(entries, metadata, on_page=next(iter(tensors))) + b"".join(content))


def assert_same_bits(got: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
    """`got` is values[rows], byte by byte."""
    assert got.dtype == values.dtype and got.shape == (len(rows), values.shape[1])
    assert (got.view(torch.uint8).numpy() == values.view(torch.uint8).numpy()[rows.numpy()]).all()
