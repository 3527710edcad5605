"""The results file of bench/row_definitions.py."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from bench.schemas.common import Provenance
from bench.schemas.generator import Must, one_of, rules
from bench.schemas.values import Amount, Count, Digest, Natural


class Record(TypedDict):
    """One stream under one definition, at one place."""

    table: Annotated[str, one_of("paper-27b", "paper-40b", "v41-flash"), "a preset"]
    tokens: Natural
    reads: Natural
    distinct_rows: Natural
    layout: Annotated[str, one_of("held live", "compacted")]
    definition: Annotated[
        str,
        one_of("lru", "classic", "live", "stationary", "opt", "kept copies", "floor"),
        "of depth; or what a memory costs that copies up once what is read again; or the bound under all managers",
    ]
    padding_bytes: Annotated[Count, "above the table, live, never read"]
    price: Annotated[Natural, "of the floor, the lower number, which is a bound"]
    price_at_most: Annotated[Natural, "of the floor, the upper number; else the same"]
    seconds: Amount


@rules(title="Results of bench/row_definitions.py")
class Results(Provenance):
    """Prices of row reads under every definition; the same on every machine, but for the seconds. No conclusions."""

    schema_version: Literal[1]
    benchmark: Literal["row_definitions"]
    code_sha256: Digest
    records: Annotated[list[Record], Must(minItems=1)]
