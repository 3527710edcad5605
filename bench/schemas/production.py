"""The results file of bench/production.py."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from bench.schemas.common import Environment, Git
from bench.schemas.generator import Must, NotRequired, one_of, rules
from bench.schemas.values import Count, Counts, Digest, Share

Part = Annotated[str, one_of("scale", "hot", "place", "whole_model")]


class Configuration(TypedDict):
    """What was asked for."""

    parts: Annotated[list[Part], Must(minItems=1)]
    quick: bool


class ByDepth(TypedDict):
    """First reads of a row, and later ones: b -> reads (or price) at a depth of 2^b .. 2^(b+1) - 1 bytes."""

    first: Counts
    later: Counts


class About(TypedDict):
    """The reads that a case prices."""

    part: Part
    table: Annotated[str, "a preset; in whole_model the model that the table belongs to"]
    stream: Annotated[str, one_of("python-stdlib", "uniform", "zipf")]
    stream_sha256: Annotated[Digest, "of the whole text, UTF-8, or of the random ids"]
    tokens: Annotated[Count, "tokens whose rows are charged"]
    mode: Annotated[str, one_of("token", "decode", "prefill")]
    tokens_per_step: Count
    table_rows: Annotated[Count, "of all layers"]
    row_bytes: Count
    reads: Count
    distinct_rows: Count
    row_reads_sha256: Annotated[
        Digest, "of the links as little-endian int32, then the distinct rows as little-endian int64"
    ]


class Record(About):
    """One price."""

    layout: Annotated[
        str,
        one_of("held live", "compacted"),
        "the whole table live throughout; or only rows that are read, until their last read",
    ]
    first_reads_by_order: NotRequired[Annotated[Counts, "scale: reads of new rows, by n of the n-gram"]]
    price: NotRequired[Annotated[Count, "scale, hot: ByteDMD price, a row read by one instruction"]]
    price_by_value: NotRequired[Annotated[Count, "the same, an instruction for every byte"]]
    reads_by_depth: NotRequired[ByDepth]
    price_by_depth: NotRequired[ByDepth]
    hot_share: NotRequired[Annotated[Share, "hot: tier rows over all rows"]]
    tier_rows: NotRequired[Count]
    tier_rows_filled: NotRequired[Annotated[Count, "rows seen in the calibration half"]]
    tier_rows_read: NotRequired[Annotated[Count, "rows of the tier that the other half reads"]]
    reads_of_tier: NotRequired[Count]
    padding_bytes: NotRequired[Annotated[Count, "place: bytes above the table, live, never read"]]
    resident: NotRequired[Annotated[Count, "place, whole_model: price with the table on top at first"]]
    offload_naive: NotRequired[Annotated[Count, "the same with the table below"]]
    staged_at_most: NotRequired[Annotated[Count, "whole_model: price of reading the prefetched copies of a step"]]
    steps: NotRequired[Count]
    weight_bytes: NotRequired[Annotated[Count, "of the model, read in a step, at least"]]
    weights_step_price: NotRequired[Count]
    engram_weight_bytes: NotRequired[Annotated[Count, "of Engram's projections"]]
    engram_weights_step_price: NotRequired[Count]


@rules(title="Results of bench/production.py")
class Results(TypedDict):
    """Exact prices of row reads at the published table sizes; integers, the same on every machine for the same text
    and Python's standard library. No times and no conclusions."""

    schema_version: Literal[1]
    benchmark: Literal["production"]
    configuration: Configuration
    environment: Environment
    git: Git
    records: Annotated[list[Record], Must(minItems=1)]
