"""What the samples of a wall-time results file mean: overhead, noise floor, hidden share, distance from the limit.

A results file holds measurements and no conclusions; tables, figures and documents take theirs from here:

    step = results["steps"][0]
    run = run_of(step, "offload_prefetch")
    overhead(step, run).median, hidden_share(step, run), floor_ratio(step, run), bytes_agree(run)

A number that a run does not carry raises `NotMeasured`, whose text is the reason.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.instruments import timing
from bench.instruments.timing import NotMeasured, Overhead, paired_ratio

Step = dict[str, Any]
Run = dict[str, Any]
ALONE = ("synchronous", "in place")  # schedules in which nothing overlaps with the fetch
_HOST_PLACEMENTS = ("offload_naive", "offload_prefetch", "offload_uva", "offload_hot")


def run_of(
    step: Step, variant: str, schedule: str | None = None, page_cache: str | None = None, repeat: int = 0
) -> Run:
    """The first run of these names; None as `schedule` or `page_cache` means any.

    Raises:
        NotMeasured: there is none.
    """
    for run in step["runs"]:
        if (
            (run["variant"], run["repeat"]) == (variant, repeat)
            and schedule in (None, run["schedule"])
            and page_cache in (None, run["page_cache"])
        ):
            return run
    names = ", ".join(name for name in (schedule, page_cache, "again" if repeat else None) if name)
    raise NotMeasured(f"{variant}{f' ({names})' if names else ''} was not measured")


def noise_floor(step: Step) -> dict[str, float]:
    """Paired ratio (median, low, high) of `resident` against itself, run for run in the same rounds.

    Raises:
        NotMeasured: `resident` was not measured twice.
    """
    again = run_of(step, "resident", repeat=1)
    return paired_ratio(again["step_s"], run_of(step, "resident")["step_s"])


def overhead(step: Step, run: Run) -> Overhead:
    """Step time against `resident`, round by round.

    Raises:
        NotMeasured: there is no `resident` run.
    """
    # Paired: index i of every run of a step was measured in the same round.
    ratio = paired_ratio(run["step_s"], run_of(step, "resident")["step_s"])
    return timing.overhead(ratio, lambda: noise_floor(step), len(run["step_s"]))


def exposed(run: Run) -> float:
    """Median seconds for which compute waited for rows.

    Raises:
        NotMeasured: the wait was not timed.
    """
    if not run["exposed_s"]:
        reads = run["bytes"]["from_ids"]
        raise NotMeasured("the wait was not timed" if reads else "no rows are fetched")
    return statistics.median(run["exposed_s"])


def synchronous_run(step: Step, run: Run) -> Run:
    """The run that fetches the same rows from the same place and page cache with nothing beside it.

    Rows that are gathered where they lie are such a run; `offload_naive` is that of
    `offload_prefetch`.

    Raises:
        NotMeasured: there is none.
    """
    variant = "offload_naive" if run["variant"] == "offload_prefetch" else run["variant"]
    for other in step["runs"]:
        if (other["variant"], other["page_cache"]) == (variant, run["page_cache"]) and other["schedule"] in ALONE:
            return other
    raise NotMeasured(f"{variant} was not fetched alone")


def hidden_share(step: Step, run: Run) -> float:
    """1 - exposed / exposed of the synchronous run: 1 when compute never waits, negative when it waits longer.

    The synchronous run is that of the same placement and page cache; where a host placement (`offload_uva`,
    `offload_hot`) has none of its own, `offload_naive`. The median over rounds, each taken within itself.

    Raises:
        NotMeasured: no such run, or no wait was timed in one of the two.
    """
    exposed(run)
    reference = _hidden_against(step, run)
    if exposed(reference) == 0 or min(reference["exposed_s"]) == 0:  # each round is divided by its own wait
        raise NotMeasured("the synchronous run did not wait in every round")
    return 1 - paired_ratio(run["exposed_s"], reference["exposed_s"])["median"]


def _hidden_against(step: Step, run: Run) -> Run:
    try:
        return synchronous_run(step, run)
    except NotMeasured:
        if run["variant"] in _HOST_PLACEMENTS:  # the share then also holds what the placement saves
            return run_of(step, "offload_naive", "synchronous")
        raise


def floor_ratio(step: Step, run: Run) -> float:
    """Median time of the fetch alone over its floor `limit_s`; below 1 it was faster than the limit allows.

    The fetch alone is the wait of the synchronous run of the same placement, in which nothing overlaps.

    Raises:
        NotMeasured: the run has no floor, or its fetch was not timed alone.
    """
    limit = floor(run)
    return exposed(synchronous_run(step, run)) / limit


def floor(run: Run) -> float:
    """Seconds that the fetch alone takes at least.

    Raises:
        NotMeasured: none is known.
    """
    if run["limit_s"] is None:
        raise NotMeasured(run["limit_why"])
    return run["limit_s"]


def predicted_floor(step: Step, copy_bytes_per_s: float) -> float:
    """Seconds that the deduplicated rows of one step take at the measured copy bandwidth."""
    return step["prediction"]["bytes_unique"] / copy_bytes_per_s


def fetch_rates(run: Run) -> list[float]:
    """Unique bytes per second of a fetch alone: the deduplicated bytes of a median step over each sample.

    Raises:
        NotMeasured: the fetch is not alone, or has no wait to divide by.
    """
    if run["schedule"] not in ALONE:
        raise NotMeasured("its fetch overlaps with other work")
    if exposed(run) == 0 or min(run["exposed_s"]) == 0:
        raise NotMeasured("there were rounds without a wait")
    nbytes = median_bytes(run, "from_ids")
    return [nbytes / seconds for seconds in run["exposed_s"]]


def median_bytes(run: Run, source: str) -> float:
    """Bytes of a median step: `from_ids` (deduplicated), `copied` (explicit copies or reads) or `counter`.

    Raises:
        NotMeasured: nothing was read or copied, or no counter saw it.
    """
    counts = run["bytes"][source]
    if counts:
        return statistics.median(counts)
    if counts is None:
        raise NotMeasured("no counter sees this traffic" if source == "counter" else "nothing is copied explicitly")
    raise NotMeasured("no rows are fetched")


def over_control(step: Step, run: Run) -> float:
    """Bytes that the driver counted on the bus in a step, less those of the backbone by itself.

    Raises:
        NotMeasured: one of the two was not counted, or by another counter.
    """
    control = run_of(step, "no_engram")
    if run["bytes"]["counter_what"] != control["bytes"]["counter_what"]:
        raise NotMeasured("the backbone by itself was not counted, or by another counter")
    return median_bytes(run, "counter") - median_bytes(control, "counter")


def bytes_agree(run: Run) -> bool | None:
    """Whether every step copied or read exactly the bytes that were predicted; None where nothing was."""
    predicted = run["bytes"]["predicted"]
    return None if predicted is None else run["bytes"]["copied"] == predicted


def rows_agree(step: Step) -> bool:
    """Whether all runs that fetched the rows of the fixed batch got the same bits."""
    return len({run["rows_sha256"] for run in step["runs"] if run["rows_sha256"]}) <= 1
