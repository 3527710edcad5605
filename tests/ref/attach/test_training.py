"""Training with Engram attached: gradients as by hand, and blocks computed again neither fetch nor remember twice."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from engram_ref.attach import attach
from engram_ref.attach.checkpointing import hooks_run_again
from engram_ref.hashing import NgramHasher
from engram_ref.prefetch import Prefetcher
from tests.ref.attach.models import by_hand, make_family, make_ids, make_layers, make_model


class Counted(Prefetcher):
    """A prefetcher that counts."""

    started = 0

    def start(self, *args):
        self.started += 1
        return super().start(*args)


@pytest.fixture
def model():
    made = make_model()
    made.train()
    yield made


def gradients(model, layers):
    """Of all parameters and rows, and then none."""
    named = [*model.named_parameters()]
    for layer_id, engram in layers.engrams.items():
        named += [(f"{layer_id}.{name}", p) for name, p in engram.named_parameters()]
        named.append((f"rows {layer_id}", layers.weights[layer_id]))
    found = {name: p.grad for name, p in named if p.grad is not None}
    for _, p in named:
        p.grad = None
    return found


def backward(model, layers, batches, forward):
    """Gradients of two forwards that come before both backwards."""
    losses = [forward(ids).square().mean() for ids in batches]
    for loss in losses:
        loss.backward()
    return gradients(model, layers)


def checkpoint_blocks(model, *options):
    """By the name of the release at hand."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*options)


BATCHES = make_ids(seed=1), make_ids(seed=2)


@pytest.mark.parametrize("trained", [False, True], ids=["rows fixed", "rows trained"])
@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("length", [9, 70], ids=["inline", "thread"])  # so many rows are left to the thread
def test_gradients_are_those_by_hand(trained, form, length):
    """In the rows' own dtype, so that what a fetch left in its buffer is what gradients need."""
    model = make_model(dtype=torch.float32).train()
    layers = make_layers((1,), form, dtype=torch.float32, trained=trained)
    batches = make_ids(length=length, seed=1), make_ids(length=length, seed=2)
    with attach(model, layers.engrams, layers.plan):
        got = backward(model, layers, batches, lambda ids: model(ids).logits)
    want = backward(model, layers, batches, lambda ids: by_hand(model, layers, ids))
    assert got.keys() == want.keys() and ("rows 1" in got) == trained
    assert all(torch.equal(got[name], want[name]) for name in want)


class AsBefore:
    """What transformers did until it checkpointed `forward`: the whole call of a block, its hooks included."""

    def __call__(self, *args, **kwargs):
        call = partial(super().__call__, **kwargs)
        if self.training:
            return checkpoint(call, *args, use_reentrant=self.reentrant)
        return call(*args)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hooks", ["once", "twice"])
def test_checkpointing_changes_nothing(reentrant, hooks, model):
    layers = make_layers(trained=True)
    want = backward(model, layers, BATCHES, lambda ids: by_hand(model, layers, ids))
    if hooks == "once":
        checkpoint_blocks(model, {"use_reentrant": reentrant})
    else:
        for block in model.model.layers:
            block.__class__ = type("Block", (AsBefore, type(block)), {"reentrant": reentrant})
        model.model.gradient_checkpointing = True
    tables = {layer_id: engram.table for layer_id, engram in layers.engrams.items()}
    counted = Counted(NgramHasher(layers.plan), tables)
    with counted, attach(model, layers.engrams, layers.plan, prefetcher=counted) as attached:
        got = backward(model, layers, BATCHES, lambda ids: model(ids).logits)
        assert counted.started == 2 and not attached._recomputed
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-14)  # summed in another order


def test_rows_found_again_are_those_of_the_same_forward(model):
    """The comparison above fails where a block that is computed again gets another forward's rows."""
    layers = make_layers((1,))
    want = backward(model, layers, BATCHES, lambda ids: by_hand(model, layers, ids))
    for block in model.model.layers:
        block.__class__ = type("Block", (AsBefore, type(block)), {"reentrant": True})
    model.model.gradient_checkpointing = True
    with attach(model, layers.engrams, layers.plan) as attached:

        class MixedUp(dict):
            def pop(self, key, default):
                return self.popitem()[1]

        attached._recomputed = MixedUp()
        got = backward(model, layers, BATCHES, lambda ids: model(ids).logits)
    assert any(not torch.allclose(got[name], want[name], rtol=0, atol=1e-9) for name in want)


