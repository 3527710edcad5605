"""A process that forks after or in the middle of a fetch: the child fetches, closes and ends, the parent goes on."""

import os
import threading
import time
import traceback
import warnings

import numpy as np
import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.files import row_reader
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.prefetch import FetchError, Prefetcher
from engram_ref.tables import make_table
from engram_ref.tables.base import Ready
from engram_ref.tables.file import StoredRows, save_rows
from engram_ref.tables.host import HostTable
from engram_ref.tables.staging import Once
from engram_ref.threads.errands import Later, Pool
from engram_ref.threads.users import Users

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

CONFIG = EngramConfig.preset("tiny")
PLAN = HashPlan.build(CONFIG, 500, 2)
VALUES = torch.arange(PLAN.layer(1).rows * CONFIG.row_width, dtype=torch.float32).view(-1, CONFIG.row_width)


def ids_of(seed, length=400):
    return np.random.default_rng(seed).integers(0, 500, (2, length))


def rows_of(ids):
    return VALUES[torch.from_numpy(NgramHasher(PLAN, "numpy")(ids, 1).reshape(-1)).long()]


def in_child(work, seconds=30):
    """Fork, and wait for the child, which does `work`; how it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks with threads: our subject
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


@pytest.fixture
def file_table(tmp_path, monkeypatch):
    monkeypatch.setattr(row_reader, "_ASKING", (3, 20))  # several threads, also for few rows
    save_rows(tmp_path / "table.safetensors", VALUES)
    with make_table("file", StoredRows.find(tmp_path / "table.safetensors")) as table:
        yield table


def test_a_file_is_read_in_the_child_too(file_table):
    rows = torch.arange(0, 4000, 3)

    def fetch():
        assert torch.equal(file_table.start(rows).wait(), VALUES[rows])

    def fetch_and_close():
        fetch()
        file_table.close()

    fetch()
    assert in_child(fetch_and_close) == 0
    fetch()


def test_hot_rows_are_put_together_in_the_child_too():
    """Many, over which torch wakes threads: those of the parent are not in the child."""
    rows, threads = torch.arange(60_000) % len(VALUES), torch.get_num_threads()
    with make_table("hot", VALUES, hot=torch.arange(9)) as table:

        def fetch():
            assert np.array_equal(table.start(rows).wait().numpy(), VALUES.numpy()[rows.numpy()])

        torch.set_num_threads(2)
        try:
            torch.ones(100_000).add(1)  # they are there
            fetch()
            assert in_child(fetch, seconds=10) == 0
        finally:
            torch.set_num_threads(threads)


def test_a_prefetcher_works_in_the_child_too(file_table):
    prefetcher = Prefetcher(NgramHasher(PLAN), {1: file_table})

    def fetch():
        with prefetcher.start(ids_of(0)) as fetch:
            assert torch.equal(fetch[1].wait(), rows_of(ids_of(0)))

    def fetch_and_close():
        fetch(), fetch(), fetch()
        prefetcher.close()

    fetch()
    assert in_child(fetch_and_close) == 0
    assert in_child(prefetcher.close) == 0
    fetch()
    prefetcher.close()


class Held(HostTable):
    """A table whose fetches end when they may."""

    waits = True

    def __init__(self):
        super().__init__(VALUES, "cpu")
        self.begun, self.may_end = threading.Event(), threading.Event()

    def start(self, rows, out=None):
        with self._users.here(), self._users.alone:
            self.begun.set()
            assert self.may_end.wait(30)
            return Ready(torch.index_select(VALUES, 0, rows, out=out))


class HeldLater(Held):
    """The same of a fetch whose rows are gathered by whoever waits for them."""

    def start(self, rows, out=None):
        return Later(lambda: super(HeldLater, self).start(rows, out).wait())


def test_forked_while_a_thread_waits_for_rows():
    table = HeldLater()
    with Prefetcher(NgramHasher(PLAN), {1: table}) as prefetcher, prefetcher.start(ids_of(1)) as fetch:
        thread = threading.Thread(target=fetch[1].wait)
        thread.start()
        assert table.begun.wait(30)
        try:
            assert in_child(fetch.release) == 0
        finally:
            table.may_end.set()
            thread.join()


class Waited:
    """A fetch that ends when it may."""

    def __init__(self):
        self.begun, self.may_end = threading.Event(), threading.Event()

    def wait(self):
        self.begun.set()
        assert self.may_end.wait(30)
        return VALUES[:1]


@pytest.mark.parametrize("kind", [Once, lambda fetch: Later(fetch.wait)], ids=["once", "later"])
def test_forked_while_a_thread_puts_rows_together(kind):
    fetch = Waited()
    pending, untouched = kind(fetch), kind(Ready(VALUES[1:2]))
    thread = threading.Thread(target=pending.wait)
    thread.start()
    assert fetch.begun.wait(30)

    def use():
        with pytest.raises(RuntimeError, match=r"it was under way in process \d+, not in this fork: start it anew"):
            pending.wait()
        assert torch.equal(untouched.wait(), VALUES[1:2])

    try:
        assert in_child(use, seconds=10) == 0
    finally:
        fetch.may_end.set()
        thread.join()
    assert in_child(pending.wait) == 0  # has ended


def test_forked_in_the_middle_of_a_fetch():
    table = Held()
    with Prefetcher(NgramHasher(PLAN), {1: table}) as prefetcher:
        fetch = prefetcher.start(ids_of(1))
        assert table.begun.wait(30)  # locks are held now

        def use():
            table.may_end.set()
            with pytest.raises(FetchError, match=r"it was under way in process \d+, not in this fork: start it anew"):
                fetch[1].wait()
            fetch.release()
            for seed in range(3):  # more than there are buffers
                with prefetcher.start(ids_of(seed)) as mine:
                    assert torch.equal(mine[1].wait(), rows_of(ids_of(seed)))
            prefetcher.close()
            table.close()

        assert in_child(use) == 0
        table.may_end.set()
        assert torch.equal(fetch[1].wait(), rows_of(ids_of(1)))
        fetch.release()


def test_rows_that_had_arrived_are_there_in_the_child():
    with make_table("host", VALUES) as table, Prefetcher(NgramHasher(PLAN), {1: table}) as prefetcher:
        fetch = prefetcher.start(ids_of(2))
        fetch[1].wait()

        def use():
            with prefetcher.start(ids_of(3)) as mine:
                assert torch.equal(mine[1].wait(), rows_of(ids_of(3)))
            assert torch.equal(fetch[1].wait(), rows_of(ids_of(2)))
            fetch.release()

        assert in_child(use) == 0
        assert torch.equal(fetch[1].wait(), rows_of(ids_of(2)))
        fetch.release()


class Batches(torch.utils.data.Dataset):
    """Rows as a data loader's workers fetch them."""

    def __init__(self, prefetcher):
        self.prefetcher = prefetcher

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        with self.prefetcher.start(ids_of(seed, 64)) as fetch:
            return fetch[1].wait().clone()


def test_workers_of_a_data_loader_fetch(file_table):
    with Prefetcher(NgramHasher(PLAN), {1: file_table}) as prefetcher:
        batches = Batches(prefetcher)
        assert torch.equal(batches[0], rows_of(ids_of(0, 64)))  # its threads are there before the workers
        loader = torch.utils.data.DataLoader(batches, None, num_workers=2, timeout=60, multiprocessing_context="fork")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(loader)
        assert all(torch.equal(rows, rows_of(ids_of(seed, 64))) for seed, rows in enumerate(found))
        assert torch.equal(batches[1], rows_of(ids_of(1, 64)))


def test_locks_of_threads_that_are_not_in_the_child_are_made_anew():
    users, pool, held, leave = Users("it"), Pool(1, "errand"), threading.Event(), threading.Event()

    def hold():
        with users.here(), users.alone, pool._lock:
            held.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)

    def use():
        with users.here(), users.alone:
            assert pool.do_all([lambda: 7]) == [7]
        users.close(), pool.close()

    assert in_child(use) == 0
    assert not users.closed
    leave.set()
    thread.join()
