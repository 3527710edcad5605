"""What the published geometries are cut to, so that a laptop can lay a table out value by value: fields by preset.

The orders, the heads and the form stay, and with them the rows that a token reads. `CUTS` is for whole layers, `ROWS`
for lookups alone, which are fewer reads: there the rows of the paper's tables and of the demo's keep their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engram_toy.fp8 import SCALE_BLOCK

_TABLE = (1000, 1000)  # rows of a column, of each order
CUTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    # One residual copy, as a `Workload` has; rows as narrow as V4.1's can be, a block of codes with its scale.
    "v41-flash": {"hc_mult": 1, "row_width": SCALE_BLOCK, "table_size_per_order": (*_TABLE, 1000)},
    "qwen38-flash-next": {"hc_mult": 1, "row_width": SCALE_BLOCK, "table_size_per_order": _TABLE},
}
ROWS: Mapping[str, dict[str, Any]] = {
    **CUTS,
    "demo": {"table_size_per_order": _TABLE},
    "paper-27b": {"table_size_per_order": _TABLE},
    "paper-40b": {"table_size_per_order": (3200, 3200)},  # as much larger as it is
}
