"""Engram in a decoder on a GPU: every placement gives the same bits, also compiled, and captured in a CUDA graph."""

import warnings
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from transformers import StaticCache

from engram_ref.attach import ExposedTime, attach
from engram_ref.attach.on_hand import OnHand
from engram_ref.layer import Engram
from engram_ref.tables import make_table
from tests.ref.attach.models import VOCAB, make_ids, make_layers, make_model

pytestmark = pytest.mark.cuda

PLACEMENTS = ["device", "host", "uva", "hot"]
LENGTH = 12
# float32 in another order of summation, through three blocks: a few hundred times its eps, for logits of about 1.
CLOSE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    """Without TF32, which rounds the inputs of a matrix product to 10 bits."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


@pytest.fixture(scope="module")
def model(request):
    return make_model(dtype=torch.float32).cuda()


@pytest.fixture(params=["demo", "v41"])
def layers(request):
    return make_layers(form=request.param, dtype=torch.float32)


@pytest.fixture
def ids():
    return make_ids(4, LENGTH).cuda()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def placed():
    """Puts layers on the GPU and their rows where a placement says; the tables are closed after the test."""
    with ExitStack() as tables:

        def place(layers, placement):
            made = {}
            for layer_id, engram in layers.engrams.items():
                rows = layers.weights[layer_id]
                options = {"hot": torch.arange(0, len(rows), 3)} if placement == "hot" else {}
                table = tables.enter_context(make_table(placement, rows, "cuda", **options))
                made[layer_id] = Engram(engram.fusion.cuda(), table)
            return made

        yield place


def static(model):
    return StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("background", [True, False], ids=["prefetch", "naive"])
@pytest.mark.parametrize("placement", PLACEMENTS[1:])
def test_every_placement_equals_device(placed, placement, background, model, layers, ids):
    with attach(model, placed(layers, "device"), layers.plan, np.arange(VOCAB)):
        want = model(ids).logits
    with attach(model, placed(layers, placement), layers.plan, np.arange(VOCAB), background=background):
        for _ in range(20):
            assert torch.equal(model(ids).logits, want)


def test_equals_the_cpu(placed, model, layers, ids):
    with attach(model, placed(layers, "device"), layers.plan):
        got = model(ids).logits
    on_cpu = make_model(dtype=torch.float32)
    again = make_layers(form=layers.engrams[1].fusion.form, dtype=torch.float32)
    with attach(on_cpu, again.engrams, again.plan):
        torch.testing.assert_close(got.cpu(), on_cpu(ids.cpu()).logits, **CLOSE)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_token_by_token_equals_one_shot(placed, placement, model, layers, ids):
    with attach(model, placed(layers, placement), layers.plan):
        want = model(ids).logits
        cache = static(model)
        parts = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(LENGTH)]
    torch.testing.assert_close(torch.cat(parts, 1), want, **CLOSE)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generate_with_a_static_cache(placed, placement, model, layers, ids):
    options = dict(max_new_tokens=8, do_sample=False, disable_compile=True)
    with attach(model, placed(layers, placement), layers.plan):
        for beams in (1, 3):
            want = model.generate(ids, use_cache=False, num_beams=beams, **options)
            for implementation in (None, "static"):
                got = model.generate(ids, cache_implementation=implementation, num_beams=beams, **options)
                assert torch.equal(got, want)


# Compiling takes a while: each once, in two placements that between them have everything.
COMPILED = [("demo", "host"), ("v41", "uva")]


@pytest.mark.parametrize(("form", "placement"), COMPILED)
def test_generate_compiled_by_transformers(placed, form, placement, model, ids):
    """With a static cache, transformers compiles the decoding step by itself; so its logits are compared."""
    layers = make_layers(form=form, dtype=torch.float32)
    options = dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with attach(model, placed(layers, placement), layers.plan):
        got = model.generate(ids, cache_implementation="static", **options)
    with attach(model, placed(layers, placement), layers.plan):
        want = model(got.sequences).logits[:, LENGTH - 1 : -1]
    torch.testing.assert_close(torch.stack(got.logits, 1), want, **CLOSE)


@pytest.mark.parametrize(("form", "placement"), COMPILED)
def test_compiled(placed, form, placement, model, ids):
    layers = make_layers(form=form, dtype=torch.float32)
    with attach(model, placed(layers, placement), layers.plan):
        want = model(ids).logits
        compiled = torch.compile(model, dynamic=False)
        for _ in range(3):
            torch.testing.assert_close(compiled(ids).logits, want, **CLOSE)


def synchronisations(model, ids):
    """How often a decoding step makes the CPU wait for the device."""
    cache = static(model)
    model(ids, past_key_values=cache)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(ids[:, :1], past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("placement", ["device", "uva", "on hand"])
def test_a_step_does_not_wait_for_the_device(placed, placement, model, layers, ids):
    """No more than the model does by itself; where the CPU gathers, it must have the ids, and the count shows it."""
    bare = synchronisations(model, ids)
    engrams = placed(layers, "host" if placement == "on hand" else placement)
    source = OnHand(engrams) if placement == "on hand" else None
    with attach(model, engrams, layers.plan, np.arange(VOCAB), prefetcher=source):
        assert synchronisations(model, ids) <= bare
    with attach(model, placed(layers, "host"), layers.plan, np.arange(VOCAB)):
        assert synchronisations(model, ids) > bare


def steps_of(model, cache, ids, positions):
    """The arguments of a decoding step whose tensors stay where they are, and a function that sets them to a step."""
    token, position = ids[:, :1].clone(), positions[:1].clone()[None]
    allowed = torch.zeros(len(ids), 1, 1, 32, dtype=torch.bool, device=ids.device)

    def go_to(step):
        token.copy_(ids[:, step : step + 1])
        position.fill_(step)
        allowed[..., : step + 1] = True
        allowed[..., step + 1 :] = False

    arguments = dict(input_ids=token, position_ids=position, attention_mask={"full_attention": allowed})
    return arguments | dict(past_key_values=cache), go_to


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_captured_step_is_replayed(placed, placement, overlap, model, layers, ids):
    """Bit for bit what the same steps give uncaptured; with overlap, the wait for the rows is in the graph."""
    positions = torch.arange(LENGTH, device="cuda")
    with attach(model, placed(layers, placement), layers.plan) as attached:
        cache = static(model)
        arguments, go_to = steps_of(model, cache, ids, positions)
        want = []
        for step in range(LENGTH):
            go_to(step)
            want.append(model(**arguments).logits.clone())
        cache.reset()
        with attached.staging(overlap=overlap):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for step in range(2):
                    go_to(step)
                    attached.stage(arguments["input_ids"], cache)
                    model(**arguments)
            torch.cuda.current_stream().wait_stream(side)
            cache.reset()
            go_to(0)
            attached.stage(arguments["input_ids"], cache)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(**arguments).logits
            for _ in range(2):  # twice from the start
                cache.reset()
                for step in range(LENGTH):
                    go_to(step)
                    attached.stage(arguments["input_ids"], cache)
                    graph.replay()
                    assert torch.equal(logits, want[step])


def test_replayed_without_staging_it_is_wrong(placed, model, layers, ids):
    """The comparison above fails where rows are those of an older step."""
    with attach(model, placed(layers, "device"), layers.plan) as attached:
        want = model(ids).logits
        cache = static(model)
        arguments, go_to = steps_of(model, cache, ids, torch.arange(LENGTH, device="cuda"))
        with attached.staging():
            go_to(0)
            attached.stage(arguments["input_ids"], cache)
            model(**arguments)
            cache.reset()
            attached.stage(arguments["input_ids"], cache)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(**arguments).logits
            cache.reset()
            for step in range(2):
                go_to(step)
                graph.replay()
    assert not torch.allclose(logits[:, 0], want[:, 1], rtol=0, atol=1e-2)


def test_what_only_the_device_knows_is_raised_by_check(placed, model, layers, ids):
    with attach(model, placed(layers, "uva"), layers.plan, np.arange(VOCAB)) as attached:
        attached.check()
        model(ids.clone().fill_(VOCAB - 1))
        attached.check()
        cache = static(model)
        model(ids, past_key_values=cache)
        cache.layers[0].cumulative_length.add_(1)
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=f"the cache holds {LENGTH + 1} positions, Engram's history {LENGTH}"):
            attached.check()


def test_exposed_time(placed, model, layers, ids):
    exposed = ExposedTime("cuda")
    with attach(model, placed(layers, "host"), layers.plan, exposed=exposed):
        model(ids)
    assert [place for place, _ in exposed.seconds()] == ["start", 1, 2]
    assert all(0 <= seconds < 10 for _, seconds in exposed.seconds())
