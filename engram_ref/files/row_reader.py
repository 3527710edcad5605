"""Many small reads from a file, as fast as the disk serves them: the I/O of a table that lives in a file.

A disk serves scattered reads fast only when it has many of them at a time. Threads that each wait for one are the
usual way; here a thread asks for many without waiting: what is in the page cache is read at once, the others when AHEAD
more have been asked for. Rows in two parts, codes and scales, are asked for in both before either is waited for.

With numba this is compiled (`row_reader_fused`). With `direct`, which bypasses the page cache, the system is given a
queue of reads (`direct_reads`). Where neither can be (macOS), threads that wait read instead. All of this only makes
reading faster: where a sandbox refuses a hint, or a file system returns less than was asked for, the rows are read
without it.

    python -m pytest tests/ref/files/test_row_reader.py tests/ref/tables/test_file.py
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from engram_ref.compiled import numba_works
from engram_ref.files.direct_reads import AT_ONCE, Queues, open_direct, read_blocks
from engram_ref.files.header import Stamp
from engram_ref.files.read_plan import Reads, plan_reads, rows_in
from engram_ref.files.validated import StoredPart, read_whole
from engram_ref.threads.errands import Pool

AHEAD = 1024  # pieces that the disk is asked for before the first is waited for
_ASKING = 4, 1024  # threads that ask ahead, and reads that are worth another one
_WAITING = 32, 4  # the same for threads that wait for each read
_CAN_ASK_AHEAD = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")

_fused: Callable[..., int] | None = None
_ask_fused: Callable[..., None] | None = None
if _CAN_ASK_AHEAD and numba_works():
    from engram_ref.files.row_reader_fused import ask_rows as _ask_fused
    from engram_ref.files.row_reader_fused import read_rows as _fused


class RowReader:
    """Reads rows of a table's files into memory, in the calling thread and, for many rows, in others.

    Args:
        parts: of the rows: one, or codes and scales; of rows in several tensors, those of one after the other.
        threads: that read at most; None takes what is fastest here, which with `direct` is none but the caller's.
        direct: read whole blocks, past the page cache.

    Attributes:
        can_ask: whether the disk can be asked for rows without waiting for them.

    Raises:
        ValueError: no threads, a file that was changed, or one that cannot be read past the page cache.
    """

    def __init__(self, parts: Sequence[StoredPart], threads: int | None = None, direct: bool = False) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: one at least must read")
        self._parts = parts
        self._shards = [part.first for part in parts if part.columns[0] == 0]  # first row of each
        self._direct = direct
        self._files: dict[Stamp, int] = {}
        with ExitStack() as undo:
            for part in parts:
                if part.stamp not in self._files:
                    self._files[part.stamp] = open_direct(part) if direct else part.open()
                    undo.callback(os.close, self._files[part.stamp])
            self._close_files = weakref.finalize(self, undo.pop_all().close)
        self._fds = [self._files[part.stamp] for part in parts]
        self._one_of_each = [(fd, next(p for p in parts if p.stamp == stamp)) for stamp, fd in self._files.items()]
        places = [
            (fd, part.offset - part.first * part.row_bytes, part.columns[0], part.row_bytes)
            for fd, part in zip(self._fds, parts)
        ]
        self._places = np.array(places, dtype=np.int64)  # [S*P, 4], as the compiled loop wants them
        self._bounds = np.array([*self._shards, parts[-1].first + parts[-1].rows], dtype=np.int64)  # [S + 1]
        self._ahead = _CAN_ASK_AHEAD and not direct
        self._now = self._ahead and all(map(_can_read_now, self._files.values()))
        most, self._fewest = _ASKING if self._ahead else _WAITING
        self._threads = threads or most
        self._pool = Pool(self._threads, "rows")
        # A thread that waits for each read costs far more of the processor than the read: it goes to sleep, is woken,
        # and takes a turn at the interpreter lock, all beside the model that computes meanwhile.
        self._queues = Queues.where_possible() if direct and threads is None else None
        self.can_ask = self._ahead or self._queues is not None
        if hasattr(os, "posix_fadvise"):
            for fd in self._files.values():
                _advise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # or the system reads what nobody asked for

    def read(self, ordered: np.ndarray, places: np.ndarray, raw: np.ndarray) -> int:
        """Read rows to their places; how many bytes the reads returned.

        Args:
            ordered: row numbers [N], int64, sorted, checked.
            places: where each of them is wanted, [N], int64, each place once.
            raw: uint8 [N, row_bytes] to write the rows into, contiguous.

        Raises:
            ValueError: a file was changed, or the reader closed.
            OSError: the disk failed.
        """
        self._require_same_size()
        read = self._read(ordered, places, raw)
        self._require_unchanged()  # afterwards, so that it holds for what was written meanwhile
        return read

    def ask(self, ordered: np.ndarray) -> Callable[[np.ndarray, np.ndarray], int]:
        """Ask the disk for rows and wait for nothing; only where `can_ask`, and for AT_ONCE rows at most.

        Args:
            ordered: as for `read`.

        Returns:
            What waits for them, to be called once: the rest of `read`, of its other two arguments.

        Raises:
            ValueError, OSError: as `read`.
        """
        self._require_same_size()
        if self._queues is None:
            self._ask_ahead(ordered)
            return functools.partial(self.read, ordered)
        planned = self._plan(ordered)
        take = self._queues.ask(self._fds, planned.reads)

        def wait(places: np.ndarray, raw: np.ndarray) -> int:
            total = take(planned.found)
            self._require_unchanged()
            planned.put(places, raw)
            return total

        return wait

    def _ask_ahead(self, ordered: np.ndarray) -> None:
        """Let the system bring rows into the page cache."""
        if _ask_fused is not None:
            return _ask_fused(self._places, self._bounds, ordered)
        for fd, reads in zip(self._fds, self._plan(ordered).reads):
            for offset, length in zip(reads.offsets.tolist(), reads.lengths.tolist()):
                _advise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _read(self, ordered: np.ndarray, places: np.ndarray, raw: np.ndarray) -> int:
        if not len(ordered):
            return 0
        if _fused is not None and self._ahead:
            read = self._read_fused(_fused, ordered, places, raw)
            if read is not None:
                return read
        return self._read_planned(ordered, places, raw)

    def _read_fused(
        self, fused: Callable[..., int], ordered: np.ndarray, places: np.ndarray, raw: np.ndarray
    ) -> int | None:
        """How many bytes the compiled loop read, each row once, or None if it could not read some row."""
        per_row = len(self._parts) // len(self._shards)
        shares = self._shares(len(ordered) * per_row)
        cuts = [len(ordered) * share // shares for share in range(1, shares)]
        bounds = [0, *np.searchsorted(ordered, ordered[cuts]).tolist(), len(ordered)]  # repeats stay together
        ahead = max(1, AHEAD // per_row)

        def read(low: int, high: int) -> int:
            return fused(self._places, self._bounds, ordered[low:high], places[low:high], raw, ahead, self._now)

        unique = self._run([functools.partial(read, *bound) for bound in itertools.pairwise(bounds)])
        return None if min(unique) < 0 else sum(unique) * raw.shape[1]

    def _read_planned(self, ordered: np.ndarray, places: np.ndarray, raw: np.ndarray) -> int:
        """Read every row once, where `plan_reads` says, then put it wherever it is wanted."""
        planned = self._plan(ordered)
        shares = self._shares(sum(map(len, planned.reads)))
        split = zip(*(reads.split(shares) for reads in planned.reads))
        total = sum(self._run([functools.partial(self._read_share, reads, planned.found) for reads in split]))
        planned.put(places, raw)
        return total

    def _plan(self, ordered: np.ndarray) -> _Planned:
        unique, index = np.unique(ordered, return_inverse=True)
        whole = {p.columns: np.empty((len(unique), p.row_bytes), dtype=np.uint8) for p in self._parts if not p.first}
        inside = [rows_in(unique, part) for part in self._parts]
        reads = [plan_reads(unique[rows], part, self._direct) for rows, part in zip(inside, self._parts)]
        found = [whole[part.columns][rows] for rows, part in zip(inside, self._parts)]
        return _Planned(index, whole, found, reads)

    def _read_share(self, reads: Sequence[Reads], found: Sequence[np.ndarray]) -> int:
        """Do some of the reads of each part; how many bytes they returned."""
        if self._direct:
            return (read_blocks if self._queues is None else self._queues.read)(self._fds, reads, found)
        pieces = itertools.chain.from_iterable(map(_pieces, self._fds, reads, found))
        if self._ahead:
            return _read_ahead(pieces, self._now)
        return sum(read_whole(fd, piece, offset) for fd, offset, piece in pieces)

    def _shares(self, count: int) -> int:
        """Into how many shares so many reads are split, one for each thread, or for each filling of a queue."""
        if self._queues is not None:
            return -(-count // AT_ONCE)
        return min(self._threads, -(-count // self._fewest))

    def _run(self, tasks: Sequence[Callable[[], int]]) -> list[int]:
        """What the tasks return; a single one, and what a queue does, is done in this thread."""
        if len(tasks) == 1 or self._queues is not None:
            return [task() for task in tasks]
        return self._pool.do_all(tasks)  # none of them writes to memory that an error has handed back

    def _require_same_size(self) -> None:
        self.require_open()
        for fd, part in self._one_of_each:
            size = os.fstat(fd).st_size
            if size != part.file_bytes:
                raise ValueError(
                    f"{part.path} has {size} bytes now and had {part.file_bytes} when it was opened: open it anew"
                )

    def _require_unchanged(self) -> None:
        for fd, part in self._one_of_each:
            part.require_same(fd)

    def require_open(self) -> list[int]:
        """The descriptors, one for each file.

        Raises:
            ValueError: they were closed.
        """
        if not self._close_files.alive:
            raise ValueError(f"the table in {self._parts[0].path} was closed: make a new one")
        return list(self._files.values())

    def close(self) -> None:
        """End the threads and close the files; a second time does nothing."""
        self._pool.close()
        if self._queues is not None:
            self._queues.close()
        self._close_files()


@dataclass(frozen=True)
class _Planned:
    """The reads of a fetch, and where their rows go.

    Attributes:
        index: of each row that is wanted, its place among the different ones.
        whole: by columns of a part, the different rows.
        found: of each part, the rows in `whole` that its reads bring.
        reads: of each part.
    """

    index: np.ndarray
    whole: dict[tuple[int, int], np.ndarray]
    found: list[np.ndarray]
    reads: list[Reads]

    def put(self, places: np.ndarray, raw: np.ndarray) -> None:
        """Copy the rows to wherever they are wanted."""
        for columns, rows in self.whole.items():
            raw[places, slice(*columns)] = rows[self.index]


def _advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, nbytes, advice)


def _can_read_now(fd: int) -> bool:
    """Whether the file system can refuse to wait for a page that is not in memory."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:  # not supported, not known, not allowed; a disk that fails says so when it is read
        return False
    return True


