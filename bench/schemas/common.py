"""Records that several results files share: machine, code, bandwidths, tables, and what a driver may not say."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from bench.schemas.generator import NotRequired, one_of, rules
from bench.schemas.values import Amount, Amounts, Count, Counts, Digest, Natural, Positive, Samples, Share, Text

CONTROL = "no_engram"  # the backbone by itself
PLACEMENTS = ("resident", "offload_naive", "offload_prefetch", "offload_uva", "offload_hot", "offload_disk")
Device = Annotated[str, one_of("cpu", "cuda")]
Layout = Annotated[
    str,
    one_of("plain", "packed", "split"),
    "packed: codes and scales of an fp8 row side by side; split: apart; plain: rows without scales",
]
# Of a record with `value` and `why`: a value that is not there has a reason.
VALUE_OR_WHY = [
    {"properties": {"value": {"not": {"type": "null"}}}},
    {"properties": {"why": {"type": "string", "minLength": 1}}},
]


class Git(TypedDict):
    """The code that ran."""

    commit: str | None
    dirty: Annotated[bool | None, "whether it had changes since; null: unknown"]


class MeasuringProcess(TypedDict):
    """One process that wrote into the file."""

    started: Annotated[Text, "UTC, ISO 8601"]
    kept: Annotated[Count, "passes of whole rounds that were there already"]
    dropped: Annotated[Count, "passes of unfinished rounds, which were measured again"]


class Environment(TypedDict):
    """The machine and the software."""

    python: Text
    implementation: Text
    platform: str
    cpu: str
    cpu_count: int | None
    memory_bytes: int | None
    packages: dict[str, str | None]


class Accelerator(TypedDict):
    """What the driver says of the GPU while it is busy."""

    name: Text
    driver: str | None
    cuda: str | None
    torch: str
    memory_bytes: Count
    pcie_generation: int | None
    pcie_width: int | None
    clocks_mhz: Counts | None
    power_limit_w: float | None
    numa_node: int | None
    unknown: Annotated[dict[str, Text], "why an entry is null"]


class DeviceEnvironment(Environment):
    """The machine, its accelerator and the software."""

    accelerator: Accelerator | None
    page_size: Natural


class Provenance(TypedDict):
    """Where it was found, and by which code."""

    environment: Environment
    git: Git


class Origin(Provenance):
    """How every results file begins: whose it is, and where it was found."""

    benchmark: Any


class DeviceProvenance(TypedDict):
    """What a run of a device must share with an earlier one, to go on with it; and where it was found."""

    device: Device
    device_name: Annotated[Text, "the model, as the driver or the kernel calls it"]
    configuration: Annotated[dict[str, Any], "Every option that a time depends on, defaults included."]
    code_sha256: Annotated[Digest, "of the sources"]
    environment: DeviceEnvironment
    git: Git


class DeviceOrigin(DeviceProvenance):
    """How results of a device begin."""

    benchmark: Any


class Bandwidth(TypedDict):
    """Copies of one kind, and bytes per second of the median one."""

    bytes_per_s: Positive
    samples_s: Samples
    bytes: Annotated[Count, "moved in one sample"]
    what: Text
    counted: NotRequired[Annotated[Text, "which bytes, where that is not plain"]]


class Limits(TypedDict):
    """What this machine can do at most, measured in the same run."""

    copy: Bandwidth
    gather: Annotated[Bandwidth | None, "within the device; null on a CPU"]


class Held(TypedDict):
    """Bytes of the table by place, staging not counted."""

    device: Count
    host: Count
    disk: Count


class Table(TypedDict):
    """The table that was looked up."""

    preset: Text
    parameters: Count
    rows: Count
    row_bytes: Count
    columns: Count
    bytes: Count
    row_dtype: Text
    huge_pages: Annotated[Share, "share of it that lies on huge pages"]


class Rate(TypedDict):
    """The driver's samples of what crosses the link."""

    bytes_per_s: Annotated[Amount, "mean of the samples"]
    samples_bytes_per_s: Amounts
    seconds: Amount


class Fallback(TypedDict):
    """Sampled in place of a counter: bytes per second."""

    what: Text
    value: Rate | None
    why: str | None


@rules(anyOf=VALUE_OR_WHY)
class Traffic(TypedDict):
    """Bytes that the GPU received over PCIe, over passes or steps that were not timed."""

    value: Annotated[Count | None, "of one, by the driver's counter"]
    why: str | None
    passes: Annotated[Count, "how many were counted; 0 where nothing could be read"]
    seconds: Amount
    row_bytes: Annotated[Count, "of the rows that these asked for"]
    fallback: Fallback | None
    first: NotRequired[Annotated[Count, "as `value`, counted before, where it was far more than was asked for"]]
