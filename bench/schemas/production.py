"""The results file of bench/production.py."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from bench.schemas.common import Provenance
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
    table: Annotated[str, "a preset; in whole_model the model around the table"]
    stream: Annotated[str, one_of("python-stdlib", "uniform", "zipf")]
    stream_sha256: Annotated[Digest, "of the whole text, UTF-8, or of the random ids"]
    asked_tokens: Annotated[int | None, "length of the stream; null for all of the text"]
    tokens: Annotated[Count, "tokens whose rows are charged, in whole steps"]
    mode: Annotated[str, one_of("token", "decode", "prefill")]
    tokens_per_step: Count
    prefetch: Annotated[bool, "place, whole_model: copies were priced, too"]
    table_rows: Annotated[Count, "of all layers"]
    row_bytes: Annotated[Count, "of a stored row; the table of another maker's preset is priced at several sizes"]
    reads: Count
    distinct_rows: Count
    row_reads_sha256: Annotated[
        Digest, "of the links as little-endian int32, then the distinct rows as little-endian int64"
    ]


class SecondHalf(TypedDict):
    """Steps and prices of the second half of the steps."""

    steps: Count
    offload_naive: Count
    pinned: Count
    prefetch_stands: NotRequired[Count]
    prefetch_one_use: NotRequired[Count]


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
    resident: NotRequired[Annotated[Count, "place: price with the table above the padding"]]
    offload_naive: NotRequired[Annotated[Count, "price of the rows with the table below padding or weights"]]
    prefetch_stands: NotRequired[
        Annotated[Count, "the same with a copy of every row one step ahead, which stands for its original from then on"]
    ]
    prefetch_one_use: NotRequired[Annotated[Count, "the same with copies that serve one read each"]]
    pinned: NotRequired[
        Annotated[Count, "whole_model: price of the rows with the table above the weights at every step"]
    ]
    second_half: NotRequired[SecondHalf]
    experts: NotRequired[
        Annotated[
            str,
            one_of("", "one", "expected", "all"),
            "whole_model: weights of one token's experts, of the expected union over a step's tokens, or of all; empty "
            "for a dense model",
        ]
    ]
    context: NotRequired[
        Annotated[Count, "whole_model: tokens of keys and values that each sequence holds; 0: left out"]
    ]
    steps: NotRequired[Count]
    read_bytes: NotRequired[Annotated[Count, "weights, keys and values read in a step, at least"]]
    live_bytes: NotRequired[
        Annotated[
            Count,
            "place: of the table's rows that are live at the start; whole_model: all that comes to lie above a row "
            "between two steps",
        ]
    ]
    weights_step_price: NotRequired[Annotated[Count, "of reading read_bytes once, without Engram"]]
    engram_weight_bytes: NotRequired[Annotated[Count, "of Engram's projections"]]
    engram_weights_step_price: NotRequired[Annotated[Count, "of reading them once"]]
    buried_step_price: NotRequired[
        Annotated[
            Count,
            "what Engram's weights and the rows of a step, with their copies, add to weights_step_price by lying above",
        ]
    ]


@rules(title="Results of bench/production.py")
class Results(Provenance):
    """Exact prices of row reads at the published table sizes; integers, the same on every machine for the same text
    and Python's standard library. No times and no conclusions."""

    schema_version: Literal[2]
    benchmark: Literal["production"]
    configuration: Configuration
    records: Annotated[list[Record], Must(minItems=1)]
