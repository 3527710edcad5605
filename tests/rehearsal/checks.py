"""What the stand-in must refuse, and what it must compute: run in a process of its own, told as JSON.

python -m tests.rehearsal.checks            {name: null, or what went wrong}
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.rehearsal import install

install.install()

import numpy as np  # noqa: E402 - the stand-in comes first
import torch  # noqa: E402

from tests.rehearsal.graphs import CUDAGraph  # noqa: E402
from tests.rehearsal.host_memory import RUNTIME  # noqa: E402
from tests.rehearsal.streams import current  # noqa: E402

LOG: dict[Any, list[tuple[str, int]]] = {}
GPU = torch.device("cuda")


def refused(action: Callable[[], object], words: str) -> None:
    """It raises, and says so."""
    try:
        action()
    except (RuntimeError, TypeError) as error:
        assert words in str(error), f"{words!r} is not in {str(error)!r}"
    else:
        raise AssertionError(f"not refused: {words}")


def in_capture(action: Callable[[], object]) -> None:
    """Run it while a stream is captured."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        action()


def devices_are_not_mixed() -> None:
    there, here = torch.ones(3, device=GPU), torch.ones(3)
    words = "Expected all tensors to be on the same device"
    for action in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: torch.nn.functional.linear(here, there),
    ):
        refused(action, words)
        with torch.inference_mode():
            refused(action, words)
    refused(lambda: here[torch.tensor([0]).to(GPU)], "indices should be")
    refused(there.numpy, "can't convert cuda:0")
    refused(lambda: torch.rand(2, device=GPU, generator=torch.Generator()), "generator")
    assert (there + torch.tensor(1.0)).device == torch.device("cuda", 0)  # a number may come from the CPU
    assert torch.equal((there + 1).cpu(), here + 1) and there.is_cuda and not here.is_cuda


def the_host_does_not_wait_in_a_capture() -> None:
    tensor, event = torch.ones(3, device=GPU), torch.cuda.Event()
    words = "not permitted when stream is capturing"
    for action in (
        tensor.sum().item, tensor.tolist, tensor.cpu, tensor.nonzero, torch.cuda.synchronize, event.synchronize,
        lambda: torch.ones(3).to(GPU), lambda: torch.tensor([1], device=GPU), lambda: tensor[tensor > 0],
        lambda: tensor.copy_(torch.ones(3), non_blocking=True), torch.cuda.current_stream().synchronize,
    ):  # fmt: skip
        refused(lambda action=action: in_capture(action), words)
    pinned = torch.ones(3).pin_memory()
    in_capture(lambda: tensor.copy_(pinned, non_blocking=True))


def captures_are_begun_and_ended_as_cuda_wants() -> None:
    graph = torch.cuda.CUDAGraph()
    refused(graph.replay, "without a preceding successful capture")
    refused(graph.capture_begin, "non-default stream")
    side = torch.cuda.Stream()
    before = torch.cuda.Event()
    before.record()
    refused(lambda: in_capture(lambda: torch.cuda.current_stream().wait_event(before)), "outside of the capture")
    refused(lambda: in_capture(lambda: side.wait_stream(torch.cuda.current_stream())), "were not joined")

    def fork_and_join() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.ones(3, device=GPU)
        main.wait_stream(side)

    in_capture(fork_and_join)


