"""What a piece of code asks of CUDA: operations, launches, streams and events, counted by name; views are free.

with Calls() as calls:
    table.start(rows).wait()
assert calls == {"copy_": 1, ...}
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from triton.runtime.interpreter import GridExecutor

from tests.rehearsal import streams, tensors

_VIEWS = {"view", "slice", "detach", "alias", "unsqueeze", "select"}


class Calls(Counter[str]):
    """Counts while it is entered."""

    def __enter__(self) -> Calls:
        self._stack = ExitStack()
        for owner, name, called in (
            (GridExecutor, "__call__", "launch"),
            (streams.use, "__enter__", "enter a stream"),
            (streams.Event, "__init__", "make an event"),
            (streams.Event, "record", "record"),
            (streams.Event, "synchronize", "the host waits"),
            (streams.Stream, "wait_event", "a stream waits"),
            (tensors.CudaTensor, "record_stream", "record_stream"),
            (torch.cuda, "current_stream", "current stream"),
        ):
            self._count(owner, name, called)
        real = tensors.dispatch

        def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            name = func._schema.name.split("::")[1]
            on_cuda = tensors.is_cuda(kwargs.get("device")) or any(isinstance(x, tensors.CudaTensor) for x in args)
            if on_cuda and name not in _VIEWS:
                self[name] += 1
            return real(func, args, kwargs)

        self._stack.enter_context(mock.patch.object(tensors, "dispatch", dispatch))
        return self

    def _count(self, owner: Any, name: str, called: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self[called] += 1
            return real(*args, **kwargs)

        self._stack.enter_context(mock.patch.object(owner, name, counted))

    def __exit__(self, *error: object) -> None:
        self._stack.close()
