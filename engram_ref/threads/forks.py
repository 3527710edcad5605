"""What a forked process makes anew: locks that other threads held, and pools whose threads it does not have.

    renew_after_fork(thing)     # from now on `thing.renew()` is called in every child of this process

A child has one thread, a copy of that which called fork: without new locks and pools it would hang at its first fetch.

    python -m pytest tests/ref/threads/test_forks.py
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewable(Protocol):
    """Something with locks or threads."""

    def renew(self) -> None:
        """Make new locks, and forget the threads."""
        ...


_renewables: weakref.WeakSet[Renewable] = weakref.WeakSet()  # the system takes callbacks, but never gives one back


def renew_after_fork(thing: Renewable) -> None:
    """Let a child renew this, if it is still there when the process forks."""
    _renewables.add(thing)


def _renew_all() -> None:
    for thing in list(_renewables):
        thing.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
