"""How long a model waited for rows: the exposed time of each lookup, on the clock of the device that waited.

    exposed = ExposedTime("cuda")
    with attach(model, engrams, plan, vocab, exposed=exposed):
        model(input_ids)
    exposed.seconds()        # [("start", 0.00002), (1, 0.00031)]: at the decoder's entry, then before block 1

On CUDA it is how long the stream stood still; where the CPU is late, its lateness is in it, too. Elsewhere it is the
wall clock. Events cannot be read from a captured graph: staged steps are not measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from engram_ref.devices import as_device

Place = str | int  # "start", or the block before which rows were joined


class Waits(Protocol):
    """What is told of every wait while it lasts: see `ExposedTime`, which notes it."""

    def around(self, place: Place) -> AbstractContextManager[None]:
        """Entered before a wait, left after it."""
        ...


class ExposedTime:
    """Notes every wait.

    Args:
        device: the model's.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._device = as_device(device)
        self._waits: list[tuple[Place, Any, Any]] = []

    @contextmanager
    def around(self, place: Place) -> Iterator[None]:
        """Measure what happens inside."""
        begin = self._now()
        yield
        self._waits.append((place, begin, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # two a wait: all that measuring adds to the stream
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> list[tuple[Place, float]]:
        """All waits so far, in order; on CUDA the device is waited for."""
        if self._device.type != "cuda":
            return [(place, end - begin) for place, begin, end in self._waits]
        torch.cuda.synchronize(self._device)
        return [(place, begin.elapsed_time(end) / 1e3) for place, begin, end in self._waits]

    def clear(self) -> None:
        """Forget them."""
        self._waits.clear()
