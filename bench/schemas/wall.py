"""The results file of bench/gpu_wall.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from bench.schemas.common import (
    CONTROL,
    PLACEMENTS,
    Device,
    DeviceEnvironment,
    Git,
    Held,
    Layout,
    Limits,
    MeasuringProcess,
    Traffic,
)
from bench.schemas.generator import Must, NotRequired, one_of, rules, when
from bench.schemas.values import Amount, Amounts, Count, Digest, Natural, Positive, Samples, Share, Text

RowDtype = Annotated[
    str,
    one_of("float32", "float16", "bfloat16", "float8_e4m3fn"),
    "as rows are stored; float8_e4m3fn with one float8_e8m0fnu scale for every 32 values",
]
_KINDS, _LANES = ["hash", "gather", "copy", "compute", "wait", "step"], ["main", "background", "stream"]
_SPAN = [{"enum": _KINDS}, {"enum": _LANES}, {"type": "number"}, {"type": "number"}]
Span = Annotated[list[Any], Must(minItems=4, prefixItems=_SPAN, items=False)]
_NULL, _TEXT = {"type": "null"}, {"type": "string", "minLength": 1}
_ON_CPU = {"items": {"properties": {"device": {"const": "cpu"}}}}


class WallEnvironment(DeviceEnvironment):
    """The machine, its accelerator and the software."""

    huge_pages: Annotated[Share | None, "share of the host table that lies on huge pages"]
    pinned: bool


class Stream(TypedDict):
    """Token ids that were read."""

    name: Annotated[Text, "python-stdlib, uniform or a file"]
    sha256: Annotated[Digest, "of the text or of the token ids"]
    tokens: Annotated[Count | None, "null: random ids, which do not end"]


class Disk(TypedDict):
    """Random reads of the disk under the table's file."""

    reads_per_s: Positive
    bytes_per_s: Positive
    what: Text


class UnknownDisk(TypedDict):
    """No disk was measured."""

    reads_per_s: None
    why: Text


class WallLimits(Limits):
    """What this machine can do at most, measured in the same run."""

    disk: Disk | UnknownDisk


class Shape(TypedDict):
    """Tokens of a step."""

    phase: Annotated[str, one_of("prefill", "decode")]
    batch: Natural
    tokens: Annotated[Natural, "new ones, per sequence"]
    context: Annotated[Count, "tokens before them"]


@rules(dependentRequired={"preset": ["published_rows", "row_dtype", "layout"]})
class StepTable(TypedDict):
    """The table of a step."""

    params: Positive
    rows: Count
    row_bytes: Natural
    bytes: Count
    columns: Natural
    layer_ids: Annotated[list[Count], Must(minItems=1)]
    preset: NotRequired[Annotated[Text, "whose geometry it has; absent in older results"]]
    published_rows: NotRequired[Annotated[Natural, "of one layer of the preset as published"]]
    row_dtype: NotRequired[RowDtype]
    layout: NotRequired[Layout]


class Prediction(TypedDict):
    """Of a median step, counted from the token ids before anything was measured."""

    rows: Amount
    unique_rows: Amount
    bytes_requested: Amount
    bytes_unique: Amount
    bytes_paged: NotRequired[Annotated[Amount, "pages of a file that hold the rows; 0 without one"]]
    disk_reads: NotRequired[Annotated[Amount, "runs of touching pages among them; 0 without a file"]]


class RunTable(TypedDict):
    """Of this step; absent in older results."""

    preset: Text
    share: Annotated[Positive, "rows of the table / rows of one layer of the preset as published"]
    row_dtype: RowDtype
    layout: Layout


@rules(**when("counter", {"type": "array"}, {"counter_what": _TEXT}))
class StepBytes(TypedDict):
    """Bytes per step, from three sources, and what the last two should be."""

    from_ids: Annotated[list[Count], "exact, of the deduplicated ids"]
    copied: Annotated[list[Count] | None, "by explicit copies or reads; null in place"]
    counter: Annotated[list[Count] | None, "the driver's or the kernel's"]
    counter_what: str | None
    predicted: Annotated[list[Count] | None, "what `copied` should be, exactly"]
    predicted_counter: list[Count] | None


class Hot(TypedDict):
    """What the rows that were kept on the device were good for."""

    hit_rate: Share
    used_share: Annotated[Share, "of the table's rows, read at least once"]
    hot_rows: Count