def test_which_blocks_run_their_hooks_again(model):
    checkpoints_its_call = "__call__" in vars(GradientCheckpointingLayer)  # transformers 5.17 does, 5.24 does not
    assert hooks_run_again(model.model.layers) == checkpoints_its_call
    assert hooks_run_again(torch.nn.ModuleList([torch.nn.Linear(1, 1)]))  # the decoder checkpoints the call
    model.model.layers[0].__class__ = type("Block", (AsBefore, type(model.model.layers[0])), {})
    assert hooks_run_again(model.model.layers)


def test_checkpointing_with_a_filled_cache_is_refused(model):
    layers = make_layers((1,))
    with attach(model, layers.engrams, layers.plan):
        model.eval()
        cache = model(BATCHES[0], use_cache=True).past_key_values
        model.train()
        checkpoint_blocks(model)
        with pytest.raises(ValueError, match="gradient checkpointing with a cache of 9 positions"):
            model(BATCHES[0], past_key_values=cache)


def test_a_cache_in_training_is_followed(model):
    layers = make_layers()
    ids = BATCHES[0]
    with attach(model, layers.engrams, layers.plan):
        out = model(ids[:, :4], use_cache=True)
        got = torch.cat([out.logits, model(ids[:, 4:], past_key_values=out.past_key_values).logits], 1)
    got.square().mean().backward()
    assert all(value.isfinite().all() for value in gradients(model, layers).values())
    torch.testing.assert_close(got, by_hand(model, layers, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["demo", "v41"])
def test_derivatives_by_torch_func(form):
    """Backwards and forwards, of a function of weights, token ids and mask, which torch wraps, all of them."""
    model, layers = make_model(attn_implementation="eager"), make_layers(form=form)
    name, ids, mask = "model.layers.0.mlp.up_proj.weight", BATCHES[0], torch.ones_like(BATCHES[0])
    mask[0, -3:] = 0

    def loss(weight, ids, mask):
        return torch.func.functional_call(model, {name: weight}, (ids, mask)).logits.square().mean()

    weight = model.get_parameter(name)
    plain = weight.detach()
    with attach(model, layers.engrams, layers.plan):
        (want,) = torch.autograd.grad(loss(weight, ids, mask), [weight])
        got = torch.func.grad(loss)(plain, ids, mask)
        with torch.no_grad():
            _, along = torch.func.jvp(lambda weight: loss(weight, ids, mask), (plain,), (want,))
        with pytest.raises(ValueError, match=r"input_ids inside of torch\.func\.vmap.*give the model the whole batch"):
            torch.func.vmap(loss, in_dims=(None, 0, 0))(plain, ids[:, None], mask[:, None])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(along, want.square().sum(), rtol=1e-6, atol=0)  # norms and loss are float32 in between


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_vmap_over_weights(mode, form, dtype):
    model, layers = make_model(dtype=dtype, attn_implementation="eager"), make_layers(form=form, dtype=dtype)
    name, ids = "model.layers.0.mlp.up_proj.weight", BATCHES[0]
    weights = model.get_parameter(name).detach() * torch.tensor([1.0, 1.5], dtype=dtype)[:, None, None]

    def logits(weight):
        return torch.func.functional_call(model, {name: weight}, (ids,)).logits

    with mode(), attach(model, layers.engrams, layers.plan):
        each = torch.stack([logits(weight) for weight in weights])
        together = torch.func.vmap(logits)(weights)
    assert not torch.allclose(each[0], each[1], atol=1e-2)
    close = 1e-10 if dtype == torch.float64 else 1e-4  # products of a batch of weights sum in another order
    torch.testing.assert_close(together, each, rtol=0, atol=close * each.abs().max().item())


def test_a_cache_that_layer_drop_left_incomplete_is_refused_only_where_it_was_given():
    model, layers, ids = make_family("OPT").train(), make_layers(), BATCHES[0]
    model.model.decoder.layerdrop = 1.0  # no block runs, and the cache counts the first one's positions
    with attach(model, layers.engrams, layers.plan):
        model(ids, labels=ids).loss.backward()
        with pytest.raises(ValueError, match="counts 0 positions after 9"):
            model(ids, past_key_values=DynamicCache())
