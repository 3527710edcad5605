"""The results file of bench/bytedmd_toy.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from bench.schemas.common import Provenance
from bench.schemas.generator import Must, NotRequired, one_of, rules
from bench.schemas.values import Counts, Digest, Natural, Samples

Model = Annotated[str, one_of("engram", "kv-bank")]
Boundary = Annotated[str, one_of("lookup", "layer", "block")]
Variant = Annotated[str, one_of("resident", "offload_naive", "offload_prefetch", "offload_hot")]
Pair = Annotated[list[Natural], Must(minItems=2, maxItems=2)]
_OPTIONS = [
    "model", "text", "tokenizer", "seq_len", "d_model", "padding", "hot_share", "bytes_per_element", "seed",
    "definition", "tracer", "repeats", "jobs", "out", "quick"
]  # fmt: skip


class Stream(TypedDict):
    """The text that was read."""

    name: str
    sha256: Annotated[Digest, "of the whole text, UTF-8; of random ids, as little-endian int64"]
    tokens: Annotated[int, "in the whole text"]
    start: Annotated[int, "first token that was read"]


class Scale(TypedDict):
    """Where a published model was cut to what a laptop traces: sizes here, and as published."""

    table_rows: Annotated[Pair, "of the layer that is run"]
    row_width: Pair
    hidden: Pair
    hc_mult: Pair
    layers: Pair


class ModelRead(TypedDict):
    """What a model reads, whatever the layout."""

    config: dict[str, Any]
    plan: dict[str, Any]
    row_stream_sha256: Annotated[
        Digest, "of the row indices [T, C] as little-endian int64; both implementations agreed on them"
    ]
    lookups: Annotated[int, "rows read, tokens times columns"]
    distinct_rows: int
    hot_rows: Annotated[int, "rows that offload_hot keeps above the padding"]
    scale: NotRequired[Scale]


class NoiseFloor(TypedDict):
    """Resident measured against itself, in the same rounds."""

    model: Model
    boundary: Boundary
    again_s: Samples
    ratio: Annotated[
        dict[str, float], Must(required=["median", "low", "high"], maxProperties=3), "and the interval of its median"
    ]


class Priced(TypedDict):
    """One program traced and priced: integers and digests only."""

    model: Model
    boundary: Boundary
    variant: Variant
    cost: Annotated[int, "ByteDMD price of the traced run"]
    cost_by_kind: Annotated[Counts, "kind of value read -> price"]
    reads: int
    reads_by_kind: Counts
    depth_histogram: Annotated[dict[str, Counts], "kind -> b -> reads at depth 2^b .. 2^(b+1) - 1"]
    instructions: int
    escapes: Annotated[Counts, "values that left the tracer, by conversion"]
    untracked_outputs: int
    output_sha256: Annotated[Digest, "of the output's float64 bits, traced"]
    trace_sha256: Annotated[Digest, "of the depths as int32 of the machine, in order"]


class Timed(TypedDict):
    """The same program, untraced."""

    untraced_output_sha256: Digest
    wall_time_s: Annotated[Samples, "the untraced run"]
    wall_time_summary_s: Annotated[dict[str, float], Must(required=["median", "q25", "q75"], maxProperties=3)]


class Run(Priced, Timed):
    """One program, traced and untraced."""

    cost_per_token: float
    scale: NotRequired[Scale]


@rules(title="Results of bench/bytedmd_toy.py")
class Results(Provenance):
    """Raw numbers and their provenance; no conclusions. Prices, reads and digests are the same on every machine for
    the same configuration and text; wall times are not."""

    schema_version: Literal[1]
    benchmark: Literal["bytedmd_toy"]
    started: Annotated[str, "UTC, ISO 8601"]
    finished: Annotated[str, "UTC, ISO 8601"]
    configuration: Annotated[
        dict[str, Any],
        Must(required=_OPTIONS),
        "Every option of the command line, defaults included; `preset` is missing from results that are older than it, "
        "and means tiny.",
    ]
    stream: Stream
    models: dict[str, ModelRead]
    noise_floor: list[NoiseFloor]
    runs: Annotated[list[Run], Must(minItems=1)]
