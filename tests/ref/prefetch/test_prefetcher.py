"""The schedule of fetches: what arrives and when, what happens to errors, what breaks without a safeguard."""

import copy
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher, TokenHistory
from engram_ref.hashing.ngram import Hashed
from engram_ref.prefetch import Fetch, FetchError, Prefetcher, slots
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, save_rows
from engram_ref.tables.hot import HotTable
from engram_ref.vocab import CompressedVocab
from tests.ref.prefetch.tables import CONFIG, PLAN, Gated, SlowTable, alive, expected, numbers, random_ids, slow_tables


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


def test_what_was_hashed_may_be_written_over_while_its_rows_are_gathered(values):
    hasher, vocab = NgramHasher(PLAN), CompressedVocab.identity(PLAN.compressed_size)
    first, second = np.random.default_rng(5).integers(0, PLAN.compressed_size, (2, 2, 300))
    with Prefetcher(hasher, slow_tables(values, seconds=0.02)) as prefetcher:
        hashed = prefetcher.hash_tokens(first, vocab)
        with prefetcher.start_hashed(hashed) as fetch:
            hasher.from_tokens(second, vocab, out=hashed)
            for layer_id in fetch:
                assert torch.equal(fetch[layer_id].wait(), expected(values, first, layer_id))


def test_rows_whose_gradients_somebody_wanted_are_nobody_elses_buffer(values):
    tables = {layer_id: make_table("host", rows) for layer_id, rows in values.items()}
    with Prefetcher(NgramHasher(PLAN), tables) as prefetcher:
        for seed in range(4):  # more than there are buffers
            with prefetcher.start(random_ids(seed, (1, 5))) as fetch:
                rows = fetch[1].wait().requires_grad_()
                (rows * rows).sum().backward()
                assert rows.grad is not None and torch.equal(rows.grad, 2 * rows)


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
    """Steps of 40 whose rows are not the right ones after `damage` was done to the prefetcher."""
    pool = [random_ids(seed, (1, 300)) for seed in range(10)]
    want = [expected(values, ids, 3) for ids in pool]
    wrong = 0
    with Prefetcher(NgramHasher(PLAN), slow_tables(values, seconds=0.001)) as prefetcher:
        damage(prefetcher, monkeypatch)
        current = prefetcher.start(pool[0])
        for step in range(40):
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

    assert steps_gone_wrong(values, monkeypatch, no_join, AT_ONCE) > 4


def test_without_the_second_buffer_rows_are_wrong(values, monkeypatch):
    def one_buffer(prefetcher, patch):
        shared = slots.Buffers()
        patch.setattr(slots, "Buffers", lambda: shared)

    assert steps_gone_wrong(values, monkeypatch, one_buffer, AFTER_OTHER_FETCHES) > 4


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
    with Prefetcher(NgramHasher(PLAN), tables):
        assert tables[1].trims == 1
    assert tables[1].trims == 2  # the end of the block closes it
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
        prefetcher.start(random_ids(0, (1, 1))).release()
        assert len(given) == 4


def test_a_prefetcher_is_not_copied(values):
    with Prefetcher(NgramHasher(PLAN), slow_tables(values)) as prefetcher:
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(ValueError, match="make a new one instead of a copy"):
                act(prefetcher)


def test_a_fetch_that_has_ended_may_be_waited_for_from_within_another(values):
    calls, found = [], []

    def observe(*_):
        while calls:
            found.append(calls.pop()())

    tables = slow_tables_that_do_not_wait(values)
    with (
        Prefetcher(NgramHasher(PLAN), tables, observer=observe) as prefetcher,
        prefetcher.start(random_ids(0, (1, 1))) as first,
    ):
        first[1].wait(), first[3].wait()
        calls.append(first[3].wait)
        prefetcher.start(random_ids(1, (1, 1))).release()
        assert torch.equal(found[0], expected(values, random_ids(0, (1, 1)), 3))


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
