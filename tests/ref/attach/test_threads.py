"""Several threads, one model with Engram: each gets its own rows, or an error that says why not."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engram_ref.attach import attach
from engram_ref.hashing import NgramHasher
from engram_ref.prefetch import Prefetcher
from tests.ref.attach.models import by_hand, make_ids, make_layers, make_model
from tests.ref.threads.together import in_threads

THREADS = 4


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("length", [9, 70], ids=["inline", "worker"])
@pytest.mark.parametrize("background", [True, False])
def test_each_thread_gets_its_own_rows(length, background, model, layers):
    inputs = [make_ids(2, length, seed=n) for n in range(THREADS)]
    with torch.no_grad():
        want = [by_hand(model, layers, ids) for ids in inputs]

    def forwards(number):
        with torch.no_grad():
            return [model(inputs[number]).logits for _ in range(3)]

    with attach(model, layers.engrams, layers.plan, background=background) as attached:
        for got, one in zip(in_threads(forwards), want):
            assert all(torch.equal(logits, one) for logits in got)
        assert not attached._steps


def test_forwards_that_are_inside_of_each_other(model, layers):
    """Both are between their first and their last block at the same time."""
    inputs = [make_ids(2, 9, seed=n) for n in range(2)]
    meeting = threading.Barrier(2)
    want = [by_hand(model, layers, ids) for ids in inputs]
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: (meeting.wait(10), None)[1])
    try:
        with attach(model, layers.engrams, layers.plan):
            got = in_threads(lambda n: logits(model, inputs[n]), 2)
    finally:
        hook.remove()
    assert all(torch.equal(ours, one) for ours, one in zip(got, want))


def test_generate_in_threads(model, layers):
    prompts = [make_ids(2, 5 + n, seed=n) for n in range(THREADS)]
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        want = [model.generate(ids, max_new_tokens=4, do_sample=False) for ids in prompts]
        got = in_threads(lambda n: model.generate(prompts[n], max_new_tokens=4, do_sample=False))
    assert all(torch.equal(ours, one) for ours, one in zip(got, want))


def test_training_in_threads():
    """Forward and backward of all threads in any order, the blocks computed a second time."""
    model, layers = make_model().train(), make_layers((1,))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    inputs = [make_ids(seed=n) for n in range(THREADS)]
    weight = model.model.embed_tokens.weight

    def gradient(number):
        return torch.autograd.grad(model(inputs[number]).logits.square().mean(), weight)[0]

    with attach(model, layers.engrams, layers.plan):
        got = in_threads(gradient)
    for ids, ours in zip(inputs, got):
        want = torch.autograd.grad(by_hand(model, layers, ids).square().mean(), weight)[0]
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


def test_more_threads_than_buffers_of_ones_own_are_refused(model, layers):
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_):
        inside.set()
        go_on.wait(10)

    tables = {i: engram.table for i, engram in layers.engrams.items()}
    prefetcher = Prefetcher(NgramHasher(layers.plan), tables)
    with prefetcher, attach(model, layers.engrams, layers.plan, prefetcher=prefetcher) as attached:
        want = logits(model, make_ids())
        hook = model.model.layers[0].register_forward_pre_hook(stop)
        with ThreadPoolExecutor(2) as pool:
            busy = [pool.submit(logits, model, make_ids()) for _ in range(2)]
            while len(attached._steps) < 2:
                inside.wait(0.01)
            with pytest.raises(RuntimeError, match="2 fetches are in flight"):
                model(make_ids())
            with pytest.raises(RuntimeError, match="another thread is inside of a forward"):
                attached.detach()
            go_on.set()
            assert all(torch.equal(done.result(10), want) for done in busy)
        hook.remove()
        assert torch.equal(logits(model, make_ids()), want)


def test_a_thread_that_ends_in_an_error_stops_nobody(model, layers):
    class Broken(BaseException):
        """Not an Exception: torch does not call the hook after the decoder."""

    def fail(*_):
        raise Broken

    def broken(number):
        with pytest.raises(Broken):
            model(make_ids())

    with attach(model, layers.engrams, layers.plan):
        want = logits(model, make_ids())
        hook = model.model.layers[0].register_forward_pre_hook(fail)
        in_threads(broken, 1)
        hook.remove()
        assert all(torch.equal(logits(model, make_ids()), want) for _ in range(3))


def test_an_attachment_that_is_forgotten_with_its_model_leaves_no_thread(layers):
    before, model = set(threading.enumerate()), make_model()
    attached = attach(model, layers.engrams, layers.plan)
    logits(model, make_ids(2, 70))
    (worker,) = set(threading.enumerate()) - before
    del attached, model
    gc.collect()
    worker.join(20)
    assert not worker.is_alive()


def test_staging_belongs_to_one_thread(model, layers):
    ids = make_ids()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        attached.stage(ids)
        for work in (lambda n: model(ids), lambda n: attached.stage(ids)):
            with pytest.raises(RuntimeError, match="another thread is inside of staging"):
                in_threads(work, 1)
        with pytest.raises(RuntimeError, match=r"staging\(\) inside of staging\(\)"), attached.staging():
            pass
        got = model(ids).logits
    assert torch.equal(got, by_hand(model, layers, ids))
