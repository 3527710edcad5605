"""Sequences that come to the places of one cache and leave them: each is what it is by itself, staged or not."""

import time
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from engram_ref.attach import Places, Staged, attach
from engram_ref.calling.call import CallError, CpuCall
from engram_ref.fusion import ShortConvHistory
from engram_ref.hashing import NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.histories.following import history_of
from engram_ref.layer import Engram
from engram_ref.tables.host import HostTable
from tests.ref.attach.models import VOCAB, make_ids, make_layers

CPU = torch.device("cpu")
# Prompts in turn: (place, tokens, how many more it is given); the second one in place 1 comes while place 0 goes on.
TURNS = [[(0, 9, 5), (1, 1, 2)], [(1, 4, 3)]]


class Tokenwise(nn.Module):
    """A decoder without attention: a token meets others only in Engram. Its cache counts nothing."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=64, num_hidden_layers=2, vocab_size=VOCAB, use_cache=False)
        self.config.get_text_config = lambda: self.config
        generator = torch.Generator().manual_seed(0)
        self.embedded = torch.randn(VOCAB, 64, dtype=torch.float64, generator=generator)
        self.layers = nn.ModuleList([nn.Tanh(), nn.Tanh()])

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        hidden = self.embedded[input_ids]
        for layer in self.blocks():
            hidden = layer(hidden)
        return hidden

    def blocks(self):
        return self.layers


class Nested(Tokenwise):
    """The same with its blocks one module further inside, as BERT has them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = self.layers
        del self.layers

    def blocks(self):
        return self.encoder.layer


class Cache:
    """Of places: a single length means nothing."""

    def get_seq_length(self):
        return 0


@pytest.fixture(scope="module")
def sequences():
    """By prompt, all of its tokens."""
    each = [[make_ids(1, tokens + more, seed=7 * slot + tokens)[0] for slot, tokens, more in turn] for turn in TURNS]
    assert len({tuple(ids.tolist()) for turn in each for ids in turn}) == 3
    return each


def in_places(model, attached, sequences, step):
    """Outputs of every sequence, [T, H], where they are served in two places; `step` runs tokens [2, 1]."""
    cache, found = Cache(), {}
    reach = {i: ShortConvHistory(engram.fusion, 2) for i, engram in attached.engrams.items() if engram.fusion.reach}
    places = Places(attached._source.plan, 2, attached.index_device, reach)
    attached.seat(cache, places)
    running = {}
    for turn, prompts in zip(TURNS, sequences):
        ids = torch.zeros(len(turn), max(tokens for _, tokens, _ in turn), dtype=torch.int64)
        for row, (given, (slot, tokens, _)) in enumerate(zip(prompts, turn)):
            ids[row, :tokens] = given[:tokens]
            running[slot] = tuple(given.tolist()), tokens
        places.admit(np.array([slot for slot, *_ in turn]), np.array([tokens for _, tokens, _ in turn]))
        out = model(ids, past_key_values=cache)
        for row, (slot, tokens, _) in enumerate(turn):
            found[running[slot][0]] = list(out[row, :tokens])
        for _ in range(2 if turn is TURNS[0] else 3):
            tokens = torch.tensor([[running[slot][0][running[slot][1]]] for slot in (0, 1)])
            out = step(tokens, cache)
            for slot, (given, at) in running.items():
                found[given].append(out[slot, 0])
                running[slot] = given, at + 1
    return found


def alone(model, attached, sequences):
    return {tuple(ids.tolist()): model(ids[None])[0] for turn in sequences for ids in turn}


