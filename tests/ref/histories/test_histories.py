"""A history in a cache: what is done to one is done to the other, and copies are independent."""

import copy

import pytest
import torch
from transformers import DynamicCache

from engram_ref.hashing import DEAD
from engram_ref.histories.cache import SLACK, CacheHistory, LengthsOnDevice
from engram_ref.histories.following import follow, history_of, unfollow
from engram_ref.histories.places import Places
from tests.ref.attach.models import make_layers

LAYERS = make_layers((1,))
CPU = torch.device("cpu")


def make_history(batch=3, length=5):
    """Its ids are numbered, its convolution's past too."""
    history = CacheHistory(LAYERS.plan, batch, CPU, LAYERS.engrams)
    history.append(torch.arange(batch * length).view(batch, length))
    values = history.convolutions[1].values
    values.copy_(torch.arange(values.numel()).view(values.shape))
    return history


def test_a_new_one_stands_before_the_start():
    history = CacheHistory(LAYERS.plan, 2, CPU, LAYERS.engrams)
    assert history.length == 0 and history.batch_size == 2 and not history.open
    assert torch.equal(history.context, torch.full((2, 2), DEAD))
    assert not history.convolutions[1].values.any()
    assert CacheHistory(LAYERS.plan, 2, CPU, make_layers((1,), "v41").engrams).convolutions == {}


def test_it_keeps_the_last_ids():
    history = CacheHistory(LAYERS.plan, 1, CPU, {})
    for part in torch.arange(200)[None].split([1, 99, 100], dim=1):
        history.append(part)
    assert history.length == 200 and history.context.tolist() == [[198, 199]]
    assert history.recent.shape[1] == SLACK + 2
    history.settle(200 - SLACK)
    assert history.context.tolist() == [[198 - SLACK, 199 - SLACK]]
    with pytest.raises(ValueError, match="cropped by 1 positions"):
        history.settle(199 - SLACK)


def test_it_goes_back_before_the_first_id():
    history = CacheHistory(LAYERS.plan, 1, CPU, {})
    history.append(torch.tensor([[7, 8, 9]]))
    history.settle(1)
    assert history.context.tolist() == [[DEAD, 7]] and history.length == 1
    history.settle(0)
    assert history.context.tolist() == [[DEAD, DEAD]] and history.length == 0


@pytest.mark.parametrize(
    ("act", "order"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.reorder_cache(beam_idx=torch.tensor([1, 2, 0])), [1, 2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(slice(0, 2)), [0, 1]),
        (lambda cache: cache.batch_select_indices([]), []),
        (lambda cache: cache.batch_select_indices([2, 0]), [2, 0]),
        (lambda cache: cache.batch_select_indices((1,)), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0], dtype=torch.int32)), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "by name", "select", "slice", "none", "list", "tuple", "int32", "booleans", "repeat"],
)
def test_it_does_what_the_cache_does(act, order):
    cache, history, before = DynamicCache(), make_history(), make_history()
    cache.update(torch.arange(3.0).view(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), 0)
    follow(cache, "key", history)
    act(cache)
    assert cache.layers[0].keys.flatten().tolist() == order
    assert torch.equal(history.recent, before.recent[order])
    assert torch.equal(history.convolutions[1].values, before.convolutions[1].values[order])


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.arange(6.0).view(3, 1, 1, 2), torch.zeros(3, 1, 1, 2), 0)
    return cache


MOVES = [
    lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    lambda cache: cache.batch_select_indices(torch.tensor([1])),
    lambda cache: cache.batch_repeat_interleave(2),
]


@pytest.mark.parametrize("move", MOVES, ids=["reorder", "select", "repeat"])
def test_what_one_refuses_is_done_to_none_and_not_to_the_cache(move):
    cache, history = filled_cache(), make_history()
    follow(cache, "before", history)
    follow(cache, "refuses", Places(LAYERS.plan, 3, CPU))
    keys, recent = cache.layers[0].keys.clone(), history.recent
    with pytest.raises(ValueError, match="a cache of places, which cannot be reordered"):
        move(cache)
    assert torch.equal(cache.layers[0].keys, keys) and history.recent is recent
    cache.reset()  # which no history refuses
    assert history.length == 0


