"""`generate` with Engram attached: the history follows the cache, whatever is done to it, or says that it cannot."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from engram_ref.attach import attach
from engram_ref.attach.blocks import reader
from engram_ref.hashing.device import DeviceHasher
from engram_ref.histories.cache import CacheHistory
from engram_ref.histories.following import history_of
from tests.ref.attach.models import PAD, SIZES, by_hand, make_family, make_ids, make_layers, make_model, padded_batch

EXACT = dict(rtol=0, atol=1e-12)  # float64, logits of about 1; other shapes of the same sums differ by 1e-15
MORE = dict(max_new_tokens=6, do_sample=False)


@pytest.fixture
def attached(model, layers):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as made:
        yield made


@pytest.fixture
def demo(model):
    layers = make_layers()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as made:
        yield made


@pytest.fixture
def v41(model):
    layers = make_layers(form="v41")
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as made:
        yield made


def in_chunks(model, ids, sizes, cache):
    """Logits of all positions, chunk by chunk."""
    parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split(sizes, dim=1)]
    return torch.cat(parts, 1)


def static(model, length=32):
    return StaticCache(config=model.config, max_cache_len=length)


# --- a step after the other ------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 1, 4], [8, 1], [2, 7]], ids=str)
@pytest.mark.parametrize("new_cache", [lambda model: DynamicCache(), static], ids=["dynamic", "static"])
def test_any_chunks_give_what_one_shot_gives(sizes, new_cache, model, layers, ids):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = in_chunks(model, ids, sizes, new_cache(model))
    torch.testing.assert_close(got, by_hand(model, layers, ids), **EXACT)


@pytest.mark.parametrize("forgotten", ["recent", "convolutions"])
def test_a_forgotten_past_shows(forgotten, model, ids, demo, monkeypatch):
    """The comparison above fails where either history is dropped."""
    want = model(ids).logits
    honest = CacheHistory.go_on

    def forgetful(history, recent, count):
        honest(history, recent, count)
        if forgotten == "recent":
            history.recent = torch.full_like(history.recent, -1)
        else:
            history.convolutions[1].values.zero_()

    monkeypatch.setattr(CacheHistory, "go_on", forgetful)
    assert not torch.allclose(in_chunks(model, ids, 3, DynamicCache()), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_every_cache_generates_the_same(kind, layers, ids):
    model = make_model(kind)
    with attach(model, layers.engrams, layers.plan):
        want = model.generate(ids, use_cache=False, **MORE)
        for options in (
            {},
            dict(cache_implementation="static"),
            dict(cache_implementation="static"),  # the same cache again, emptied
            dict(prefill_chunk_size=4),
            dict(past_key_values=DynamicCache()),
        ):
            assert torch.equal(model.generate(ids, **MORE, **options), want), options
    assert not torch.equal(model.generate(ids, **MORE), want)


def test_sampling(model, attached, ids):
    drawn = []
    for options in (dict(use_cache=False), {}, dict(cache_implementation="static")):
        torch.manual_seed(7)
        drawn.append(model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=2, **options))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_beams_are_reordered(model, attached, ids, monkeypatch):
    moved = []
    select = CacheHistory.select

    def noting(history, sequences):
        moved.append(not torch.equal(sequences, torch.arange(len(sequences))))
        select(history, sequences)

    monkeypatch.setattr(CacheHistory, "select", noting)
    options = dict(num_beams=3, num_return_sequences=3, max_new_tokens=8, do_sample=False)
    want = model.generate(ids, use_cache=False, **options)
    assert not moved
    assert torch.equal(model.generate(ids, **options), want)
    assert any(moved)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), want)


def test_beams_that_keep_their_old_past_go_wrong(model, attached, ids, monkeypatch):
    options = dict(num_beams=3, num_return_sequences=3, max_new_tokens=8, do_sample=False, output_scores=True)
    options["return_dict_in_generate"] = True
    want = model.generate(ids, **options).sequences_scores
    monkeypatch.setattr(CacheHistory, "select", lambda history, sequences: None)
    assert not torch.allclose(model.generate(ids, **options).sequences_scores, want, rtol=0, atol=1e-6)


def test_generation_goes_on_where_it_stopped(model, attached, ids):
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    cache = DynamicCache()
    first = model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
    got = model.generate(first, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert torch.equal(got, want) and torch.equal(first, want[:, : first.shape[1]])


# --- padding ---------------------------------------------------------------------------------------


def test_beyond_a_window_a_static_cache_is_refused_and_a_dynamic_one_followed(layers):
    """All of its layers slide, so `generate` makes a mask of the window alone out of the one that it was given."""
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4, initializer_range=0.2)).double().eval()
    ids = make_ids()
    given = dict(MORE, attention_mask=torch.ones_like(ids))
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        want = model.generate(ids, use_cache=False, **given)
        assert torch.equal(model.generate(ids, **given), want)
        for more in ({}, dict(prefill_chunk_size=4)):  # by token, or by chunk
            with pytest.raises(
                ValueError, match="for a static cache of sliding windows alone, take a dynamic cache; else "
            ):
                model.generate(ids, cache_implementation="static", disable_compile=True, **given, **more)


@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static")], ids=["dynamic", "static"])
@pytest.mark.parametrize(("implementation", "dtype"), [("sdpa", torch.float64), ("eager", torch.float32)])
@pytest.mark.parametrize("form", ["demo", "v41"])
def test_sequences_padded_on_the_left_generate_what_they_do_alone(form, options, implementation, dtype, ids):
    """Eager attention adds its mask; transformers' own overflows in float64."""
    model, layers = make_model(attn_implementation=implementation, dtype=dtype), make_layers(form=form, dtype=dtype)
    sequences = [ids[0], ids[1, :5], ids[1, 5:6]]
    padded, mask, _ = padded_batch(sequences, 11)
    with attach(model, layers.engrams, layers.plan):
        want = [model.generate(sequence[None], **MORE)[0, -6:] for sequence in sequences]
        got = model.generate(padded, attention_mask=mask, **MORE, **options)[:, -6:]
    assert torch.equal(got, torch.stack(want))


