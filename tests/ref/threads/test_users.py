"""Who is inside: closing waits for the others, refuses for oneself, and an interruption leaves nobody counted."""

import threading
import time

import pytest

from engram_ref.threads.users import Users


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def inside(users, leave):
    """A thread that is inside until it may leave."""
    entered = threading.Event()

    def stay():
        with users.here():
            entered.set()
            leave.wait(20)

    thread = in_thread(stay)
    assert entered.wait(20)
    return thread


def test_closing_waits_for_whoever_is_inside():
    users, leave = Users("it"), threading.Event()
    others = [inside(users, leave), inside(users, leave)]
    closing = in_thread(users.close)
    closing.join(0.05)
    assert closing.is_alive() and users.closed  # nobody comes in any more
    leave.set()
    for thread in (closing, *others):
        thread.join(20)
        assert not thread.is_alive()
    users.close()


def test_a_thread_inside_neither_comes_in_again_nor_closes():
    users = Users("this table")
    with users.here():
        assert users.is_here()
        with pytest.raises(RuntimeError, match="this table is used from within a call of its own"):
            users.here()
        with pytest.raises(RuntimeError, match="this table is closed from within a call of its own"):
            users.close()
        assert not users.closed
    assert not users.is_here()
    users.close()


def test_an_error_inside_leaves():
    users = Users("it")
    with pytest.raises(KeyboardInterrupt), users.here():
        raise KeyboardInterrupt
    users.close()


def test_closing_by_two_threads():
    users, leave = Users("it"), threading.Event()
    inside(users, leave)
    closing = [in_thread(users.close) for _ in range(2)]
    time.sleep(0.02)
    leave.set()
    for thread in closing:
        thread.join(20)
        assert not thread.is_alive()
