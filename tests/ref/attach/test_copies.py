"""Copies and pickles with Engram attached: each computes what the original computes, or says what to do instead."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from engram_ref.attach import attach
from engram_ref.attach.on_hand import OnHand
from engram_ref.hashing import NgramHasher
from engram_ref.layer import build_engram
from engram_ref.prefetch import Prefetcher
from engram_ref.tables import make_table
from tests.ref.attach.models import VOCAB, by_hand, make_ids, make_layers, make_model

EXACT = dict(rtol=0, atol=1e-12)  # float64, logits of about 1; other shapes of the same sums differ by 1e-15
WAYS = {
    "background": lambda layers: {},
    "naive": lambda layers: dict(background=False),
    "on hand": lambda layers: dict(prefetcher=OnHand(layers.engrams)),
}


# --- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_copy_of_a_model_has_its_engram_until_that_is_detached(how, layers, ids):
    model = make_model()
    with torch.no_grad():
        bare = model(ids).logits
        with attach(model, layers.engrams, layers.plan, **how(layers)):
            twin = copy.deepcopy(model)
            want = model(ids).logits
            assert torch.equal(twin(ids).logits, want) and not torch.allclose(want, bare, atol=1e-3)
            assert torch.equal(twin.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
        assert torch.equal(twin(ids).logits, bare) and torch.equal(copy.deepcopy(twin)(ids).logits, bare)
        with attach(twin, layers.engrams, layers.plan), attach(model, layers.engrams, layers.plan):
            assert torch.equal(twin(ids).logits, by_hand(make_model(), layers, ids))


class Wrapper(nn.Module):
    """As fine-tuning libraries wrap a model."""

    def __init__(self, model):
        super().__init__()
        self.wrapped, self.config = model, model.config


class WrappedBlock(nn.Module):
    """As sharding libraries wrap a block."""

    def __init__(self, block):
        super().__init__()
        self.block = block


def rewrapped(model):
    other = copy.copy(model.model)
    other._modules = dict(other._modules, layers=nn.ModuleList(WrappedBlock(block) for block in model.model.layers))
    return other


@pytest.mark.parametrize(
    "same", [lambda m: m, copy.deepcopy, copy.copy, lambda m: m.model, Wrapper, rewrapped], ids=list("abcdef")
)
def test_a_second_layer_before_a_block_is_refused(same, layers, ids):
    model = make_model()
    one, both = {1: layers.engrams[1]}, layers.engrams
    with attach(model, one, layers.plan):
        other = same(model)
        before = [len(module._forward_pre_hooks) for module in model.modules()]
        with pytest.raises(ValueError, match=r"before block 1 of this model already.*detach\(\) that one first"):
            attach(other, both, layers.plan)
        assert before == [len(module._forward_pre_hooks) for module in model.modules()]
        attach(other, {2: layers.engrams[2]}, layers.plan).detach()
    with torch.no_grad(), attach(same(model), both, layers.plan):
        pass
    with torch.no_grad(), attach(model, both, layers.plan):
        assert torch.equal(model(ids).logits, by_hand(make_model(), layers, ids))


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch"])
def test_a_model_with_engram_is_not_pickled(save, layers, ids):
    model = make_model()
    names = list(model.state_dict())
    with attach(model, layers.engrams, layers.plan) as attached:
        with pytest.raises(ValueError, match=r"detach\(\) first, or save its state_dict\(\)"):
            save(model)
        for copied in (copy.copy, copy.deepcopy, save):
            with pytest.raises(ValueError, match="attach Engram to the other model anew"):
                copied(attached)
            with pytest.raises(ValueError, match="make a new one"):
                copied(attached.prefetcher)
        assert list(model.state_dict()) == names
    save(model)


# --- the layer and its table -----------------------------------------------------------------------


def test_a_copied_layer_reads_the_same_table(ids):
    engram = make_layers((1,)).engrams[1]
    twin = copy.deepcopy(engram)
    assert twin.table is engram.table
    with torch.no_grad():
        twin.fusion.projection_bias += 1
    assert not torch.equal(twin.fusion.projection_bias, engram.fusion.projection_bias)
    assert copy.deepcopy([engram, engram.table])[1] is engram.table
    with pytest.raises(ValueError, match=r"rows are trained.*rows of its own"):
        copy.deepcopy(make_layers((1,), trained=True).engrams[1])


def test_rows_are_no_weights(ids):
    layers = make_layers((1,))
    engram = layers.engrams[1]
    assert all(name.startswith("fusion.") for name in engram.state_dict())
    other = build_engram(engram.fusion.config, layers.plan.layer(1), dtype=torch.float64, seed=5)
    other.load_state_dict(engram.state_dict())
    assert torch.equal(other.fusion.projection_weight, engram.fusion.projection_weight)
    torch.save(engram.state_dict(), io.BytesIO())


@pytest.mark.parametrize("placement", ["device", "host", "hot"])
def test_a_table_is_neither_copied_nor_pickled(placement):
    layers = make_layers((1,))
    hot = {"hot": torch.arange(5)} if placement == "hot" else {}
    with make_table(placement, layers.weights[1], **hot) as table:
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(ValueError, match=f"a {placement} table of Engram is neither copied nor pickled.*save_"):
                act(table)
    with pytest.raises(ValueError, match="neither copied nor pickled"):
        torch.save(layers.engrams[1], io.BytesIO())


# --- the cache -------------------------------------------------------------------------------------

THROUGH = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "old pickle": lambda cache: pickle.loads(pickle.dumps(cache, protocol=1)),
    "torch": lambda cache: _through_a_file(cache),
}


def _through_a_file(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", THROUGH.values(), ids=THROUGH)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_goes_on_as_its_copies_do(again, kind, layers, ids):
    model = make_model()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        whole = model(ids).logits
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :5], past_key_values=cache)
        twin = again(again(cache))
        assert type(twin) is type(cache)
        other = make_ids(length=4, seed=8)
        wanted = model(torch.cat([ids[:, :5], other], 1)).logits[:, 5:]
        torch.testing.assert_close(model(other, past_key_values=twin).logits, wanted, **EXACT)
        torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:], **EXACT)
        again(DynamicCache())  # one without a history is what it was


def shallow(cache):
    """A cheap fork: keys and values are replaced, not written to, so both may hold the same."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