@rules(additionalProperties=True)
class Energy(TypedDict):
    """Of the whole board, above what it draws when idle."""

    joules_per_step: float


@rules(
    allOf=[
        when("variant", {"const": "offload_hot"}, {"hot": {"type": "object"}}, {"hot": _NULL}),
        when("variant", {"const": "offload_disk"}, {"page_cache": {"type": "string"}}, {"page_cache": _NULL}),
        when("variant", {"not": {"const": "resident"}}, {"repeat": {"const": 0}}),
        when("energy", _NULL, {"energy_why": _TEXT}),
    ]
)
class Run(TypedDict):
    """One variant of a step."""

    variant: Annotated[str, one_of(CONTROL, *PLACEMENTS)]
    schedule: Annotated[str, one_of("synchronous", "prefetched", "in place")]
    page_cache: Annotated[str, one_of("cold", "warm")] | None
    repeat: Annotated[int, one_of(0, 1), "1: the second measurement of resident, the noise floor"]
    table: NotRequired[RunTable]
    step_s: Samples
    exposed_s: Annotated[Amounts, "how long compute waited for rows; empty where there are none"]
    limit_s: Annotated[Positive | None, "floor of the fetch alone"]
    limit_why: Annotated[Text, "how the floor is computed, or why there is none"]
    bytes: StepBytes
    held: Held
    freed: NotRequired[
        Annotated[
            int | None,
            "bytes of device memory that this table leaves free against a resident one; null without a table; "
            "absent in older results",
        ]
    ]
    pcie: NotRequired[Annotated[Traffic | None, "null on a CPU and where the step was cut; absent in older results"]]
    hot: Hot | None
    energy: Energy | None
    energy_why: Annotated[str | None, "why there is none, or how it was measured"]
    spans: Annotated[list[Span], "of one step, whose begin is 0: kind, lane, begin, end"]
    rows_sha256: Annotated[Digest | None, "of the rows of one fixed batch, the same for all runs; null without Engram"]


class Step(TypedDict):
    """One table size and shape."""

    shape: Shape
    table: StepTable
    backbone: Text
    blocks: Count
    dtype: Text
    device: Device
    prediction: Prediction
    finished: NotRequired[
        Annotated[bool, "false: cut, after the rounds that are here; absent in older results, all whole"]
    ]
    process_of_round: NotRequired[Annotated[list[Count], "which of `processes`; absent in older results"]]
    runs: Annotated[list[Run], Must(minItems=1)]


class Cost(TypedDict):
    """Bytes, operations and the time below which this machine cannot do a part."""

    bytes: Count | None
    flops: Count | None
    limit_s: Positive | None
    limit_why: Text


class Component(Cost):
    """One part of a step, by itself."""

    case: Annotated[str, one_of("hash", "compute", "up_embed", "up_kv", "full_1", "full_2")]
    device: Device
    batch: Natural
    tokens: Natural
    dtype: Text
    what: Text
    samples_s: Samples


class SkippedComponent(TypedDict):
    """A part that this machine cannot run."""

    case: Annotated[str, one_of("hash", "compute", "up_embed", "up_kv", "full")]
    why: Text


@rules(
    title="Results of bench/gpu_wall.py",
    **when(  # a CPU's time is never a GPU's
        "device",
        {"const": "cpu"},
        {"environment": {"properties": {"accelerator": _NULL}}, "steps": _ON_CPU, "components": _ON_CPU},
        {"environment": {"properties": {"accelerator": {"type": "object"}}}},
    ),
)
class Results(TypedDict):
    """Raw samples and their provenance; no conclusions. Times are seconds, sizes bytes, rates per second. Index i of
    the samples of all runs of one step was measured in the same round."""

    benchmark: Literal["gpu_wall"]
    device: Device
    device_name: Annotated[Text, "the model, as the driver or the kernel calls it"]
    configuration: Annotated[dict[str, Any], "Every option of the command line, defaults included."]
    environment: WallEnvironment
    git: Git
    code_sha256: NotRequired[Annotated[Digest, "of all code that a time depends on"]]
    stream: Stream
    limits: WallLimits
    processes: NotRequired[Annotated[list[MeasuringProcess], Must(minItems=1), "absent in older results"]]
    steps: list[Step]
    components: list[Component]
    components_skipped: list[SkippedComponent]
