"""Whose buffers are whose: no row is written over, no slot is lost, whatever is released, interrupted or forgotten."""

import contextlib
import gc
import itertools
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engram_ref.hashing import NgramHasher
from engram_ref.prefetch import FetchError, Prefetcher, slots
from engram_ref.prefetch import fetch as fetching
from engram_ref.prefetch import prefetcher as starting
from engram_ref.tables import make_table
from engram_ref.threads.errands import Later
from tests.ref.prefetch.tables import CONFIG, PLAN, Gated, SlowTable, expected, random_ids, slow_tables


def test_a_second_release_does_nothing_to_the_next_fetch(values):
    ids = [random_ids(seed) for seed in range(3)]
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        with prefetcher.start(ids[0]) as first:
            first[1].wait(), first.release()
            second = prefetcher.start(ids[1])
            rows = second[1].wait()
        first.release()
        with prefetcher.start(ids[2]) as third:
            third[1].wait()
            assert torch.equal(rows, expected(values, ids[1], 1))
            with pytest.raises(RuntimeError, match=r"rows of layer 1 were released: wait for them before release\(\)"):
                first[1].wait()
        second.release()


@pytest.mark.parametrize(("ends_in", "raised"), [(None, FetchError), (ZeroDivisionError, ZeroDivisionError)])
def test_the_block_of_a_fetch_raises_what_failed_unless_it_ended_in_another_error(values, ends_in, raised):
    prefetcher = Prefetcher(NgramHasher(PLAN), slow_tables(values, fail_at=1))
    with pytest.raises(raised), prefetcher, prefetcher.start(random_ids(0)):
        if ends_in:
            raise ends_in


def test_tables_of_other_sizes_than_the_plan_are_refused(values):
    fewer = {**values, 3: values[3][:-1]}
    with pytest.raises(ValueError, match=r"rows for the table of layer 3, which has .*: give the plan"):
        Prefetcher(NgramHasher(PLAN), slow_tables(fewer))


def test_a_failed_layer_frees_no_buffer_that_another_is_writing(values):
    tables = {1: SlowTable(values[1], fail_at=1), 3: Gated(values[3])}
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        fetch = prefetcher.start(random_ids(0, (4, 60)))

        def release():
            with pytest.raises(FetchError, match="layer 1 failed: the disk has gone"):
                fetch.release()

        releasing = threading.Thread(target=release)
        releasing.start()
        assert tables[3].begun.wait(30)
        releasing.join(0.05)
        assert releasing.is_alive() and not fetch._lease.over
        tables[3].may_end.set()
        releasing.join(30)
        assert fetch._lease.over
        fetch.release()  # it was told


class Late(SlowTable):
    """A table whose rows arrive only while somebody waits for them, and when they may; a file's do."""

    def __init__(self, values):
        super().__init__(values)
        self.begun, self.may_end = threading.Event(), threading.Event()

    def start(self, rows, out=None):
        def gather():
            self.begun.set()
            assert self.may_end.wait(30)
            return super(Late, self).start(rows, out).wait()

        return Later(gather)


def test_no_other_fetch_gets_the_place_of_rows_that_a_thread_is_waiting_for(values):
    table = Late(values[1])
    with Prefetcher(NgramHasher(PLAN), {1: table}) as prefetcher, ThreadPoolExecutor(2) as threads:
        fetch, other = prefetcher.start(random_ids(0)), random_ids(1)
        joined = threads.submit(fetch[1].wait)
        assert table.begun.wait(30)
        released = threads.submit(fetch.release)
        time.sleep(0.02)
        assert not released.done()
        table.may_end.set()
        assert torch.equal(joined.result(), expected(values, random_ids(0), 1))
        released.result()
        with pytest.raises(RuntimeError, match="were released"):
            fetch[1].wait()
        with prefetcher.start(other) as next_one:
            assert torch.equal(next_one[1].wait(), expected(values, other, 1))


def interrupted_at(step):
    """Ctrl-C where so many lines of slots or of contextlib have begun."""
    files, lines = {slots.__file__, contextlib.__file__}, itertools.count()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and next(lines) == step:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    return trace


def test_a_wait_that_is_interrupted_lets_go_of_the_buffers_though_the_exception_is_kept(values):
    """As a prompt does, which keeps the last one; its frames, and what they hold, live on."""
    table, kept, before, rows = Late(values[1]), [], sys.gettrace(), None
    table.may_end.set()
    with Prefetcher(NgramHasher(PLAN), {1: table}) as prefetcher:
        while rows is None:
            fetch = prefetcher.start(random_ids(0))
            fetch[1].settle()
            sys.settrace(interrupted_at(len(kept)))
            try:
                rows = fetch[1].wait()
            except KeyboardInterrupt as error:
                kept.append(error)
            finally:
                sys.settrace(before)
            releasing = threading.Thread(target=fetch.release, daemon=True)
            releasing.start()
            releasing.join(10)
            assert not releasing.is_alive(), f"step {len(kept)}"
        assert kept and torch.equal(rows, expected(values, random_ids(0), 1))


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_fetch(values):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values, fail_at=1)) as prefetcher:
        with pytest.raises(KeyboardInterrupt), prefetcher.start(random_ids(4, (2, 300))):
            raise KeyboardInterrupt
        for _ in range(3):
            prefetcher.start(random_ids(5)).release()


