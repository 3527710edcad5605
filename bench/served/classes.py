"""Whether under 3 % is lost: a class for each place of the table, each baseline and each phase of a pass.

    label, reason = classify(cases, "offload_uva", "resident", "decode")
    table = losses(case)                     # all of one case, as text cells

WIN: in every case the interval of what is lost, and the noise, end below 3 %. LOSS: in one the interval begins above
it. INVALID: variants chose different tokens. INCONCLUSIVE: anything else. A CPU has no class.
"""

from __future__ import annotations

import statistics
from functools import partial

from bench.instruments.claim import WALL_TIME_CLAIM
from bench.instruments.timing import LEAST_SAMPLES, NotMeasured, unless_missing
from bench.served.numbers import (
    BASELINES,
    NO_LOOKUP,
    Json,
    against,
    noise_floor,
    paired,
    row_of,
    same_tokens,
)

# The paper's figure is of whole passes, prompts included; a decode step is where a fetch has least time to hide.
JUDGED = {"decode": "decode steps", "together": "whole pass"}  # phase -> as a reader knows it
NO_CLASS = "no class: a CPU has no bus between table and compute"


def offloaded_labels(case: Json) -> list[str]:
    """Labels of the tables that are not where the compute is, each by the bus that the machine has."""
    return [
        row["label"]
        for row in case["rows"]
        if row["rounds"] and not row["bus"] and row["variant"] not in (*NO_LOOKUP, "resident")
    ]


def classify(cases: list[Json], label: str, baseline: str, phase: str) -> tuple[str, str]:
    """The class of a place over all cases that have it, and why.

    Args:
        cases: of CUDA machines.
        label: of the rows.
        baseline: of BASELINES.
        phase: of JUDGED.
    """
    with_it = [case for case in cases if label in offloaded_labels(case)]
    if not with_it:
        return "INCONCLUSIVE", "not measured"
    if not all(same_tokens(case) for case in with_it):
        return "INVALID", "variants chose different tokens, so their times are not of the same computation"
    try:
        found = [against(case, row_of(case, label), baseline, phase) for case in with_it]
        noise = [noise_floor(case, phase, baseline)["high"] - 1 for case in with_it]
    except NotMeasured as why:
        return "INCONCLUSIVE", str(why)
    few = min(len(paired([row_of(case, label), row_of(case, baseline)], phase)[0]) for case in with_it)
    if few < LEAST_SAMPLES:  # they have a narrow interval by chance
        return "INCONCLUSIVE", f"{few} rounds: a class needs {LEAST_SAMPLES}"
    count = f"in all {len(found)} cases" if len(found) > 1 else "in the one case"
    if all(max(part.high, least) < WALL_TIME_CLAIM for part, least in zip(found, noise)):
        return "WIN", f"{count}, less than 3 % is lost, to the end of the interval"
    if any(part.resolved and part.low > WALL_TIME_CLAIM for part in found):
        return "LOSS", "in at least one case, more than 3 % is lost, from the beginning of the interval"
    return "INCONCLUSIVE", "the intervals reach across 3 %"


def loss(case: Json, label: str, baseline: str, phase: str) -> str:
    """What a row loses, with its class where it has one; a dash where it cannot be known."""
    if label == baseline:
        return "baseline"
    try:
        text = str(against(case, row_of(case, label), baseline, phase))
    except NotMeasured:
        return "-"
    if case["device"] == "cpu" or label not in offloaded_labels(case):
        return text
    return f"{text} {classify([case], label, baseline, phase)[0]}"


def added_each(case: Json, label: str) -> list[float]:
    """Seconds that a row adds to the mean decode step without Engram, of each round that both have.

    Raises:
        NotMeasured: a row is missing.
    """
    # By the steps of each round: sequences differ in length, so that rounds do.
    later, earlier = paired([row_of(case, label), row_of(case, "no_engram")], "step")
    return [a - b for a, b in zip(later, earlier)]


def added_s(case: Json, label: str) -> float:
    """The median of `added_each`."""
    return statistics.median(added_each(case, label))


def losses(case: Json) -> list[list[str]]:
    """Two lines of heads and one for each row: what it adds to a decode step, and what is lost of each baseline."""
    columns = [(phase, baseline) for phase in JUDGED for baseline in BASELINES]
    heads = [
        ["lost, %", "decode", *(JUDGED[phase] for phase, _ in columns)],
        ["", "us added", *(f"of {baseline}" for _, baseline in columns)],
    ]
    lines = []
    for row in case["rows"]:
        if row["rounds"] and not row["bus"]:
            cells = [loss(case, row["label"], baseline, phase) for phase, baseline in columns]
            added = unless_missing(partial(added_s, case, row["label"]), None)
            us = "-" if added is None else f"{1e6 * added:+.0f}"
            lines.append([row["label"], "" if row["label"] == "no_engram" else us, *cells])
    return [*heads, *lines]
