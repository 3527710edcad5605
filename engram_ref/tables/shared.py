"""One copy of a table for all processes of a machine: laid down by the first, mapped by all the others.

    table = make_table("host", rows, device, shared="v41-layer-1")      # in each of eight processes: one copy

The first process that names the copy lays the rows down in memory that has no name in any file system (memfd), and
hands it to the others over a socket that has none either (Linux's abstract names), together with what it holds, or with
the error that it met. Nothing can be left behind, whoever dies when: the system takes the memory with the last process
that maps it. Where the first one dies while it lays rows down, the next begins anew; where it ends later, one of the
others hands on the same memory. Another user's process, and a table of another shape or content, are refused.

Content is compared whole: whoever is handed a copy holds its own rows against it, about a second for each GiB. Only
rows of the same file in the same state are not read again, so that eight processes open one checkpoint as fast as one.

    python -m pytest tests/ref/tables/test_shared.py
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import json
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engram_ref.files.stored_rows import StoredRows
from engram_ref.quoting import one_line, quoted
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory, require_host_bytes
from engram_ref.rows.rows import Rows
from engram_ref.tables.file import FileTable
from engram_ref.tables.laid import len_of
from engram_ref.threads.forks import renew_after_fork

PATIENCE = 3600.0  # seconds that a process waits for another one to lay down the rows
_LONGEST_NAME = 200
_SAMPLE = 64  # rows that tell at once most tables from others; where they are the same, all rows are compared
_FILES = "files"  # in a head: the state of the files that rows lie in; copies of one content may have come from several
_HEAD_BYTES = 16384  # of a message: what a copy holds, as JSON, or an error, whose 400 characters may be 4,800 bytes
_AGAIN_S = 0.005  # between two looks at a name that is just changing hands
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_WAITING = 4096  # processes that may wait to be served; the system may allow fewer at a time

Head = Mapping[str, Any]  # what a copy holds, or the error why there is none
Lay = Callable[[HostMemory], object]  # writes the content
OtherRow = Callable[[int], int | None]  # of the memory with this descriptor, the first row that is not the same


class SharedMemory(HostMemory):
    """Memory that all processes of one user map who name it, and that is handed on as long as one of them has it.

    Args:
        nbytes: of the memory.
        keeper: of its descriptor.
    """

    def __init__(self, nbytes: int, keeper: _Keeper) -> None:
        super().__init__(nbytes, fd=keeper.fd)
        self._end = weakref.finalize(self, keeper.close)
        keeper.start()

    def close(self) -> None:
        """Hand it to nobody any more, and let go of it."""
        self._end()
        super().close()


def shared_memory(
    name: str, nbytes: int, head: Head, lay: Lay, other_row: OtherRow, patience: float = PATIENCE
) -> SharedMemory:
    """The memory that goes by a name on this machine, laid down by `lay` if nobody has done so.

    Args:
        name: any text.
        nbytes: of the memory.
        head: what it holds (`describe`), as JSON has it; processes that name one memory must say the same, but for the
            files that it came from.
        lay: writes the content.
        other_row: compares the content with memory that is there already, which may have come from elsewhere.
        patience: seconds to wait for somebody else who is at it.

    Raises:
        ValueError: no name, memory that does not fit, another content under this name, or whatever went wrong for the
            process that laid it down.
        OSError: another user has the name, the wait was too long, or the system has no such memory.
    """
    assert len(json.dumps(head)) <= _HEAD_BYTES, head  # every caller describes a table
    address = _address(name)
    deadline = time.monotonic() + patience
    while True:
        listener = None
        try:
            listener = _bind(address)
            if listener is not None:
                return _lead(_Keeper(address, head, listener=listener), listener, nbytes, lay)
        except BaseException:  # Ctrl-C before there is a keeper, too: others would wait for an answer
            if listener is not None:
                listener.close()
            raise
        line = _connect(address)
        if line is not None:
            memory = _follow(_Keeper(address, head, line=line), line, name, nbytes, other_row, deadline)
            if memory is not None:
                return memory
        time.sleep(_AGAIN_S)  # who had the name is gone: whoever binds it first lays the rows down
        if time.monotonic() > deadline:
            raise TimeoutError(f"shared={quoted(name)}: nobody laid the rows down within {patience:.0f} s")


def _lead(keeper: _Keeper, listener: socket.socket, nbytes: int, lay: Lay) -> SharedMemory:
    """Lay the content down, then serve whoever asks; whoever has asked so far is told of an error."""
    try:
        require_host_bytes(nbytes)
        # No file in /dev/shm: a container gives that 64 MiB, and a killed process leaves it full.
        keeper.fd = os.memfd_create(keeper.address[1:].decode(), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(keeper.fd, max(nbytes, 1))
        # No reader falls off its end.
        fcntl.fcntl(keeper.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        lay(HostMemory(nbytes, fd=keeper.fd))
        return SharedMemory(nbytes, keeper)
    except BaseException as error:
        _tell_waiting(listener, error)
        keeper.close()
        raise


def _tell_waiting(listener: socket.socket, error: BaseException) -> None:
    with contextlib.suppress(OSError):  # nobody asks any more
        listener.setblocking(False)
        while True:
            _send(listener.accept()[0], {"error": one_line(error), "mended": isinstance(error, ValueError)})


def _follow(
    keeper: _Keeper, line: socket.socket, name: str, nbytes: int, other_row: OtherRow, deadline: float
) -> SharedMemory | None:
    """The memory that the other side has laid down, if it holds the same; None if it ended before."""
    try:
        found, keeper.fd = _receive(line, name, deadline)
        if keeper.fd < 0:
            keeper.close()
            return None
        head = keeper.head
        other = [key for key in head if key != _FILES and head[key] != found.get(key)]
        if other:
            raise ValueError(
                f"shared={quoted(name)} names a table with {other[0]} {quoted(found.get(other[0]))}; this one has "
                f"{quoted(head[other[0]])}: give another table another name"
            )
        files = head.get(_FILES)
        if files is None or files != found.get(_FILES):  # who serves goes on serving others meanwhile
            number = other_row(keeper.fd)
            if number is not None:
                raise ValueError(
                    f"shared={quoted(name)} names a table whose row {number} has other bytes than this one's: give "
                    "another table another name"
                )
        return SharedMemory(nbytes, keeper)
    except BaseException:
        keeper.close()
        raise


class _Keeper:
    """Hands a descriptor to whoever asks under an address; while another process does so, waits for its end.

    It is made before there is a descriptor, since rows take long to be laid down: a process forked meanwhile would keep
    the address, and never answer there.

    Args:
        address: where they ask.
        head: goes with the descriptor.
        listener: bound to the address; or
        line: to the process that is.

    Attributes:
        fd: the descriptor, -1 until there is one; it is closed in the end.
    """

    def __init__(
        self,
        address: bytes,
        head: Head,
        listener: socket.socket | None = None,
        line: socket.socket | None = None,
    ) -> None:
        self.address = address
        self.head = head
        self.fd = -1
        self._listener = listener
        self._lines = [] if line is None else [line]  # to the one process that serves, or from all that are served
        self._stop, self._stopped = socket.socketpair()
        self._thread: threading.Thread | None = None
        renew_after_fork(self)

    def start(self) -> None:
        """Hand the descriptor on, from now on."""
        self._thread = threading.Thread(target=self._keep, name="engram-shared", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """In a forked process: the parent keeps the memory. It stays mapped here, and is not handed on."""
        self._let_go()

    def close(self) -> None:
        """Stop, and close the descriptor."""
        with contextlib.suppress(OSError):  # closed already: a forked process has let go of it
            self._stop.send(b".")
            if self._thread is not None and self._thread.is_alive():  # it was never started where laying failed
                self._thread.join()
        self._let_go()

    def _let_go(self) -> None:
        for end in (self._listener, *self._lines, self._stop, self._stopped):  # the name is free before they are told
            if end is not None:
                end.close()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _keep(self) -> None:
        while self._serve() if self._listener is not None else self._stand_by():
            pass

    def _serve(self) -> bool:
        """Serve one process; whether to go on."""
        assert self._listener is not None
        if self._stopped in _ready(self._listener, self._stopped):
            return False
        try:
            line = self._listener.accept()[0]
            if _peer(line)[1] == os.getuid() and _send(line, self.head, self.fd):
                self._lines = [*filter(_is_there, self._lines), line]  # open until the end, which it learns by this
            else:
                line.close()
        except OSError:  # it may have gone again; or no descriptor is left, and it still waits
            time.sleep(_AGAIN_S)
        return True

    def _stand_by(self) -> bool:
        """Wait until the one who serves is gone, and try to take its place; whether to go on."""
        if self._stopped in _ready(*self._lines, self._stopped, seconds=None if self._lines else _AGAIN_S):
            return False
        if self._lines and _greets(self._lines[0]):
            return True
        for line in self._lines:
            line.close()
        self._lines = []
        with contextlib.suppress(OSError):  # no descriptor is left: it tries again
            self._listener = _bind(self.address)
            successor = _connect(self.address) if self._listener is None else None  # was quicker: the same memory
            self._lines = [] if successor is None else [successor]
        return True


def _ready(*ends: socket.socket, seconds: float | None = None) -> list[socket.socket]:
    """Those of which something can be read, or the end; waits for one, or so long."""
    poll = select.poll()  # select.select refuses descriptors from 1024 on, which a server with many clients has
    for end in ends:
        poll.register(end, select.POLLIN)
    found = {fd for fd, _ in poll.poll(None if seconds is None else 1000 * seconds)}
    return [end for end in ends if end.fileno() in found]


def _greets(line: socket.socket) -> bool:
    """Whether the other end says what it has, which is known here, or has ended."""
    try:
        return bool(line.recv(_HEAD_BYTES))
    except OSError:
        return False


def _address(name: str) -> bytes:
    if not hasattr(os, "memfd_create"):
        raise ValueError("shared=: this system has no memory without a name (memfd, Linux): leave it out")
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        raise ValueError(f"shared={quoted(name)}: give a name of 1 .. {_LONGEST_NAME} characters")
    return f"\0engram-{os.getuid()}-{hashlib.sha256(name.encode()).hexdigest()[:40]}".encode()


def _bind(address: bytes) -> socket.socket | None:
    """A socket that listens there; None where another one does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(_WAITING)
        return listener
    except BaseException as error:  # Ctrl-C, too: whoever keeps the exception would keep the name
        listener.close()
        if isinstance(error, OSError):
            return None
        raise


