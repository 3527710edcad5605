"""Whole blocks of files read past the page cache, and the rows in them.

    queues = Queues.where_possible()                    # None where the system does one read a thread at a time
    nbytes = queues.read([fd], [plan_reads(unique, part, direct=True)], [rows])

Linux works on many reads of one thread, which asks for all of them in one call and sleeps in another until they are
there (io_submit, io_getevents). Where there are no such queues (other systems, sandboxes), threads wait for each read
(`read_blocks`).

    python -m pytest tests/ref/files/test_direct_reads.py tests/ref/tables/test_file.py
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import numpy as np

from engram_ref.files.conventions import BLOCK, round_up
from engram_ref.files.read_plan import Reads
from engram_ref.files.validated import StoredPart, ended_early
from engram_ref.threads.forks import renew_after_fork

AT_ONCE = 256  # reads that a disk is given at a time; with four times as many it does no more of them a second
# Numbers of io_setup, io_destroy, io_getevents and io_submit, which the C library has no names for.
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
_COMMAND = np.dtype("u8,u4,u4,u2,i2,u4,u8,u8,i8,u8,u4,u4")  # struct iocb; its opcode 0 reads
_COMMAND.names = (
    "place", "key", "rw_flags", "opcode", "priority", "file", "target", "nbytes", "offset", "reserved", "flags",
    "eventfd",
)  # fmt: skip
_EVENT = np.dtype([("place", "u8"), ("command", "u8"), ("result", "i8"), ("second_result", "i8")])  # struct io_event


def open_direct(part: StoredPart) -> int:
    """A descriptor of a part's file that reads past the page cache.

    Raises:
        ValueError: the file was changed, or its file system cannot do that.
    """
    refused = f"{part.path}: its file system cannot be read past the page cache: use direct=False"
    if not hasattr(os, "O_DIRECT"):
        raise ValueError(refused)
    os.close(part.open())  # what fails here fails whichever way it is read
    try:
        fd = part.open(os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, BLOCK)], 0)  # some file systems refuse only here
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        raise ValueError(refused) from error
    return fd


class Queues:
    """Queues of reads, one for each thread that reads at the same time."""

    def __init__(self) -> None:
        self._free: list[_Queue] = [_Queue()]
        renew_after_fork(self)

    @classmethod
    def where_possible(cls) -> Queues | None:
        """Queues, or None where the system has none, or none left."""
        if sys.platform != "linux" or sys.maxsize < 2**32 or platform.machine() not in _CALLS:
            return None
        try:
            return cls()
        except OSError:
            return None

    def renew(self) -> None:
        """In a forked process: queues belong to the process that made them."""
        self._free = []

    def ask(self, fds: Sequence[int], plans: Sequence[Reads]) -> Callable[[Sequence[np.ndarray]], int]:
        """Ask for all reads of some plans, at most AT_ONCE, and wait for nothing.

        Args:
            fds: descriptor of each plan's file, opened directly.
            plans: what is read of each.

        Returns:
            What waits and puts the rows where they belong, to be called once: it takes, for each plan, uint8
            [U, row_bytes], of which the rows that are read are written, and gives how many bytes were read. If nobody
            calls it, the queue ends with it.

        Raises:
            OSError: the disk failed, or the system has no room for a read.
        """
        queue = self._any()
        if queue is None:
            return functools.partial(read_blocks, fds, plans)
        queue.ask(np.repeat(fds, [len(plan) for plan in plans]), *_flat(plans))

        def take(found: Sequence[np.ndarray]) -> int:
            memory, places = queue.take()
            at = 0
            for plan, rows in zip(plans, found):
                _take_rows(plan, memory, places[at : at + len(plan)], rows)
                at += len(plan)
            self._free.append(queue)  # not after an error: then it goes, and its end waits for what is under way
            return sum(int(plan.lengths.sum()) for plan in plans)

        return take

    def _any(self) -> _Queue | None:
        """A queue that nobody uses; None where the system has none left: then one read follows the other."""
        try:
            return self._free.pop()
        except IndexError:  # looked at and taken in one, since other threads take some, too
            with suppress(OSError):
                return _Queue()
        return None

    def read(self, fds: Sequence[int], plans: Sequence[Reads], found: Sequence[np.ndarray]) -> int:
        """Ask and take at once.

        Raises:
            OSError: the disk failed, or the system has no room for a read.
            ValueError: a file is shorter than it was.
        """
        return self.ask(fds, plans)(found)

    def close(self) -> None:
        """Give back the queues that nobody uses."""
        while self._free:
            self._free.pop().close()


def _flat(plans: Sequence[Reads]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of all reads."""
    return np.concatenate([plan.offsets for plan in plans]), np.concatenate([plan.lengths for plan in plans])


