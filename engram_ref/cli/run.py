"""A command from its start to its exit code: errors, Ctrl-C, a reader that leaves, time left."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from engram_ref.quoting import one_line

_LONGEST_ERROR = 2000  # characters


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Around reading input and writing output: what the user can mend becomes one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, MemoryError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _leave_unread()
        if isinstance(error, ModuleNotFoundError) and error.name != "torch":  # torch's says how to install it
            raise
        number = f"[Errno {error.errno}] " if isinstance(error, OSError) else ""  # of use to nobody at a terminal
        print(f"{prog}: error: {one_line(str(error).removeprefix(number), _LONGEST_ERROR)}", file=sys.stderr)
        sys.exit(2)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has left; another pipe may have broken as well."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(what & select.POLLERR for _, what in poll.poll(0))
    except (OSError, ValueError):  # stdout is no file, or closed
        return False


def _leave_unread() -> NoReturn:
    """End as other programs do whose reader leaves, by the code of SIGPIPE; what is left to print is dropped."""
    # Python flushes stdout once more as it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def run(main: Callable[[], None], prog: str, left: str = "nothing was written") -> NoReturn:
    """Run a command; Ctrl-C ends it in one line, which says what is `left` of the run.

    SIGTERM ends it with code 143 as an exception would: what must be given back or removed, is. Where nobody reads on
    (`... | head`), it ends in silence, with code 141. In a thread that is not the main one, signals stay as they are.
    """
    _handle(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us, as for a daemon: nobody reads there
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be in no encoding; as on stderr
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which a shell's job in the background does
            _handle(signal.SIGINT, signal.default_int_handler)  # it had one for its imports (`starting`)
        try:
            main()
        finally:
            sys.stdout.flush()  # what is written last has no reader, perhaps
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _leave_unread()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _handle(number: int, handler: Callable[[int, FrameType | None], object]) -> None:
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread do this
        signal.signal(number, handler)


def time_left(elapsed: float, done: float, of: float) -> str:
    """For a line of progress: how long it has taken, and, if the rest goes on like this, how long it will.

    Args:
        elapsed: seconds.
        done, of: work, in whatever unit tells best how long it takes.
    """
    left = "" if done <= 0 else f", about {elapsed * max(0.0, of - done) / done:.0f} s left"
    return f"{elapsed:6.0f} s{left}"
