"""How a safetensors file says what its rows are: dtypes, names and marks, and the unit of direct reads."""

from __future__ import annotations

from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch

from engram_ref.config import SCALE_BLOCK
from engram_ref.rows.fp8 import CODE_DTYPE, SCALE_DTYPE

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "F8_E4M3": CODE_DTYPE,
    "F8_E8M0": SCALE_DTYPE,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ROW_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BLOCK = 4096  # direct reads begin and end at multiples of it


def packed_mark(name: str) -> dict[str, str]:
    """The metadata that say of a tensor of bytes, U8 [R, D + D/32], that it has packed fp8 rows."""
    return {f"{name}.rows": f"F8_E4M3 codes, then one F8_E8M0 scale for every {SCALE_BLOCK}"}


def scale_name(name: str) -> str | None:
    """The name under which a checkpoint has the scales of some codes, or None if these are not called `weight`."""
    *folders, last = name.split(".")
    return ".".join([*folders, "scale"]) if last == "weight" else None


def round_up(position: Any) -> Any:
    """The next multiple of BLOCK, of a number or of each in an array."""
    return -(-position // BLOCK) * BLOCK
