"""The lookup of a step on a GPU: captured in a graph and replayed, without stopping the CPU, the definition's integers.

What needs no GPU is in tests/ref/lookup/test_device.py. Here the threads of a program really race,
and a graph really replays.
"""

import numpy as np
import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher, TokenHistory
from engram_ref.lookup.device import DeviceLookup
from engram_ref.tables import make_table
from engram_ref.vocab import CompressedVocab

pytestmark = pytest.mark.cuda

TOKENS, SIZE, STEPS = 150, 100, 20
VOCAB = CompressedVocab.from_map(np.concatenate([np.arange(SIZE), np.random.default_rng(1).integers(0, SIZE, 50)]))


@pytest.fixture(scope="module")
def plan():
    return HashPlan.build(EngramConfig.preset("tiny"), SIZE, 2)


@pytest.fixture(scope="module")
def weights(plan):
    return {x.layer_id: torch.randn(x.rows, 80).bfloat16() for x in plan.layers}


@pytest.fixture(params=[("device", 1), ("device", 2), ("uva", 1), ("uva", 2)], ids=str)
def lookup(request, plan, weights, device):
    placement, launches = request.param
    tables = {layer_id: make_table(placement, rows, device) for layer_id, rows in weights.items()}
    yield DeviceLookup(plan, tables, VOCAB, launches=launches)
    for table in tables.values():
        table.close()


def assert_found(found, plan, weights, compressed, history):
    for layer in plan.layers:
        rows = NgramHasher(plan, "numpy")(compressed, layer.layer_id, history=history)
        assert (found.rows[layer.layer_id].cpu().numpy() == rows).all()
        want = weights[layer.layer_id][torch.from_numpy(rows).reshape(-1).long()]
        assert torch.equal(found.values[layer.layer_id].cpu(), want)


@pytest.mark.parametrize("shape", [(1, 1), (256, 1), (64, 5), (2, 333)], ids=str)
def test_a_captured_lookup_is_replayed(shape, lookup, plan, weights, device):
    """Its ids, its tail and its rows stay where they are; the tail goes on where the last replay ended."""
    assert lookup.fused
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    tail, out = lookup.new_tail(shape[0]), lookup.new_rows(*shape)
    lookup(ids, tail, tail, out=out)  # compiled
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = lookup(ids, tail, tail, out=out)
    tail.fill_(-1)
    history, rng = TokenHistory(plan, shape[0]), np.random.default_rng(3)
    for _ in range(STEPS):
        step = rng.integers(0, TOKENS, shape)
        ids.copy_(torch.from_numpy(step))
        graph.replay()
        compressed = VOCAB(step)
        assert_found(found, plan, weights, compressed, history)
        history.advance(compressed)
        assert (tail.cpu().numpy() == history.ids).all()
    lookup.check()


def test_without_advancing_a_replay_goes_wrong(lookup, plan, weights, device):
    """The comparison above tells a tail that stands still."""
    ids, tail = torch.ones((2, 1), dtype=torch.int64, device=device), lookup.new_tail(2)
    history = TokenHistory(plan, 2)
    history.advance(VOCAB([[1], [1]]))
    lookup(ids, tail)
    with pytest.raises(AssertionError):
        assert_found(lookup(ids, tail), plan, weights, VOCAB([[1], [1]]), history)


def test_a_lookup_does_not_stop_the_cpu(lookup, device):
    ids, tail = torch.ones((4, 1), dtype=torch.int32, device=device), lookup.new_tail(4)
    lookup(ids, tail, tail, dead=ids == 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lookup(ids, tail, tail, dead=ids == 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_a_replay_met_is_raised_by_check(lookup, device):
    ids, tail = torch.ones((2, 1), dtype=torch.int64, device=device), lookup.new_tail(2)
    lookup(ids, tail, tail)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        lookup(ids, tail, tail)
    ids[1] = TOKENS
    graph.replay()
    with pytest.raises(ValueError, match=f"token ids contain {TOKENS}; the vocabulary has 0 .. {TOKENS - 1}"):
        lookup.check()
    assert tail[1, -1] == -1
