"""A measured variant as an entry of the results file: samples, bytes from three sides, the floor, what it held."""

from __future__ import annotations

from typing import Any

from bench.instruments.board import Beside
from bench.schemas.wall import Hot, Run, StepBytes
from bench.setup.variants import CONTROL, Variant
from bench.wall.step import IO_COUNTER, Samples, file_behind
from bench.wall.timeline import Span
from engram_ref.tables.hot import HotTable

NVML_COUNTER = "NVML PCIe receive"


def run_record(
    variant: Variant,
    samples: Samples,
    step: dict[str, Any],
    limits: dict[str, Any],
    digest: str,
    beside: Beside,
    spans: list[Span],
) -> Run:
    """One entry of a step's `runs`.

    Args:
        step: the entry that this run belongs to, for its prediction and table.
        limits: the bandwidths measured in this run.
        digest: of the rows of the fixed batch, which every variant has been checked to return.
        beside: bus traffic and energy.
        spans: of one step.
    """
    rows = variant.name != CONTROL
    limit, why = _limit(variant, step, limits)
    held, table = variant.bytes_held(), step["table"]
    return {
        "variant": variant.name,
        "schedule": variant.schedule,
        "page_cache": variant.page_cache,
        "repeat": variant.repeat,
        "table": {
            "preset": table["preset"],
            "share": table["rows"] / table["published_rows"],
            "row_dtype": table["row_dtype"],
            "layout": table["layout"],
        },
        "step_s": samples.step_s,
        "exposed_s": samples.exposed_s if rows else [],
        "limit_s": limit,
        "limit_why": why,
        "bytes": _bytes(variant, samples, beside),
        "pcie": beside.traffic,
        "held": held,
        "freed": step["table"]["bytes"] - held["device"] if rows else None,
        "hot": _hot(variant),
        "energy": beside.energy.value,
        "energy_why": beside.energy.why or "",
        "spans": [list(span) for span in spans],
        "rows_sha256": digest if rows else None,
    }


def _bytes(variant: Variant, samples: Samples, beside: Beside) -> StepBytes:
    """From three sides; of the control what crosses the bus without any rows, to be taken off what others receive."""
    counted = samples.counter or beside.received or None
    what = IO_COUNTER if samples.counter else NVML_COUNTER if beside.received else None
    in_place = variant.name in ("resident", "offload_uva")  # nothing is copied
    return {
        "from_ids": samples.from_ids if variant.table else [],
        "copied": None if in_place else samples.copied if variant.table else [],
        "counter": counted,
        "counter_what": what,
        "predicted": samples.predicted or None,
        "predicted_counter": samples.predicted_counter or None,
    }


def _limit(variant: Variant, step: dict[str, Any], limits: dict[str, Any]) -> tuple[float | None, str]:
    """Seconds that a fetch takes at least, and what that is derived from."""
    unique, requested = step["prediction"]["bytes_unique"], step["prediction"]["bytes_requested"]
    copy = limits["copy"]["bytes_per_s"]
    if variant.name == CONTROL:
        return None, "no rows are fetched"
    if variant.name == "resident":
        rate = (limits["gather"] or limits["copy"])["bytes_per_s"]
        return requested / rate, "bytes requested / copy bandwidth of the memory they lie in"
    if file_behind(variant) is not None and variant.page_cache == "cold":
        reads = limits["disk"]["reads_per_s"]
        if reads is None:
            return None, f"the disk's limit is unknown: {limits['disk']['why']}"
        return step["prediction"]["disk_reads"] / reads, "runs of touching pages / random reads per second"
    if isinstance(variant.table, HotTable):
        misses = 1 - variant.table.report().hit_rate
        return misses * unique / copy, "bytes of unique rows that are not on the device / copy bandwidth"
    return unique / copy, "bytes of unique rows / copy bandwidth"


def _hot(variant: Variant) -> Hot | None:
    if not isinstance(variant.table, HotTable):
        return None
    report = variant.table.report()
    return {"hit_rate": report.hit_rate, "used_share": report.used_share, "hot_rows": variant.table.hot_rows}