def _connect(address: bytes) -> socket.socket | None:
    """A line to whoever listens there; None if nobody does any more."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(address)
    except OSError:
        line.close()
        return None
    return line


def _send(line: socket.socket, head: Head, fd: int | None = None) -> bool:
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    with contextlib.suppress(OSError):
        line.sendmsg([json.dumps(head).encode()], rights)
        return True
    return False


def _receive(line: socket.socket, name: str, deadline: float) -> tuple[Head, int]:
    """What the other side has, and its descriptor; -1 if it ended before it had anything.

    Raises:
        ValueError: what went wrong there.
        OSError: it is another user's, or it takes too long.
    """
    process, user, _ = _peer(line)
    if user != os.getuid():
        raise PermissionError(f"shared={quoted(name)}: user {user} has taken this name: give another one")
    line.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        # Python makes no descriptor that a program started from here inherits; of one that it receives, one must ask.
        text, rights, _, _ = line.recvmsg(_HEAD_BYTES, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        line.settimeout(None)
    except TimeoutError:
        raise TimeoutError(
            f"shared={quoted(name)}: process {process} has not laid the rows down in time: is it stopped?"
        ) from None
    except OSError:
        text, rights = b"", []
    found = json.loads(text) if text else {}
    if "error" in found:
        kind = ValueError if found["mended"] else OSError
        raise kind(f"{found['error']} (in process {process}, which laid down shared={quoted(name)})")
    return found, array.array("i", rights[0][2])[0] if rights else -1


def _peer(line: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end."""
    return _CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))


