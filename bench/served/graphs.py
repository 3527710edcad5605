"""A decode step as CUDA graphs, cut where its rows are joined: what serving engines call piecewise graphs.

All pieces are captured during one call of the step, which says where it is to be cut: there the capture of one piece
ends and that of the next begins.

    pieces = Pieces(device)
    with attached.staging(between=pieces.cut):
        pieces.prepare(key, step)
    out = pieces.replay(key, join)

This file needs CUDA; what it is given is tested without.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 2  # calls before a capture: libraries take their workspaces, Triton compiles


class CaptureError(ValueError):
    """A step cannot be captured: what it times would be another step's than its name says."""


class Pieces:
    """Captured steps by key. They share one pool of memory, since only one step runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, tuple[list[Any], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # taken first: a graph tells its own only when it is captured
        self._stream = torch.cuda.Stream(device)  # the default one cannot be captured
        self._recording: list[Any] = []  # graphs of the step that is being captured, the last one open

    def prepare(self, key: Hashable, step: Callable[[], Tensor]) -> None:
        """Capture a step. It is run a few times before, so whatever state it advances is to be set anew afterwards.

        Args:
            key: of all that a graph cannot change.
            step: runs the model, and calls `cut` where it is to be cut.

        Raises:
            CaptureError: that failed, or one of the runs before.
        """
        if key in self._captured:
            return
        try:
            self._captured[key] = self._record(step)
        except RuntimeError as error:  # what cannot be captured depends on releases of torch and transformers
            why = str(error).partition("\n")[0]
            raise CaptureError(f"capturing a decode step failed: {why}; --eager decodes without graphs") from error

    def replay(self, key: Hashable, join: Callable[[], object]) -> Tensor:
        """Run a step that was prepared with this key; `join` is called between its pieces."""
        (first, *others), out = self._captured[key]
        first.replay()
        for graph in others:
            join()
            graph.replay()
        return out

    def cut(self) -> None:
        """Called by a step: of its capture, a piece ends here. Outside of a capture, nothing."""
        if self._recording:  # a graph cannot wait for rows that the CPU gathers: they are joined between two
            self._recording[-1].capture_end()
            self._begin()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA meanwhile spoils no capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._recording.append(graph)

    def _record(self, step: Callable[[], Tensor]) -> tuple[list[Any], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                step()
        torch.cuda.synchronize(self._device)
        if not self._captured:  # later captures find what the first one left
            gc.collect()
            torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            self._begin()
            try:
                out = step()
            finally:
                # After an error, too: while a capture is open, every wait behind it fails.
                self._recording[-1].capture_end()
                graphs, self._recording = self._recording, []
        torch.cuda.synchronize(self._device)
        return graphs, out
