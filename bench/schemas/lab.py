"""The results file of the exported experiment (`bench/lab/run.py`), run with the original tracer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from bench.schemas.generator import Must, one_of, rules
from bench.schemas.values import Amount, Count, Counts, Digest, Natural, Positive, Samples, Share, Text


class Machine(TypedDict):
    """Where it ran."""

    python: Text
    platform: Text
    cpu: str


class Record(TypedDict):
    """One variant of one configuration."""

    boundary: Annotated[str, one_of("lookup", "attention")]
    variant: Annotated[str, one_of("resident", "offload_naive", "offload_prefetch")]
    seed: Count
    padding: Count
    offloaded_share: Annotated[Share, "of the bank's rows"]
    cost: Annotated[Natural, "ByteDMD price"]
    cost_per_token: Positive
    geometric_lower_bound: Annotated[Positive, "0.3849 times the price"]
    reads: Natural
    reads_by_depth: Annotated[Counts, "b -> reads at a depth of 2^b .. 2^(b+1) - 1"]
    output_sha256: Digest
    traced_s: Amount
    wall_time_s: Annotated[Samples, "of the untraced function"]


class NotServed(TypedDict):
    """A padding that the tracer cannot serve."""

    padding: Natural
    estimated_s: Annotated[Positive, "of one trace, at squared growth"]


@rules(title="Results of bench/lab/run.py")
class Results(TypedDict):
    """Raw numbers of the experiment in the asking lab's form; no conclusions. Times are seconds."""

    schema_version: Literal[1]
    benchmark: Literal["engram-offload"]
    configuration: dict[str, Any]
    environment: Machine
    git_commit: str | None
    tracer_sha256: Annotated[Digest, "of the source of the tracer that priced"]
    records: Annotated[list[Record], Must(minItems=1)]
    not_served: list[NotServed]
