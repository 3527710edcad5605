"""The results file of bench/gpu_wall.py --end-to-end."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from bench.schemas.common import (
    CONTROL,
    PLACEMENTS,
    VALUE_OR_WHY,
    Device,
    DeviceProvenance,
    Held,
    Limits,
    MeasuringProcess,
    Table,
    Traffic,
)
from bench.schemas.generator import Must, NotRequired, one_of, rules
from bench.schemas.values import Amount, Amounts, Count, Counts, Digest, Natural, Positive, Share, Text

Range = Annotated[list[Natural], Must(minItems=2, maxItems=2)]


class WeightBytes(TypedDict):
    """Bytes that a decode step reads of the weights; absent in older results."""

    model: Annotated[Count, "of the blocks and the output weights"]
    engram: Annotated[Count, "of the Engram layer, its table left out"]


class Stream(TypedDict):
    """What was served."""

    kind: Annotated[str, one_of("text", "uniform")]
    name: Text
    sha256: Digest


class Needs(TypedDict):
    """Bytes counted before anything was allocated."""

    device: Counts
    host: Counts


class Round(TypedDict):
    """What every variant serves in a round, counted from the ids."""

    round: Count
    prompt_tokens: Count
    output_tokens: Count
    rows_requested: Count
    rows_unique: Annotated[Count, "each once in every step"]
    bytes_staged: NotRequired[Annotated[Count, "that cross where the CPU gathers; missing: as stored"]]


class BoardState(TypedDict):
    """Clock and power when nothing was left to be given to the device, energy before and after the pass."""

    joules_before: Annotated[float | None, "of the board, since its driver was loaded"]
    sm_mhz: float | None
    power_w: float | None
    throttled: Annotated[list[Text] | None, "the driver's reasons for lower clocks"]
    joules_after: float | None
    unknown: Annotated[dict[str, Text], "why an entry is null"]


@rules(anyOf=VALUE_OR_WHY)
class Board(TypedDict):
    """The board in a pass; absent in older results."""

    value: BoardState | None
    why: str | None


class PassSamples(TypedDict):
    """What one pass took, a value per step."""

    prefill_s: Amounts
    decode_s: Amounts
    first_token_s: Annotated[Amounts, "of each sequence: its group's prefill"]
    window_s: Annotated[Amounts, "of each decode step, from its begin to the join, without waiting before it"]
    prefill_exposed_s: Amounts
    decode_exposed_s: Annotated[
        Amounts | None, "null where rows are waited for inside of a graph, where no clock is; 0 in older results"
    ]
    tokens_sha256: Annotated[Digest, "of the tokens that the model chose"]


class Sample(PassSamples):
    """One pass: a round served by one variant."""

    round: Count
    process: Annotated[Count, "which of `processes` measured it"]
    copied: Annotated[Count, "bytes of explicit copies to an accelerator, or read from a file"]
    lookups: Count
    hits: Annotated[Count, "rows found on the device, of hot rows"]
    board: NotRequired[Board]


class Bus(TypedDict):
    """A slower bus, put in by waiting."""

    bytes_per_s: Annotated[Positive | None, "null: no limit of bandwidth"]
    latency_s: Amount


class Graphs(TypedDict):
    """Whether CUDA graphs were used, and why not."""

    used: bool
    why: str | None


class Reading(TypedDict):
    """How fast a median decode step reads the weights."""

    bytes: Count
    bytes_per_s: Positive
    limit_bytes_per_s: Positive
    launch_bound: Annotated[bool, "a median step takes over twice as long as its weights at that limit"]


@rules(anyOf=VALUE_OR_WHY)
class Weights(TypedDict):
    """How fast a median decode step reads the weights; null until all rounds were measured, absent in older results."""

    value: Reading | None
    why: str | None


@rules(anyOf=VALUE_OR_WHY)
class Freed(TypedDict):
    """Bytes of device memory that this table leaves free against a resident one; absent in older results."""

    value: int | None
    why: str | None


@rules(anyOf=VALUE_OR_WHY)
class Energy(TypedDict):
    """Of the whole board in a pass, above what it draws when idle: joules, watts, seconds, passes."""

    value: dict[str, float] | None
    why: str | None


class NotCounted(TypedDict):
    """No traffic is counted on a CPU."""

    value: None
    why: Text


class Contender(TypedDict):
    """One variant, before its passes."""

    label: Text
    variant: Annotated[str, one_of(CONTROL, "own_compute", *PLACEMENTS, "throttled")]
    schedule: Annotated[
        str,
        one_of(
            "none", "in place", "in graph", "in graph, beside", "in graph, asking the CPU", "synchronous", "prefetched"
        ),
        "in graph: looked up by the kernels of the first CUDA graph; beside: on a branch of it; asking: by the CPU",
    ]
    repeat: Annotated[int, one_of(0, 1)]
    hot_share: Share | None
    bus: Bus | None
    page_cache: Annotated[str, one_of("passed by", "used")] | None
    device: Device
    device_label: Annotated[str, Must(pattern="^(CPU|GPU) .")]
    graphs: Graphs
    held: Held
    freed: NotRequired[Freed]
    weights: NotRequired[Weights | None]
    pcie: Annotated[Traffic | NotCounted | None, "Bytes that the GPU received in a pass."]
    energy: Energy | None


class Row(Contender):
    """One variant, and its passes."""

    rounds: list[Sample]


class Case(TypedDict):
    """A backbone, a batch, a stream."""

    backbone: Text
    blocks: Annotated[int, Must(minimum=2)]
    parameters: Count
    weights: Literal["random"]
    weight_bytes: NotRequired[WeightBytes]
    dtype: Annotated[str, one_of("float32", "float16", "bfloat16")]
    device: Device
    batch: Annotated[Natural, "sequences at a time"]
    sequences: Annotated[Natural, "of a round"]
    prompt_tokens: Range
    output_tokens: Range
    stream: Stream
    layer_id: Count
    table: Table
    needs: Needs
    rounds: Annotated[list[Round], "What every variant serves, counted from the ids."]
    labels: Annotated[list[Text], Must(uniqueItems=True), "of the rows, in their order"]
    rows: list[Row]


class Head(DeviceProvenance):
    """What a file begins with, and a run continues only if it has the same."""

    schema_version: Literal[1]
    benchmark: Literal["end_to_end"]
    limits: Limits


@rules(title="Results of bench/gpu_wall.py --end-to-end")
class Results(Head):
    """Raw samples and their provenance; no conclusions. Times are seconds, sizes bytes, rates per second. Samples of a
    round are compared with each other where one process measured them. A run that was cut leaves a valid
    file."""

    processes: Annotated[list[MeasuringProcess], Must(minItems=1)]
    cases: list[Case]