def synchronisation_is_told() -> None:
    tensor = torch.ones(3, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        refused(tensor.sum().item, "called a synchronizing CUDA operation")
        tensor + 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def a_replay_is_what_was_captured() -> None:
    given, total = torch.zeros(3, device=GPU), torch.zeros(3, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = (given[1:] + 1) * 2
        total.add_(given)
    assert out.isnan().all().item(), "captured, not computed"
    assert total.sum().item() == 0
    for value in (3, 5):
        given.fill_(value)
        graph.replay()
        assert out.tolist() == [2.0 * (value + 1)] * 2
    assert total.tolist() == [8.0] * 3


def registrations_are_ranges() -> None:
    raw = torch.zeros(4096, dtype=torch.uint8)
    first = raw.data_ptr()
    assert RUNTIME.cudaHostRegister(first, 2048, 0) == 0
    for address, nbytes in ((first, 2048), (first + 2047, 10), (first - 5, 6), (first + 10, 1)):
        assert RUNTIME.cudaHostRegister(address, nbytes, 0) == 712
    assert RUNTIME.cudaHostRegister(first + 2048, 2048, 0) == 0
    target = torch.zeros(4096, dtype=torch.uint8, device=GPU)
    target[:2048].copy_(raw[:2048])
    refused(lambda: target.copy_(raw), "one copy reaches over the end")
    assert RUNTIME.cudaHostUnregister(first) == RUNTIME.cudaHostUnregister(first + 2048) == 0
    assert RUNTIME.cudaHostUnregister(first) == 713
    assert len(RUNTIME.refused) == 5 and "0 ranges still registered, 5 calls refused" in install.report()
    RUNTIME.refused.clear()


def a_kernel_reads_no_pageable_memory() -> None:
    from engram_ref.rows import kernels

    rows = torch.zeros((8, 16), dtype=torch.uint8)
    numbers, out = torch.tensor([3, 1], device=GPU), torch.empty((2, 16), dtype=torch.uint8, device=GPU)
    bad = torch.zeros(1, dtype=torch.int64, device=GPU)
    refused(lambda: kernels.gather_rows(rows, numbers, out, bad), "no GPU can read")
    rows[3], rows[1] = 7, 9
    kernels.gather_rows(rows.pin_memory(), numbers, out, bad)
    assert out.cpu()[:, 0].tolist() == [7, 9]


def a_fetch_by_the_cpu_asks_little_of_cuda() -> None:
    """A copy, memory for it, and an event that says when the staging buffer is free; every call is microseconds.

    On a side stream, that of whoever waits has to be told; more rows than a kernel decodes in less time than the CPU
    take that kernel, and the memory that it reads.
    """
    from engram_ref.hashing.ngram import NgramHasher
    from engram_ref.prefetch import Prefetcher
    from engram_ref.rows import kernels
    from engram_ref.rows.rows import Rows
    from engram_ref.tables.host import HostTable
    from engram_ref.tables.staging import CPU_DECODED_BYTES
    from tests.rehearsal.calls import Calls

    config, plan, raw = _fp8_rows()
    kernels.SCALED_ROWS_PER_PROGRAM = 512  # interpreted, a program takes as long as many rows
    few = CPU_DECODED_BYTES // config.row_bytes() // config.columns  # tokens
    least = {"the host waits": 1, "empty": 1, "copy_": 1, "make an event": 1, "record": 1}
    here = {**least, "current stream": 2}
    beside = {**least, "enter a stream": 1, "current stream": 1, "a stream waits": 1, "record_stream": 1}
    kernel = {"empty_like": 1, "launch": 1}
    for background, waited_for, tokens, wanted in (
        (False, False, few, here),
        (False, False, few + 1, {**here, **kernel}),
        (True, True, few + 1, {**here, **kernel}),
        (True, True, few, here),
        (True, False, few, beside),
    ):
        table = HostTable(Rows.from_packed(raw), GPU)
        with table, Prefetcher(NgramHasher(plan), {1: table}, background=background) as prefetcher:
            for number in (1, 1, tokens):  # both buffers are there when it counts
                ids = np.random.default_rng(number).integers(0, 150, (number, 1))
                with Calls() as calls, prefetcher.start(ids, waited_for=waited_for) as fetch:
                    values = fetch[1].wait()
                wanted_rows = torch.from_numpy(NgramHasher(plan)(ids, 1)).view(-1)
                assert torch.equal(values.cpu(), Rows.from_packed(raw[wanted_rows]).values())
            assert calls == wanted, f"{background=} {waited_for=} {tokens=}: {dict(calls)}, not {wanted}"


def rows_of_a_stream_that_is_not_told_are_always_waited_for() -> None:
    from engram_ref.tables.staging import Arriving
    from tests.rehearsal.calls import Calls

    here, values = torch.cuda.current_stream(), torch.ones(3, device=GPU)
    for stream, waits in ((None, 1), (torch.cuda.Stream(), 1), (here, 0)):
        with Calls() as calls:
            assert Arriving(values, here.record_event(), stream).wait() is values
        assert calls["a stream waits"] == calls["record_stream"] == waits, f"{stream}: {dict(calls)}"


def token_ids_that_the_cpu_needs_come_into_the_same_memory() -> None:
    """A step copies, notes it, and waits for it: no memory is page-locked anew, and no event made."""
    from engram_ref.attach.lookup import Source
    from engram_ref.hashing.ngram import NgramHasher
    from engram_ref.prefetch import Prefetcher
    from engram_ref.rows.rows import Rows
    from engram_ref.tables.host import HostTable
    from tests.rehearsal.calls import Calls

    _, plan, raw = _fp8_rows()
    with Prefetcher(NgramHasher(plan), {1: HostTable(Rows.from_packed(raw), GPU)}) as prefetcher:
        source = Source(NgramHasher(plan), None, prefetcher, "v41", False)
        made = []
        for batch in (3, 3, 2, 2):
            ids = torch.randint(0, 150, (batch, 1), device=GPU)
            streams = {ids.device: torch.cuda.Stream(), None: torch.cuda.Stream()}  # None: of another, current device
            current_stream = mock.patch.object(torch.cuda, "current_stream", lambda device=None, of=streams: of[device])
            with torch.inference_mode(batch == 3), current_stream, Calls() as calls:
                sent = source.send_for(ids)
                assert sent is not None
                arrived = sent()
            assert torch.equal(arrived, ids.cpu())
            made.append(calls.pop("make an event", 0))
            assert calls == {"current stream": 1, "copy_": 1, "record": 1, "the host waits": 1}, dict(calls)
            assert source._sent is not None and source._sent[1].stream is streams[ids.device], "the stream that copies"
        assert made == [1, 0, 1, 0]


def a_mask_of_one_token_costs_one_copy() -> None:
    """What a decode step asks with a mask, of two dimensions or four, and not without one: its columns, on the CPU."""
    from transformers import StaticCache

    from engram_ref.attach import attach
    from engram_ref.layer import Engram
    from engram_ref.tables.host import HostTable
    from tests.ref.attach.models import make_ids, make_layers, make_model
    from tests.rehearsal.calls import Calls

    model, ids = make_model(dtype=torch.float32).cuda(), make_ids(4, 12).cuda()
    layers = make_layers(dtype=torch.float32)
    tables = {layer_id: HostTable(rows.detach(), GPU) for layer_id, rows in layers.weights.items()}
    engrams = {layer_id: Engram(one.fusion.cuda(), tables[layer_id]) for layer_id, one in layers.engrams.items()}
    sees = torch.arange(32, device=GPU).expand(4, 1, 1, 32) < 13
    masks = {"none": None, "2-D": torch.ones(4, 13, device=GPU), "4-D": {"full_attention": sees}}

    def step(mask: Any) -> Calls:
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(ids, past_key_values=cache)
        with Calls() as calls:
            model(ids[:, :1], past_key_values=cache, attention_mask=mask)
        return calls

    with torch.no_grad():
        plain = {name: step(mask) for name, mask in masks.items()}
        with attach(model, engrams, layers.plan):
            step(None)  # makes buffers
            added = {name: step(mask) - plain[name] for name, mask in masks.items()}
    for table in tables.values():
        table.close()
    assert sum(added["none"].values()) < 40, added["none"]
    for name in ("2-D", "4-D"):
        assert added[name] - added["none"] == {"_to_copy": 1} and not added["none"] - added[name], (name, added)


def _fp8_rows() -> tuple[Any, Any, Any]:
    """A small layer of the shipped form: configuration, plan and stored rows."""
    from engram_ref.config import EngramConfig
    from engram_ref.hashing import HashPlan

    config = EngramConfig.preset("v41-flash").replace(
        layer_ids=(1,), compressed_size=None, table_size_per_order=(300,) * 3, row_dtype="float8_e4m3fn"
    )
    plan = HashPlan.build(config, 150, 0)
    return config, plan, torch.randint(0, 0x7F, (plan.layers[0].rows, config.row_bytes()), dtype=torch.uint8)


def decoding_from_graphs_is_decoding() -> None:
    """Choices, keys, values and pasts equal to the bit, across a change of span; and other rows give others."""
    models, work, variants, rows = _served_on_two()
    graphs, eager = (model for model, _ in models)
    for variant in variants:
        chosen = []
        for _, server in models:
            chosen.append(server.serve(work, variant)["tokens_sha256"])
        assert chosen[0] == chosen[1], variant.label
        for a, b in zip(graphs._stored, eager._stored):
            assert torch.equal(a[0].cpu(), b[0].cpu()) and torch.equal(a[1].cpu(), b[1].cpu()), variant.label
        assert torch.equal(graphs._convolutions[1].values.cpu(), eager._convolutions[1].values.cpu()), variant.label
    kept = eager._stored[1][0].cpu()
    rows.neg_()
    for variant in variants[1:]:
        models[0][1].serve(work, variant)
        assert not torch.equal(graphs._stored[1][0].cpu(), kept), f"the comparison would not notice: {variant.label}"


def a_lookup_in_a_graph_is_a_branch_of_it() -> None:
    """It forks before the first block and joins behind it; a step is one replay, and nothing of the lookup is eager."""
    from bench.setup.variants import ASKING, BESIDE, IN_GRAPH
    from engram_ref.attach.lookup import Source

    models, work, variants, _ = _served_on_two()
    model, server = models[0]
    for (span, schedule), (captured, _) in model._pieces._captured.items():
        if schedule == IN_GRAPH:  # the way before: the lookup comes first, and the model behind it
            assert len(captured) == 1 and {stream for graph in captured for _, stream in LOG[graph]} == {0}
        if schedule not in (BESIDE, ASKING):
            continue
        (graph,) = captured
        told = LOG[graph]
        lookup = [i for i, (what, stream) in enumerate(told) if what == "runs" and stream > 0]
        join = next(i for i, entry in enumerate(told) if entry == ("waits", 0))
        block = [i for i in range(lookup[-1], join) if told[i] == ("runs", 0)]
        assert lookup and len(block) > 20, f"span {span}: {len(block)} operations between lookup and join"
    steps = sum(hasattr(step, "span") for step in work.steps)
    for variant in variants:
        if variant.schedule not in (BESIDE, ASKING):
            continue
        replays = sum(graph.replays for graph in LOG)
        starts, start = [], Source.start
        Source.start = lambda *args: starts.append(1) or start(*args)  # type: ignore[method-assign]  # noqa: B023
        server.serve(work, variant)
        Source.start = start  # type: ignore[method-assign]
        assert len(starts) == len(work.steps) - steps, "only prompts are looked up here"
        assert sum(graph.replays for graph in LOG) - replays == steps


def a_replay_that_asks_the_cpu_gets_its_rows_or_ends() -> None:
    """Question and answer are of two threads; without the answer rows are NaN, it is told, and the next has its own."""
    from engram_ref.calling.call import CallError, CpuCall
    from tests.rehearsal.calls import Calls

    refused(lambda: in_capture(lambda: CpuCall((1, 1), (1, 2, 8), torch.bfloat16, GPU)), "run the step once before")
    call = CpuCall((3, 1), (2, 6, 8), torch.bfloat16, GPU, polls=50)
    patient = CpuCall((3, 1), (2, 6, 8), torch.bfloat16, GPU)
    ids, side = torch.zeros((3, 1), dtype=torch.int64, device=GPU), torch.cuda.Stream()
    graphs, outs = [], []
    for one in (call, patient):
        graph, out = torch.cuda.CUDAGraph(), torch.zeros((2, 6, 8), dtype=torch.bfloat16, device=GPU)
        with torch.cuda.graph(graph):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                one.make(ids, out)
            torch.cuda.current_stream().wait_stream(side)
        graphs.append(graph)
        outs.append(out)

    def answer(ids: Any, values: Any) -> None:
        with Calls() as calls:
            values.copy_(torch.arange(96).view(2, 6, 8) + ids.sum())
        assert not calls, "whoever answers asks nothing of CUDA, which may be held up by the step that waits"

    graphs[0].replay()
    assert outs[0].isnan().all().item()
    try:
        call.settle()
    except CallError as error:
        assert "step 1 waited in vain for its rows, 50 looks long" in str(error)
    else:
        raise AssertionError("nobody was told")
    for step in range(1, 4):
        ids.fill_(step)
        patient.expect(answer)
        graphs[1].replay()
        patient.settle()
        wanted = (torch.arange(96).view(2, 6, 8) + 3 * step).bfloat16()
        assert torch.equal(outs[1].cpu(), wanted), step


class Noted(CUDAGraph):
    """A graph that says in LOG what its capture met: which of its streams runs something, or waits for another."""

    def tape(self, *operation: Any) -> None:
        super().tape(*operation)
        LOG.setdefault(self, []).append(("runs", self.streams.index(current())))

    def wait(self, waiting: Any, event: Any) -> None:
        super().wait(waiting, event)
        if event.stream is not waiting:
            LOG.setdefault(self, []).append(("waits", self.streams.index(waiting)))


@functools.cache
def _served_on_two() -> tuple[Any, Any, Any, Any]:
    """A model that decodes from graphs, one that does not; a round of two spans, variants, and their rows."""
    import numpy as np

    from bench.served import model as served
    from bench.served.model import ATTENTION, ServedModel, register_attention
    from bench.served.one_pass import Server
    from bench.served.requests import TokenSource
    from bench.setup.backbones import build_backbone
    from bench.setup.variants import ASKING, BESIDE, IN_GRAPH, Variant
    from engram_ref.config import EngramConfig
    from engram_ref.fusion.factory import make_fusion
    from engram_ref.hashing import HashPlan, NgramHasher
    from engram_ref.hashing.device import DeviceHasher
    from engram_ref.prefetch import Prefetcher
    from engram_ref.rows.rows import Rows
    from engram_ref.tables import uva
    from engram_ref.tables.device import DeviceTable
    from engram_ref.tables.host import HostTable
    from engram_ref.vocab import CompressedVocab, map_digest

    uva._host_addresses_serve = lambda: True  # asked of a driver, and there is none
    served.SPAN = 4  # positions, so that short sequences cross its border
    register_attention()
    decoder = build_backbone("tiny", 2, GPU, torch.float32, 0, vocabulary=300, attention=ATTENTION)
    head = torch.empty((300, decoder.hidden), device=GPU).normal_(0, 0.02)
    ids = np.arange(300, dtype=np.int64) // 2
    vocab = CompressedVocab(ids, 150, map_digest(ids))
    config = EngramConfig.preset("tiny").replace(
        hidden=decoder.hidden, hc_mult=1, layer_ids=(1,), compressed_size=None, table_size_per_order=(300, 300)
    )
    plan = HashPlan.for_vocab(config, vocab)
    fusion = make_fusion(config, GPU, torch.float32).eval()
    rows = torch.randn(plan.layers[0].rows, config.row_width).pin_memory()
    there, here = DeviceTable(rows.to(GPU)), HostTable(rows, GPU)
    on_device = Prefetcher(DeviceHasher(plan, GPU), {1: there}, background=False)
    variants = [Variant("resident", IN_GRAPH, table=there, prefetcher=on_device)]
    pinned = uva.UvaTable(Rows.of(rows), GPU)
    by_itself = Prefetcher(DeviceHasher(plan, GPU), {1: pinned})
    variants += [Variant("uva", schedule, table=pinned, prefetcher=by_itself) for schedule in (BESIDE, "prefetched")]
    for schedule in (ASKING, "prefetched", "synchronous"):
        fetches = Prefetcher(NgramHasher(plan), {1: here}, background=schedule != "synchronous")
        variants.append(Variant("offload", schedule, table=here, prefetcher=fetches))
    models = []
    for used in (True, False):
        model = ServedModel(decoder, head, fusion, plan, vocab, 2, 6, used)
        model.prepare(3, there, [one for one in variants if one.schedule in (IN_GRAPH, BESIDE, ASKING)])
        models.append((model, Server(model, vocab, plan)))
    assert models[0][0].graphs["used"], models[0][0].graphs["why"]
    work = models[0][1].prepare(TokenSource(None, 300, 0).round(0, 3, (3, 3), (3, 3)), most_tokens=100)
    assert len({step.span for step in work.steps if hasattr(step, "span")}) == 2
    return models, work, variants, rows


CHECKS = [
    devices_are_not_mixed, the_host_does_not_wait_in_a_capture, captures_are_begun_and_ended_as_cuda_wants,
    synchronisation_is_told, a_replay_is_what_was_captured, registrations_are_ranges,
    a_kernel_reads_no_pageable_memory, a_fetch_by_the_cpu_asks_little_of_cuda,
    rows_of_a_stream_that_is_not_told_are_always_waited_for,
    token_ids_that_the_cpu_needs_come_into_the_same_memory, a_mask_of_one_token_costs_one_copy,
    decoding_from_graphs_is_decoding,
    a_lookup_in_a_graph_is_a_branch_of_it, a_replay_that_asks_the_cpu_gets_its_rows_or_ends,
]  # fmt: skip

if __name__ == "__main__":
    torch.cuda.CUDAGraph = Noted  # type: ignore[misc, assignment]
    found: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            check()
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
    _served_on_two.cache_clear()
    print(json.dumps(found))