def test_a_release_that_is_interrupted_lends_the_slot_when_nobody_writes_any_more(values, monkeypatch):
    tables = {1: SlowTable(values[1]), 3: Gated(values[3])}
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        first, second = prefetcher.start(random_ids(0, (4, 60))), prefetcher.start(random_ids(1, (4, 60)))
        assert tables[3].begun.wait(30)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fetching.Join, "settle", lambda join: (_ for _ in ()).throw(KeyboardInterrupt))
            first.release()
        threading.Timer(0.1, tables[3].may_end.set).start()
        with prefetcher.start(random_ids(2, (4, 60))) as third:  # the same slot, which the worker was writing to
            assert tables[3].may_end.is_set()
            assert torch.equal(third[3].wait(), expected(values, random_ids(2, (4, 60)), 3))
        second.release()


@pytest.mark.parametrize("background", [True, False])
def test_a_start_that_is_interrupted_keeps_no_slot(values, background, monkeypatch):
    tables = slow_tables(values)
    with Prefetcher(NgramHasher(PLAN), tables, background=background) as prefetcher:
        for _ in range(5):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
                where, name = (starting, "Fetch") if background else (tables[3], "start")
                patch.setattr(where, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                prefetcher.start(random_ids(0))
            assert caught.tb  # it holds the frames, and what was in them
        with prefetcher.start(random_ids(1)) as fetch:
            assert torch.equal(fetch[3].wait(), expected(values, random_ids(1), 3))


class StoppedBehind:
    """A lock behind whose block Ctrl-C comes."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        raise KeyboardInterrupt


@pytest.mark.parametrize("lock", ["alone", "here"])
def test_a_start_that_is_interrupted_behind_a_lock_keeps_no_slot(values, lock, monkeypatch):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values), background=False) as prefetcher:
        stopped = StoppedBehind()
        for _ in range(3):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
                patch.setattr(prefetcher._users, lock, stopped if lock == "alone" else lambda: stopped)
                prefetcher.start(random_ids(0))
            assert caught.tb  # it holds the frames, and what was in them
        fetches = [prefetcher.start(random_ids(1)) for _ in range(2)]
        assert all(torch.equal(fetch[3].wait(), expected(values, random_ids(1), 3)) for fetch in fetches)


@pytest.mark.parametrize("collected", ["at once", "with its circle"])
def test_a_forgotten_fetch_gives_its_slot_back_and_its_rows_stay(values, collected):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        kept = []
        for seed in range(6):
            fetch = prefetcher.start(random_ids(seed))
            kept.append(fetch[3].wait())
            if collected == "with its circle":
                fetch.itself = fetch
            del fetch
        for seed, rows in enumerate(kept):
            assert torch.equal(rows, expected(values, random_ids(seed), 3))


def test_circles_are_looked_for_where_no_slot_is_free(values):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        gc.disable()
        try:
            fetches = [prefetcher.start(random_ids(seed)) for seed in range(2)]
            for fetch in fetches:
                fetch.itself = fetch
            del fetch, fetches
            prefetcher.start(random_ids(2)).release()
        finally:
            gc.enable()


def test_rows_that_arrive_while_somebody_waits_are_not_written_after_a_release(values, monkeypatch):
    """Between the first look, whether they are released, and the last."""
    tables = {layer_id: make_table("hot", rows, hot=torch.arange(3)) for layer_id, rows in values.items()}
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        fetch = prefetcher.start(random_ids(0))
        released = iter([fetch.release])
        monkeypatch.setattr(type(fetch[1]), "tell", lambda join: next(released, lambda: None)())
        with pytest.raises(RuntimeError, match="rows of layer 1 were released"):
            fetch[1].wait()


def test_a_join_keeps_the_slot_of_a_forgotten_fetch(values):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        joins = [prefetcher.start(random_ids(seed))[3] for seed in range(2)]
        with pytest.raises(RuntimeError, match="2 fetches are in flight"):
            prefetcher.start(random_ids(2))
        for seed, join in enumerate(joins):
            assert torch.equal(join.wait(), expected(values, random_ids(seed), 3))


def test_what_nobody_wants_any_more_is_waited_for_or_not_begun(values):
    tables = {1: Gated(values[1]), 3: SlowTable(values[3])}
    large = (4, 60)
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        prefetcher.start(random_ids(0, large))
        assert tables[1].begun.wait(30)
        prefetcher.start(random_ids(1, large))  # stands behind the first
        threading.Timer(0.1, tables[1].may_end.set).start()
        fetches = [prefetcher.start(random_ids(seed, large)) for seed in (2, 3)]
        for seed, fetch in zip((2, 3), fetches):
            assert torch.equal(fetch[3].wait(), expected(values, random_ids(seed, large), 3))
            fetch.release()
    assert tables[3].fetches == 2  # the forgotten ones had not begun with this layer


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_a_storm_of_interruptions(values):
    """Ctrl-C anywhere: no slot is lost, no row is wrong, closing does not hang."""
    tables = {layer_id: make_table("host", v) for layer_id, v in values.items()}
    pool = [random_ids(seed, shape) for seed, shape in enumerate([(1, 1), (2, 9), (4, 120)])]
    want = [expected(values, ids, 3) for ids in pool]
    generator, interruptions, whole = np.random.default_rng(0), 0, 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        prefetcher = Prefetcher(NgramHasher(PLAN), tables)
        for step in range(1500):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 6e-4))
                with prefetcher.start(pool[step % 3]) as fetch:
                    rows = fetch[3].wait()
                    assert torch.equal(rows, want[step % 3])
                signal.setitimer(signal.ITIMER_REAL, 0)
                whole += 1
            except KeyboardInterrupt:
                interruptions += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interruptions > 50 and whole > 50
    fetches = [prefetcher.start(pool[2]) for _ in range(2)]
    assert all(torch.equal(fetch[3].wait(), want[2]) for fetch in fetches)
    prefetcher.close()
    for table in tables.values():
        table.close()


@pytest.mark.parametrize("placement", ["host", "hot", "slow"])
def test_two_threads_get_their_own_rows(values, placement):
    options = {"hot": torch.arange(0, 5000, 3)} if placement == "hot" else {}
    tables = {
        i: SlowTable(v) if placement == "slow" else make_table(placement, v, **options) for i, v in values.items()
    }
    pool = [random_ids(seed, (1, 1 + 40 * (seed % 5))) for seed in range(20)]
    want = [expected(values, ids, 3) for ids in pool]
    wrong = []
    with Prefetcher(NgramHasher(PLAN), tables, buffers=4) as prefetcher:

        def serve(offset):
            generator = np.random.default_rng(offset)
            for _ in range(150):
                first, second = generator.integers(0, 20, 2)
                fetches = [(n, prefetcher.start(pool[n])) for n in (first, second)]
                for n, fetch in fetches[:: generator.choice([-1, 1])]:
                    if not torch.equal(fetch[3].wait(), want[n]):
                        wrong.append(n)
                    fetch.release()

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(serve, range(2)))
    assert not wrong


def test_releases_in_any_order(values):
    """2,500 steps: up to four in flight, small and large, released, forgotten or left to their block."""
    pool = [random_ids(seed, (1, 4 if seed % 2 else 70)) for seed in range(40)]
    want = [expected(values, ids, 1) for ids in pool]
    generator = np.random.default_rng(5)
    in_flight, started = [], 0
    choices, places = generator.integers(0, 40, 2_500), generator.random(5_000)
    with Prefetcher(NgramHasher(PLAN), {1: SlowTable(values[1])}, buffers=4) as prefetcher:
        for n in choices:
            if len(in_flight) == 4:
                m, fetch = in_flight.pop(int(4 * places[started]))
                rows = fetch[1].wait()
                assert torch.equal(rows, want[m]), started
                if places[started + 1] < 0.9:
                    fetch.release()
                del fetch
            in_flight.append((n, prefetcher.start(pool[n])))
            started += 1
        del in_flight
    assert started == 2_500


def test_buffers_are_kept_until_they_are_too_small_and_are_written_to_in_any_mode(values):
    table, buffers = SlowTable(values[1]), slots.Buffers()
    with torch.inference_mode():
        first = buffers.room(1, table, 5)
    assert first.shape == (5, CONFIG.row_width) and first.dtype == values[1].dtype and not first.is_inference()
    for count in (5, 3):
        assert buffers.room(1, table, count).data_ptr() == first.data_ptr()
    assert buffers.room(1, table, 6).shape == (6, CONFIG.row_width)
    assert buffers.room(3, table, 5).data_ptr() != buffers.room(1, table, 5).data_ptr() != first.data_ptr()
    table.trained = True  # gradients need tensors of their own
    assert buffers.room(1, table, 5) is None
    table.trained, table.device = False, torch.device("cuda")
    assert buffers.room(1, table, 5) is None
