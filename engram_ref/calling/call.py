"""A call from the GPU to the CPU: a captured step asks for its rows while it runs, and waits where it needs them.

    call = CpuCall((64, 1), (2, 64 * 24, 256), torch.bfloat16, device)
    with torch.cuda.graph(graph):
        ...                                 # on a branch of the graph:
        call.make(token_ids, rows)          # ids go to page-locked memory; rows come from there
        ...
    for step in steps:
        call.expect(look_up)                # look_up(ids [B, T], values) is called by a thread of this call's
        graph.replay()
    call.settle()                           # all calls have been answered; what went wrong is raised

Nothing of a step waits for the host before it begins, and the host waits for nothing: the thread sees the ids in
page-locked memory, as the GPU sees the answer there (`engram_ref.calling.words`). One thread answers one call after the
other, so the state that `work` has is nobody else's until `settle`. It looks at memory without rest for the first 50 ms
of each wait, which costs a processor. It asks nothing of CUDA, so that no queue of CUDA's can hold it up.

An answer that does not come ends the GPU's waiting all the same: rows are NaN then, and the next `expect` or `settle`
raises. Steps that are launched before they do are queued behind one that waited in vain: each of them waits a sixteenth
as long. It has not run on CUDA yet.

    python -m pytest tests/ref/calling/test_call.py
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.calling.words import peek, post, wait_for
from engram_ref.rows.memory import HostMemory
from engram_ref.threads.errands import Errand, Pool

Work = Callable[[Tensor, Tensor], object]  # writes values for token ids [B, T]; both lie in host memory
POLLS = 1 << 23  # looks of the GPU at an answer that does not come: several seconds, at a microsecond or more each
PATIENCE = 60.0  # seconds that the CPU waits for a question: a step may be queued behind long prompts
_LINE = 128


class CallError(RuntimeError):
    """A call was not answered, or not in time; a cause is chained."""


class CpuCall:
    """One call in each run of a step, always of the same shape and through the same memory.

    Args:
        shape: of the token ids, (B, T).
        values: shape of the answer.
        dtype: of its values.
        device: that calls.
        polls: looks at the answer, at most.
        patience: seconds that the CPU waits for a question.

    Raises:
        ValueError: the kernels do not run there.
        RuntimeError: a stream is being captured.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        values: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        polls: int = POLLS,
        patience: float = PATIENCE,
    ) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The count of turns would begin anew in each replay, which would take the first answer for its own.
            raise RuntimeError("a call to the CPU that is made in a capture: run the step once before it is captured")
        self._kernels = _kernels_for(device)
        self._polls, self._patience = polls, patience
        head = -(-8 * (self._kernels.IDS + math.prod(shape)) // _LINE) * _LINE
        nbytes = head + math.prod(values) * dtype.itemsize
        with torch.inference_mode(False):  # written to in whatever mode a later step runs
            self._memory = HostMemory(nbytes)
            if device.type == "cuda":
                self._memory.pin(piece=nbytes)
            self._mailbox = self._memory.bytes[:head].view(torch.int64)
            first = self._kernels.IDS
            self._ids = self._mailbox[first : first + math.prod(shape)].view(shape)
            self._sent = self._memory.bytes[head:].view(dtype).view(values)
            self._turn = torch.zeros(1, dtype=torch.int64, device=device)
            self._answered = torch.ones(1, dtype=torch.int32, device=device)  # as if the last step had been
        self._answers = 0  # the last turn that was answered
        self._called_off = False  # whoever has not asked is not waited for
        self._errands: deque[Errand[None]] = deque()
        self._pool = Pool(1, "engram-answers")
        weakref.finalize(self, self._pool.close).atexit = False  # the thread may be waiting for a question then

    def make(self, ids: Tensor, out: Tensor) -> None:
        """Ask, wait and take the answer, on the current stream, which may be captured.

        Args:
            ids: int64 [B, T], on the device.
            out: takes the values, contiguous.
        """
        self._kernels.ask(ids, self._mailbox, self._turn, self._answered, self._polls)
        self._kernels.take(self._sent, self._answered, out)

    def expect(self, work: Work) -> None:
        """Answer the next call, which the caller is about to have made; at once, this returns.

        Raises:
            CallError: an earlier call was not answered.
        """
        while self._errands and self._errands[0].ended:
            _require_done(self._errands.popleft())
        self._require_in_time()
        errand: Errand[None] = Errand(partial(self._answer, work))
        self._errands.append(errand)
        self._pool.give(errand)

    def settle(self) -> None:
        """Wait until all that were expected are answered.

        Raises:
            CallError: one was not.
        """
        while self._errands:
            self._errands[0].wait()
            _require_done(self._errands.popleft())
        self._require_in_time()

    def call_off(self) -> None:
        """Expect nothing more, when the steps that were launched are over: what was not asked by then will not be.

        An error may have come between `expect` and the step. Its answer would be waited for, and the next step get it.
        """
        try:
            self._called_off = True
            for errand in self._errands:
                errand.wait()
        finally:
            self._called_off = False

    def close(self) -> None:
        """Answer who has asked, end the thread and give the memory back: nothing may make the call afterwards."""
        self._called_off = True
        self._pool.close()
        self._memory.close()

    def _answer(self, work: Work) -> None:
        # A step that has given up wants no answer any more, least of all one that is meant for the next.
        over = max(self._answers, peek(self._word(self._kernels.EXPIRED)))
        turn = wait_for(self._word(self._kernels.ASKED), over + 1, self._patience, lambda: self._called_off)
        if turn is None:
            if self._called_off:
                return
            raise CallError(f"no step asked for rows within {self._patience:g} s: expect() one call for each replay")
        self._answers = turn
        answer = -turn  # minus: not answered
        try:
            work(self._ids, self._sent)
            answer = turn
        finally:
            post(self._word(self._kernels.ANSWERED), answer)

    def _require_in_time(self) -> None:
        last, told = peek(self._word(self._kernels.EXPIRED)), self._word(self._kernels.TOLD)
        if last > peek(told):
            post(told, last)  # what is launched from here on waits as long as any other
            first = peek(self._word(self._kernels.FIRST))
            behind = f" (and so did {last - first} queued behind it, not as long)" if first < last else ""
            raise CallError(
                f"step {first} waited in vain for its rows, {self._polls:,} looks long{behind}, and went on with NaN: "
                "the thread that answers was held up, or nobody expected the call"
            )

    def _word(self, index: int) -> int:
        return self._mailbox.data_ptr() + 8 * index


def _require_done(errand: Errand[None]) -> None:
    error = errand.error
    if isinstance(error, CallError):
        raise error
    if error is not None:
        raise CallError(f"looking up the rows of a captured step failed, so that they were NaN: {error}") from error


def _kernels_for(device: torch.device) -> Any:
    try:
        from engram_ref import gpu
        from engram_ref.calling import kernels
    except ImportError as error:
        raise ValueError(f"a step that calls the CPU needs Triton ({error})") from error
    if not gpu.can_run_on(device):
        raise ValueError(f"a step that calls the CPU runs on CUDA, not on {device}")
    return kernels
