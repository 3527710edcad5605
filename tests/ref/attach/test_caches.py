"""What a forward is given as its past, under whatever name: followed, or refused in one line."""

import inspect
from argparse import Namespace
from collections import UserDict

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, MambaConfig, MambaForCausalLM
from transformers.modeling_outputs import ModelOutput

from engram_ref.attach import attach
from engram_ref.attach.blocks import CACHES, cache_in, looks_like_cache, reader
from engram_ref.attach.versions import NEWEST_TESTED, tell_untested
from tests.ref.attach.models import SIZES, VOCAB, make_ids, make_layers, make_model


def counting_decoder(name, returned=None):
    """A decoder that calls its cache by `name`, and adds up what it has seen, so that the past matters.

    `returned` names the cache in what it gives back, which it makes itself where none is given.
    """

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = LlamaConfig(**SIZES | dict(num_hidden_layers=3), use_cache=True)
            self.embedded = nn.Embedding(VOCAB, SIZES["hidden_size"], dtype=torch.float64)
            self.h = nn.ModuleList(nn.Identity() for _ in range(3))

        def forward(self, input_ids, **kwargs):
            cache = kwargs.get(name)
            if cache is None and returned:
                cache = DynamicCache()
            hidden = self.embedded(input_ids)
            for block in self.h:
                hidden = block(hidden)
            if cache is not None:
                seen = hidden[:, None]
                cache.update(seen, seen, 0)
            out = ModelOutput(last_hidden_state=hidden)
            if returned:
                out[returned] = cache
            return out

    Decoder.forward.__signature__ = inspect.Signature(
        [
            inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
            for parameter in ("self", "input_ids", name)
        ]
        + [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Decoder()


@pytest.fixture(scope="module", params=["demo", "v41"])
def layers(request):
    return make_layers((1,), request.param)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_followed_by_each_of_its_names(name, layers):
    decoder, ids = counting_decoder(name, name), make_ids()
    with torch.no_grad(), attach(decoder, layers.engrams, layers.plan):
        want = decoder(ids)["last_hidden_state"]
        cache = decoder(ids[:, :4])[name]  # made inside
        parts = [decoder(ids[:, 4:6], **{name: cache}), decoder(ids[:, 6:], **{name: cache})]
        got = torch.cat([part["last_hidden_state"] for part in parts], 1)
        assert torch.equal(got, want[:, 4:])
        fresh = decoder(ids[:, 4:])["last_hidden_state"]
        assert not torch.allclose(fresh, want[:, 4:], atol=1e-3)  # the past matters


@pytest.mark.parametrize("name", ["memory", "kv", "past_kv", "mems", "state"])
def test_a_cache_by_another_name_is_refused(name, layers):
    decoder, ids = counting_decoder(name), make_ids()
    with torch.no_grad(), attach(decoder, layers.engrams, layers.plan):
        for value in (
            DynamicCache(),
            (DynamicCache(), None),
            {"self": [DynamicCache()]},
            Namespace(kept=DynamicCache()),
        ):
            with pytest.raises(ValueError, match=f"{name} is a .* that Engram does not follow.*use_cache=False"):
                decoder(ids, **{name: value})
        decoder(ids)


def test_a_returned_cache_by_another_name_goes_on_or_is_refused(layers):
    decoder, ids = counting_decoder("cache", "memory"), make_ids()
    with torch.no_grad(), attach(decoder, layers.engrams, layers.plan):
        want = decoder(ids)["last_hidden_state"][:, 4:]
        cache = decoder(ids[:, :4])["memory"]
        assert torch.equal(decoder(ids[:, 4:], cache=cache)["last_hidden_state"], want)
    with pytest.raises(ValueError, match="gives back DynamicCache, DynamicCache"):
        cache_in((torch.zeros(1), DynamicCache(), DynamicCache()))
    with pytest.raises(ValueError, match="gives back Recurrent, which Engram does not follow: use_cache=False"):
        cache_in(ModelOutput(logits=torch.zeros(1), other=type("Recurrent", (), {"update": print})()))


def test_what_looks_like_a_cache():
    class Recurrent:
        def update(self, states): ...

    inside = (UserDict(a=DynamicCache()), Namespace(step=1, inner=Recurrent()))
    for value in (DynamicCache(), Recurrent(), type("PagedCache", (), {})(), *inside):
        assert looks_like_cache(value) and looks_like_cache([None, (value,)])
    for value in (
        None,
        True,
        3,
        "cache",
        torch.zeros(2),
        {"a": 1},
        {1, 2},
        (torch.zeros(1),),
        LlamaConfig(),
        Namespace(a={}),
    ):
        assert not looks_like_cache(value)


def test_two_caches_and_unnamed_arguments_are_refused():
    read = reader(make_model().model)
    ids = make_ids()
    with pytest.raises(ValueError, match="two caches"):
        read((), dict(input_ids=ids, past_key_values=DynamicCache(), cache=DynamicCache()))
    cache = DynamicCache()
    assert read((), dict(input_ids=ids, past_key_values=cache, cache=cache)).cache is cache
    names = list(inspect.signature(make_model().model.forward).parameters)
    place = next(i for i, name in enumerate(names) if name in CACHES)
    assert read((ids, *[None] * (place - 1), cache), {}).cache is cache
    with pytest.raises(ValueError, match="40 arguments by position"):
        read((ids,) * 40, {})
    with pytest.raises(ValueError, match=r"token ids of shape \(9,\)"):
        read((ids[0],), {})


@pytest.mark.parametrize("counts", [0, 3], ids=["nothing", "too little"])
def test_a_cache_that_does_not_count_is_refused(counts, layers):
    class Miscounting(DynamicCache):
        def get_seq_length(self, layer_idx=0):
            return counts if super().get_seq_length(layer_idx) else 0

    decoder, ids = counting_decoder("cache"), make_ids()
    with attach(decoder, layers.engrams, layers.plan), pytest.raises(ValueError, match=f"counts {counts} positions"):
        decoder(ids, cache=Miscounting())


def test_a_paged_cache_is_refused(layers, ids):
    class PagedAttentionCache:
        """As the one of continuous batching is called."""

    decoder = counting_decoder("cache")
    with attach(decoder, layers.engrams, layers.plan), pytest.raises(ValueError, match=r"continuous batching: use gen"):
        decoder(ids, cache=PagedAttentionCache())


def test_a_recurrent_model_needs_no_cache():
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, state_size=4)).double()
    layers, ids = make_layers((1,)), make_ids()
    model = model.eval()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        want = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
        with pytest.raises(ValueError, match=r"Engram.*follow.*use_cache=False"):
            model.generate(ids, max_new_tokens=4, do_sample=False)
    assert want.shape == (2, 13)


# --- releases --------------------------------------------------------------------------------------


def test_a_newer_release_is_told_once(recwarn, monkeypatch):
    tell_untested.cache_clear()
    major, minor = NEWEST_TESTED["transformers"]
    for version, told in ((f"{major}.{minor}.7", 0), (f"{major}.{minor + 1}.0.dev0", 1), (f"{major + 1}.0", 1)):
        recwarn.clear()
        tell_untested.cache_clear()
        monkeypatch.setattr("transformers.__version__", version)
        for _ in range(2):
            attach(make_model(), make_layers((1,)).engrams, make_layers((1,)).plan).detach()
        found = [w for w in recwarn if "is newer than" in str(w.message) and "transformers" in str(w.message)]
        assert len(found) == told
    tell_untested.cache_clear()
