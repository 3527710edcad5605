"""Rows in buffers that stay where they are: what a captured graph reads, filled before each replay.

By default the stream of the model waits for the rows, and then the graph runs. With `overlap`, rows are laid down on a
side stream, and the graph itself waits for them, at every block that needs some: the blocks before it compute while
rows are still on their way. What the CPU gathers it has gathered before the replay begins; only copies, and reads by
the accelerator itself, overlap.

Where the accelerator looks rows up by itself, `stage` may be captured together with the forward that reads them: then
the lookup is a branch of the graph, which forks before the first block and joins at the one that needs its rows, and
the host does nothing in a step but replay. What is captured is of places (`engram_ref.attach.Places`), which stay where
they are; a history that a cache carries does not.

With `asking`, a captured `stage` does the same for tables that the CPU gathers from: the branch sends the token ids to
the CPU and waits there for its rows (`engram_ref.calling.call`), so that a step is one graph and one replay, and no
host stands between two halves of it. `Attached.answer` before each replay lets a thread answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from engram_ref.attach.step import ForBlock, Step
from engram_ref.calling.call import CpuCall
from engram_ref.devices import beside, side_stream
from engram_ref.layer import Engram


class Staged:
    """The buffers of staged steps, by the steps' shape, and which of them the next forward reads.

    Args:
        device: the model's.
        overlap: see above; CUDA only.
        asking: see above.

    Attributes:
        shape: of the staged step's token ids, None before the first.

    Raises:
        ValueError: no CUDA device, or a torch without external events.
    """

    def __init__(self, device: torch.device, overlap: bool = False, asking: bool = False) -> None:
        self.shape: torch.Size | None = None
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._together: dict[torch.Size, Tensor] = {}  # rows of all layers, by the steps' shape: `room`
        self._current: dict[int, ForBlock] = {}
        self._padded: dict[torch.Size, bool] = {}
        self._device = device
        self._stream: Any = None
        self._external: dict[int, Any] = {}  # events, by layer
        self._laid_down: dict[int, Any] = {}  # those of the step that is staged
        self.asking = asking
        self._calls: dict[torch.Size, CpuCall] = {}  # by the steps' shape
        if overlap:
            if device.type != "cuda":
                raise ValueError(f"overlap=True on {device}: only a CUDA device copies by itself; leave overlap out")
            self._stream = side_stream(device)

    def forget(self) -> None:
        """Nothing is staged; the buffers stay."""
        self.shape = None
        self._current.clear()

    def fill(self, step: Step, engrams: Mapping[int, Engram]) -> None:
        """Lay a step down.

        Raises:
            ValueError: one step of a shape has padding and another has none.
        """
        shape, padding = step.shape, step.padding
        if self._padded.setdefault(shape, padding is not None) != (padding is not None):
            raise ValueError(
                f"an attention mask for some steps of shape {tuple(shape)} and none for others: a graph cannot follow; "
                "give stage() one for all of them"
            )
        with self.beside():
            if padding is not None:
                padding = self._lay(("padding", *shape), padding.to(self._device))
            for layer_id, engram in engrams.items():
                rows = self._lay(("rows", layer_id, *shape), step.fetch[layer_id].wait().to(engram.fusion.dtype))
                self._current[layer_id] = ForBlock(rows, step.past(layer_id), padding)
                if self._stream is not None:
                    self._laid_down[layer_id] = event = self._event(layer_id)
                    event.record(self._stream)
        self.shape = shape

    def beside(self) -> AbstractContextManager[Any]:
        """On the side stream, if there is one, behind what the current one has: the last step may still be reading."""
        return beside(self._stream)

    def call(self, shape: torch.Size, values: torch.Size, dtype: torch.dtype) -> CpuCall:
        """What a step of this shape asks the CPU by, for values of this shape: always the same."""
        if shape not in self._calls:
            self._calls[shape] = CpuCall((shape[0], shape[1]), tuple(values), dtype, self._device)
        return self._calls[shape]

    def settle(self) -> None:
        """Wait until the CPU has answered whatever was expected.

        Raises:
            CallError: it has not.
        """
        for call in self._calls.values():
            call.settle()

    def call_off(self) -> None:
        """Expect no more questions: what has not asked by now will not."""
        for call in self._calls.values():
            call.call_off()

    def close(self) -> None:
        """No step asks the CPU any more: its threads end, and graphs that ask are not to be replayed."""
        for call in self._calls.values():
            call.close()
        self._calls.clear()

    def room(self, shape: torch.Size, layer_ids: Iterable[int], new_rows: Callable[[], Tensor]) -> Tensor | None:
        """The buffers of these layers side by side, [L, B*T*C, D], for a step of this shape; `new_rows` makes them.

        None where they lie apart already: graphs read them there, so rows are to be copied to them.
        """
        keys = [("rows", layer_id, *shape) for layer_id in layer_ids]
        if shape not in self._together and not any(key in self._buffers for key in keys):
            self._together[shape] = new_rows()
            for key, buffer in zip(keys, self._together[shape]):
                self._buffers[key] = buffer
                keep_address(buffer)
        return self._together.get(shape)

    def _lay(self, key: tuple[Any, ...], values: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            with torch.inference_mode(False):  # written to in whatever mode a later step runs
                buffer = self._buffers[key] = torch.empty_like(values)
            keep_address(buffer)
        if values.data_ptr() == buffer.data_ptr():  # they were put there
            return buffer
        return buffer.copy_(values)

    def _event(self, layer_id: int) -> Any:
        """An event between graphs, always the same; of one that is being captured with the lookup, an edge in it."""
        if torch.cuda.is_current_stream_capturing():
            return torch.cuda.Event()
        if layer_id not in self._external:
            try:
                # External: the wait is captured as a node of the graph, for what is recorded outside of it.
                self._external[layer_id] = torch.cuda.Event(external=True)
            except TypeError as error:
                raise ValueError(
                    f"overlap=True needs external CUDA events, which torch {torch.__version__} lacks: leave it out"
                ) from error
        return self._external[layer_id]

    def at(self, layer_id: int) -> ForBlock:
        """What block `layer_id` reads.

        Raises:
            RuntimeError: nothing was staged.
        """
        if layer_id not in self._current:
            raise RuntimeError("nothing is staged: call stage(input_ids, cache) before the forward")
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._laid_down[layer_id])
        return self._current[layer_id]


def keep_address(tensor: Tensor) -> None:
    """Tell torch.compile that this tensor stays where it is, so that its CUDA graphs need not copy it."""
    if tensor.device.type == "cuda":
        import torch._dynamo  # takes a second to import

        torch._dynamo.mark_static_address(tensor)