def _is_there(line: socket.socket) -> bool:
    """Whether the other end is open: it never sends anything, so what can be read is its end."""
    if _ready(line, seconds=0):
        line.close()
        return False
    return True


def describe(rows: Tensor | Rows | StoredRows, widths: list[int]) -> dict[str, Any]:
    """What tells a table from others, in values that JSON has: shape, format, how it is laid, a sample of its bytes.

    And which files its rows lie in, if they do: where these are the same, in the same state, so is every byte.
    """
    row_format = RowFormat(rows.dtype, rows.shape[1]) if isinstance(rows, Tensor) else rows.format  # laid in any order
    return {
        "rows": len_of(rows),
        "format": f"{row_format.dtype} x {row_format.width}{', scaled' if row_format.scaled else ''}",
        "parts": widths,
        "sample of rows": _sample(rows, len_of(rows)),
        _FILES: _state_of_files(rows) if isinstance(rows, StoredRows) else None,
    }


def _state_of_files(rows: StoredRows) -> str:
    """A digest, since there may be hundreds of parts: the stamp of each one's file, and where in it which rows lie."""
    where = [(part.stamp, part.offset, part.first, part.rows, part.columns) for part in rows.parts]
    return hashlib.sha256(json.dumps(where).encode()).hexdigest()


def _sample(rows: Tensor | Rows | StoredRows, count: int) -> str:
    """A digest of some rows from the first to the last."""
    numbers = torch.linspace(0, max(0, count - 1), min(_SAMPLE, count), dtype=torch.float64, device="cpu").long()
    if isinstance(rows, StoredRows):
        with FileTable(rows, torch.device("cpu")) as table:
            raw = table.stored(numbers)
    elif isinstance(rows, Rows):
        raw = rows.take(numbers)
    else:
        raw = Rows.of(rows.detach()[numbers.to(rows.device)].contiguous()).take(
            torch.arange(len(numbers), device="cpu")
        )
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]
