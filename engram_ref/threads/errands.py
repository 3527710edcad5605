"""Work that other threads do, into memory that is not theirs: it can be waited for, and called off for certain.

    pool = Pool(4, "readers")
    found = pool.do_all([read_this, read_that])     # all have ended, whatever goes wrong

Memory may be used for something else only when nobody writes to it any more. A future cannot promise that to somebody
who was interrupted (Ctrl-C) while he handed it over: it may be running, or begin later. An errand is known before it is
handed over; once it is called off it has ended, or it will never begin.

    python -m pytest tests/ref/threads/test_errands.py
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from engram_ref.threads.forks import renew_after_fork

T = TypeVar("T")


class Errand(Generic[T]):
    """Work to be done once, by whoever calls the errand.

    Attributes:
        ended: whether it has a result or an error.
        error: what it raised, or why it has no result.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.ended = False
        self.error: BaseException | None = None
        self._result: Any = None
        self._work: Callable[[], T] | None = work
        self._process = os.getpid()
        self._doing = threading.Lock()  # held by whoever does it
        self._waiting = threading.Lock()  # held until it has ended
        self._waiting.acquire()

    def __call__(self) -> None:
        """Do it, unless it was called off; what it raises is kept, and an interruption raised besides."""
        with self._doing:
            work, self._work = self._work, None
            if work is None:
                return
            try:
                self._result = work()
            except BaseException as error:
                self.error = error
                if not isinstance(error, Exception):
                    raise
            finally:
                self._end()

    def _end(self) -> None:
        self.ended = True
        self._waiting.release()

    @property
    def is_being_done(self) -> bool:
        """Whether somebody is at it."""
        return self._doing.locked()

    def wait(self) -> None:
        """Return when it has ended; in a fork of the process whose threads do it, at once, with an error."""
        if self.ended:
            return
        if os.getpid() != self._process:
            self.error = _not_here(self._process)
            return
        with self._waiting:
            pass

    def result(self) -> T:
        """What it returned, once it has ended.

        Raises:
            BaseException: what it raised.
        """
        self.wait()
        if self.error is not None:
            raise self.error
        return self._result

    def forbid(self) -> None:
        """Let nobody begin it any more."""
        self._work = None

    def call_off(self) -> None:
        """Return when it has ended, or never will begin; those who wait for it are told."""
        self.forbid()
        if os.getpid() != self._process:
            return  # nobody does it here
        with self._doing:
            if not self.ended:
                self.error = RuntimeError("it was called off before it began")
                self._end()


class Done(Generic[T]):
    """Work that whoever makes this has done by then: how an errand looks that has ended, without its locks.

    Attributes:
        ended: true.
        error: what it raised; an interruption is raised at once instead.
    """

    ended = True

    def __init__(self, work: Callable[[], T]) -> None:
        self.error: Exception | None = None
        try:
            self._result = work()
        except Exception as error:  # nothing is swallowed: whoever wants the result gets it
            self.error = error

    def wait(self) -> None:
        """It has ended."""

    def result(self) -> T:
        """What it returned.

        Raises:
            Exception: what it raised.
        """
        if self.error is not None:
            raise self.error
        return self._result


class Later(Generic[T]):
    """Work that is left to whoever waits for it first; how a fetch looks that the disk has only been asked for."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()
        self._work: Callable[[], T] = work
        self._done: Done[T] | None = None

    def wait(self) -> T:
        """Do it, unless it has been done; what it gives.

        Raises:
            Exception: what it raised, each time.
            RuntimeError: somebody was interrupted while he did it, or does it in the process that this is a fork of.
        """
        if self._done is None:
            self._process = require_here(self._lock, self._process)
            with self._lock:
                if self._done is None:
                    work, self._work = self._work, _interrupted
                    self._done = Done(work)
        return self._done.result()


def require_here(lock: threading.Lock, process: int) -> int:
    """This process's number, before a lock of `process` is waited for.

    Raises:
        RuntimeError: this is a fork, and whoever holds the lock is not in it.
    """
    here = os.getpid()
    if here != process and lock.locked():
        raise _not_here(process)
    return here


def _not_here(process: int) -> RuntimeError:
    return RuntimeError(f"it was under way in process {process}, not in this fork: start it anew")


def _interrupted() -> Any:
    raise RuntimeError("waiting for the rows of this fetch was interrupted: start it anew")


def call_off(errands: Sequence[Errand[Any]]) -> None:
    """Return when nobody does any of them, even if this is interrupted; then raise the interruption."""
    try:
        for errand in errands:
            errand.forbid()
        for errand in errands:
            errand.call_off()
    except BaseException:
        call_off(errands)
        raise


class Pool:
    """Threads that begin with the first errand, belong to one process, and end with `close`, or when nobody has it.

    Args:
        threads: at most.
        name: of the threads.
    """

    # Not a ThreadPoolExecutor: its own locks stay locked if Ctrl-C comes while something is submitted.

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._name = name
        self.renew()
        renew_after_fork(self)

    def __del__(self) -> None:
        # The threads know the queue only, and so do not keep the pool. Garbage may be collected in any thread, even in
        # the middle of its `put` or `give`: nothing is locked or waited for here, and a SimpleQueue's `put` may be
        # called inside of another one.
        queue = getattr(self, "_queue", None)
        if queue is not None:  # or whoever made the pool was interrupted
            queue.put(None)

    def renew(self) -> None:
        """In a forked process: the threads are not there."""
        self._lock = threading.Lock()
        self._members: list[threading.Thread] = []
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    def give(self, work: Callable[[], object]) -> None:
        """Let a thread do it; they begin in the order in which they are given."""
        with self._lock:
            self._members = [member for member in self._members if member.is_alive()]
            if len(self._members) < self._threads:
                name = f"{self._name}_{len(self._members)}"
                # Daemons, because one whose start was interrupted may wait for good, and another one takes its place.
                member = threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
                self._members.append(member)
                member.start()
            self._queue.put(work)

    def do_all(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What they return, when all have ended.

        Raises:
            BaseException: what the first of them to fail raised.
        """
        errands = [Errand(work) for work in works]
        try:
            for errand in errands:
                self.give(errand)
            for errand in errands:
                errand.wait()
        except BaseException:
            call_off(errands)
            raise
        return [errand.result() for errand in errands]

    def close(self) -> None:
        """Wait for what was given, and end the threads."""
        with self._lock:
            members, queue = self._members, self._queue
            self._members, self._queue = [], SimpleQueue()
        queue.put(None)
        for member in members:
            if member.is_alive() and member is not threading.current_thread():
                member.join()


def _serve(queue: SimpleQueue[Callable[[], object] | None]) -> None:
    """Do what comes, until None does. An errand keeps what goes wrong; its interruption ends nobody else's."""
    while (work := queue.get()) is not None:
        with suppress(SystemExit, KeyboardInterrupt):
            work()
        del work  # and what it holds, before the next one comes
    queue.put(None)  # for the next thread; there may be more than the pool knows, if a start was interrupted