def _pieces(fd: int, reads: Reads, found: np.ndarray) -> Iterator[tuple[int, int, memoryview]]:
    """File, position in it, and the memory that it fills, of each read."""
    if not len(reads):
        return
    target, row_bytes = found.data.cast("B"), found.shape[1]
    places = (reads.first[:-1] * row_bytes).tolist()
    for offset, place, length in zip(reads.offsets.tolist(), places, reads.lengths.tolist()):
        yield fd, offset, target[place : place + length]


def _read_ahead(pieces: Iterator[tuple[int, int, memoryview]], now: bool) -> int:
    """Read what is in memory at once, ask for the rest, and read it later; how many bytes that were."""
    total = 0
    asked: deque[tuple[int, int, memoryview]] = deque()
    for fd, offset, piece in pieces:
        got = _read_now(fd, piece, offset) if now else 0  # what is in the page cache
        total += got
        if got == len(piece):
            continue
        _advise(fd, offset + got, len(piece) - got, os.POSIX_FADV_WILLNEED)  # the disk begins, nobody waits
        asked.append((fd, offset + got, piece[got:]))
        if len(asked) > AHEAD:
            fd, offset, piece = asked.popleft()
            total += read_whole(fd, piece, offset)
    return total + sum(read_whole(fd, piece, offset) for fd, offset, piece in asked)


def _read_now(fd: int, piece: memoryview, offset: int) -> int:
    try:
        return os.preadv(fd, [piece], offset, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or this kind of read is refused; the ordinary one says what is wrong
        return 0
