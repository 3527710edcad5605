"""The results file of bench/lookup_speed.py."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from bench.schemas.common import DeviceProvenance, Layout, Limits, Table
from bench.schemas.generator import Must, NotRequired, one_of, rules
from bench.schemas.values import Amount, Amounts, Count, Counts, Natural, Text


class LaidTable(Table):
    """The table that was looked up."""

    layout: Layout


class Skipped(TypedDict):
    """A placement that this machine cannot serve."""

    way: Text
    why: Text


class Asked(TypedDict):
    """Of host memory by the loads of one sample, the mean over all of them; what two loads ask for counts twice."""

    lines: Annotated[Amount, "aligned stretches of 128 B: a request of a warp each"]
    sectors: Annotated[Amount, "aligned stretches of 32 B"]


class Case(TypedDict):
    """A number of tokens."""

    tokens: Annotated[Natural, "of a step, one of each sequence"]
    rows: Annotated[Count, "asked for"]
    bytes: Annotated[Count, "of these rows"]
    samples_s: Annotated[
        dict[str, Amounts],
        Must(minProperties=1),
        "by way, in the order of the rounds; resident again is the noise floor",
    ]
    launched_late: Annotated[Counts, "samples of a way that the device began before all was launched"]
    asked: NotRequired[Annotated[dict[str, Asked], "by way to read rows in place, from their addresses"]]
    parts_s: NotRequired[
        Annotated[
            dict[str, Amounts],
            "of a staged fetch, by the host's clock: hash, start (check, gather, submit the copy), join, all three as "
            "whole, what the device takes after that, arrive, and another fetch that a thread does, handed over",
        ]
    ]
    gather_s: NotRequired[
        Annotated[dict[str, Amounts], "by threads that share it: these rows into staging memory, by the host's clock"]
    ]
    disturbed: NotRequired[
        Annotated[
            dict[str, Amount],
            "while all of this was measured: seconds that the host of a virtual machine took from its processors, how "
            "often the process was switched away, pages that it touched for the first time",
        ]
    ]


class Head(DeviceProvenance):
    """All that is known when the file is not yet written."""

    schema_version: Literal[1]
    benchmark: Literal["lookup_speed"]
    started: Annotated[Text, "UTC, ISO 8601"]
    limits: Limits
    clock: Annotated[str, one_of("device events", "host clock")]
    stream: Annotated[Literal["uniform"], "random token ids, other ones in every sample of every way"]
    table: LaidTable
    ways: Annotated[dict[str, Text], Must(minProperties=1), "what was timed, by its name"]
    skipped: Annotated[list[Skipped], "placements that this machine cannot serve"]
    cases: list[Case]


@rules(title="Results of bench/lookup_speed.py")
class Results(Head):
    """Raw samples and their provenance; no conclusions. Times are seconds, sizes bytes, rates per second. The file is
    complete after each number of tokens."""

    finished: Annotated[Text, "of the last case that is there"]
