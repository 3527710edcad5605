"""A captured step calls the CPU while it runs, on a GPU: rows to the bit, run after run, and an end of waiting."""

import time
from contextlib import contextmanager

import pytest
import torch

from engram_ref.attach import Places, attach
from engram_ref.calling.call import CallError, CpuCall
from engram_ref.devices import side_stream
from engram_ref.fusion import ShortConvHistory
from engram_ref.layer import Engram
from engram_ref.tables.host import HostTable
from tests.ref.attach.models import VOCAB, make_ids, make_layers
from tests.ref.attach.test_places import Cache, Tokenwise

pytestmark = pytest.mark.cuda
VALUES = (2, 96, 256)  # two layers, four tokens of V4.1


@contextmanager
def captured_call(device, polls=None):
    """A call, its graph, the ids that it reads and what it writes; the main branch computes meanwhile.

    Args:
        polls: looks of a replay; the step before it, which compiles and is to be answered, takes as many as it needs.
    """
    call = CpuCall((4, 1), VALUES, torch.bfloat16, device)
    ids = torch.zeros((4, 1), dtype=torch.int64, device=device)
    out = torch.zeros(VALUES, dtype=torch.bfloat16, device=device)
    busy, side, graph = torch.ones(512, 512, device=device), side_stream(device), torch.cuda.CUDAGraph()

    def step():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call.make(ids, out)
        made = busy @ busy
        torch.cuda.current_stream().wait_stream(side)
        return made

    torch.cuda.synchronize()  # what was filled on this stream is there on any other
    try:
        with torch.cuda.stream(torch.cuda.Stream()):  # kernels are compiled, libraries take their workspaces
            call.expect(answer)
            step()
        torch.cuda.synchronize()
        call.settle()
        call._polls = polls or call._polls  # a number in the graph from here on
        with torch.cuda.graph(graph):
            made = step()
        yield call, graph, ids, out, made
    finally:
        call.close()


def rows_for(ids):
    count = torch.arange(torch.Size(VALUES).numel()).view(VALUES) % 101
    return (count + int(ids.sum()) % 97).bfloat16()


def answer(ids, values):
    values.copy_(rows_for(ids))


def test_each_replay_has_the_rows_of_its_own_ids_while_the_caller_runs_ahead(device, stress_steps):
    with captured_call(device) as (call, graph, ids, out, made):
        steps, found = max(3, stress_steps // 50), []
        for step in range(steps):
            ids.fill_(step)  # behind the replay before, on the same stream
            call.expect(answer)
            graph.replay()
            found.append(out.clone())
        torch.cuda.synchronize()
        call.settle()
        for step, rows in enumerate(found):
            assert torch.equal(rows.cpu(), rows_for(torch.full((4, 1), step))), step
        assert float(made[0, 0]) == 512


def test_without_the_answer_a_replay_ends_with_nan_and_an_error(device):
    with captured_call(device, polls=2000) as (call, graph, _, out, _):
        begin = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        assert time.perf_counter() - begin < 20, "2,000 looks over the bus are some milliseconds"
        assert out.isnan().all()
        with pytest.raises(CallError, match="step 2 waited in vain for its rows, 2,000 looks long"):
            call.settle()


@pytest.mark.parametrize("form", ["demo", "v41"])
def test_a_captured_step_that_asks_is_the_step_that_does_not(device, form):
    """Of places, through `attach`, prompts in between included."""
    layers, model = make_layers((0, 1), form, torch.float32), Tokenwise()
    model.embedded = model.embedded.float().cuda()
    tables = [HostTable(rows, device) for rows in layers.weights.values()]
    engrams = {i: Engram(e.fusion.cuda(), table) for (i, e), table in zip(layers.engrams.items(), tables)}
    tokens, outs = make_ids(2, 6).cuda(), {}
    with torch.no_grad(), attach(model, engrams, layers.plan) as attached:
        for asks in (False, True):
            cache = Cache()
            reach = {i: ShortConvHistory(e.fusion, 2) for i, e in engrams.items() if e.fusion.reach}
            places = Places(layers.plan, 2, attached.index_device, reach)
            attached.seat(cache, places)
            outs[asks] = []
            given, graph = tokens[:, :1].clone(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()  # the eager step below reads it on another stream
            if asks:
                with attached.staging(overlap=True, asking=True):
                    for step in range(2):  # the first is eager, and compiles
                        with torch.cuda.graph(graph) if step else torch.cuda.stream(torch.cuda.Stream()):
                            attached.stage(given, cache)
                            out = model(given, past_key_values=cache)
                        torch.cuda.synchronize()
                attached.check()
                places.clear()
            for step in range(6):
                if step == 3:  # a new sequence takes place 1
                    places.admit([1], [4])
                    model(make_ids(1, 4, seed=5).cuda(), past_key_values=cache)
                given.copy_(tokens[:, step : step + 1])
                if asks:
                    with attached.staging(overlap=True, asking=True):
                        attached.answer(given, cache)
                        graph.replay()
                else:
                    out = model(given, past_key_values=cache)
                outs[asks].append(out.clone())
        torch.cuda.synchronize()
        assert all(int(ids.max()) < VOCAB for ids in tokens)
    for table in tables:
        table.close()
    for alone, asked in zip(outs[False], outs[True]):
        # float32 in another order of summation, where a library chooses another way in a capture; rows are of size 1.
        torch.testing.assert_close(asked, alone, rtol=0, atol=1e-4)