def _take_rows(plan: Reads, memory: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
    """Copy the rows of a plan out of the memory that its reads have filled from `places` on."""
    if not len(plan):
        return
    low, high, width = plan.first[0], plan.first[-1], rows.shape[1]
    begins = plan.starts[low:high] + np.repeat(places - plan.offsets, np.diff(plan.first))  # in memory
    windows: np.ndarray = np.ndarray((len(memory) - width + 1, width), np.uint8, memory, strides=(1, 1))
    rows[low:high] = windows[begins]


class _Queue:
    """A queue of the system, and the memory that its reads are written to.

    Raises:
        OSError: the system has no queue, or none left.
    """

    def __init__(self) -> None:
        context = ctypes.c_ulong(0)
        _call(0, AT_ONCE, ctypes.byref(context))
        self._context = context.value
        self._memory = [mmap.mmap(-1, 16 * BLOCK)]  # of whoever destroys it: the disk writes to it until then
        self._destroy = weakref.finalize(self, _destroy, self._context, os.getpid(), self._memory)

    def ask(self, fds: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> None:
        """Begin to read from files; nothing else may be under way."""
        blocks = round_up(lengths)
        ends = np.cumsum(blocks)
        if ends[-1] > len(self._memory[0]):
            self._memory[0] = mmap.mmap(-1, int(ends[-1]))
        self._bytes = np.frombuffer(self._memory[0], np.uint8)
        commands = np.zeros(len(fds), _COMMAND)
        commands["place"], commands["file"], commands["offset"] = np.arange(len(fds)), fds, offsets
        commands["target"], commands["nbytes"] = self._bytes.ctypes.data + ends - blocks, blocks
        self._commands, self._wanted = commands, lengths
        self._pointers = commands.ctypes.data + _COMMAND.itemsize * np.arange(len(commands), dtype=np.uint64)
        self._asked = self._ask(self._pointers[:AT_ONCE], under_way=False)

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for what was asked for: the memory, uint8, and where in it each read begins."""
        commands, lengths = self._commands, self._wanted
        results = self._results()
        places = (commands["target"] - np.uint64(self._bytes.ctypes.data)).astype(np.int64)
        for at in np.flatnonzero(results < lengths).tolist():
            if results[at] < 0:
                raise OSError(-int(results[at]), os.strerror(-int(results[at])))
            _, _, _, _, _, fd, _, nbytes, offset, *_ = commands[at].tolist()
            read_direct(fd, memoryview(self._memory[0])[places[at] : places[at] + nbytes], offset, int(lengths[at]))
        return self._bytes, places

    def _results(self) -> np.ndarray:
        """What each command gave once all have ended, bytes or an error's negative number."""
        count = len(self._pointers)
        events = np.empty(min(AT_ONCE, count), _EVENT)
        results = np.empty(count, np.int64)
        ended = 0
        while True:
            got = self._wait(self._asked - ended, events)
            results[events["place"][:got]] = events["result"][:got]
            ended += got
            if ended == count:
                return results
            self._asked += self._ask(self._pointers[self._asked : ended + AT_ONCE], under_way=self._asked > ended)

    def _ask(self, pointers: np.ndarray, under_way: bool) -> int:
        """Ask for reads; how many the system took."""
        if not len(pointers):
            return 0
        try:
            return _call(3, self._context, len(pointers), ctypes.c_void_p(pointers.ctypes.data))
        except BlockingIOError:
            if under_way:  # when some have ended there will be room again
                return 0
            raise

    def _wait(self, count: int, events: np.ndarray) -> int:
        """Wait for so many reads; how many have ended when a signal comes."""
        try:
            return _call(2, self._context, count, count, ctypes.c_void_p(events.ctypes.data), None)
        except InterruptedError:  # its handler has run, or runs next
            return 0

    def close(self) -> None:
        """Wait for what is under way, and give the queue back."""
        self._destroy()


def _destroy(context: int, process: int, memory: list[mmap.mmap]) -> None:
    """Give a queue back once nothing is under way that writes to its memory; in a fork it is not there."""
    if os.getpid() == process:
        _call(1, context)


_system = ctypes.CDLL(None, use_errno=True).syscall
_system.restype = ctypes.c_long


def _call(which: int, *arguments: object) -> int:
    """A call of the system, by its place in `_CALLS`, without the interpreter lock."""
    number = _CALLS[platform.machine()][which]
    result: int = _system(*(ctypes.c_long(x) if isinstance(x, int) else x for x in (number, *arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def read_blocks(fds: Iterable[int], plans: Sequence[Reads], found: Sequence[np.ndarray]) -> int:
    """As `Queues.read`, one read after the other."""
    return sum(map(_read_blocks, fds, plans, found))


def _read_blocks(fd: int, reads: Reads, found: np.ndarray) -> int:
    if not len(reads):
        return 0
    total = 0
    target, row_bytes = found.data.cast("B"), found.shape[1]
    aligned = memoryview(mmap.mmap(-1, int(round_up(reads.lengths.max()))))
    for offset, length, low, high in zip(reads.offsets.tolist(), reads.lengths.tolist(), reads.first, reads.first[1:]):
        read_direct(fd, aligned[: round_up(length)], offset, length)
        total += length
        for row, start in enumerate(reads.starts[low:high].tolist(), int(low)):
            target[row * row_bytes : (row + 1) * row_bytes] = aligned[start - offset : start - offset + row_bytes]
    return total


def read_direct(fd: int, blocks: memoryview, offset: int, length: int) -> None:
    """Fill whole blocks, `length` bytes of which are in the file; after a short read, from its last whole block on.

    Raises:
        ValueError: the file ends before.
    """
    done = 0
    while True:
        got = done + os.preadv(fd, [blocks[done:]], offset + done)
        if got >= length:
            return
        if got == done:
            raise ended_early(offset + got)
        done = got // BLOCK * BLOCK if got - done >= BLOCK else got
