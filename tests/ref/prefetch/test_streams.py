"""Fetches of tables that a device reads: who hashes there, and which stream waits for which."""

from __future__ import annotations

import contextlib

import pytest
import torch

from engram_ref.hashing import NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.prefetch import Prefetcher
from engram_ref.tables.base import Ready
from tests.ref.prefetch.tables import CPU, PLAN, SlowTable, expected, numbers, random_ids, slow_tables


def test_hashing_on_the_device(values):
    ids = random_ids(8)
    hasher = DeviceHasher(PLAN, CPU)
    with Prefetcher(hasher, slow_tables(values)) as prefetcher, prefetcher.start(torch.from_numpy(ids)) as fetch:
        for layer_id in fetch:
            assert torch.equal(fetch[layer_id].wait(), expected(values, ids, layer_id))


class OnStream(torch.Tensor):
    """A tensor whose memory a stream keeps."""

    is_cuda = True

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
        found = real(hasher, ids.as_subclass(torch.Tensor), history)
        on_gpu = type(ids) is OnStream
        return {i: rows.as_subclass(OnStream) if on_gpu else rows for i, rows in found.items()}

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
            assert did[7:] == [f"caller waits for event {place}", "caller keeps memory"]
            assert torch.equal(fetch[layer_id].row_numbers, numbers(ids, layer_id))
            assert did[9:] == ["caller keeps memory"]
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
