"""What was started: the pending rows of each layer, waited for in the background's own words, and released once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.prefetch.slots import Lease
from engram_ref.tables.base import Pending, Ready
from engram_ref.threads.errands import Done, Errand

Outcome = Errand[Pending] | Done[Pending]  # of one layer
Observer = Callable[[str, int, float, float], None]  # stage, layer id, begin and end by time.perf_counter


class FetchError(RuntimeError):
    """A fetch that was running in the background failed; the cause is chained."""


class Fetch(Mapping[int, Pending]):
    """The started fetch of one batch: per layer id something to wait for.

    The rows stay as they are until `release`; use the fetch as a context manager and they are released at its end.
    A fetch that was forgotten is given back when it is collected; rows of it that somebody has kept stay as they are.
    """

    def __init__(self, lease: Lease, outcomes: Mapping[int, Outcome], observer: Observer | None) -> None:
        self._lease = lease
        self._joins = {layer_id: Join(layer_id, outcome, lease, observer) for layer_id, outcome in outcomes.items()}

    def __getitem__(self, layer_id: int) -> Join:
        return self._joins[layer_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._joins)

    def __len__(self) -> int:
        return len(self._joins)

    def release(self) -> None:
        """Let the buffers be filled again, once nobody writes to them; a second time does nothing.

        Raises:
            FetchError: the fetch of a layer failed, and no join has raised it.
        """
        if self._lease.over:
            return
        try:
            for join in self._joins.values():
                join.settle()
            self._lease.errands.clear()  # all have ended
        finally:
            self._lease.end()
        for join in self._joins.values():
            if not join.told:
                join.tell()

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.release()
        except FetchError:
            if error[1] is None:  # otherwise what ended the block is raised, which came first
                raise


class Join:
    """The pending fetch of one layer, wherever it is running."""

    def __init__(self, layer_id: int, errand: Outcome, lease: Lease, observer: Observer | None) -> None:
        self._layer_id = layer_id
        self._errand = errand
        self._lease = lease  # while somebody may still wait, nobody else gets the slot
        self._observer = observer
        self.told = False

    def wait(self) -> Tensor:
        """The rows, [B*T*C, D], safe to use on the current stream.

        Raises:
            FetchError: the fetch failed; the cause is chained.
            RuntimeError: the fetch was released.
        """
        begin = time.perf_counter()
        self.settle()
        if self._lease.over:
            raise self._released()
        self.tell()
        pending = self._errand.result()
        values = pending.values if type(pending) is Ready else self._write(pending)
        if self._observer:
            self._observer("wait", self._layer_id, begin, time.perf_counter())
        return values

    @property
    def row_numbers(self) -> Tensor:
        """The numbers of the rows, [B*T*C], where the table wanted them; for the current stream, after `wait`."""
        numbers = self._lease.buffers.numbers[self._layer_id]
        if numbers.is_cuda:  # of the side stream, which would recycle their memory while the current one reads it
            numbers.record_stream(torch.cuda.current_stream(numbers.device))
        return numbers

    def settle(self) -> None:
        """Wait until nobody writes into the buffers any more."""
        if self._errand.ended or self._lease.over:
            return
        if self._lease.users.is_here():
            raise RuntimeError("a fetch is waited for from within one of the same prefetcher (observer): return first")
        self._errand.wait()

    def _write(self, pending: Pending) -> Tensor:
        """Rows that arrive only while somebody waits for them."""
        with self._lease.writing():
            if self._lease.ending:
                raise self._released()
            try:
                return pending.wait()
            except (OSError, ValueError) as error:
                raise self._failed(error) from error

    def _released(self) -> RuntimeError:
        return RuntimeError(f"the rows of layer {self._layer_id} were released: wait for them before release()")

    def tell(self) -> None:
        """Raise what went wrong in the background."""
        self.told = True
        error = self._errand.error
        if error is not None:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> FetchError:
        return FetchError(f"fetching the rows of layer {self._layer_id} failed: {error}")
