"""The results files of bench/how_far.py, one a run: lookup_range, energy_by_tier, verdict_map, other_texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from bench.schemas.common import Provenance
from bench.schemas.generator import Must, NotRequired, one_of, rules
from bench.schemas.values import Amount, Count, Digest, Natural, Share, Text

Table = Annotated[str, one_of("paper-100b", "v41-flash"), "a preset"]
SeenBefore = TypedDict("SeenBefore", {"2": Share, "3": Share, "4": Share})  # by n of the n-gram


class Stream(TypedDict):
    """What was read."""

    name: Text
    sha256: Annotated[Digest, "of the text, UTF-8"]


class Run(Provenance):
    """What all four have at their head."""

    schema_version: Literal[1]
    code_sha256: Digest


class Configuration(TypedDict):
    """What was asked for."""

    tokens: Natural
    quick: bool


class LookupConfiguration(Configuration):
    """What was asked for."""

    hidden: Natural
    seed: Count


class LookupStream(Stream):
    """What the toys read, of which each takes a window."""

    tokens: Natural


class Toy(TypedDict):
    """What was looked up."""

    toy: Text
    tokens: Natural
    lookups: Natural
    distinct_rows: Natural
    row_values: Annotated[Natural, "values of one row"]
    row_stream_sha256: Digest
    config: dict[str, Any]


class Ended(TypedDict):
    """The price of one lookup that ends in one way, in one layout."""

    toy: Text
    ending: Annotated[
        str,
        one_of("returned", "dropped", "row sums", "position sum", "position sum, returned"),
        "what becomes of the delivered rows",
    ]
    variant: Annotated[str, one_of("resident", "offload_naive", "offload_prefetch")]
    padding: Count
    cost: Annotated[Natural, "ByteDMD price"]
    row_cost: Annotated[Natural, "of it, reads of the table's rows"]
    floor: Annotated[Natural, "what no manager can pay less than; short of that by a ten-thousandth at most"]


@rules(title="bench/how_far.py lookup_range")
class LookupRange(Run):
    """Prices of the lookup alone, over its endings and paddings; no conclusions and no times. The same on every
    machine."""

    benchmark: Literal["lookup_range"]
    configuration: LookupConfiguration
    stream: LookupStream
    toys: Annotated[list[Toy], Must(minItems=1)]
    records: Annotated[list[Ended], Must(minItems=1)]


class StepReads(TypedDict):
    """Row reads of the decode steps of one size."""

    table: Table
    tokens: Annotated[Natural, "read, the warming half included"]
    tokens_per_step: Natural
    steps_counted: Annotated[Natural, "the second half"]
    reads: Annotated[Natural, "row reads of those"]
    distinct_in_step: Annotated[Natural, "of them, the first of their row in a step"]
    first_ever: Annotated[Count, "of them, the first of their row since the beginning"]


@rules(title="bench/how_far.py energy_by_tier")
class EnergyByTier(Run):
    """Counts of row reads of decode steps. No energies: those are published ranges, multiplied in where a table is
    made."""

    benchmark: Literal["energy_by_tier"]
    configuration: Configuration
    stream: Stream
    records: Annotated[list[StepReads], Must(minItems=1)]


class MapConfiguration(Configuration):
    """What was asked for."""

    tokens_per_step: Natural


class MapRecord(TypedDict):
    """The rows of a table under so many bytes."""

    table: Table
    layout: Annotated[str, one_of("held live", "compacted")]
    table_bytes: Annotated[Natural, "live"]
    bytes_above: Annotated[Count, "between two steps"]
    row_bytes_read: Natural
    pinned: Annotated[Natural, "price of the rows of a table that stays on top"]
    buried: Annotated[Natural, "price of the rows under the bytes above"]
    price_of_a_byte_below: Annotated[Natural, "of one byte at the foot of what is above"]


@rules(title="bench/how_far.py verdict_map")
class VerdictMap(Run):
    """Prices of the rows of decode steps, the table on top throughout and buried. No conclusions."""

    benchmark: Literal["verdict_map"]
    configuration: MapConfiguration
    stream: Stream
    records: Annotated[list[MapRecord], Must(minItems=1)]


class TextsConfiguration(TypedDict):
    """What was asked for."""

    tokens: Annotated[Natural, "that each text is cut to"]
    texts: Annotated[list[Text], Must(minItems=1)]


Prices = TypedDict("Prices", {"held live": Natural, "compacted": Natural})


class HotTier(TypedDict):
    """A tier filled from the first half, read by the second."""

    reads: Natural
    reads_of_tier: Count
    price: Natural
    price_without: Natural


class TextOfTable(TypedDict):
    """What one text costs on one table."""

    reads: Natural
    distinct_rows: Natural
    row_bytes: Natural
    price: Prices
    hot: HotTier
    step_tokens: Natural
    step_reads: Natural
    distinct_in_step: Natural
    step_price_share: Annotated[Amount, "of a decode step's rows, held live, in the price of its weights"]


class BatchOfTable(TypedDict):
    """Row reads of independent texts that share their steps."""

    reads: Natural
    distinct_in_step: Natural
    first_ever: Natural


TextTables = TypedDict("TextTables", {"paper-100b": TextOfTable, "v41-flash": TextOfTable})
BatchTables = TypedDict("BatchTables", {"paper-100b": BatchOfTable, "v41-flash": BatchOfTable})


class Batch(TypedDict):
    """The parts of a text, read as independent ones, a token of each a step."""

    texts: Natural
    steps: Natural
    tables: BatchTables


class TextRecord(TypedDict):
    """One text."""

    text: Text
    kind: Text
    package: Annotated[str, "and version, as its index takes them; empty of ids that are drawn"]
    licence: Annotated[str, "of the text; empty of ids that are drawn"]
    sha256: Annotated[Digest, "of the text, or of the ids that are drawn"]
    all_tokens: NotRequired[Annotated[Natural, "of the text, of at most 1.5 million characters"]]
    all_seen_before: NotRequired[Annotated[SeenBefore, "share of its n-grams that stood in it before"]]
    tokens: Annotated[Natural, "that the rest is of"]
    seen_before: SeenBefore
    shuffled_seen_before: Annotated[SeenBefore, "the same tokens in another order"]
    tables: TextTables
    batch: NotRequired[Batch]


@rules(title="bench/how_far.py other_texts")
class OtherTexts(Run):
    """Counts and prices of texts of several kinds; no part of a text."""

    benchmark: Literal["other_texts"]
    configuration: TextsConfiguration
    records: Annotated[list[TextRecord], Must(minItems=1)]


Results = Annotated[
    LookupRange | EnergyByTier | VerdictMap | OtherTexts,
    Must(title="Results of bench/how_far.py"),
    "Counts and prices, each with its provenance; no conclusions.",
]
