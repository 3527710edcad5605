"""The formulas of every prediction: bytes that a placement holds and moves, and how long a step waits for its rows.

Each is a function, and FORMULAS says the same in words, by the name that predictions carry; the page
docs/where-should-my-table-live.md shows them, and how far they are from what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engram_ref.config import VALUE_BYTES, EngramConfig
from engram_ref.place.energy import PAGE, pages_per_row
from engram_ref.place.machine import Machine

SECTOR = 32  # bytes: what a GPU reads of host memory at least
HOT_ENTRY = 4  # bytes per row of the table: whether it is hot, and where

FORMULAS = {
    "held": "device: table; host: table + two staging buffers; uva: table, in host memory; file: table on disk + two "
    "staging buffers; hot: its rows on the device and 4 B for each row of the table; arriving rows on the device, as "
    "stored and decoded",
    "rows": "tokens x layers x columns",
    "distinct": "rows x share of distinct rows in a step of the text",
    "window": "layer x block time; the block time given, or bytes of a block's active weights / bandwidth: a least",
    "exposed": "over layers, the most that the fetches up to one take beyond its window; not below 0",
    "time.device": "start_device + 2 x bytes / device",
    "time.memory": "start_host + rows / gather",
    "time.uva": "start_device + start_bus + rows x row in sectors of 32 B / bus",
    "time.host": "start_host + rows / gather + start_bus + bytes / bus",
    "time.file": "start_disk + distinct rows x pages of a row / reads, then as host",
    "time.hot": "hits as device, the others as the tier behind",
    "price": "rows at sqrt(depth): first reads anywhere in the table, others below what was read since; offloaded, "
    "the former below all live bytes and the latter below what a step reads",
    "energy": "rows x (bits x pJ of the tier + pages x pJ of a page), published ranges",
}


def table_bytes(config: EngramConfig, rows: Sequence[int]) -> int:
    """Bytes of the tables as stored."""
    return sum(rows) * config.row_bytes()


def held_bytes(config: EngramConfig, rows: Sequence[int], tokens: int, hot_rows: int) -> dict[str, dict[str, int]]:
    """What each placement holds on "gpu", in "host" memory and on "disk", for batches of up to so many tokens."""
    table = table_bytes(config, rows)
    staging = 2 * tokens * config.columns * config.row_bytes()  # two buffers; the layers take turns
    scaled = config.row_dtype == "float8_e4m3fn"
    values = tokens * config.rows_per_token() * config.row_width * (2 if scaled else VALUE_BYTES[config.row_dtype])
    arriving = values + tokens * config.bytes_per_token() * scaled  # fp8, until it is decoded
    hot = hot_rows * config.row_bytes()
    places = {
        "device": (table, 0, 0),
        "hot": (arriving + hot, table + staging + HOT_ENTRY * sum(rows), 0),
        "uva": (values, table, 0),
        "host": (arriving, table + staging, 0),
        "file": (arriving, staging, table),
    }
    return {name: dict(zip(("gpu", "host", "disk"), sizes)) for name, sizes in places.items()}


def moved_bytes(placement: str, rows: float, distinct: float, row_bytes: int, hits: float) -> dict[str, float]:
    """What a fetch of so many rows reads from each tier: device, bus, host, disk (in whole pages)."""
    asked = rows * row_bytes
    pages = distinct * pages_per_row(row_bytes) * PAGE
    missed = asked * (1 - hits)
    return {
        "device": {"device": asked},
        "memory": {"host": asked},
        "uva": {"host": asked, "bus": rows * in_sectors(row_bytes)},
        "host": {"host": asked, "bus": asked},
        "hot": {"device": asked * hits, "host": missed, "bus": missed},
        "file": {"disk": pages, "bus": asked},
        "file, no GPU": {"disk": pages, "host": asked},
    }[placement]


def in_sectors(row_bytes: int) -> int:
    """Bytes of a row as a GPU reads it in place."""
    return math.ceil(row_bytes / SECTOR) * SECTOR


def seconds(machine: Machine, placement: str, rows: float, distinct: float, row_bytes: int, hits: float) -> float:
    """How long a fetch of so many rows takes."""
    if rows <= 0:
        return 0.0
    nbytes = rows * row_bytes
    if placement == "device":
        return machine["start_device"] + 2 * nbytes / machine["device"]
    if placement == "memory":
        return machine["start_host"] + rows / machine["gather"]
    if placement == "uva":
        return machine["start_device"] + machine["start_bus"] + rows * in_sectors(row_bytes) / machine["bus"]
    if placement == "host":
        return machine["start_host"] + rows / machine["gather"] + machine["start_bus"] + nbytes / machine["bus"]
    if placement == "hot":
        near = seconds(machine, "device", rows * hits, distinct * hits, row_bytes, 0.0)
        return near + seconds(machine, "host", rows * (1 - hits), distinct * (1 - hits), row_bytes, 0.0)
    behind = "memory" if placement == "file, no GPU" else "host"
    read = machine["start_disk"] + distinct * pages_per_row(row_bytes) / machine["reads"]
    return read + seconds(machine, behind, rows, distinct, row_bytes, hits)


def exposed_seconds(per_layer: Sequence[float], layer_ids: Sequence[int], block: float) -> float:
    """How long a step waits in all for fetches that start with it, one layer's after the other's.

    Args:
        per_layer: how long the fetch of each layer takes.
        layer_ids: blocks that run before each layer.
        block: seconds of one.
    """
    done, waited = 0.0, 0.0
    for layer_id, took in sorted(zip(layer_ids, per_layer)):
        done += took
        waited = max(waited, done - layer_id * block)
    return waited
