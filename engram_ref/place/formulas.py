"""The formulas of every prediction: bytes that a placement holds and moves, and how long a step waits for its rows.

Each is a function, and FORMULAS says the same in words, by the name that predictions carry; the page
docs/where-should-my-table-live.md shows them, and how far they are from what was measured. Placements that are made of
others (a hot tier in front of a table, rows that ranks own) are computed from those that they are made of. A CPU that
computes without a GPU has placements of its own: the same names, and ", no GPU".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engram_ref.config import VALUE_BYTES, EngramConfig
from engram_ref.place.energy import PAGE, pages_per_row
from engram_ref.place.group import ALONE, Group
from engram_ref.place.machine import Machine
from engram_ref.sharding.on_paper import exchange_bytes, exchange_seconds

SECTOR = 32  # bytes: what a GPU reads of host memory at least
HOT_ENTRY = 4  # bytes per row of the table: whether it is hot, and where
# What a hot tier is made of, hits first; and where the rows are that ranks own.
HOT = {
    "hot": ("device", "host"),
    "hot file": ("device", "file"),
    "hot sharded": ("device", "sharded"),
    "hot file, no GPU": ("memory", "file, no GPU"),
    "hot sharded, no GPU": ("memory", "sharded, no GPU"),
}
OWNED = {"sharded": "device", "sharded host": "host", "sharded, no GPU": "memory"}
# What a fetch takes from the blocks that run beside it, however long they are; of others nothing has been measured.
BESIDE = {
    "uva": "beside_uva",
    "host": "beside_staged",
    "file": "beside_staged",
    "sharded host": "beside_staged",
    "hot": "beside_hot",
    "hot file": "beside_hot",
    "file, no GPU": "beside_file",
    "hot file, no GPU": "beside_file",
}

FORMULAS = {
    "held": "device: table; host: table + two staging buffers a rank; uva: table, in host memory; file: table on disk, "
    "two staging buffers a rank; hot: its rows on the device and 4 B for each row of the table; sharded: table / ranks "
    "on each device, or table / machines in host memory, and rows that are sent; arriving rows on the device, as "
    "stored and decoded. GPU of a rank; host and disk of a machine, whose ranks share one copy",
    "rows": "tokens x layers x columns",
    "distinct": "rows x share of distinct rows in a step of the text; of a prompt, in as many tokens in a row",
    "window": "layer x block time; that given for a decode step, or the longer of two leasts: bytes of a block's "
    "weights that a step reads / weights_over / device (memory, if no GPU), of experts those that the tokens of r = "
    "min(weights_over, ranks) ranks choose, each by itself and none preferred, of all else r times; 2 x active values "
    "of a block x those tokens / weights_over / compute (processor, if no GPU). A prompt takes a given time or its "
    "operations, the longer",
    "beyond": "over layers, the most that the fetches up to one take beyond its window; not below 0",
    "beside": "uva: beside_uva x what of its fetches is not beyond the windows; each fetch of host, file and sharded "
    "host: beside_staged, of hot and hot file: beside_hot; if no GPU, of file and hot file: beside_file; others: 0, "
    "not measured",
    "exposed": "beyond + beside",
    "loss": "exposed / (blocks x block time); where nobody says how many blocks, those up to the last layer: a most",
    "time.device": "start_device + 2 x bytes / device",
    "time.memory": "start_host + rows / gather",
    "time.uva": "start_device + start_bus + the longer of rows x row in sectors of 32 B / bus and rows / uva",
    "time.host": "start_staged + rows / gather + bytes / bus",
    "time.file": "start_disk + distinct rows x pages of a row x ranks of the machine / reads, then as host",
    "time.hot": "hits as device (memory, if no GPU), the others as host",
    "time.hot file": "hits as device (memory, if no GPU), the others as file",
    "time.hot sharded": "hits as device (memory, if no GPU), the others as sharded",
    "time.sharded": "as device (memory, if no GPU), then exchange",
    "time.sharded host": "as host, then exchange",
    "exchange.bytes": "a layer: rows x (ranks - 1) / ranks x (row number of 4 B + row) + (ranks - 1) x 272 B",
    "exchange": "3 x (base + hop + (ranks - 1) x peer) + exchange.bytes / link",
    "price": "rows at sqrt(depth): first reads anywhere in the table, others below what was read since; offloaded, "
    "the former below all live bytes and the latter below what a step reads; a wire has no price",
    "energy": "rows x (bits x pJ of the tier + pages x pJ of a page) + bits of a wire x pJ of a link, published ranges",
}


def table_bytes(config: EngramConfig, rows: Sequence[int]) -> int:
    """Bytes of the tables as stored."""
    return sum(rows) * config.row_bytes()


def held_bytes(
    config: EngramConfig, rows: Sequence[int], tokens: int, hot_rows: int, group: Group = ALONE
) -> dict[str, dict[str, int]]:
    """What each placement holds on "gpu", in "host" memory and on "disk", for steps of up to so many tokens.

    Of the GPU it is what one rank holds, of host memory and disk what a machine holds.
    """
    table, ranks = table_bytes(config, rows), group.per_machine
    staging = ranks * 2 * tokens * config.columns * config.row_bytes()  # two buffers; the layers take turns
    scaled = config.row_dtype == "float8_e4m3fn"
    stored = tokens * config.bytes_per_token()
    # Rows of fp8 are decoded to bfloat16.
    values = tokens * config.rows_per_token() * config.row_width * (2 if scaled else VALUE_BYTES[config.row_dtype])
    arriving = values + stored * scaled  # fp8, until it is decoded
    exchanged = values + 2 * stored  # rows as others sent them, and as others are sent them
    hot, entries = hot_rows * config.row_bytes(), ranks * HOT_ENTRY * sum(rows)
    owned = -(-table // group.ranks)  # of the rank that has most
    places = {
        "device": (table, 0, 0),
        "hot": (arriving + hot, table + staging + entries, 0),  # hot rows are copies: the table stays whole
        "uva": (values, table, 0),  # the kernel decodes rows as it reads them
        "host": (arriving, table + staging, 0),
        "hot file": (arriving + hot, staging + entries, table),
        "file": (arriving, staging, table),
        "sharded": (owned + exchanged, 0, 0),
        "hot sharded": (owned + exchanged + hot, entries, 0),
        "sharded host": (exchanged, ranks * owned + staging, 0),
    }
    return {name: dict(zip(("gpu", "host", "disk"), sizes)) for name, sizes in places.items()}


def moved_bytes(
    placement: str, rows: float, distinct: float, row_bytes: int, hits: float, group: Group = ALONE
) -> dict[str, float]:
    """What a fetch of so many rows reads from each tier: device, bus, host, disk (in whole pages); and from others."""
    asked = rows * row_bytes
    if placement in HOT:
        front, behind = HOT[placement]
        near = moved_bytes(front, rows * hits, distinct * hits, row_bytes, 0.0, group)
        far = moved_bytes(behind, rows * (1 - hits), distinct * (1 - hits), row_bytes, 0.0, group)
        return _sum(near, far)
    if placement in OWNED:
        wire = exchange_bytes(rows, group.ranks, row_bytes).total
        return {**moved_bytes(OWNED[placement], rows, distinct, row_bytes, 0.0), "link": wire}
    pages = distinct * pages_per_row(row_bytes) * PAGE  # repeats are read once
    return {
        "device": {"device": asked},
        "memory": {"host": asked},
        "uva": {"host": asked, "bus": rows * in_sectors(row_bytes)},
        "host": {"host": asked, "bus": asked},
        "file": {"disk": pages, "bus": asked},
        "file, no GPU": {"disk": pages, "host": asked},
    }[placement]


def _sum(near: dict[str, float], far: dict[str, float]) -> dict[str, float]:
    return {name: near.get(name, 0.0) + far.get(name, 0.0) for name in {**near, **far}}


def in_sectors(row_bytes: int) -> int:
    """Bytes of a row as a GPU reads it in place."""
    return math.ceil(row_bytes / SECTOR) * SECTOR


def seconds(
    machine: Machine,
    placement: str,
    rows: float,
    distinct: float,
    row_bytes: int,
    hits: float,
    group: Group = ALONE,
) -> float:
    """How long a fetch of so many rows of one table takes."""
    if rows <= 0:  # a tier that nothing is asked of is not even started
        return 0.0
    nbytes = rows * row_bytes
    if placement in HOT:
        front, behind = HOT[placement]
        near = seconds(machine, front, rows * hits, distinct * hits, row_bytes, 0.0, group)
        return near + seconds(machine, behind, rows * (1 - hits), distinct * (1 - hits), row_bytes, 0.0, group)
    if placement in OWNED:  # an owner gathers for others as many rows as others gather for it
        wire = exchange_seconds(group.link, group.ranks, exchange_bytes(rows, group.ranks, row_bytes))
        return seconds(machine, OWNED[placement], rows, distinct, row_bytes, 0.0, group) + wire
    if placement == "device":
        return machine["start_device"] + 2 * nbytes / machine["device"]  # read, and written where they are used
    if placement == "memory":
        return machine["start_host"] + rows / machine["gather"]
    if placement == "uva":
        longer = max(rows * in_sectors(row_bytes) / machine["bus"], rows / machine["uva"])
        return machine["start_device"] + machine["start_bus"] + longer
    if placement == "host":
        return machine["start_staged"] + rows / machine["gather"] + nbytes / machine["bus"]
    behind = "memory" if placement == "file, no GPU" else "host"
    reads = distinct * pages_per_row(row_bytes) * group.per_machine / machine["reads"]  # ranks share a disk
    return machine["start_disk"] + reads + seconds(machine, behind, rows, distinct, row_bytes, hits)


def beside_seconds(machine: Machine, placement: str, fetches: Sequence[float], beyond: float) -> float:
    """What the blocks beside the fetches of a step lose to them, however long they take.

    Args:
        fetches: seconds that each takes.
        beyond: seconds that the step waits for them.
    """
    if placement not in BESIDE:
        return 0.0
    lost = machine[BESIDE[placement]]
    if placement == "uva":  # a kernel that reads in place shares the GPU with blocks for as long as these run beside it
        return lost * (sum(fetches) - beyond)
    return lost * sum(took > 0 for took in fetches)  # the CPU's part is a hand-over


def tier_shares(placement: str, hits: float, group: Group = ALONE) -> dict[str, float]:
    """Which share of a step's rows is read from each tier of `energy.TIERS`, and which crosses the link."""
    if placement in HOT:
        front, behind = HOT[placement]
        far = {tier: share * (1 - hits) for tier, share in tier_shares(behind, 0.0, group).items()}
        return _sum({front: hits}, far)
    if placement in OWNED:
        return {OWNED[placement]: 1.0, "link": (group.ranks - 1) / group.ranks}
    return {{"uva": "host", "file, no GPU": "file"}.get(placement, placement): 1.0}


def block_seconds(values: float, tokens: int, operations_per_s: float) -> float:
    """How long a block computes at least: a multiplication and an addition for each weight and token."""
    return 2 * values * tokens / operations_per_s


def beyond_seconds(per_layer: Sequence[float], layer_ids: Sequence[int], block: float) -> float:
    """How long a step waits in all for fetches that start with it, one layer's after the other's.

    Args:
        per_layer: how long the fetch of each layer takes.
        layer_ids: blocks that run before each layer.
        block: seconds of one.
    """
    done, waited = 0.0, 0.0
    for layer_id, took in sorted(zip(layer_ids, per_layer)):
        done += took
        # A wait delays what comes behind it: that much longer is the window of the next layer.
        waited = max(waited, done - layer_id * block)
    return waited
