"""What happened when in one step: spans of hash, gather, copy, compute and wait, for the timeline figure.

Host stages are told by the prefetcher. On a CPU the rest follows from the marks of the step; on CUDA, copies and
kernels come from the same step under `torch.profiler`.
"""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.instruments.clocks import Lap
from bench.setup.variants import Variant
from bench.wall.step import Stepper

Span = tuple[str, str, float, float]  # what, lane, begin and end in seconds
_STEP = "engram_step"
_FETCHES = ("gather", "indexselect", "dequantise")  # in the names of kernels that fetch rows, decoding included


class SpanLog:
    """A prefetcher's observer that remembers what it is told."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __call__(self, stage: str, layer_id: int, begin: float, end: float) -> None:
        """Remember one stage, and the lane of the thread that ran it."""
        # Called from whichever thread the stage ran in.
        lane = "main" if threading.current_thread() is threading.main_thread() else "background"
        self.spans.append((stage, lane, begin, end))


def trace_step(stepper: Stepper, variant: Variant, log: SpanLog, chrome: Path | None = None) -> list[Span]:
    """Spans of one more step, which begins at 0.

    Args:
        log: the observer of the variant's prefetcher.
        chrome: write the profiler's trace there, for chrome://tracing or Perfetto.
    """
    cuda = stepper.tables.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]
    profile = torch.profiler.profile(activities=activities) if cuda or chrome is not None else None
    log.spans.clear()  # it has heard of every step so far
    with profile or nullcontext(), torch.profiler.record_function(_STEP):
        entered = time.perf_counter()  # when the profiler's range begins: what both clocks have in common
        laps = stepper.run(variant, None)  # ends synchronised
    if profile is not None and chrome is not None:
        chrome.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(chrome))
    host = [(what, lane, begin - stepper.began, end - stepper.began) for what, lane, begin, end in log.spans]
    return host + (_device_spans(profile, stepper.began - entered) if cuda else _compute_spans(laps))


def _compute_spans(laps: list[Lap]) -> list[Span]:
    """On a CPU, what is not waiting is computing."""
    ends = itertools.accumulate(seconds for _, seconds in laps)
    return [("compute", "main", end - lap, end) for (name, lap), end in zip(laps, ends) if name != "joined"]


def _device_spans(profile: Any, began: float) -> list[Span]:
    """Kernels and copies of the step; `began` is when its clock started, in seconds after it was entered."""
    events = profile.events()
    cuda = torch.autograd.DeviceType.CUDA
    # The host's: the device lists the range a second time.
    entered = next(e.time_range.start for e in events if e.name == _STEP and e.device_type != cuda)  # microseconds
    spans = []
    for event in events:
        if event.device_type != cuda or event.name == _STEP:
            continue
        name = event.name.lower()
        what = "copy" if "memcpy" in name else "gather" if any(word in name for word in _FETCHES) else "compute"
        begin, end = (1e-6 * (at - entered) - began for at in (event.time_range.start, event.time_range.end))
        spans.append((what, "stream", begin, end))
    return spans
