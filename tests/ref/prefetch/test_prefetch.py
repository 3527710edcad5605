"""The schedule of fetches: what arrives and when, what happens to errors, what breaks without a safeguard."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher, TokenHistory
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.ngram import Hashed
from engram_ref.prefetch import Fetch, FetchError, Prefetcher, slots
from engram_ref.prefetch import fetch as fetching
from engram_ref.prefetch import prefetcher as starting
from engram_ref.tables import RowFormat, Table, make_table
from engram_ref.tables.base import Ready, check_rows
from engram_ref.tables.file import StoredRows, save_rows
from engram_ref.tables.hot import HotTable
from engram_ref.threads.errands import Later
from engram_ref.vocab import CompressedVocab

CPU = torch.device("cpu")
CONFIG = EngramConfig.preset("tiny").replace(layer_ids=(1, 3))
PLAN = HashPlan.build(CONFIG, 500, 2)


class SlowTable(Table):
    """A table in memory that takes its time: the stand-in for whatever makes a fetch worth hiding."""

    placement = "slow"
    waits = True

    def __init__(self, values, seconds=0.0, fail_at=None):
        super().__init__(len(values), RowFormat(values.dtype, values.shape[1]), CPU, CPU)
        self.values, self.seconds, self.fail_at = values, seconds, fail_at
        self.fetches = self.trims = 0
        self.threads = set()

    def start(self, rows, out=None):
        self.threads.add(threading.current_thread().name)
        self.fetches += 1
        if self.fetches == self.fail_at:
            raise OSError("the disk has gone")
        time.sleep(self.seconds)
        check_rows(rows, self.rows)
        return Ready(torch.index_select(self.values, 0, rows, out=out) if out is not None else self.values[rows])

    def stored(self, rows):
        return self.values[rows].view(torch.uint8)

    def _held(self):
        return {"host": self.values.nbytes}

    def trim(self):
        self.trims += 1


def make_values(layer_id):
    generator = torch.Generator().manual_seed(layer_id)
    return torch.randn(PLAN.layer(layer_id).rows, CONFIG.row_width, generator=generator)


@pytest.fixture(scope="module")
def values():
    return {layer_id: make_values(layer_id) for layer_id in CONFIG.layer_ids}


def slow_tables(values, seconds=0.0, fail_at=None):
    return {layer_id: SlowTable(v, seconds, fail_at) for layer_id, v in values.items()}


def expected(values, ids, layer_id, history=None):
    rows = NgramHasher(PLAN, "numpy")(ids, layer_id, history=history)
    return values[layer_id][torch.from_numpy(rows).long().reshape(-1)]


def numbers(ids, layer_id):
    return torch.from_numpy(NgramHasher(PLAN)(ids, layer_id).reshape(-1))


def random_ids(seed, shape=(2, 9)):
    return np.random.default_rng(seed).integers(0, PLAN.compressed_size, shape)


def alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("engram-prefetch")]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (1, 2000)])
def test_the_rows_of_every_layer_arrive(values, background, shape):
    ids = random_ids(0, shape)
    prefetcher = Prefetcher(NgramHasher(PLAN), slow_tables(values), background=background)
    with prefetcher, prefetcher.start(ids) as fetch:
        assert list(fetch) == [1, 3] and len(fetch) == 2
        for layer_id in (3, 1):  # joined in any order
            assert torch.equal(fetch[layer_id].wait(), expected(values, ids, layer_id))
            assert torch.equal(fetch[layer_id].row_numbers, numbers(ids, layer_id))


def test_a_wrong_hash_would_be_noticed(values):
    ids = random_ids(0)
    other = HashPlan.build(CONFIG.replace(seed=1), 500, 2)
    with Prefetcher(NgramHasher(other), slow_tables(values)) as prefetcher, prefetcher.start(ids) as fetch:
        assert not torch.equal(fetch[1].wait(), expected(values, ids, 1))


def test_fetches_run_beside_the_caller_and_hide_their_time(values):
    tables = slow_tables(values, seconds=0.15)
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        begin = time.perf_counter()
        fetch = prefetcher.start(random_ids(1))
        started = time.perf_counter() - begin
        time.sleep(0.6)  # the compute that hides the fetch
        begin = time.perf_counter()
        fetch[1].wait(), fetch[3].wait()
        exposed = time.perf_counter() - begin
    assert started < 0.1 and exposed < 0.1  # of 0.3
    assert all("engram-prefetch" in name for table in tables.values() for name in table.threads)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (1, 3000)])
def test_token_ids_are_compressed_and_hashed_for_all_layers_at_once(values, background, shape):
    vocab = CompressedVocab.from_map(np.arange(900) % PLAN.compressed_size)
    history, tables = TokenHistory(PLAN, shape[0]), {i: make_table("host", v) for i, v in values.items()}
    with Prefetcher(NgramHasher(PLAN), tables, background=background) as prefetcher:
        for seed in range(3):
            tokens = np.random.default_rng(seed).integers(0, 900, shape)
            hashed = prefetcher.hash_tokens(tokens, vocab, history)
            compressed = hashed.compressed
            assert np.array_equal(compressed, vocab(tokens))
            with prefetcher.start_hashed(hashed) as fetch:
                assert list(fetch) == list(values)
                for layer_id in fetch:
                    assert torch.equal(fetch[layer_id].wait(), expected(values, compressed, layer_id, history))
            history.advance(compressed)
        for wrong in (np.array([[900]]), np.array([[0.5]])):
            with pytest.raises(ValueError, match="token ids"):
                prefetcher.hash_tokens(wrong, vocab)
        assert all(slot.is_free() for slot in prefetcher._slots._all)


def test_without_a_background_nothing_overlaps(values):
    tables = slow_tables(values, seconds=0.03)
    with Prefetcher(NgramHasher(PLAN), tables, background=False) as prefetcher:
        begin = time.perf_counter()
        prefetcher.start(random_ids(1))
        assert time.perf_counter() - begin >= 0.06
    assert not alive() and all(table.threads == {"MainThread"} for table in tables.values())


def test_ids_and_history_may_change_once_a_fetch_has_started(values):
    history = TokenHistory(PLAN, 2)
    ids = random_ids(2)
    want = expected(values, ids, 3, history)
    prefetcher = Prefetcher(NgramHasher(PLAN), slow_tables(values, seconds=0.02))
    with prefetcher, prefetcher.start(ids, history) as fetch:
        history.advance(ids.copy())
        ids[:] = 0
        assert torch.equal(fetch[3].wait(), want)


def test_chunks_give_the_rows_of_one_shot(values):
    ids = random_ids(3, (2, 12))
    history, parts = TokenHistory(PLAN, 2), []
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        for chunk in np.split(ids, [1, 2, 7], axis=1):
            with prefetcher.start(chunk, history) as fetch:
                parts.append(fetch[1].wait().clone().reshape(2, -1, 16, CONFIG.row_width))
            history.advance(chunk)
    whole = expected(values, ids, 1).reshape(2, 12, 16, CONFIG.row_width)
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_two_thousand_steps_are_equal_to_the_bit(values):
    """Two fetches in flight all the time, each used while the next one is filling the other buffers."""
    pool = [random_ids(seed, (1, 24)) for seed in range(50)]
    want = [expected(values, ids, 3) for ids in pool]
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        current = prefetcher.start(pool[0])
        for step in range(2_000):  # each of 50 batches 40 times, in either buffer
            upcoming = prefetcher.start(pool[(step + 1) % 50])
            rows = current[3].wait()
            assert torch.equal(rows, want[step % 50]), step
            current.release()
            current = upcoming
        current.release()


AT_ONCE, AFTER_OTHER_FETCHES = 0.0, 0.006  # when rows are looked at; two fetches take 0.002


def steps_gone_wrong(values, monkeypatch, damage, looked_at):
    """Steps of 100 whose rows are not the right ones after `damage` was done to the prefetcher."""
    pool = [random_ids(seed, (1, 300)) for seed in range(10)]
    want = [expected(values, ids, 3) for ids in pool]
    wrong = 0
    with Prefetcher(NgramHasher(PLAN), slow_tables(values, seconds=0.001)) as prefetcher:
        damage(prefetcher, monkeypatch)
        current = prefetcher.start(pool[0])
        for step in range(100):
            upcoming = prefetcher.start(pool[(step + 1) % 10])
            rows = current[3].wait()
            time.sleep(looked_at)
            wrong += not torch.equal(rows, want[step % 10])
            current.release()
            current = upcoming
        current.release()
    return wrong


@pytest.mark.parametrize("looked_at", [AT_ONCE, AFTER_OTHER_FETCHES])
def test_nothing_goes_wrong_undamaged(values, monkeypatch, looked_at):
    assert steps_gone_wrong(values, monkeypatch, lambda prefetcher, patch: None, looked_at) == 0


def test_without_the_join_rows_are_wrong(values, monkeypatch):
    def no_join(prefetcher, patch):
        real = Fetch.__getitem__

        def unjoined(fetch, layer_id):
            join = real(fetch, layer_id)
            room = fetch._lease.buffers.room(layer_id, prefetcher.tables[layer_id], 300 * 16)
            patch.setattr(join, "wait", lambda: room, raising=False)
            return join

        patch.setattr(Fetch, "__getitem__", unjoined)

    assert steps_gone_wrong(values, monkeypatch, no_join, AT_ONCE) > 10


def test_without_the_second_buffer_rows_are_wrong(values, monkeypatch):
    def one_buffer(prefetcher, patch):
        shared = slots.Buffers()
        patch.setattr(slots, "Buffers", lambda: shared)

    assert steps_gone_wrong(values, monkeypatch, one_buffer, AFTER_OTHER_FETCHES) > 10


def test_an_error_in_the_background_is_raised_at_the_join(values):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values, fail_at=1)) as prefetcher:
        fetch = prefetcher.start(random_ids(4, (2, 300)))
        with pytest.raises(FetchError, match=r"layer 1 failed: the disk has gone") as caught:
            fetch[1].wait()
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(FetchError, match="layer 3"):
            fetch.release()  # nobody asked for layer 3, so nobody has heard of its failure yet
        with prefetcher.start(random_ids(5)) as fetch:  # the buffers are free again
            assert torch.equal(fetch[1].wait(), expected(values, random_ids(5), 1))


@pytest.mark.parametrize("background", [True, False])
def test_what_keeps_a_fetch_from_beginning_is_told_to_every_table(values, background, monkeypatch):
    """And raised, where a table has the words for it that all processes use."""
    told = []

    def excuse(table, error):
        told.append((table.rows, str(error)))
        if len(told) > len(values):
            raise ValueError("the same on all ranks")

    monkeypatch.setattr(SlowTable, "excuse", excuse)
    with Prefetcher(NgramHasher(PLAN), slow_tables(values), background=background) as prefetcher:
        prefetcher.excuse(ValueError("a wrong token"))
        assert told == [(len(v), "a wrong token") for v in values.values()]
        with pytest.raises(ValueError, match="the same on all ranks"):
            prefetcher.excuse(ValueError("a wrong token"))


@pytest.mark.parametrize("background", [True, False])
def test_a_wrong_id_is_raised_at_the_join(values, background):
    ids = random_ids(4)
    ids[1, 3] = 500
    with Prefetcher(NgramHasher(PLAN), slow_tables(values), background=background) as prefetcher:
        fetch = prefetcher.start(ids)
        for layer_id in fetch:
            with pytest.raises(FetchError, match=r"contain 500; the vocabulary has -1 \.\. 499"):
                fetch[layer_id].wait()
        fetch.release()


def test_staging_is_bounded(values):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        first, second = prefetcher.start(random_ids(0)), prefetcher.start(random_ids(1))
        with pytest.raises(RuntimeError, match="2 fetches are in flight"):
            prefetcher.start(random_ids(2))
        kept = first[1].wait().data_ptr()
        first.release()
        with prefetcher.start(random_ids(2)) as third:
            assert third[1].wait().data_ptr() == kept  # no new memory
        second.release()


# --- whose buffers are whose ------------------------------------------------------------------------------


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


class Gated(SlowTable):
    """A table whose large fetches wait until they may go on."""

    def __init__(self, values):
        super().__init__(values)
        self.begun, self.may_end = threading.Event(), threading.Event()

    def start(self, rows, out=None):
        if len(rows) > 1000:
            self.begun.set()
            assert self.may_end.wait(30)
        return super().start(rows, out)


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


def test_calls_from_within_a_fetch_say_so(values):
    told, calls = [], []

    def observe(stage, *_):
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                told.append(str(error))

    for shape in ((1, 1), (2, 300)):  # in this thread, and beside it
        told.clear()
        prefetcher = Prefetcher(NgramHasher(PLAN), slow_tables_that_do_not_wait(values), observer=observe)
        calls[:] = [lambda p=prefetcher: p.start(random_ids(0)), prefetcher.close]
        with prefetcher.start(random_ids(0, shape)) as fetch:
            calls.append(fetch[3].wait) if shape != (1, 1) else None
            while not all(join._errand.ended for join in fetch._joins.values()):
                time.sleep(0.001)
            calls.clear()
            assert torch.equal(fetch[3].wait(), expected(values, random_ids(0, shape), 3))
        assert any("is used from within a call of its own" in message for message in told)
        assert any("is closed from within a call of its own" in message for message in told)
        prefetcher.close()


def slow_tables_that_do_not_wait(values):
    tables = slow_tables(values)
    for table in tables.values():
        table.waits = False
    return tables


def test_closing_waits_for_a_start_in_another_thread(values):
    tables = {1: Gated(values[1])}
    prefetcher = Prefetcher(NgramHasher(PLAN), tables, background=False)
    ids, got = random_ids(0, (4, 60)), []
    starting = threading.Thread(target=lambda: got.append(prefetcher.start(ids)[1].wait()))
    starting.start()
    assert tables[1].begun.wait(30)
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive() and tables[1].trims == 0
    tables[1].may_end.set()
    starting.join(30), closing.join(30)
    assert torch.equal(got[0], expected(values, ids, 1)) and tables[1].trims == 1
    prefetcher.close()
    with pytest.raises(RuntimeError, match="this prefetcher is closed: make a new one"):
        prefetcher.start(ids)


def test_closing_leaves_no_thread_and_no_memory(values):
    tables = slow_tables(values, seconds=0.02)
    prefetcher = Prefetcher(NgramHasher(PLAN), tables)
    prefetcher.start(random_ids(0, (2, 50)))
    assert len(alive()) == 1
    prefetcher.close()
    assert not alive() and all(table.trims == 1 for table in tables.values())
    assert all(slot.kept is None for slot in prefetcher._slots._all)
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.start(random_ids(0))


def test_the_observer_hears_of_every_stage(values):
    heard = []
    tables = slow_tables(values, 0.01)
    with (
        Prefetcher(NgramHasher(PLAN), tables, observer=lambda *told: heard.append(told)) as prefetcher,
        prefetcher.start(random_ids(0)) as fetch,
    ):
        fetch[1].wait(), fetch[3].wait()
    assert len(tables[1].threads | tables[3].threads) == 1  # one after the other, in one thread
    assert sorted(told[:2] for told in heard) == [(s, i) for s in ("gather", "hash", "wait") for i in (1, 3)]
    assert all(begin <= end for _, _, begin, end in heard)
    assert all(end - begin >= 0.01 for stage, _, begin, end in heard if stage == "gather")


@pytest.mark.parametrize("placement", ["device", "host", "hot"])
def test_real_tables_behind_it(values, placement):
    options = {"hot": torch.arange(0, 5000, 3)} if placement == "hot" else {}
    tables = {layer_id: make_table(placement, v, **options) for layer_id, v in values.items()}
    ids = random_ids(7, (3, 40))
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher, prefetcher.start(ids) as fetch:
        for layer_id in fetch:
            assert torch.equal(fetch[layer_id].wait(), expected(values, ids, layer_id))


def test_hashing_on_the_device(values):
    ids = random_ids(8)
    hasher = DeviceHasher(PLAN, CPU)
    with Prefetcher(hasher, slow_tables(values)) as prefetcher, prefetcher.start(torch.from_numpy(ids)) as fetch:
        for layer_id in fetch:
            assert torch.equal(fetch[layer_id].wait(), expected(values, ids, layer_id))


class OnStream(torch.Tensor):
    """A tensor whose memory a stream keeps."""

    def record_stream(self, stream):
        stream.did.append(f"{stream.name} keeps memory")


class Stream:
    """In place of a CUDA stream: what it was told, in the order of all streams."""

    device = torch.device("cuda")
    current: Stream

    def __init__(self, name, did):
        self.name, self.did = name, did

    def wait_stream(self, other):
        self.did.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.did.append(f"event on {self.name}")
        return f"event {len(self.did)}"

    def wait_event(self, event):
        self.did.append(f"{self.name} waits for {event}")


@pytest.fixture
def did(monkeypatch):
    """What two streams do: the caller's, and the one that is made."""
    did = []
    Stream.current = Stream("caller", did)

    @contextlib.contextmanager
    def on(stream):
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    def hashed(hasher, ids, history=None):
        did.append(f"hash on {Stream.current.name}")
        return real(hasher, ids.as_subclass(torch.Tensor), history)

    real = DeviceHasher.__call__
    monkeypatch.setattr(DeviceHasher, "__call__", hashed)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Stream("side", did))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    return did


