"""Prefetching on a GPU under stress: right with its three safeguards, visibly wrong without any one of them.

Every safeguard is taken away by a patch, while the GPU is kept busy in the place where the race is: a copy that
must be waited for is delayed, a consumer that still needs its rows is delayed.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.prefetch import Prefetcher
from engram_ref.tables import make_table
from engram_ref.tables.staging import Delivery
from tests.cuda.stress import steps
from tests.ref.rows.fp8_pairs import random_rows, rows_of

pytestmark = pytest.mark.cuda

CONFIG = EngramConfig.preset("tiny").replace(row_width=64, table_size_per_order=(20_000, 20_000))
PLAN = HashPlan.build(CONFIG, 5000, 2)
LAYER = 1
DELAY = 2_000_000  # GPU clock cycles: about a millisecond
LONG_DELAY = 10_000_000  # until memory that was let go too early has surely been taken and written again


@pytest.fixture(scope="module")
def coded():
    """fp8 rows."""
    return rows_of(random_rows(PLAN.layer(LAYER).rows, 64))


@pytest.fixture(scope="module")
def values(coded):
    """The same as plain rows, float32."""
    return coded.values().float()


@pytest.fixture(scope="module")
def pool():
    return [np.random.default_rng(seed).integers(0, 5000, (4, 200)) for seed in range(16)]


@pytest.fixture(scope="module")
def want(values, pool):
    """The rows of every batch of the pool, on the GPU, gathered there once."""
    hasher, resident = NgramHasher(PLAN), values.cuda()
    return [resident[torch.from_numpy(hasher(ids, LAYER)).cuda().long().reshape(-1)] for ids in pool]


def run_steps(prefetcher, pool, want, count, before_use=lambda: None):
    """Steps that used wrong rows. Nothing synchronises in between; rows are dropped as soon as they were used."""
    on_device = isinstance(prefetcher.hasher, DeviceHasher)
    batches = [torch.from_numpy(ids).cuda() for ids in pool] if on_device else pool
    wrong = torch.zeros(count, dtype=torch.bool, device="cuda")
    current = prefetcher.start(batches[0])
    for step in range(count):
        upcoming = prefetcher.start(batches[(step + 1) % len(pool)])
        rows = current[LAYER].wait()
        before_use()
        wrong[step] = (rows != want[step % len(pool)]).any()
        del rows
        current.release()
        current = upcoming
    current.release()
    return int(wrong.sum())


@contextmanager
def prefetching(placement, rows, device):
    options = {"hot": torch.arange(0, len(rows), 3)} if placement == "hot" else {}
    on_device = placement in ("device", "uva")
    hasher = DeviceHasher(PLAN, device) if on_device else NgramHasher(PLAN)
    with make_table(placement, rows, device, **options) as table, Prefetcher(hasher, {LAYER: table}) as made:
        yield made


@pytest.fixture(params=["device", "host", "uva", "hot"])
def placement(request):
    return request.param


@pytest.fixture
def prefetcher(placement, values, device):
    with prefetching(placement, values, device) as made:
        yield made


@pytest.fixture(params=[False, True], ids=["packed", "split"])
def fp8_prefetcher(request, placement, coded, device):
    with prefetching(placement, coded.split() if request.param else coded, device) as made:
        yield made


def test_ten_thousand_steps_are_equal_to_the_bit(prefetcher, pool, want, stress_steps):
    assert run_steps(prefetcher, pool, want, stress_steps) == 0


def test_two_thousand_steps_with_fp8_rows(fp8_prefetcher, pool, want, stress_steps):
    assert run_steps(fp8_prefetcher, pool, want, stress_steps // 5) == 0


def test_a_busy_gpu_changes_nothing_of_fp8_rows(fp8_prefetcher, pool, want):
    assert run_steps(fp8_prefetcher, pool, want, steps(200), before_use=lambda: torch.cuda._sleep(DELAY)) == 0


def test_a_busy_gpu_changes_nothing(prefetcher, pool, want):
    assert run_steps(prefetcher, pool, want, steps(300), before_use=lambda: torch.cuda._sleep(DELAY)) == 0


@pytest.fixture
def host_prefetcher(values, device):
    with make_table("host", values, device) as table, Prefetcher(NgramHasher(PLAN), {LAYER: table}) as made:
        yield made


def test_without_the_event_wait_rows_are_wrong(host_prefetcher, pool, want, monkeypatch):
    delay_copies(monkeypatch)
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda stream, event: None)
    assert run_steps(host_prefetcher, pool, want, 200) > 20


def test_without_record_stream_rows_are_wrong(host_prefetcher, pool, want, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    assert run_steps(host_prefetcher, pool, want, 200, before_use=lambda: torch.cuda._sleep(LONG_DELAY)) > 20


def test_without_the_second_staging_buffer_rows_are_wrong(host_prefetcher, pool, want, monkeypatch):
    delay_copies(monkeypatch)
    monkeypatch.setattr(Delivery, "_next_slot", lambda delivery: delivery._slots[0])  # refilled while it is copied
    assert run_steps(host_prefetcher, pool, want, 200) > 20


def delay_copies(monkeypatch):
    """Each copy to the GPU starts about a millisecond late, on its own stream."""
    real = Delivery.empty

    def late(delivery, count):
        torch.cuda._sleep(DELAY)  # the side stream is current here
        return real(delivery, count)

    monkeypatch.setattr(Delivery, "empty", late)


def test_closing_leaves_no_pinned_staging(values, device, pool):
    with make_table("host", values, device) as table:
        prefetcher = Prefetcher(NgramHasher(PLAN), {LAYER: table})
        prefetcher.start(pool[0]).release()
        slots = table._delivery._slots
        assert any(slot.memory is not None for slot in slots)
        prefetcher.close()
        assert all(slot.memory is None for slot in slots)