def test_what_the_cache_cannot_do_is_not_done_to_it():
    cache, history = filled_cache(), make_history()
    follow(cache, "a", history)
    recent = history.recent
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 1, 3]))
    assert history.recent is recent


def test_a_cache_and_its_shallow_copies_share_a_history():
    cache, history, before = filled_cache(), make_history(), make_history()
    follow(cache, "key", history)
    twin = copy.copy(copy.copy(cache))
    twin.reorder_cache(torch.tensor([2, 0, 0]))
    assert history_of(twin, "key") is history_of(cache, "key") is history
    assert torch.equal(history.recent, before.recent[[2, 0, 0]])
    one, two = copy.deepcopy([cache, copy.copy(cache)])
    assert history_of(one, "key") is history_of(two, "key") is not history


class Bare:
    """A cache that does not show where it holds what."""

    def get_seq_length(self):
        return 5


def filled_afterwards(cache):
    cache.update(torch.zeros(3, 1, 1, 2), torch.zeros(3, 1, 1, 2), 0)


def with_other_layers(cache):
    cache.layers = [copy.copy(layer) for layer in cache.layers]


@pytest.mark.parametrize(
    ("kind", "fill", "part"),
    [(Bare, lambda _: None, lambda _: None), (DynamicCache, filled_afterwards, with_other_layers)],
    ids=["no layers", "layers that came since"],
)
@pytest.mark.parametrize("first", ["cache", "copy"])
def test_of_a_cache_and_its_copy_whose_layers_bear_no_mark_the_first_goes_on(kind, fill, part, first):
    cache, history = kind(), make_history()
    follow(cache, "key", history)
    fill(cache)
    twin = copy.copy(cache)
    part(twin)
    goes_on, second = (cache, twin) if first == "cache" else (twin, cache)
    assert history_of(goes_on, "key") is history
    with pytest.raises(ValueError, match="layers that it had left, or of another cache"):
        history_of(second, "key")
    for copied in (copy.copy, copy.deepcopy):  # nor does a copy make it another
        with pytest.raises(ValueError, match="layers that it had left, or of another cache"):
            history_of(copied(second), "key")
    assert history_of(goes_on, "key") is history
    assert history_of(copy.deepcopy(goes_on), "key") is not history


def test_layers_that_were_filled_while_nothing_was_attached_are_refused():
    cache, history = filled_cache(), make_history()
    follow(cache, "key", history)
    cache.layers = filled_cache().layers
    with pytest.raises(ValueError, match="layers that it had left, or of another cache"):
        history_of(cache, "key")


def test_a_cache_keeps_its_class_and_gets_it_back():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), 0)
    layer = list(vars(cache.layers[0]))
    assert history_of(cache, "one") is None
    follow(cache, "one", make_history())
    follow(cache, "two", make_history())
    assert isinstance(cache, DynamicCache) and type(cache).__name__ == "DynamicCache"
    second = DynamicCache()
    follow(second, "one", make_history())
    assert type(second) is type(cache)  # compiled code that knows one knows the other
    unfollow(cache, "one")
    assert history_of(cache, "one") is None and history_of(cache, "two") is not None
    unfollow(cache, "two")
    unfollow(cache, "two")
    bare = vars(DynamicCache()).keys()
    assert type(cache) is DynamicCache and vars(cache).keys() == bare and list(vars(cache.layers[0])) == layer
    follow(cache, "one", make_history())
    twin = copy.copy(cache)
    unfollow(cache, "one")
    cache.layers = []
    assert history_of(twin, "one") is None and vars(cache).keys() == bare


def test_lengths_are_compared_without_asking():
    lengths = LengthsOnDevice()
    lengths.check()
    lengths.compare(torch.tensor(4), 4)
    lengths.check()
    lengths.compare(torch.tensor([5]), 4)
    lengths.compare(torch.tensor(6), 6)
    with pytest.raises(ValueError, match="the cache holds 5 positions, Engram's history 4"):
        lengths.check()
    lengths.check()
