"""A step in the results file, round by round, and its variants: samples, bytes from three sides, floor, what is held.

record = StepRecord(results, described, variants, limits, digest, save)    # new, or as far as an earlier run came
steps.measure(stepper, variants, record.samples, ..., record.keep)         # whole rounds are on disk
record.finish(besides)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.instruments.board import Beside
from bench.instruments.driver import Answer
from bench.schemas.common import CONTROL
from bench.schemas.wall import Hot, Run, StepBytes
from bench.setup.variants import Variant
from bench.wall.step import IO_COUNTER, Samples, file_behind
from bench.wall.timeline import Span
from engram_ref.tables.hot import HotTable

NVML_COUNTER = "NVML PCIe receive"
SAVED_EVERY = 1.0  # seconds
_CUT = Beside(None, Answer(None, "the run was cut before it was asked"))
_KEYS = ("shape", "table")  # tell the steps of a results file apart


class StepRecord:
    """One step of a results file, which holds its whole rounds while it is measured.

    Args:
        results: the file's content; the last of its processes is the running process.
        described: the step without its runs. Where an earlier run has left rounds of it, they are gone on with.
        variants: in the order of the runs.
        limits: the bandwidths measured in this run.
        digest: of the rows of the fixed batch.
        save: writes the file.

    Attributes:
        content: as it is written.
        samples: by label, as far as they are measured.
    """

    def __init__(
        self,
        results: dict[str, Any],
        described: dict[str, Any],
        variants: Sequence[Variant],
        limits: dict[str, Any],
        digest: str,
        save: Callable[[], None],
    ) -> None:
        self._steps, self._process = results["steps"], len(results["processes"]) - 1
        same = (s for s in self._steps if all(s[key] == described[key] for key in _KEYS))
        left: dict[str, Any] = next(same, {})
        begun = {"finished": False, "process_of_round": left.get("process_of_round", []), "runs": left.get("runs")}
        self.content = {**described, **begun}
        if left:
            self._steps[self._steps.index(left)] = self.content  # steps stay in their order
        runs = self.content["runs"] or [None] * len(variants)
        self.samples = {v.label: Samples() if run is None else samples_of(run) for v, run in zip(variants, runs)}
        self._variants, self._limits, self._digest, self._save = variants, limits, digest, save
        self._saved = time.monotonic()

    def keep(self) -> None:
        """A round is whole. A cut loses the round that runs, and at most a second of rounds before it."""
        # A round may take less than writing the file does.
        self.content["process_of_round"].append(self._process)
        if time.monotonic() - self._saved >= SAVED_EVERY:
            # What is counted beside comes when all is measured; a cut run has none of it.
            self._write({variant.label: _CUT for variant in self._variants})

    def finish(self, besides: Mapping[str, Beside]) -> None:
        """All is measured, and counted beside, by label."""
        self.content["finished"] = True
        self._write(besides)

    def _write(self, besides: Mapping[str, Beside]) -> None:
        self.content["runs"] = [
            run_record(v, self.samples[v.label], self.content, self._limits, self._digest, besides[v.label], [])
            for v in self._variants
        ]
        if not any(step is self.content for step in self._steps):
            self._steps.append(self.content)
        self._save()
        self._saved = time.monotonic()


def samples_of(run: Run) -> Samples:
    """What a run that was cut has measured; what a driver counted is none of it."""
    nbytes = run["bytes"]
    return Samples(
        run["step_s"], run["exposed_s"], nbytes["from_ids"], nbytes["copied"] or [],
        nbytes["predicted"] or [], nbytes["counter"] or [], nbytes["predicted_counter"] or [],
    )  # fmt: skip


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
    # The system counts reads of a file in every step; the driver counts the bus over steps that are not timed.
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
    # Whatever is fetched twice need not be: a floor counts a row once.
    return unique / copy, "bytes of unique rows / copy bandwidth"


def _hot(variant: Variant) -> Hot | None:
    if not isinstance(variant.table, HotTable):
        return None
    report = variant.table.report()
    return {"hit_rate": report.hit_rate, "used_share": report.used_share, "hot_rows": variant.table.hot_rows}