# --- cropped ---------------------------------------------------------------------------------------


def test_a_form_without_convolution_follows_a_cropped_cache(model, v41, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    cache.crop(-4)
    other = make_ids(length=3, seed=6)
    got = model(other, past_key_values=cache).logits
    torch.testing.assert_close(got, model(torch.cat([ids[:, :-4], other], 1)).logits[:, -3:], **EXACT)


def test_assisted_generation_without_convolution(model, v41):
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), want)


def test_a_convolution_refuses_a_cropped_cache(model, demo, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    cache.crop(-2)
    with pytest.raises(ValueError, match="cropped by 2 positions; the short convolution cannot go back"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="short convolution cannot go back"):
        model.generate(torch.tensor([[5, 6, 7, 8, 5, 6]]), max_new_tokens=12, prompt_lookup_num_tokens=3)


def test_more_is_cropped_than_is_remembered(model, v41):
    cache = DynamicCache()
    model(make_ids(1, 80), past_key_values=cache)
    cache.crop(-70)
    with pytest.raises(ValueError, match=r"cropped by 70 positions; .* can follow 64"):
        model(make_ids(1, 1), past_key_values=cache)


def test_a_cache_that_was_emptied_begins_anew(model, attached, ids):
    cache = static(model)
    want = in_chunks(model, ids, 4, cache)
    cache.reset()
    torch.testing.assert_close(in_chunks(model, ids, 4, cache), want, rtol=0, atol=0)


# --- refused ---------------------------------------------------------------------------------------


def test_a_cache_filled_without_engram_is_refused(model, layers, ids):
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with attach(model, layers.engrams, layers.plan), pytest.raises(ValueError, match="9 positions that Engram has"):
            model(ids, past_key_values=cache)


def test_a_step_that_engram_did_not_see_is_refused(model, layers, ids):
    other = make_model()
    cache = DynamicCache()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        model(ids, past_key_values=cache)
        other(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="the cache holds 10 positions, Engram's history 9"):
            model(ids[:, :1], past_key_values=cache)


def test_another_batch_is_refused(model, attached, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="3 sequences with a cache of 2"):
        model(make_ids(3, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # of newer releases, and of all
def test_a_cache_is_followed_under_either_name(name, model, attached, ids):
    if name not in inspect.signature(type(model).forward).parameters and name == "cache":
        pytest.skip("this transformers has the older name alone")
    cache = DynamicCache()
    chunks = [model(chunk, **{name: cache}).logits for chunk in (ids[:, :4], ids[:, 4:5], ids[:, 5:])]
    torch.testing.assert_close(torch.cat(chunks, 1), model(ids).logits, **EXACT)
    assert cache.get_seq_length() == ids.shape[1]


def test_an_emptied_cache_takes_another_batch(model, attached, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    cache.reset()
    if cache.get_seq_length():  # transformers 5.17 fills it with zeros and keeps its length
        with pytest.raises(ValueError, match="begin with a new cache"):
            model(ids[:1], past_key_values=cache)
        return
    assert torch.equal(model(ids[:1], past_key_values=cache).logits, model(ids[:1]).logits)


def test_after_a_broken_step_the_cache_is_refused(model, attached, ids):
    def fail(*_):
        raise MemoryError

    cache = DynamicCache()
    model(ids, past_key_values=cache)
    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(ids, past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match=r"broken off.*begin with a new cache"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("name", ["Lfm2", "Qwen3Next"])
def test_a_cache_that_counts_nothing_may_hold_states_of_a_broken_step(name, layers, ids):
    """The first block carries a state, and only attention counts positions."""
    model = make_family(name)

    def fail(*_):
        raise MemoryError

    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        cache = DynamicCache(config=model.config)
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(ids, past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == 0
        for again in (ids, ids[:1]):
            with pytest.raises(ValueError, match=r"broken off.*begin with a new cache, .*reset\(\) this one"):
                model(again, past_key_values=cache)


def test_a_cache_of_another_kind_is_refused(model, attached, ids):
    with pytest.raises(ValueError, match="is a tuple: give a Cache"):
        model(ids, past_key_values=((), ()))


def test_arguments_are_read_by_name_and_by_position(model, ids):
    read = reader(model.model)
    positions, mask = torch.tensor([[4, 5]]), torch.ones(2, 9)
    by_name = read((), dict(input_ids=ids, attention_mask=mask, use_cache=True, position_ids=positions))
    assert by_name.ids is ids and by_name.mask is mask and by_name.use_cache is True and by_name.positions is positions
    assert read((ids, mask), {})[:3] == (ids, None, mask)


def test_a_length_on_the_device_is_not_asked_for(model, layers, ids, monkeypatch):
    """A tensor without content stands for one that the CPU would have to wait for."""

    class OnDevice(DynamicCache):
        hidden = False

        def get_seq_length(self, layer_idx=0):
            return torch.tensor(9, device="meta") if self.hidden else super().get_seq_length(layer_idx)

    compared = []
    for source in (DeviceHasher(layers.plan, "cpu"), layers.plan):
        with torch.no_grad(), attach(model, layers.engrams, source) as attached:
            monkeypatch.setattr(attached._lengths, "compare", lambda length, remembered: compared.append(remembered))
            cache = OnDevice()
            model(ids, past_key_values=cache)
            cache.hidden = True
            history = history_of(cache, attached._key)
            if source is layers.plan:
                with pytest.raises(RuntimeError, match="meta"):
                    attached._past_length(cache, history)
            else:
                assert attached._past_length(cache, history) == 9
    assert compared == [9]


# --- a cache that was filled elsewhere -------------------------------------------------------------


@pytest.mark.parametrize("known", [2, 6])
@pytest.mark.parametrize("vocab", [False, True])
def test_a_cache_goes_on_with_engram_attached_anew(known, vocab, model, layers, ids):
    """Attached a second time, it knows nothing of the first: not the ids before, and not the convolutions' past."""
    order = torch.arange(97) if vocab else None
    want, cache = by_hand(model, layers, ids), DynamicCache()
    with torch.no_grad():
        with attach(model, layers.engrams, layers.plan, order) as first:
            model(ids[:, :6], past_key_values=cache)
            pasts = copy.deepcopy(history_of(cache, first._key).convolutions)
        unknown, again = copy.deepcopy((cache, pasts))
        with attach(model, layers.engrams, layers.plan, order) as second:
            second.remember(cache, ids[:, 6 - known : 6], pasts)
            got = torch.cat([model(chunk, past_key_values=cache).logits for chunk in ids[:, 6:].split([1, 2], 1)], 1)
        with attach(model, layers.engrams, layers.plan, order) as third:
            third.remember(unknown, 0 * ids[:, :6], again)
            other = model(ids[:, 6:7], past_key_values=unknown).logits
    torch.testing.assert_close(got, want[:, 6:], **EXACT)
    assert not torch.allclose(other, want[:, 6:7], rtol=0, atol=1e-6)


@pytest.mark.parametrize("known", [2, 4])
@pytest.mark.parametrize("form", ["demo", "v41"])
def test_a_padded_past_is_remembered_as_such(known, form, model):
    layers, cache = make_layers(form=form), DynamicCache()
    ids = torch.tensor([[PAD, PAD, PAD, 5, 6], [7, 8, 9, 10, 11]])
    mask = (torch.arange(5) >= torch.tensor([[3], [0]])).long()
    with torch.no_grad():
        with attach(model, layers.engrams, layers.plan) as first:
            model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
            pasts = copy.deepcopy(history_of(cache, first._key).convolutions)
            want = model(ids[:, 4:], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
        for told in (mask[:, :4], None):
            with attach(model, layers.engrams, layers.plan) as second:
                again, pasts_again = copy.deepcopy((cache, pasts))
                second.remember(again, 0 * ids[:, :3] if told is None else ids[:, 4 - known : 4], pasts_again, told)
                got = model(ids[:, 4:], attention_mask=mask, past_key_values=again).logits
            assert torch.allclose(got, want, **EXACT) == (told is not None)


@pytest.mark.parametrize("known", [2, 3, 4, 12])
def test_a_cache_that_is_remembered_is_cropped_as_far_as_its_ids_are_known(known, model):
    """By one, so that generate has a token to begin with; what came before the known ids is not a beginning."""
    layers, ids, cache = make_layers(form="v41"), make_ids(1, 12), DynamicCache()
    with torch.no_grad():
        with attach(model, layers.engrams, layers.plan):
            want = model(ids, past_key_values=cache).logits[:, -1:]
        with attach(model, layers.engrams, layers.plan) as attached:
            attached.remember(cache, ids[:, -known:])
            cache.crop(-1)
            if known == 2:
                with pytest.raises(ValueError, match=r"cropped by 1 positions; .* can follow 0"):
                    model(ids[:, -1:], past_key_values=cache)
            else:
                torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits, want, **EXACT)


@pytest.mark.parametrize(
    ("length", "shape", "given", "said"),
    [
        (0, (2, 4), True, "an empty cache"),
        (6, (2, 1), True, "for a cache of 6 positions: give the last 2 of every sequence"),
        (6, (4,), True, "give the last 2 of every sequence"),
        (6, (2, 7), True, "none beyond the cache"),
        (6, (2, 2), False, r"the convolutions of layers \[\]; those of \[1, 2\] have one"),
    ],
)
def test_what_cannot_be_remembered_is_refused(length, shape, given, said, model, ids):
    layers, cache = make_layers(), DynamicCache()
    if length:
        model(ids[:, :length], past_key_values=cache)
    pasts = CacheHistory(layers.plan, 2, torch.device("cpu"), layers.engrams).convolutions if given else None
    with attach(model, layers.engrams, layers.plan) as attached, pytest.raises(ValueError, match=said):
        attached.remember(cache, torch.ones(shape, dtype=torch.int64), pasts)
