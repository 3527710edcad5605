"""One program priced: its reads by depth and by kind of value, and what it returned."""

from __future__ import annotations

import hashlib
import importlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.schemas.toy import Priced
from engram_toy.bytedmd import Trace, trace
from engram_toy.models.layouts import Layout
from engram_toy.models.programs import Program, Workload, build
from engram_toy.tracer.stack import read_price


@dataclass(frozen=True)
class Job:
    """What to price: one model in one layout up to one boundary."""

    workload: Workload
    boundary: str
    layout: Layout
    padding: int
    definition: str = "lru"
    bytes_per_element: int = 1
    tracer: str = "own"

    def program(self) -> Program:
        """The program; its padding is held live by returning it, where the definition needs that."""
        # The other definitions bury by position alone, and charge what is returned.
        return build(self.workload, self.boundary, self.layout, self.padding, hold=self.definition == "lru")


def price_job(job: Job) -> Priced:
    """Trace a job once; the record of it that goes into a results file, integers and digests only."""
    program = job.program()
    run = trace(program.function, program.arguments, program.kinds, job.definition)
    if job.tracer == "upstream":
        check_against_upstream(job, run)
    by_kind = run.tally()
    costs = {kind: price_of(counts, job.bytes_per_element) for kind, counts in by_kind.items()}
    return {
        "model": job.workload.model,
        "boundary": job.boundary,
        "variant": job.layout.name,
        "cost": sum(costs.values()),
        "cost_by_kind": costs,
        "reads": len(run.depths),
        "reads_by_kind": {kind: sum(counts.values()) for kind, counts in by_kind.items()},
        "depth_histogram": {kind: _histogram(counts) for kind, counts in by_kind.items()},
        "instructions": run.instructions,
        "escapes": dict(sorted(run.escapes.items())),
        "untracked_outputs": run.untracked,
        "output_sha256": output_digest(run.result),
        "trace_sha256": hashlib.sha256(run.depths.tobytes()).hexdigest(),
    }


def output_digest(result: tuple[Any, ...]) -> str:
    """sha256 of the bits of a program's output: its first part, without the padding."""
    values = array("d")
    waiting = [result[0]]  # the padding behind it differs between layouts
    while waiting:
        item = waiting.pop()
        if isinstance(item, (list, tuple)):
            # Last in, first out: the first part is to come next.
            waiting.extend(reversed(item))
        else:
            values.append(item)
    return hashlib.sha256(values.tobytes()).hexdigest()


def check_against_upstream(job: Job, run: Trace) -> None:
    """Let the original tracer read the same program; any other depth than ours is an error.

    Raises:
        ValueError: the original is not installed, or it gives another trace.
    """
    original = upstream()
    program = job.program()
    depths, _ = original.traced_eval(program.function, program.arguments)
    if list(depths) != run.depths.tolist():
        first = next(
            (i for i, (a, b) in enumerate(zip(depths, run.depths)) if a != b), min(len(depths), len(run.depths))
        )
        raise ValueError(
            f"the installed bytedmd disagrees from read {first} of {job.workload.model}/{job.boundary}/"
            f"{job.layout.name}: it follows another definition than branch main of 2026-04-13"
        )


def upstream() -> Any:
    """The original ByteDMD module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("bytedmd")
    except ImportError:
        raise ValueError("the original tracer is not installed: pip install '.[upstream]'") from None


def price_of(counts: Mapping[int, int], bytes_per_element: int) -> int:
    """Price of reads, by depth -> how many."""
    return sum(reads * read_price(depth, bytes_per_element) for depth, reads in counts.items())


def _histogram(counts: Counter[int]) -> dict[str, int]:
    """Reads per power of two: bin b counts depths 2^b .. 2^(b+1) - 1."""
    bins: Counter[int] = Counter()
    for depth, reads in counts.items():
        bins[depth.bit_length() - 1] += reads
    return {str(b): bins[b] for b in sorted(bins)}
