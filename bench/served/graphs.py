"""A decode step as two CUDA graphs, with the join of the rows between them: what serving engines call piecewise graphs.

A graph cannot wait for rows that the CPU gathers, so the step is cut where they are needed. Both pieces are captured
during one call of the step: the hook before the second block ends the first capture and begins the second.

    pieces = Pieces(device)
    pieces.prepare(key, step, fuse)                     # captured; the step's state is as after a few steps
    out = pieces.replay(key, begin, join)

This file needs CUDA; what it is given is tested without.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from bench.schemas.served import Graphs

_WARM_UP = 2  # calls before a capture: libraries take their workspaces, Triton compiles
Insert = Callable[[Tensor], Tensor]


class Pieces:
    """Captured steps by key. They share one pool of memory, since only one step runs at a time.

    Where a capture fails, steps run as they are, and `report` says why.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, tuple[Any, Any, Tensor]] = {}
        self._steps: dict[Hashable, tuple[Callable[[Insert], Tensor], Insert]] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)
        self._why: str | None = None

    def report(self) -> Graphs:
        """Whether graphs are used; if not, why."""
        return {"used": self._why is None, "why": self._why}

    def prepare(self, key: Hashable, step: Callable[[Insert], Tensor], fuse: Insert) -> None:
        """Capture a step. It is run a few times before, so whatever state it advances is to be set anew afterwards.

        Args:
            key: of all that a graph cannot change.
            step: runs the model; it gives the stream before the second block to its argument.
            fuse: what is done there, once the rows lie where it looks for them.
        """
        self._steps[key] = step, fuse
        if self._why is not None or key in self._captured:
            return
        try:
            self._captured[key] = self._record(step, fuse)
        except RuntimeError as error:  # what cannot be captured depends on releases of torch and transformers
            self._why = f"capturing failed: {str(error).splitlines()[0]}"
            self._captured.clear()
            print(f"warning: decoding without CUDA graphs: {self._why}", file=sys.stderr, flush=True)

    def replay(self, key: Hashable, begin: Callable[[], object], join: Callable[[], object]) -> Tensor:
        """Run a step.

        Args:
            key: that it was prepared with.
            begin: called when the first piece has been launched.
            join: puts the rows where the step looks for them.
        """
        if self._why is not None:
            step, fuse = self._steps[key]
            begin()
            return step(lambda hidden: self._joined(hidden, fuse, join))
        first, second, out = self._captured[key]
        first.replay()
        begin()
        join()
        second.replay()
        return out

    @staticmethod
    def _joined(hidden: Tensor, fuse: Insert, join: Callable[[], object]) -> Tensor:
        join()
        return fuse(hidden)

    def _record(self, step: Callable[[Insert], Tensor], fuse: Insert) -> tuple[Any, Any, Tensor]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                step(fuse)
        torch.cuda.synchronize(self._device)
        if not self._captured:  # later captures find what the first one left
            gc.collect()
            torch.cuda.empty_cache()
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        capturing = [first]

        def between(hidden: Tensor) -> Tensor:
            capturing.pop().capture_end()
            second.capture_begin(pool=first.pool(), capture_error_mode="thread_local")
            capturing.append(second)
            return fuse(hidden)

        with torch.cuda.stream(self._stream):
            self._begin(first)
            try:
                out = step(between)
            finally:
                for graph in capturing:
                    graph.capture_end()
        torch.cuda.synchronize(self._device)
        self._pool = first.pool()
        return first, second, out

    def _begin(self, graph: Any) -> None:
        if self._pool is None:
            graph.capture_begin(capture_error_mode="thread_local")
        else:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