def tables_on_gpu(values, did):
    """Tables that give their rows to an accelerator, and say on which stream."""

    class OnGpu(SlowTable):
        def start(self, rows, out=None):
            did.append(f"gather on {Stream.current.name}")
            return Ready(super().start(rows).wait().as_subclass(OnStream))

    tables = {layer_id: OnGpu(v) for layer_id, v in values.items()}
    for table in tables.values():
        table.device = Stream.device
    return tables


def test_a_side_stream_waits_for_the_ids_and_is_waited_for(values, did):
    """Every order without which rows, or the memory of ids, would be used too early or too late."""
    ids = random_ids(8)
    given = torch.from_numpy(ids).as_subclass(OnStream)
    with Prefetcher(DeviceHasher(PLAN, CPU), tables_on_gpu(values, did)) as prefetcher:
        fetch = prefetcher.start(given)
        gathers = ["gather on side", "event on side"] * 2
        assert did == ["side waits for caller", "side keeps memory", "hash on side", *gathers]
        for place, layer_id in ((5, 1), (7, 3)):
            did[:] = did[:7]
            assert torch.equal(fetch[layer_id].wait(), expected(values, ids, layer_id))
            assert torch.equal(fetch[layer_id].row_numbers, numbers(ids, layer_id))
            assert did[7:] == [f"caller waits for event {place}", "caller keeps memory"]
        fetch.release()
        rows = torch.ones(3).as_subclass(OnStream)

        def lookup():
            did.append(f"lookup on {Stream.current.name}")
            return {1: rows}, rows + 1

        did.clear()
        fetch, other = prefetcher.start_lookup(lookup)
        assert did == ["side waits for caller", "lookup on side", "event on side"]
        did[:] = did[:3]
        assert fetch[1].wait() is rows and did[3:] == ["caller waits for event 3", "caller keeps memory"]
        did[:] = did[:3]
        assert (other.wait() == 2).all() and did[3:] == ["caller waits for event 3", "caller keeps memory"]
        fetch.release()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_without_a_side_stream_all_is_done_by_the_callers(values, did, on_gpu):
    tables = tables_on_gpu(values, did) if on_gpu else slow_tables(values)
    ids = random_ids(8)
    with Prefetcher(DeviceHasher(PLAN, CPU), tables, background=not on_gpu) as prefetcher:
        with prefetcher.start(torch.from_numpy(ids)) as fetch:
            for layer_id in fetch:
                assert torch.equal(fetch[layer_id].wait(), expected(values, ids, layer_id))
                assert torch.equal(fetch[layer_id].row_numbers, numbers(ids, layer_id))
        assert did == ["hash on caller", *["gather on caller"] * (2 * on_gpu)]
        fetch, other = prefetcher.start_lookup(lambda: ({1: torch.ones(2)}, torch.zeros(2)))
        assert (fetch[1].wait() == 1).all() and (other.wait() == 0).all()
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        prefetcher.start_lookup(lambda: ({1: torch.ones(2)}, torch.zeros(2)))[1].wait()
    assert "side" not in "".join(did)


