"""Where a table's rows live: one module per placement, one interface (`base.Table`), one factory.

device   in the memory of the device that uses them
host     in host memory: gathered by the CPU, copied through pinned staging
uva      in pinned host memory that a GPU kernel reads in place
hot      the most frequent rows on the device, in front of any other table
file     in a safetensors file: batched, sorted, deduplicated reads
sharded  over the ranks of a group, each of which owns some of the rows

    table = make_table("host", weights, device="cuda")
    values = table.start(rows).wait()        # [N, D], the same bits from every placement
"""

import engram_ref.needs_torch  # noqa: F401

from engram_ref.rows.format import RowFormat
from engram_ref.tables.base import Pending, Table
from engram_ref.tables.factory import PLACEMENTS, make_table

__all__ = ["PLACEMENTS", "Pending", "RowFormat", "Table", "make_table"]
