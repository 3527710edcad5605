"""The two results files of bench/bytedmd_toy.py --sweep: points of sweeps, and a grid."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from bench.schemas.common import Provenance
from bench.schemas.generator import Must, one_of, rules
from bench.schemas.toy import Boundary, Model, Stream, Variant
from bench.schemas.values import Amount, Counts, Digest, Natural, Share

Axis = Annotated[list[Amount], Must(minItems=1, uniqueItems=True)]
Prices = Annotated[list[list[list[list[Natural]]]], "[padding][share][hot][compute]"]


class Configuration(TypedDict):
    """What every point has unless its sweep varies it."""

    text: str | None
    tokenizer: str | None
    quick: bool
    models: list[Model]
    preset: str
    stream: str
    seq_len: int
    d_model: int
    seed: int
    padding: int
    share: Share
    hot: Share
    bytes_per_element: int
    definition: Annotated[str, one_of("lru", "two-stack")]
    wrong: Share


class Sweep(TypedDict):
    """One setting, varied."""

    setting: Annotated[str, "the entry of the configuration that is varied"]
    values: Annotated[list[Any], Must(minItems=1, uniqueItems=True)]


class Priced(TypedDict):
    """What was found for a point."""

    cost: Annotated[int, "ByteDMD price"]
    cost_by_kind: Annotated[Counts, "kind of value read -> price"]
    rows_above: Annotated[int, "rows of the table that start above the padding"]
    share_below: Annotated[Share, "of the lookups, those to rows below the padding"]
    share_wrong: Annotated[Share, "of the lookups, those whose copy is of another row"]
    rows: Annotated[int, "of the table"]
    lookups: Annotated[int, "tokens times columns"]
    distinct_rows: Annotated[int, "that are looked up"]
    row_stream_sha256: Annotated[
        Digest, "of the row indices [T, C] as little-endian int64; both implementations agreed on them"
    ]
    escapes: Annotated[Counts, "values that left the tracer, by conversion"]
    untracked_outputs: int
    output_sha256: Annotated[
        Digest,
        "of the output's float64 bits, of the recording that the point was priced from: variants without copies share "
        "one",
    ]
    reads: int
    reads_by_kind: Counts
    working_set: Annotated[int, "inputs that are ever read: live values at the start, without padding"]


class Point(Priced):
    """A price in a sweep."""

    sweep: str
    value: Annotated[float | str, "of the sweep's setting"]
    model: Model
    boundary: Boundary
    variant: Variant
    stream: Annotated[str, "which of the streams was read"]


class Asked(Provenance):
    """What was asked for, where it ran, and the digest of the code that found the prices."""

    configuration: Configuration
    code_sha256: Annotated[Digest, "of the sources that decide a price"]


@rules(title="sweeps")
class Sweeps(Asked):
    """One setting varied at a time."""

    schema_version: Literal[1]
    benchmark: Literal["bytedmd_sweeps"]
    streams: Annotated[dict[str, Stream], Must(minProperties=1), "by name/tokens/seed"]
    sweeps: Annotated[dict[str, Sweep], Must(minProperties=1)]
    points: Annotated[list[Point], Must(minItems=1)]


class Axes(TypedDict):
    """What the grid varies."""

    padding: Axis
    share: Annotated[Axis, "of the lookups, before hot rows are taken out"]
    hot: Annotated[Axis, "share of all rows kept above"]
    compute: Annotated[Axis, "width of the layer; 0: the lookup alone"]


class GridPrices(TypedDict):
    """variant -> [padding][share][hot][compute]"""

    resident: Prices
    offload_naive: Prices
    offload_prefetch: Prices


@rules(title="grid")
class Grid(Asked):
    """Four settings varied at once."""

    schema_version: Literal[1]
    benchmark: Literal["bytedmd_grid"]
    stream: Stream
    axes: Axes
    share_below: Annotated[
        list[list[Share]], "[share][hot]: of the lookups, those that go to rows below the padding in fact"
    ]
    prices: GridPrices


Results = Annotated[
    Sweeps | Grid,
    Must(title="Results of bench/bytedmd_toy.py --sweep"),
    "Raw numbers and their provenance; no conclusions and no times. For the same configuration, text and code the "
    "points are the same on every machine.",
]