def test_closing_says_what_the_device_found_wrong(values, monkeypatch):
    """A bad id on a device is found at the latest when the prefetcher is closed."""
    hasher, checks = DeviceHasher(PLAN, CPU), []
    monkeypatch.setattr(DeviceHasher, "check", lambda hasher: checks.append(hasher))
    Prefetcher(hasher, slow_tables(values)).close()
    assert checks == [hasher]


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


def test_bad_arguments(values):
    tables = slow_tables(values)
    with pytest.raises(ValueError, match="no tables"):
        Prefetcher(NgramHasher(PLAN), {})
    with pytest.raises(ValueError, match="buffers=1: with fewer than 2 nothing overlaps"):
        Prefetcher(NgramHasher(PLAN), tables, buffers=1)
    with pytest.raises(ValueError, match="layer_id=2"):
        Prefetcher(NgramHasher(PLAN), {2: tables[1]})
    tables[1].index_device = torch.device("cuda")
    with pytest.raises(ValueError, match="use NgramHasher for the CPU, DeviceHasher for an accelerator"):
        Prefetcher(NgramHasher(PLAN), tables)


@pytest.mark.parametrize("layers", [1, 2])
def test_up_to_64_kib_of_rows_are_gathered_here(layers):
    """Sixteen rows of four bytes a token and layer: 1,024 tokens of one layer, and not one more."""
    config = EngramConfig.preset("tiny").replace(layer_ids=(1, 2)[:layers])
    plan = HashPlan.build(config, 1000, 2)
    tables = {layer.layer_id: make_table("host", torch.zeros(layer.rows, 1)) for layer in plan.layers}
    most = 64 * 1024 // (16 * 4 * layers)
    with Prefetcher(NgramHasher(plan), tables) as prefetcher:
        given = []
        real = prefetcher._worker.give
        prefetcher._worker.give = lambda errand: (given.append(errand), real(errand))[1]
        for shape in ((1, most), (2, most // 2), (1, 1)):
            prefetcher.start(np.ones(shape, np.int64)).release()
        assert given == []
        prefetcher.start(np.ones((1, most + 1), np.int64), waited_for=True).release()
        assert given == []
        prefetcher.start(np.ones((1, most + 1), np.int64)).release()
        assert len(given) == layers
        hashed = Hashed(np.zeros((layers, 1, most + 1, 16), np.int32), np.zeros((1, most + 1), np.int64))
        prefetcher.start_hashed(hashed, waited_for=True).release()
        assert len(given) == layers


def test_a_table_that_waits_keeps_the_order_of_the_worker_even_where_the_caller_waits(values):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        given, real = [], prefetcher._worker.give
        prefetcher._worker.give = lambda errand: (given.append(errand), real(errand))[1]
        prefetcher.start(random_ids(0), waited_for=True).release()
        assert len(given) == 2


@pytest.mark.parametrize("hot", [False, True])
def test_up_to_64_rows_of_a_file_are_asked_for_here(hot, tmp_path):
    """Sixteen rows a token: four tokens, and not one more. What the disk says is raised at the join, as ever."""
    config = EngramConfig.preset("tiny").replace(layer_ids=(1,))
    plan = HashPlan.build(config, 1000, 2)
    content = torch.arange(plan.layers[0].rows, dtype=torch.float32)[:, None]
    save_rows(tmp_path / "table.safetensors", content)
    table = make_table("file", StoredRows.find(tmp_path / "table.safetensors"))
    if not table.inline_rows:
        pytest.skip("this system cannot be asked to read ahead")
    if hot:
        table = HotTable(table, torch.arange(100))
    with table, Prefetcher(NgramHasher(plan), {1: table}) as prefetcher:
        given, real = [], prefetcher._worker.give
        prefetcher._worker.give = lambda errand: (given.append(errand), real(errand))[1]
        for shape, threads in (((4, 1), 0), ((1, 4), 0), ((5, 1), 1)):
            ids = random_ids(3, shape)
            with prefetcher.start(ids) as fetch:
                assert torch.equal(fetch[1].wait()[:, 0], torch.from_numpy(NgramHasher(plan)(ids, 1)).view(-1).float())
            assert len(given) == threads
        fetch = prefetcher.start(random_ids(4, (4, 1)))
        (tmp_path / "table.safetensors").write_bytes(b"other")
        with pytest.raises(FetchError, match=r"fetching the rows of layer 1 failed: .* was changed|bytes now and had"):
            fetch[1].wait()
        fetch.release()
