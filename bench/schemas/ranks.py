"""The results file of bench/gpu_wall.py --sharded."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from bench.schemas.common import Device, DeviceEnvironment, Environment, Git
from bench.schemas.generator import Must, NotRequired, one_of, rules
from bench.schemas.values import Amount, Count, Digest, Natural, Positive, Samples, Share, Text


class Received(TypedDict):
    """Bytes that a rank is to receive, as the plan says before anything runs."""

    ids: Count
    rows: Count


class OneRank(TypedDict):
    """What one rank measured: bytes that it received in the last round, over all layers."""

    samples_s: Annotated[Samples, "from the start of a fetch until its rows are there, all ranks begun together"]
    ids: Annotated[Count, "row numbers that others ask it for"]
    rows: Count
    control: Annotated[Count, "notices and counts, which the formula leaves out"]
    formula: Annotated[Received | None, "null where it depends on the tokens"]


class Case(TypedDict):
    """A way to exchange, at a number of tokens."""

    way: Annotated[str, one_of("owners", "unique", "same tokens")]
    tokens: Annotated[Natural, "of each rank"]
    by_rank: Annotated[list[OneRank], Must(minItems=1)]


class Run(TypedDict):
    """So many ranks; runs with other numbers of them stand in the same file."""

    ranks: Natural
    preset: Text
    rows: Annotated[list[Natural], "of each layer's table, all ranks together"]
    row_bytes: Natural
    columns: Annotated[Count, "that each rank owns; 0: it owns a range of rows"]
    backend: Text
    cases: Annotated[list[Case], Must(minItems=1)]


class Exchange(TypedDict):
    """One point of the model on paper: latency, and bytes over bandwidth."""

    link: Text
    phase: Annotated[str, one_of("decode", "prefill")]
    tokens: Annotated[Natural, "of each rank"]
    ranks: Natural
    ids_bytes: Annotated[Amount, "that a rank receives in a step, as the formula says"]
    rows_bytes: Amount
    seconds: Annotated[Amount, "until the rows of the first layer are there"]
    window_s: Annotated[Positive, "in which it would hide"]


class Coupled(TypedDict):
    """Ranks that wait for each other, simulated: seconds a step, means over ranks and steps."""

    link: Text
    ranks: Natural
    jitter: Annotated[Share, "standard deviation of a step's length"]
    slower: Annotated[Share, "one rank is, always"]
    exchange_s: Amount
    step_s: Annotated[Positive, "of the coupled ranks"]
    alone_s: Annotated[Positive, "of the mean rank by itself"]
    slowest_s: Annotated[Positive, "of the slowest by itself"]
    waited_s: Amount
    waited_for_s: Annotated[float, "the part of it spent on ranks that began later"]


class Configuration(TypedDict):
    """What the runs were asked for."""

    seed: int
    rounds: Natural
    table_params: Positive
    # Not in files from before:
    preset: NotRequired[Text]
    steps: NotRequired[list[Text]]
    dtype: NotRequired[Text]


@rules(title="Results of bench/gpu_wall.py --sharded")
class Results(TypedDict):
    """Raw samples and counted bytes of real processes, and the model that they are held against; no conclusions."""

    benchmark: Literal["sharded"]
    device: Device
    # Not in files from before: its name, and of the environment what a device adds.
    device_name: NotRequired[Annotated[Text, "the model, as the driver or the kernel calls it"]]
    environment: Environment | DeviceEnvironment
    git: Git
    code_sha256: Annotated[Digest, "of the sources"]
    configuration: Configuration
    runs: Annotated[list[Run], Must(minItems=1), "by number of ranks"]
    model: list[Exchange]
    schedule: list[Coupled]
