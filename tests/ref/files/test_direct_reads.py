"""Reads past the page cache, many at a time: the bytes, what goes wrong under way, and how little the host does."""

import errno
import os
import threading

import numpy as np
import pytest
import torch

from engram_ref.files import direct_reads, row_reader
from engram_ref.files.direct_reads import Queues
from engram_ref.tables.file import FileTable
from tests.ref.files.stored_cases import R, assert_same_bits, random_content, store
from tests.ref.files.ways import CPU, fetch
from tests.ref.threads.together import in_threads

pytestmark = pytest.mark.skipif(Queues.where_possible() is None, reason="this system reads no files asynchronously")


@pytest.fixture(params=["256 B", "split", "two files"])
def case(request):
    return request.param


@pytest.fixture
def table(case, tmp_path):
    with FileTable(store(tmp_path, case, random_content(case)), CPU, direct=True) as made:
        yield made


def scattered(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, R, count))


@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_more_reads_than_a_queue_takes_come_in_turn(case, at_once, tmp_path, monkeypatch):
    """Both a queue of one and one that is filled and emptied in between; the reader's own shares are of four."""
    monkeypatch.setattr(direct_reads, "AT_ONCE", at_once)
    monkeypatch.setattr(row_reader, "AT_ONCE", 4)
    with FileTable(store(tmp_path, case, random_content(case)), CPU, direct=True) as table:
        for count in (1, 16, 400):
            assert_same_bits(fetch(table, scattered(count)), random_content(case).values(), scattered(count))


def test_a_fetch_is_two_calls_of_the_system_and_no_thread(table, monkeypatch):
    calls, call = [], direct_reads._call
    monkeypatch.setattr(direct_reads, "_call", lambda which, *more: calls.append(which) or call(which, *more))
    fetch(table, scattered(16))
    assert calls == [3, 2]  # asked for all, waited for all
    assert not any(thread.name.startswith("rows") for thread in threading.enumerate())


def test_reads_that_return_less_are_done_again(table, case, monkeypatch):
    """As at a signal, or on a file system over a network."""
    found = direct_reads._Queue._results

    def some_less(queue):
        results, targets = found(queue), queue._commands["target"]
        for at in range(0, len(results), 2):
            place = targets[at] - targets.min()
            np.frombuffer(queue._memory[0], np.uint8)[place + 512 : place + 4096] = 0xAA  # what was not returned
            results[at] = 512
        return results

    monkeypatch.setattr(direct_reads._Queue, "_results", some_less)
    assert_same_bits(fetch(table, scattered(60)), random_content(case).values(), scattered(60))


def test_what_the_disk_says_is_raised_and_the_next_fetch_is_right(table, case, monkeypatch):
    found = direct_reads._Queue._results
    monkeypatch.setattr(direct_reads._Queue, "_results", lambda queue: np.minimum(found(queue), -errno.EIO))
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        fetch(table, scattered(60))
    monkeypatch.undo()
    assert_same_bits(fetch(table, scattered(60)), random_content(case).values(), scattered(60))


def test_after_an_interruption_memory_that_is_written_to_is_nobody_elses(table, case, monkeypatch):
    """Ctrl-C while reads are under way: their queue is given back, which waits for them, and never used again."""
    fetch(table, scattered(3))
    (queue,) = table._reader._queues._free
    wait, gone = direct_reads._Queue._wait, queue._destroy

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(direct_reads._Queue, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(table, scattered(60))
    assert table._reader._queues._free == []
    del queue
    assert not gone.alive
    monkeypatch.setattr(direct_reads._Queue, "_wait", wait)
    assert_same_bits(fetch(table, scattered(60)), random_content(case).values(), scattered(60))


@pytest.mark.parametrize("ended", [0, 2])
def test_a_signal_during_the_wait_changes_nothing(table, case, ended, monkeypatch):
    """The system then says that it was interrupted, or how many have ended until then."""
    call, signals = direct_reads._call, []

    def with_a_signal(which, *arguments):
        if which != 2 or signals:
            return call(which, *arguments)
        signals.append(ended)
        if not ended:
            raise InterruptedError
        return call(which, arguments[0], min(ended, arguments[1]), min(ended, arguments[1]), *arguments[3:])

    monkeypatch.setattr(direct_reads, "_call", with_a_signal)
    assert_same_bits(fetch(table, scattered(60)), random_content(case).values(), scattered(60))
    assert signals


def test_a_full_system_is_waited_for_if_reads_are_under_way_and_raised_if_not(table, case, monkeypatch):
    """It takes two reads here, and no more before both have ended. Where none is under way, nothing would ever end."""
    call, room, under_way, refused = direct_reads._call, 2, 0, 0

    def narrow(which, context, count=0, *more):
        nonlocal under_way, refused
        if which == 3 and (under_way or not room):
            refused += 1
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if which == 3:
            taken = call(which, context, min(count, room), *more)
            under_way += taken
            return taken
        got = call(which, context, 1, 1, *more[1:])
        under_way -= got
        return got

    monkeypatch.setattr(direct_reads, "_call", narrow)
    assert_same_bits(fetch(table, scattered(9)), random_content(case).values(), scattered(9))
    assert refused
    room = 0
    with pytest.raises(BlockingIOError):
        fetch(table, scattered(1))


def test_several_threads_have_a_queue_each(table, case):
    values = random_content(case).values()
    for seed, got in enumerate(in_threads(lambda seed: [fetch(table, scattered(40, seed + 10 * i)) for i in range(5)])):
        for i in range(5):
            assert_same_bits(got[i], values, scattered(40, seed + 10 * i))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_queues_of_its_own(table, case):
    values = random_content(case).values()
    fetch(table, scattered(5))
    child = os.fork()
    if child == 0:
        try:
            assert_same_bits(fetch(table, scattered(30)), values, scattered(30))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same_bits(fetch(table, scattered(30)), values, scattered(30))


def test_without_a_queue_threads_read(case, tmp_path, monkeypatch):
    def none_left(which, *arguments):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(direct_reads, "_call", none_left)
    with FileTable(store(tmp_path, case, random_content(case)), CPU, direct=True) as table:
        assert table._reader._queues is None
        assert_same_bits(fetch(table, scattered(60)), random_content(case).values(), scattered(60))


def test_where_the_system_has_no_second_queue_reads_follow_each_other(table, case, monkeypatch):
    """Two fetches at a time, of which the first has the only queue."""
    call = direct_reads._call

    def no_more(which, *arguments):
        if which == 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return call(which, *arguments)

    monkeypatch.setattr(direct_reads, "_call", no_more)
    first, second = (table.ask(scattered(9, seed)) for seed in range(2))
    for seed, pending in ((1, second), (0, first)):
        assert_same_bits(pending.wait(), random_content(case).values(), scattered(9, seed))
    assert len(table._reader._queues._free) == 1


def test_queues_end_with_their_table(table):
    fetch(table, scattered(3))
    (queue,) = table._reader._queues._free
    table.close()
    assert not queue._destroy.alive and table._reader._queues._free == []
