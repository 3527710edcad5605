"""WIN, LOSS, INVALID or INCONCLUSIVE: what end-to-end cases say of the prefetched table, against both baselines.

    classify(cases, "no_engram")        # against no Engram at all, as the paper compares
    classify(cases, "resident")         # against the table in device memory: what offloading costs
    class_lines(case)                   # both, of one case

The hypothesis is that less than 3 % of the throughput is lost. Against no Engram that holds the layer's own compute and
its lookup as well; against the resident table only what prefetching could not hide.
"""

from __future__ import annotations

from bench.harness.end_to_end_numbers import BASELINES, Json, against, noise_floor, offloaded, same_tokens
from bench.harness.verdict import WALL_TIME_CLAIM
from bench.harness.wall_numbers import NotMeasured

_PHASE = "together"
NO_CLASS = "no class, a CPU has no bus between table and compute"


def classify(cases: list[Json], baseline: str) -> tuple[str, str]:
    """The class against a baseline, and why.

    Args:
        cases: at least one, of CUDA machines.
        baseline: of BASELINES.
    """
    if not all(same_tokens(case) for case in cases):
        return "INVALID", "variants chose different tokens, so their times are not of the same computation"
    try:
        found = [against(case, offloaded(case), baseline, _PHASE) for case in cases]
        noise = [noise_floor(case, _PHASE, baseline)["high"] - 1 for case in cases]
    except NotMeasured as why:
        return "INCONCLUSIVE", str(why)
    if all(max(part.high, least) < WALL_TIME_CLAIM for part, least in zip(found, noise)):
        return "WIN", f"in all {len(found)} cases, less than 3 % is lost, to the end of the interval"
    if any(part.resolved and part.low > WALL_TIME_CLAIM for part in found):
        return "LOSS", "in at least one case, more than 3 % is lost, from the beginning of the interval"
    return "INCONCLUSIVE", "the intervals reach across 3 %"


def class_of(case: Json, baseline: str) -> str:
    """Class and reason of one case; a CPU has none, for it has no bus between table and compute."""
    return NO_CLASS if case["device"] == "cpu" else ", ".join(classify([case], baseline))


def class_lines(case: Json) -> list[str]:
    """A line for each baseline."""
    return [f"against {whose}: {class_of(case, baseline)}" for baseline, whose in BASELINES.items()]