@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("hasher", [NgramHasher, lambda plan: DeviceHasher(plan, "cpu")], ids=["cpu", "device"])
@pytest.mark.parametrize("background", [True, False])
def test_each_is_what_it_is_alone(form, hasher, background, sequences):
    model, layers = Tokenwise(), make_layers((0, 1), form)
    staged, order = Staged(CPU), []
    for way in ("forward", "stage", "begin"):
        with torch.no_grad(), attach(model, layers.engrams, hasher(layers.plan), background=background) as attached:

            def step(ids, cache, way=way, attached=attached):
                if way == "forward":
                    return model(ids, past_key_values=cache)
                between = attached.lay_down if way == "begin" else lambda: order.append("between")
                with attached.staging(staged=staged, between=between):
                    (attached.begin if way == "begin" else attached.stage)(ids, cache)
                    return model(ids, past_key_values=cache)

            found, want = in_places(model, attached, sequences, step), alone(model, attached, sequences)
        assert found.keys() == want.keys()
        for key, rows in want.items():
            # float64; the sums of one token's projections are cut differently in a batch
            torch.testing.assert_close(torch.stack(found[key]), rows, rtol=0, atol=1e-12)
    assert order == ["between"] * 5  # once a step, however many layers there are


def in_host_memory(layers):
    """The layers, their tables such that the CPU gathers."""
    return {i: Engram(engram.fusion, HostTable(layers.weights[i], CPU)) for i, engram in layers.engrams.items()}


def interpreted():
    pytest.importorskip("triton", reason="a step that asks needs Triton")
    from engram_ref import gpu

    if not gpu.INTERPRETED:
        pytest.skip("tests/cuda/test_call_cuda.py does this on a GPU")


@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.filterwarnings("ignore:this plan knows the size of its vocabulary")
@pytest.mark.parametrize(
    ("vocab", "kind"),
    [(None, Tokenwise), (np.arange(VOCAB)[::-1].copy(), Nested)],
    ids=["compressed", "token ids, nested blocks"],
)
def test_each_is_what_it_is_alone_where_steps_ask_for_their_rows(form, vocab, kind, sequences):
    """Run eagerly, a step asks, too, and a thread answers it meanwhile; prompts in between wait for the thread."""
    interpreted()
    model, layers = kind(), make_layers((0, 1), form)
    with torch.no_grad(), attach(model, in_host_memory(layers), layers.plan, vocab) as attached:

        def step(ids, cache):
            with attached.staging(asking=True):
                attached.stage(ids, cache)
                return model(ids, past_key_values=cache)

        found, want = in_places(model, attached, sequences, step), alone(model, attached, sequences)
        assert attached.counters()[0]["rows"] == attached.counters()[1]["rows"] > 0
    assert found.keys() == want.keys()
    for key, rows in want.items():
        torch.testing.assert_close(torch.stack(found[key]), rows, rtol=0, atol=1e-12)  # as above


def test_steps_that_cannot_ask_are_refused_and_what_goes_wrong_is_told():
    interpreted()
    model, layers = Tokenwise(), make_layers((1,), "v41")
    ids, cache, places = make_ids(2, 1), Cache(), Places(layers.plan, 2, CPU)
    with torch.no_grad(), attach(model, in_host_memory(layers), layers.plan) as attached:
        with pytest.raises(ValueError, match=r"answer\(\) for steps that ask: write .*staging\(asking=True\)"):
            attached.answer(ids, cache)
        with attached.staging(asking=True):
            for refused in (attached.stage, attached.answer):
                with pytest.raises(ValueError, match=r"needs a cache of places: seat\(cache, Places\(...\)\) first"):
                    refused(ids, cache)
            attached.seat(cache, places)
            with pytest.raises(ValueError, match=r"begin\(\) where steps ask .*: capture stage\(\), then answer\(\)"):
                attached.begin(ids, cache)
            places.admit([0], [2])
            with pytest.raises(ValueError, match="prompts that take places are not staged"):
                attached.stage(make_ids(1, 3), cache)
            places.clear()
            attached.stage(torch.full((2, 1), VOCAB), cache)  # no such id: the CPU finds out when it is asked
            assert model(ids, past_key_values=cache).isnan().all()
            with pytest.raises(CallError, match=f"rows of a captured step failed.*{VOCAB}"):
                attached.check()
            attached.stage(ids, cache)
            assert not model(ids, past_key_values=cache).isnan().any(), "one that failed spoils none that follows"
    with torch.no_grad(), attach(model, layers.engrams, DeviceHasher(layers.plan, "cpu")) as attached:
        attached.seat(cache, places)
        with (
            attached.staging(asking=True),
            pytest.raises(ValueError, match="a step asks the CPU for the rows of tables"),
        ):
            attached.stage(ids, cache)


