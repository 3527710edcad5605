"""What a run will need, counted before anything is allocated, and refused in one line with both numbers.

    needs = Needs(...)                      # bytes by name, of the device and of the host
    needs.require(device)

Weights, keys and values, tables, staging and rows on hand are counted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from bench.instruments.timing import FLUSHED
from bench.served.model import served_bytes
from bench.served.variants import OWN_COMPUTE, Choice
from bench.setup.backbones import BlockShape
from engram_ref.config import EngramConfig
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import free_device_bytes, free_host_bytes, said_by

LARGEST = 256  # places that are tried
_HEADROOM = 1 << 30  # of a device: contexts, workspaces, graphs
_STAGED = ("offload_naive", "offload_prefetch", "offload_disk", "throttled")
_HOST_HOT = 4  # bytes per row of the array that says where hot rows are
_FRACTION = 16  # of a CPU's free memory, left to everybody else


@dataclass(frozen=True)
class Plan:
    """What is to be served.

    Attributes:
        shape, blocks, parameters: of the model, its embedding included.
        head: output weights.
        itemsize: bytes of a value of the model.
        config: of the Engram layer.
        rows: of the table.
        slots: sequences at a time.
        prompt, output: tokens of the longest.
        sequences: of a round.
        most_tokens: of a prefill.
        choice: the variants.
    """

    shape: BlockShape
    blocks: int
    parameters: int
    head: int
    itemsize: int
    config: EngramConfig
    rows: int
    slots: int
    prompt: int
    output: int
    sequences: int
    most_tokens: int
    choice: Choice


@dataclass
class Needs:
    """Bytes by what they are for.

    Attributes:
        device: of the accelerator; of a CPU, which is its own device, everything.
        host: beside an accelerator.
    """

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    def require(self, device: torch.device) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: one line with both numbers, and what they are made of.
        """
        free = free_device_bytes(device)
        _require("host" if device.type == "cpu" else str(device), self.device, free, device.type == "cpu")
        if device.type != "cpu":
            _require("host", self.host, free_host_bytes(), True)

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return sum(self.device.values())


def _require(place: str, needed: dict[str, int], free: int | None, host: bool) -> None:
    total = sum(needed.values())
    room = None if free is None else free - (free // _FRACTION if host else _HEADROOM)
    if room is None or total <= room:
        return
    assert free is not None
    parts = ", ".join(f"{name} {nbytes / 2**30:.2f}" for name, nbytes in needed.items() if nbytes)
    raise ValueError(
        f"{total / 2**30:.2f} GiB of {place} memory are needed ({parts}), {free / 2**30:.2f} GiB are free"
        f"{said_by(torch.device('cpu')) if host else ''}: "
        "take smaller --batches, --table_params or lengths, or fewer --variants"
    )


def estimate(plan: Plan, device: torch.device) -> Needs:
    """Bytes that a run needs."""
    row_format = RowFormat.of(plan.config)
    table = plan.rows * row_format.row_bytes
    names, hot = plan.choice.names, plan.choice.hot_shares if "offload_hot" in plan.choice.names else ()
    fetched = _prefill_tokens(plan) * plan.config.columns  # rows
    values = row_format.width * row_format.dtype.itemsize
    staged = sum(name in names for name in _STAGED) * 2 * fetched * row_format.row_bytes  # two buffers each
    # Fetched for a whole round before its first step.
    on_hand = sum(_tokens(plan)) * plan.config.columns * values if OWN_COMPUTE in names else 0
    fusion = 2 * plan.config.hidden * plan.config.embedding_width * plan.itemsize  # one key, one value
    of_model = {
        "weights": (plan.parameters + plan.head) * plan.itemsize + fusion,
        "keys and values": served_bytes(plan.shape, plan.blocks, plan.slots, plan.prompt + plan.output, plan.itemsize),
        "rows on hand": on_hand,
        "rows arriving": 2 * fetched * (values + row_format.row_bytes) + fetched * 8,
        "working memory": _working_bytes(plan),  # the only bound among these, from above
        "cache flush": FLUSHED,
    }
    hot_rows = sum(int(share * plan.rows) for share in hot) * row_format.row_bytes
    hot_index = len(hot) * plan.rows * _HOST_HOT
    if device.type == "cpu":
        return Needs({**of_model, "table": table, "hot rows": hot_rows + hot_index, "staging": staged})
    on_device = {"resident table": table if "resident" in names else 0, "hot rows": hot_rows}
    return Needs(
        {**of_model, **on_device}, {"table": table, "hot rows": hot_index, "staging": staged, "cache flush": FLUSHED}
    )


def _prefill_tokens(plan: Plan) -> int:
    # A prompt of more tokens than a prefill may have is processed all the same, alone.
    return min(max(plan.most_tokens, plan.prompt), plan.slots * plan.prompt)


def _tokens(plan: Plan) -> tuple[int, int]:
    """Tokens of a round at most: of prompts, padding included, and of decode steps, idle places included."""
    # Waiting sequences keep every place busy but the last to end: steps are few more than tokens over places.
    steps = -(-plan.sequences * plan.output // plan.slots) + plan.output
    return plan.sequences * plan.prompt, plan.slots * steps


def _working_bytes(plan: Plan) -> int:
    """A block's widest tensors for the tokens of a prefill, and the logits of a step in float32."""
    widest = 3 * plan.shape.intermediate + 4 * plan.shape.hidden + 2 * plan.config.embedding_width
    return _prefill_tokens(plan) * widest * plan.itemsize + plan.slots * (plan.head // plan.config.hidden) * 4


def device_room(device: torch.device) -> int:
    """Bytes of an accelerator that a run may take."""
    free = free_device_bytes(device)
    assert free is not None
    return free - _HEADROOM


def largest_batch(plan: Plan, device: torch.device) -> int:
    """The largest power of two of places that fits, LARGEST at most.

    Raises:
        ValueError: not even one place fits.
    """
    slots = LARGEST
    while slots > 1:
        try:
            estimate(replace(plan, slots=slots), device).require(device)
            return slots
        except ValueError:
            slots //= 2
    estimate(replace(plan, slots=1), device).require(device)  # raises, with both numbers, if even that is too much
    return 1