class CopiesItself(DynamicCache):
    def __copy__(self):
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.layers = copy.deepcopy(self.layers)
        return twin


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("kind", "fork"), [(DynamicCache, shallow), (CopiesItself, copy.copy)])
def test_of_a_cache_and_a_shallow_copy_with_layers_of_its_own_the_first_that_is_used_goes_on(kind, fork, swapped, ids):
    """The other one is refused, at whatever length; a form without convolution would follow it back."""
    model, layers = make_model(), make_layers(form="v41")
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        cache = kind()
        model(ids[:, :5], past_key_values=cache)
        twin = fork(cache)
        first, other = (twin, cache) if swapped else (cache, twin)
        for at in range(5, 9):
            got = model(ids[:, at : at + 1], past_key_values=first).logits
            torch.testing.assert_close(got, model(ids[:, : at + 1], use_cache=False).logits[:, -1:], **EXACT)
            for use in (lambda: other.batch_repeat_interleave(2), lambda: model(ids[:, :1], past_key_values=other)):
                with pytest.raises(ValueError, match=r"copy\.deepcopy a cache that is to go on in two ways"):
                    use()


ACTS = {
    "goes on": lambda model, one, other: model(make_ids(length=1, seed=9), past_key_values=one),
    "is reordered": lambda model, one, other: one.reorder_cache(torch.tensor([1, 0])),
    "is cropped": lambda model, one, other: (
        model(make_ids(length=1, seed=9), past_key_values=one),
        one.crop(-1),
        model(make_ids(length=1, seed=7), past_key_values=other),
    ),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_copy_with_the_layers_of_its_cache_is_the_same_cache(act, ids):
    model, layers = make_model(), make_layers(form="v41")
    with torch.no_grad():
        for swapped in (False, True):
            got = []
            for attached in (True, False):  # what is in keys and values says which ids came before
                with attach(model, layers.engrams, layers.plan):
                    cache = DynamicCache()
                    model(ids[:, :5], past_key_values=cache)
                    twin = copy.copy(cache) if attached else cache
                    one, other = (twin, cache) if swapped else (cache, twin)
                    act(model, one, other)
                    got.append(model(ids[:, 5:], past_key_values=other).logits)
            torch.testing.assert_close(*got, **EXACT)


def swap_back(model, cache, tokens):
    fork = copy.deepcopy(cache)
    model(tokens[:, :1], past_key_values=cache)
    model(tokens[:, 1:2], past_key_values=fork)
    fork.layers = cache.layers
    return fork


def swap_back_unused(model, cache, tokens):
    fork = copy.deepcopy(cache)
    model(tokens[:, :1], past_key_values=cache)
    fork.layers = cache.layers
    return fork


def exchange(model, cache, tokens):
    fork = copy.deepcopy(cache)
    model(tokens[:, :1], past_key_values=cache)
    model(tokens[:, 1:2], past_key_values=fork)
    cache.layers, fork.layers = fork.layers, cache.layers
    return cache


def rewind(model, cache, tokens):
    model(tokens[:, :1], past_key_values=cache)
    saved = copy.deepcopy(cache.layers)
    cache.crop(-1)
    model(tokens[:, 1:2], past_key_values=cache)
    cache.layers = saved
    return cache


@pytest.mark.parametrize("swapped", [swap_back, swap_back_unused, exchange, rewind])
def test_layers_of_another_history_are_refused(swapped, ids):
    """The lengths agree, or differ as after cropping."""
    model, layers = make_model(), make_layers(form="v41")
    with torch.no_grad():
        with attach(model, layers.engrams, layers.plan) as attached:
            cache = DynamicCache()
            model(ids[:, :5], past_key_values=cache)
            cache = swapped(model, cache, ids[:, 5:])
            for use in (lambda: cache.reorder_cache(torch.tensor([1, 0])), lambda: model(ids, past_key_values=cache)):
                with pytest.raises(ValueError, match="layers that it had left, or of another cache"):
                    use()
            told, before = DynamicCache(), ids[:, [0, 1, 2, 3, 4, 6 if swapped is exchange else 5]]
            told.layers = cache.layers
            attached.remember(told, before)
            wanted = model(torch.cat([before, ids[:, 7:8]], 1), use_cache=False).logits[:, -1:]
            torch.testing.assert_close(model(ids[:, 7:8], past_key_values=told).logits, wanted, **EXACT)
        with attach(model, layers.engrams, layers.plan) as attached:
            attached.remember(cache, cache_ids := torch.cat([before, ids[:, 7:8]], 1))
            wanted = model(torch.cat([cache_ids, ids[:, 8:]], 1), use_cache=False).logits[:, -1:]
            torch.testing.assert_close(model(ids[:, 8:], past_key_values=cache).logits, wanted, **EXACT)


def keep_and_go_on(model, cache, tokens):
    model(tokens[:, :1], past_key_values=cache)
    kept = copy.deepcopy(cache.layers)
    model(tokens[:, 1:2], past_key_values=cache)
    cache.layers = kept


@pytest.mark.parametrize("kind", [DynamicCache, lambda: StaticCache(make_model().config, max_cache_len=16)])
def test_what_begins_anew_or_is_told_needs_no_own_layers(kind, ids):
    """Layers of another history are emptied, or hold nothing, or somebody says what they hold."""
    model, layers, other = make_model(), make_layers(form="v41"), make_ids(seed=8)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        cache = kind()
        model(ids[:, :5], past_key_values=cache)
        keep_and_go_on(model, cache, ids[:, 5:])
        attached.remember(cache, ids[:, :6])
        wanted = model(torch.cat([ids[:, :6], other[:, :1]], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(model(other[:, :1], past_key_values=cache).logits, wanted, **EXACT)
        keep_and_go_on(model, cache, ids[:, 5:])
        cache.reset()
        if cache.get_seq_length():  # of a dynamic cache transformers 5.17 makes zeros, as many as there were
            with pytest.raises(ValueError, match="begin with a new cache"):
                model(other[:, :5], past_key_values=cache)
            return
        empty = copy.deepcopy(cache.layers)
        for begun in (other, ids):  # after the first round the cache gets empty layers of somebody else's
            model(begun[:, :5], past_key_values=cache)
            got = model(begun[:, 5:6], past_key_values=cache).logits
            torch.testing.assert_close(got, model(begun[:, :6], use_cache=False).logits[:, -1:], **EXACT)
            cache.layers = copy.deepcopy(empty)


def test_two_histories_of_one_cache_are_both_of_its_layers(ids):
    """Of two attachments one is told what the layers hold, and the other one has to be, too."""
    model, one, two = make_model(), make_layers(form="v41"), make_layers(layer_ids=(0,), form="v41")
    with (
        torch.no_grad(),
        attach(model, one.engrams, one.plan) as first,
        attach(model, two.engrams, two.plan) as attached,
    ):
        cache = DynamicCache()
        model(ids[:, :5], past_key_values=cache)
        keep_and_go_on(model, cache, ids[:, 5:])
        with pytest.raises(ValueError, match="layers that it had left, or of another cache"):
            model(ids[:, 6:7], past_key_values=cache)
        attached.remember(cache, ids[:, :6])
        with pytest.raises(ValueError, match="a cache of 6 positions that Engram has not seen"):
            model(ids[:, 6:7], past_key_values=cache)
        first.remember(cache, ids[:, :6])
        wanted = model(ids[:, :7], use_cache=False).logits[:, -1:]
        torch.testing.assert_close(model(ids[:, 6:7], past_key_values=cache).logits, wanted, **EXACT)


def test_caches_of_one_encoders_output_are_each_of_their_own_history(ids):
    """Keys and values of the encoder are read only, and shared; those of the decoder are not."""
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=1, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    decoder = transformers.BartModel(config).double().eval().get_decoder()
    layers, other = make_layers(form="v41"), make_ids(seed=8)
    encoded = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def step(tokens, cache=None):
        given = dict(past_key_values=cache, use_cache=cache is not None)
        return decoder(input_ids=tokens, encoder_hidden_states=encoded, **given).last_hidden_state

    with torch.no_grad(), attach(decoder, layers.engrams, layers.plan):
        first = EncoderDecoderCache(DynamicCache(), DynamicCache())
        step(ids[:, :3], first)
        fork = copy.deepcopy(first)
        fork.cross_attention_cache = first.cross_attention_cache
        anew = EncoderDecoderCache(DynamicCache(), first.cross_attention_cache)
        caches = (first, ids[:, :3], ids[:, 3:]), (fork, ids[:, :3], other), (anew, other[:, :0], other)
        for at in range(3):
            for cache, before, tokens in caches:
                got = step(tokens[:, at : at + 1], cache)
                wanted = step(torch.cat([before, tokens[:, : at + 1]], 1))[:, -1:]
                torch.testing.assert_close(got, wanted, **EXACT)
        first.self_attention_cache = fork.self_attention_cache
        with pytest.raises(ValueError, match="layers that it had left, or of another cache"):
            step(ids[:, 6:7], first)


class ByNumber(DynamicCache):
    """Layers in a dict, which say nothing of who used them last."""

    def __init__(self):
        super().__init__()
        self.layers = {}

    def update(self, keys, values, number, *args, **kwargs):
        layer = self.layers.setdefault(number, None) or self.layer_class_to_replicate()
        self.layers[number] = layer
        return layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, layer_idx=0):
        return self.layers[layer_idx].get_seq_length() if layer_idx in self.layers else 0

    def get_query_offset(self, layer_idx=0):
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length=None, layer_idx=0, *args, **kwargs):
        return self.get_seq_length(layer_idx) + query_length, 0


def test_a_cache_whose_layers_bear_no_mark_is_used_as_ever(ids):
    model, layers = make_model(), make_layers(form="v41")
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        cache = ByNumber()
        for at in range(4):
            got = model(ids[:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(got, model(ids[:, : at + 1], use_cache=False).logits[:, -1:], **EXACT)


class Slotted(DynamicCache):
    __slots__ = ("note",)


class Stateful(DynamicCache):
    def __getstate__(self):
        return tuple(self.__dict__.items())

    def __setstate__(self, state):
        self.__dict__.update(state)


@pytest.mark.parametrize("kind", [Slotted, Stateful])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_caches_with_states_of_their_own_kind_are_copied(again, kind, layers, ids):
    model = make_model()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        cache = kind()
        cache.note = 1
        model(ids[:, :5], past_key_values=cache)
        got = model(ids[:, 5:], past_key_values=again(cache)).logits
        torch.testing.assert_close(got, model(ids).logits[:, 5:], **EXACT)


# --- modes -----------------------------------------------------------------------------------------

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
CHANGES = {
    "as it is": lambda cache: None,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([0, 1])),
    "repeated": lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([0, 2]))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("length", [9, 70], ids=["inline", "thread"])
def test_modes_may_change_between_steps(change, length, layers):
    model, ids = make_model(), make_ids(length=length)
    with torch.inference_mode():
        attached = attach(model, layers.engrams, layers.plan)
    with attached, torch.no_grad():
        whole = by_hand(make_model(), layers, ids)
        for first in ("inference", "no_grad"):
            for second in MODES:
                cache = DynamicCache()
                with MODES[first]():
                    model(ids[:, :-2], past_key_values=cache)
                    if first == second:
                        change(cache)
                if first != second:
                    with torch.no_grad():
                        change(cache)
                if second == "grad" and first == "inference":
                    continue  # keys and values of inference mode cannot be trained through, Engram or not
                with MODES[second]():
                    got = [model(ids[:, -2:-1], past_key_values=cache).logits]
                with MODES[first]():
                    got.append(model(ids[:, -1:], past_key_values=cache).logits)
                torch.testing.assert_close(torch.cat(got, 1), whole[:, -2:], **EXACT)


def test_staged_steps_in_several_modes(layers, ids):
    model = make_model()
    with torch.no_grad():
        want = by_hand(model, layers, ids)
    with attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                attached.stage(ids)
                assert torch.equal(model(ids).logits, want)


def test_a_prefetcher_in_several_modes(layers, ids):
    tables = {i: engram.table for i, engram in layers.engrams.items()}
    with Prefetcher(NgramHasher(layers.plan), tables) as prefetcher:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode(), prefetcher.start(ids.numpy()) as fetch:
                rows = NgramHasher(layers.plan)(ids.numpy(), 1).reshape(-1)
                assert torch.equal(fetch[1].wait(), layers.weights[1][torch.from_numpy(rows).long()])