def test_an_error_between_an_answer_and_its_step_is_raised_at_once_and_no_other_cache_gets_that_answer():
    interpreted()
    model, layers = Tokenwise(), make_layers((1,), "v41")
    ids, caches = make_ids(2, 1), [Cache(), Cache()]
    with torch.no_grad(), attach(model, in_host_memory(layers), layers.plan) as attached:
        places = [Places(layers.plan, 2, CPU) for _ in caches]
        for cache, its in zip(caches, places):
            attached.seat(cache, its)
        before, begin = places[0].recent.clone(), time.perf_counter()
        with pytest.raises(KeyError), attached.staging(asking=True):
            attached.answer(ids, caches[0])
            raise KeyError
        with attached.staging(asking=True):
            attached.answer(ids, caches[0])
            attached.check()
            attached.stage(ids, caches[1])
            model(ids, past_key_values=caches[1])
        attached.check()
        assert torch.equal(places[0].recent, before) and not torch.equal(places[1].recent, before)
        with pytest.raises(KeyError), attached.staging(asking=True), mock.patch.object(CpuCall, "make") as make:
            make.side_effect = KeyError
            attached.stage(ids, caches[0])
    assert time.perf_counter() - begin < 30, "a question is waited for a minute long"


def test_pasts_stay_where_they_are_and_other_attachments_go_on_with_them(sequences):
    model, layers = Tokenwise(), make_layers((1,))
    past = ShortConvHistory(layers.engrams[1].fusion, 2)
    places, address, found = Places(layers.plan, 2, CPU, {1: past}), past.values.data_ptr(), []
    for _ in range(2):
        with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
            cache = Cache()
            places.clear()
            attached.seat(cache, places)
            places.admit([1], [6])
            model(make_ids(1, 8), past_key_values=cache)
            assert past.values[1].any() and not past.values[0].any() and history_of(cache, attached._key) is places
            found.append(model(make_ids(2, 1), past_key_values=cache))
    assert torch.equal(*found) and past.values.data_ptr() == address


@pytest.mark.parametrize(
    ("slots", "lengths", "said"),
    [
        ([0, 0], [3, 3], r"places \[0, 0\] of 2: name different ones, 0 .. 1"),
        ([2], [3], r"places \[2\] of 2"),
        ([], [], r"prompts of \[\] tokens for places \[\]: give one at least"),
        ([0], [0], r"prompts of \[0\] tokens for places \[0\]: give one at least"),
        ([0, 1], [3], r"prompts of \[3\] tokens"),
        ([[0], [1]], [[3], [3]], r"^places \[\[0\], \[1\]\]: give integers, one for each sequence$"),
        (0, [3], "^places 0: give integers"),
        ([0.0, 1.0], [3, 3], r"^places \[0.0, 1.0\]: give integers"),
        ([False, True], [3, 3], r"^places \[False, True\]: give integers"),
        ([0, 1], [3.0, 2.5], r"^lengths \[3.0, 2.5\]: give integers"),
        ([0, 1], [3, 10], "a prompt of 10 tokens was admitted; the token ids have 9 positions"),
        ([1], [3], "2 sequences, where 1 were admitted: give a chunk for every place"),
    ],
)
def test_prompts_that_take_no_places_are_refused(slots, lengths, said):
    model, layers = Tokenwise(), make_layers((1,), "v41")
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        cache, places = Cache(), Places(layers.plan, 2, CPU)
        attached.seat(cache, places)
        with pytest.raises(ValueError, match=said):
            places.admit(slots, lengths)
            model(make_ids(2, 9), past_key_values=cache)
        places.clear()
        with pytest.raises(ValueError, match="3 sequences, where 2 places go on"):
            model(make_ids(3, 1), past_key_values=cache)
        model(make_ids(2, 1), past_key_values=cache)
        with pytest.raises(ValueError, match=r"^places \[True\]: give integers"):
            places.clear([True])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integers_of_any_width_name_places(dtype, seated):
    model, cache, places = seated.model, seated.cache, seated.places
    ids, found = make_ids(2, 5), []
    for kind in (torch.int64, dtype):
        places.clear(torch.tensor([0, 1], dtype=kind))
        places.admit(torch.tensor([1, 0], dtype=kind), torch.tensor([4, 2], dtype=kind))
        model(ids[:, :4], past_key_values=cache)
        found.append((model(ids[:, 4:], past_key_values=cache), places.recent))
    assert all(torch.equal(wide, narrow) for wide, narrow in zip(*found))


