"""The threads that are using something right now, so that it is not taken away from under them.

    users = Users("this table")
    with users.here():                  # any number of threads at a time, each once
        if users.closed: raise ...      # looked at inside: closing waits for whoever is in
        ...
    users.close()                       # nobody comes in any more, and all have left

Each thread holds a lock of its own while it is inside: closing never waits in vain, whatever is interrupted.

    python -m pytest tests/ref/threads/test_users.py
"""

from __future__ import annotations

import threading
import time
from typing import Any

from engram_ref.threads.forks import renew_after_fork

_LOOK_S = 0.0005  # closing looks so often whether somebody is still inside


class Users:
    """Who is inside of something.

    Args:
        what: it is, for messages.

    Attributes:
        closed: nobody may use it any more; to be looked at inside of `here`.
        alone: a lock for what only one thread may do at a time.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.closed = False
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """In a forked process: the other threads are not there."""
        self.alone = threading.Lock()
        self._locks: dict[int, Any] = {}  # by thread, locked while it is inside

    def here(self) -> Any:
        """The calling thread's lock, to be held by `with` while it is inside.

        Raises:
            RuntimeError: it is inside already.
        """
        thread = threading.get_ident()
        lock = self._locks.get(thread)
        if lock is None:
            # A `with` on a lock is what Ctrl-C cannot break in two, as it can a counter: who has left is not counted.
            return self._locks.setdefault(thread, threading.Lock())
        if lock.locked():
            raise RuntimeError(f"{self.what} is used from within a call of its own (observer, signal): return first")
        return lock

    def is_here(self) -> bool:
        """Whether the calling thread is inside."""
        lock = self._locks.get(threading.get_ident())
        return lock is not None and lock.locked()

    def close(self) -> None:
        """Let nobody in, and wait until all have left; a second time does nothing.

        Raises:
            RuntimeError: the calling thread itself is inside.
        """
        if self.is_here():
            raise RuntimeError(f"{self.what} is closed from within a call of its own (observer, signal): return first")
        self.closed = True
        for lock in list(self._locks.values()):
            while lock.locked():  # looked at, never taken: a lock that is held says that its own thread is inside
                time.sleep(_LOOK_S)
