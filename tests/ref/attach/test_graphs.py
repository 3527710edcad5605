"""Engram in compiled and captured forwards: the same numbers, one graph where it must be one, nothing stale."""

import contextlib
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from engram_ref.attach import attach
from engram_ref.attach.graphs import Staged
from engram_ref.attach.step import Step
from engram_ref.tables.base import Ready
from tests.ref.attach.models import Plainest, by_hand, make_ids, make_layers, make_model

pytestmark = pytest.mark.slow

EXACT = dict(rtol=0, atol=1e-12)  # float64; the sums are cut differently
SMALL = dict(num_hidden_layers=2)


@pytest.fixture(scope="module")
def model():
    return make_model(**SMALL)


@pytest.fixture(scope="module")
def layers():
    return make_layers((1,))


def static(model):
    return StaticCache(config=model.config, max_cache_len=16)


# --- compiled --------------------------------------------------------------------------------------


@pytest.fixture
def plainest():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Plainest().double()


def test_a_compiled_model_notices_that_engram_comes_and_goes(plainest, layers, ids):
    compiled = torch.compile(plainest, backend="eager", dynamic=False)
    with torch.no_grad():
        bare = compiled(ids)
        with attach(plainest, layers.engrams, layers.plan):
            torch.testing.assert_close(compiled(ids), plainest(ids), **EXACT)
            assert not torch.allclose(compiled(ids), bare, atol=1e-3)
        torch.testing.assert_close(compiled(ids), bare, **EXACT)


@pytest.mark.parametrize("form", ["demo", "v41"])
def test_a_block_that_is_not_compiled_reads_each_staged_step(form, plainest, ids):
    """A graph around it begins the forward where nobody counts which blocks have run."""
    layers = make_layers((1,), form)
    with torch.no_grad(), attach(plainest, layers.engrams, layers.plan) as attached:
        want = plainest(ids)
        plainest.h[1] = torch.compiler.disable(plainest.h[1])
        compiled, cache = torch.compile(plainest, backend="eager"), DynamicCache()
        with attached.staging():
            for token, expected in zip(ids[:, :3].split(1, 1), want.split(1, 1)):
                attached.stage(token, cache)
                torch.testing.assert_close(compiled(token), expected, **EXACT)
                cache.update(*[torch.zeros(2, 2, 1, 16, dtype=torch.float64)] * 2, 0)  # as attention advances it