def test_places_that_do_not_fit_and_steps_that_cannot_be_staged_are_refused():
    model, layers = Tokenwise(), make_layers((1,))
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        with pytest.raises(ValueError, match=r"convolutions of layers \[\]; those of \[1\] have one"):
            attached.seat(Cache(), Places(layers.plan, 2, CPU))
        pasts = {1: ShortConvHistory(layers.engrams[1].fusion, 2)}
        with pytest.raises(ValueError, match="places on meta; ids are hashed on cpu: make them there"):
            attached.seat(Cache(), Places(layers.plan, 2, torch.device("meta"), pasts))
        cache, places = Cache(), Places(layers.plan, 2, CPU, pasts)
        attached.seat(cache, places)
        with pytest.raises(RuntimeError, match=r"call begin\(input_ids, cache\) before it"):
            attached.lay_down()
        with attached.staging():
            places.admit([0], [2])
            with pytest.raises(ValueError, match="prompts that take places are not staged"):
                attached.stage(make_ids(1, 3), cache)
            places.clear()
            attached.stage(make_ids(2, 1), cache)
            with pytest.raises(RuntimeError, match="without a step"):
                attached.lay_down()


def fail(*_):
    raise MemoryError


@pytest.fixture
def seated():
    """A model whose second block can fail, places of which both have a sequence, their cache, and what is attached."""
    model, layers = Tokenwise(), make_layers((0, 1))
    pasts = {i: ShortConvHistory(engram.fusion, 2) for i, engram in layers.engrams.items()}
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        cache, places = Cache(), Places(layers.plan, 2, CPU, pasts)
        attached.seat(cache, places)
        places.admit([0, 1], [4, 4])
        model(make_ids(2, 4), past_key_values=cache)
        yield SimpleNamespace(model=model, attached=attached, cache=cache, places=places)


def run_into_failure(seated, ids):
    hook = seated.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        seated.model(ids, past_key_values=seated.cache)
    hook.remove()


@pytest.mark.parametrize("way", ["forward", "stage", "begin"])
def test_places_whose_step_failed_do_not_go_on(way, seated):
    model, attached, cache, places = seated.model, seated.attached, seated.cache, seated.places
    ids = make_ids(2, 5)
    want = model(ids)[:, 4:]
    staging = attached.staging(between=attached.lay_down if way == "begin" else None)
    with staging if way != "forward" else nullcontext():
        before = {"forward": lambda *_: None, "stage": attached.stage, "begin": attached.begin}[way]
        before(ids[:, 4:], cache)
        run_into_failure(seated, ids[:, 4:])
        with pytest.raises(ValueError, match=r"step of places \[0, 1\] was broken off.*: admit\(\) .*clear\(\)"):
            before(ids[:, 4:], cache)
            model(ids[:, 4:], past_key_values=cache)
    places.admit([1], [4])
    model(ids[1:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match=r"step of places \[0\] was broken off"):
        model(ids[:, 4:], past_key_values=cache)
    places.admit([0], [4])
    model(ids[:1, :4], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 4:], past_key_values=cache), want, rtol=0, atol=1e-12)  # as above


def test_prompts_whose_forward_failed_take_no_place(seated):
    model, cache, places = seated.model, seated.cache, seated.places
    ids = make_ids(2, 5)
    want = model(ids)[0, 4]
    places.admit([1], [3])
    run_into_failure(seated, make_ids(1, 3, seed=1))
    with pytest.raises(ValueError, match=r"step of places \[1\] was broken off"):
        model(ids[:, 4:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"places \[2\] of 2: name different ones"):
        places.clear([2])
    places.clear([1])
    fresh = model(ids[1:, 4:])[0, 0]
    got = model(ids[:, 4:], past_key_values=cache)[:, 0]
    torch.testing.assert_close(got, torch.stack([want, fresh]), rtol=0, atol=1e-12)  # as above


def test_cleared_places_are_in_no_doubt(seated):
    model, cache = seated.model, seated.cache
    run_into_failure(seated, make_ids(2, 1))
    seated.places.clear()
    ids = make_ids(2, 1, seed=1)
    torch.testing.assert_close(model(ids, past_key_values=cache), model(ids), rtol=0, atol=1e-12)  # as above


@pytest.mark.parametrize("wrong", ["too short", "too many", "no such id", "staged", "begun"])
def test_prompts_that_were_refused_before_they_began_stay_admitted(wrong, seated):
    """Given again, they would pass for the next chunk of the sequences that were there before."""
    model, attached, cache, places = seated.model, seated.attached, seated.cache, seated.places
    ids = make_ids(2, 7)
    want = model(ids)
    given = {
        "too short": ids[:, :3],
        "too many": make_ids(3, 6),
        "no such id": ids[:, :6].index_fill(1, torch.tensor([4]), VOCAB),
    }
    places.admit([0, 1], [6, 6])
    with pytest.raises(ValueError):
        if wrong in given:
            model(given[wrong], past_key_values=cache)
        else:
            with attached.staging():
                (attached.stage if wrong == "staged" else attached.begin)(ids[:, :6], cache)
    assert not places.in_doubt
    found = [model(part, past_key_values=cache) for part in (ids[:, :6], ids[:, 6:])]
    torch.testing.assert_close(torch.cat(found, dim=1), want, rtol=0, atol=1e-12)  # as above


def test_a_block_that_was_replaced_is_missed_here_too(seated):
    seated.places.admit([0], [3])
    seated.model.layers[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"block 1 was replaced since attach\(\)"):
        seated.model(make_ids(1, 3), past_key_values=seated.cache)
    seated.places.clear()
    for asking in (False, True):
        with seated.attached.staging(asking=asking), pytest.raises(ValueError, match="block 1 was replaced"):
            seated.attached.stage(make_ids(2, 1), seated.cache)


def test_prompts_are_forgotten_once_others_are_admitted_or_places_cleared(seated):
    model, cache, places = seated.model, seated.cache, seated.places
    ids = make_ids(2, 5)
    want = model(ids)
    places.admit([0], [9])
    with pytest.raises(ValueError, match="a prompt of 9 tokens was admitted"):
        model(ids[:1, :4], past_key_values=cache)
    places.admit([0, 1], [4, 4])
    model(ids[:, :4], past_key_values=cache)
    places.admit([0, 1], [1, 1])
    places.clear([1])
    fresh = model(ids[1:, 4:])[0]
    got = model(ids[:, 4:], past_key_values=cache)
    torch.testing.assert_close(got, torch.stack([want[0, 4:], fresh]), rtol=0, atol=1e-12)  # as above


def test_a_step_that_is_interrupted_before_it_begins_keeps_no_buffer(seated, monkeypatch):
    model, cache, places, kept = seated.model, seated.cache, seated.places, []
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            patch.setattr(places, "begin", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            model(make_ids(2, 1), past_key_values=cache)
        kept.append(caught)  # with its frames, and what was in them
    model(make_ids(2, 1), past_key_values=cache)