def test_staged_padding_compiles_to_one_graph(plainest, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for form in ("demo", "v41"):
        layers = make_layers((1,), form)
        with torch.no_grad(), attach(plainest, layers.engrams, layers.plan) as attached:
            want = plainest(ids, mask)
            compiled = torch.compile(plainest, backend="aot_eager", fullgraph=True, dynamic=False)
            with attached.staging():
                attached.stage(ids, None, mask)
                torch.testing.assert_close(compiled(ids, mask), want, **EXACT)
                attached.stage(ids, None, torch.ones_like(ids))
                assert not torch.allclose(compiled(ids, mask), want, atol=1e-3)


def test_staged_steps_of_a_model_compile_to_one_graph(ids):
    """Functionalised, as for a backend that writes kernels; the convolution's past goes on inside the graph."""
    model, layers = make_model(num_hidden_layers=1), make_layers((0,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        cache, parts, addresses = static(model), [], set()
        for t in range(6):
            attached.stage(ids[:, t : t + 1], cache)
            parts.append(compiled(ids[:, t : t + 1], past_key_values=cache).logits)
            addresses.add(attached._staged.at(0).past.values.data_ptr())
        compiled(ids[:, 6:7], past_key_values=cache)  # reads the rows of the step before, and cannot notice
        with pytest.raises(ValueError, match="the cache holds 7 positions, Engram's history 6"):
            attached.stage(ids[:, 7:8], cache)
    assert len(addresses) == 1  # a captured graph goes on where the last replay ended
    torch.testing.assert_close(torch.cat(parts, 1), by_hand(model, layers, ids[:, :6]), **EXACT)


def test_a_block_that_runs_twice_in_one_graph_has_no_past(plainest, layers, ids):
    compiled = torch.compile(plainest, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad(), attach(plainest, layers.engrams, layers.plan) as attached, attached.staging():
        attached.stage(ids, DynamicCache())
        plainest.h.append(plainest.h[1])
        with pytest.raises(RuntimeError, match="block 1 runs several times in one forward"):
            compiled(ids)


# --- staged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("new_cache", [lambda model: DynamicCache(), static], ids=["dynamic", "static"])
def test_staged_steps_give_what_one_shot_gives(form, new_cache, model, ids):
    layers = make_layers((1,), form)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        cache = new_cache(model)
        parts = [model(ids[:, :3], past_key_values=cache).logits]
        with attached.staging():
            for chunk in ids[:, 3:8].split([1, 1, 3], dim=1):
                attached.stage(chunk, cache)
                parts.append(model(chunk, past_key_values=cache).logits)
        parts.append(model(ids[:, 8:], past_key_values=cache).logits)  # and on without staging
    torch.testing.assert_close(torch.cat(parts, 1), by_hand(model, layers, ids), **EXACT)


def test_what_a_graph_reads_stays_where_it_is(model, layers, ids):
    """Staged, run once as a capture would, then only staged, as before replays."""
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        cache = static(model)
        rows, past = [], []
        for t in range(4):
            attached.stage(ids[:, t : t + 1], cache)
            model(ids[:, t : t + 1], past_key_values=cache)
            block = attached._staged.at(1)
            rows.append((block.rows.data_ptr(), block.rows.clone()))
            past.append((block.past.values.data_ptr(), block.past.values.clone()))
        cache.reorder_cache(torch.tensor([1, 0]))
        moved = attached._staged.at(1).past.values
        assert moved.data_ptr() == past[0][0] and torch.equal(moved, past[-1][1].flip(0))
        cache.reset()
        assert moved.data_ptr() == past[0][0] and not moved.any()
    for kept in (rows, past):
        assert len({address for address, _ in kept}) == 1
        assert not torch.equal(kept[0][1], kept[1][1])


def test_another_staging_fills_the_same_buffers(model, layers, ids):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        addresses = []
        for seed in (1, 2):
            with attached.staging():
                with pytest.raises(RuntimeError, match="nothing is staged"):
                    attached._staged.at(1)
                attached.stage(make_ids(seed=seed))
                addresses.append(attached._staged.at(1).rows.data_ptr())
        assert addresses[0] == addresses[1]
    assert not attached._stagings


def test_rows_that_are_waited_for_at_once_are_gathered_by_whoever_waits(model, layers, monkeypatch):
    """A hand-over to the worker and back would come on top; where something is launched before the join, it pays."""
    ids, gathered = make_ids(length=400), []  # too many rows for whoever only starts a fetch
    table = layers.engrams[1].table
    start = type(table).start

    def noted(self, *arguments):
        gathered.append(threading.current_thread())
        return start(self, *arguments)

    monkeypatch.setattr(type(table), "start", noted)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        attached.stage(ids)
        rows = [attached._staged.at(1).rows.clone()]
        assert gathered == [threading.main_thread()]
        attached.begin(ids)
        attached.lay_down()
        rows.append(attached._staged.at(1).rows.clone())
        assert gathered[1].name.startswith("engram-prefetch")
        monkeypatch.setattr(attached._source, "send_for", lambda given: lambda: given)  # as if a GPU had them
        attached.begin(ids)
        assert len(gathered) == 2
        attached.lay_down()
        rows.append(attached._staged.at(1).rows.clone())
        assert gathered[2:] == [threading.main_thread()]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_a_mask_is_laid_down_with_the_rows(model, layers, ids):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded > 0).long()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        want = model(padded, attention_mask=mask).logits
        with attached.staging():
            attached.stage(padded, None, mask)
            assert torch.equal(model(padded, attention_mask=mask).logits, want)
            with pytest.raises(ValueError, match="an attention mask for some steps of shape"):
                attached.stage(padded)


def test_a_forward_that_was_not_staged_is_refused(model, layers, ids):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        with pytest.raises(RuntimeError, match=r"stage\(\) outside of staging\(\)"):
            attached.stage(ids)
        with attached.staging():
            with pytest.raises(RuntimeError, match="nothing is staged"):
                attached._staged.at(1)
            with pytest.raises(ValueError, match=r"token ids of \(2, 9\); staged were None"):
                model(ids)
            cache = DynamicCache()
            attached.stage(ids, cache)
            with pytest.raises(ValueError, match=r"token ids of \(2, 1\)"):
                model(ids[:, :1], past_key_values=cache)
            model(ids, past_key_values=cache)
            with pytest.raises(ValueError, match="ends at position 18; staged was one that ends at 9: call"):
                model(ids, past_key_values=cache)
        assert model(ids).logits.isfinite().all()


def test_staging_twice_without_a_step_is_noticed(model, layers, ids):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        cache = DynamicCache()
        attached.stage(ids[:, :4], cache)
        model(ids[:, :4], past_key_values=cache)
        attached.stage(ids[:, 4:5], cache)
        with pytest.raises(ValueError, match="cropped by 1 positions"):
            attached.stage(ids[:, 4:5], cache)


def fail(*_):
    raise MemoryError


@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("failing", [0, 1], ids=["before the layer", "behind it"])
@pytest.mark.parametrize("laid_down", ["before", "between"])
def test_a_cache_whose_staged_forward_failed_is_refused(laid_down, failing, form, model, ids):
    layers = make_layers((1,), form)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        between = attached.lay_down if laid_down == "between" else None
        begin = attached.begin if between else attached.stage
        with attached.staging(between=between):
            caches = [static(model), static(model)]
            for cache in caches:
                begin(ids[:, :4], cache)
                model(ids[:, :4], past_key_values=cache)
            begin(ids[:, 4:5], caches[0])
            hook = model.model.layers[failing].mlp.register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                model(ids[:, 4:5], past_key_values=caches[0])
            hook.remove()
            if laid_down == "before":  # not even run again as it was staged
                with pytest.raises(ValueError, match=r"broken off.*begin with a new cache"):
                    model(ids[:, 4:5], past_key_values=caches[0])
            with pytest.raises(ValueError, match=r"broken off.*begin with a new cache"):
                begin(ids[:, 5:6], caches[0])
            begin(ids[:, 4:5], caches[1])  # another cache goes on
            got = model(ids[:, 4:5], past_key_values=caches[1]).logits
            caches[0].reset()
            begin(ids[:, :4], caches[0])
            again = model(ids[:, :4], past_key_values=caches[0]).logits
        with pytest.raises(ValueError, match=r"broken off.*begin with a new cache"):
            hook = model.model.layers[failing].mlp.register_forward_pre_hook(fail)
            with attached.staging(between=between), contextlib.suppress(MemoryError):
                begin(ids[:, 4:5], caches[0])
                model(ids[:, 4:5], past_key_values=caches[0])
            hook.remove()
            model(ids[:, 5:6], past_key_values=caches[0])  # nor outside of staging
    whole = by_hand(model, layers, ids[:, :5])
    torch.testing.assert_close(torch.cat([again, got], 1), whole, **EXACT)


def test_steps_that_are_replayed_are_never_taken_for_broken(model, layers, ids):
    """A replay runs no hook: staged steps follow one another, whatever is known of forwards between them."""
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        cache = static(model)
        for t in range(4):
            attached.stage(ids[:, t : t + 1], cache)
            cache.update(*[torch.zeros(2, 2, 1, 16, dtype=torch.float64)] * 2, 0)  # as a replay advances it
        rows = attached._staged.at(1).rows.clone()
        attached.stage(ids[:, :4])
        whole = attached._staged.at(1).rows.view(2, 4, -1)
    assert torch.equal(rows.view(2, 1, -1), whole[:, 3:])


def test_overlap_without_a_gpu_is_refused(model, layers):
    with attach(model, layers.engrams, layers.plan) as attached:
        with pytest.raises(ValueError, match="overlap=True on cpu"), attached.staging(overlap=True):
            pass
        assert attached._staged is None


class FakeStream:
    """Notes what it is asked for."""

    def __init__(self, name, happened):
        self.name, self.happened, self.device = name, happened, torch.device("cuda")

    def wait_stream(self, other):
        self.happened.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.happened.append((self.name, "waits for event", event.number))


def test_overlapping_waits_in_the_graph(layers, ids, monkeypatch):
    """The order of things on a stand-in for a GPU: old rows are read, new ones laid down, then a block may go on."""
    happened = []
    current, side = FakeStream("model", happened), FakeStream("side", happened)

    class Event:
        count = 0

        def __init__(self, external):
            assert external
            Event.count += 1
            self.number = Event.count

        def record(self, stream):
            happened.append((stream.name, "records", self.number))

    class Entered:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            happened.append((self.stream.name, "entered"))

        def __exit__(self, *_):
            happened.append((self.stream.name, "left"))

    class Pending(Ready):
        def wait(self):
            happened.append(("rows", "joined"))
            return self.values

    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    staged = Staged(torch.device("cuda"), overlap=True)
    for _ in range(2):
        step = Step({1: Pending(torch.ones(18 * 16, 4))}, ids.shape, ids, None, None)
        staged.fill(step, layers.engrams)
        staged.at(1)
    once = [
        ("side", "waits for", "model"),
        ("side", "entered"),
        ("rows", "joined"),
        ("side", "records", 1),
        ("side", "left"),
        ("model", "waits for event", 1),
    ]
    assert happened == once * 2  # the same event, or a captured wait would wait for an old one
    monkeypatch.setattr(torch.cuda, "Event", lambda: None)
    with pytest.raises(ValueError, match="needs external CUDA events"):
        Staged(torch.device("cuda"), overlap=True).fill(step, layers.engrams)


def test_in_a_capture_the_wait_is_an_edge_of_the_graph(layers, ids, monkeypatch):
    """An ordinary event each time, as one from outside is no edge; and outside the one that graphs have always met."""
    made = []

    class Event:
        def __init__(self, external=False):
            made.append(external)
            self.number = len(made)

        def record(self, stream):
            pass

    current, side = FakeStream("model", []), FakeStream("side", [])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    staged = Staged(torch.device("cuda"), overlap=True)
    step = Step({1: Ready(torch.ones(18 * 16, 4))}, ids.shape, ids, None, None)
    for capturing in (False, True, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        staged.fill(step, layers.engrams)
        staged.at(1)
    assert made == [True, False, False]
    assert current.happened == [("model", "waits for event", number) for number in (1, 2, 3, 1)]
