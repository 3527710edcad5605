"""Engram in a decoder of transformers: the sums of a forward written by hand, and everything as before afterwards."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

from engram_ref.attach import ExposedTime, attach
from engram_ref.attach import attached as attached_module
from engram_ref.attach.blocks import find_blocks
from engram_ref.attach.on_hand import OnHand
from engram_ref.config import EngramConfig
from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_rows
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.layer import Engram, build_engram
from engram_ref.prefetch import FetchError, Prefetcher
from engram_ref.rows.rows import Rows
from engram_ref.tables import make_table
from engram_ref.tables.device import DeviceTable
from engram_ref.vocab import CompressedVocab
from tests.ref.attach.models import PAD, VOCAB, add_by_hand, by_hand, make_ids, make_layers, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def layers():
    return make_layers()


# --- equal to what is written by hand ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("background", [True, False], ids=["prefetch", "naive"])
def test_equals_the_forward_by_hand(kind, form, background, ids):
    model, layers = make_model(kind), make_layers(form=form)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan, background=background):
        got = model(ids).logits
        again = model(ids).logits
    with torch.no_grad():
        want = by_hand(model, layers, ids)
    assert torch.equal(got, want) and torch.equal(again, want)


def logits_of(model, layers, ids, *args, **options):
    """Of one forward with Engram."""
    with attach(model, layers.engrams, layers.plan, *args, **options):
        return model(ids).logits


def test_hidden_states_are_those_before_the_update(model, layers, ids):
    into_block = []
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        hook = model.model.layers[1].register_forward_pre_hook(lambda block, args: into_block.append(args[0]))
        returned = model(ids, output_hidden_states=True).hidden_states[1]
        hook.remove()
        assert torch.equal(add_by_hand(layers, 1, returned, ids), into_block[0])
    assert not torch.equal(returned, into_block[0])


def test_with_gradients_too(model, layers, ids):
    got = logits_of(model, layers, ids)
    assert got.requires_grad and torch.equal(got, by_hand(model, layers, ids))


def test_wrong_candidates_differ(model, layers, ids):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = model(ids).logits
    with torch.no_grad():
        for wrong in (dict(after=True), dict(hashed_as=1), dict(compressed=ids.flip(1))):
            assert not torch.allclose(got, by_hand(model, layers, ids, **wrong), atol=1e-3)
        assert not torch.allclose(got, model(ids).logits, atol=1e-3)


def test_the_first_block_may_have_one(ids):
    model, layers = make_model(num_hidden_layers=2), make_layers((0,))
    assert torch.equal(logits_of(model, layers, ids), by_hand(model, layers, ids))


def test_bfloat16(ids):
    model, layers = make_model(dtype=torch.bfloat16), make_layers(dtype=torch.bfloat16)
    assert torch.equal(logits_of(model, layers, ids), by_hand(model, layers, ids))


@pytest.mark.parametrize("make", [lambda ids: ids, lambda ids: CompressedVocab.from_map(ids)], ids=["array", "vocab"])
def test_token_ids_are_compressed(model, layers, ids, make):
    table = np.arange(200) % VOCAB
    tokens = ids + VOCAB
    model = make_model(vocab_size=200)
    got = logits_of(model, layers, tokens, make(table))
    assert torch.equal(got, by_hand(model, layers, tokens, compressed=ids))


def test_token_ids_are_compressed_and_hashed_in_one_pass(layers, ids):
    """Of a chunk and of steps behind it; padding, which is hashed otherwise, goes the long way to the same rows."""
    model, compressed = make_model(vocab_size=200), np.arange(200) * 7 % VOCAB
    rows, whole = torch.from_numpy(compressed)[ids], torch.ones_like(ids)
    cut = whole.clone()
    cut[0, :2] = 0

    def in_chunks(mask, passes):
        with torch.no_grad(), attach(model, layers.engrams, layers.plan, compressed) as attached:
            source = attached._source
            with mock.patch.object(source, "compress", wraps=source.compress) as long_way:
                cache, found = DynamicCache(), []
                for low, high in ((0, 5), (5, 6), (6, 9)):
                    given = dict(attention_mask=mask[:, :high], past_key_values=cache)
                    found.append(model(ids[:, low:high], **given).logits)
            assert long_way.call_count == 3 - passes
            return torch.cat(found, 1)

    got, padded = in_chunks(whole, 3), in_chunks(cut, 2)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan, compressed) as attached:
        attached._source._in_one_pass = False
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-10, atol=1e-12)  # attention sums chunks otherwise
        want = model(ids, attention_mask=cut).logits
        torch.testing.assert_close(padded[cut.bool()], want[cut.bool()], rtol=1e-10, atol=1e-12)
    assert not torch.equal(rows, ids)


def test_a_hasher_of_the_device(model, layers, ids):
    """Here the device is the CPU; the hash is the accelerator's."""
    for vocab in (None, np.arange(VOCAB)):
        with attach(model, layers.engrams, layers.plan, vocab):
            want = generated_logits(model, ids)
        with attach(model, layers.engrams, DeviceHasher(layers.plan, "cpu"), vocab):
            assert torch.equal(generated_logits(model, ids), want)


def generated_logits(model, ids):
    """Of four tokens more, [4, B, V]."""
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(model.generate(ids, **options).logits)


def test_rows_that_no_token_needs_may_be_nan(model, ids):
    layers = make_layers()
    clean = {layer_id: rows.clone() for layer_id, rows in layers.weights.items()}
    for layer_id, rows in layers.weights.items():
        needed = torch.from_numpy(NgramHasher(layers.plan)(ids.numpy(), layer_id)).flatten().unique().long()
        spoilt = torch.ones(len(rows), dtype=torch.bool)
        spoilt[needed] = False
        rows[spoilt] = torch.nan
        assert spoilt.any() and not torch.equal(rows, clean[layer_id])
    got = logits_of(model, layers, ids)
    assert torch.equal(got, by_hand(model, layers, ids)) and got.isfinite().all()
    assert logits_of(model, layers, make_ids(seed=5)).isnan().any()


@pytest.mark.parametrize("placement", ["host", "hot", "file"])
def test_other_placements_give_the_same(placement, model, layers, ids, tmp_path):
    engrams = {}
    for layer_id, engram in layers.engrams.items():
        rows, options = layers.weights[layer_id], {}
        if placement == "hot":
            options = {"hot": torch.arange(0, len(rows), 3)}
        if placement == "file":
            path = tmp_path / f"{layer_id}.safetensors"
            save_rows(path, Rows.of(rows))
            rows = StoredRows.find(path)
        engrams[layer_id] = Engram(engram.fusion, make_table(placement, rows, "cpu", **options))
    with attach(model, engrams, layers.plan):
        got = model(ids).logits
    assert torch.equal(got, by_hand(model, layers, ids))
    for engram in engrams.values():
        engram.table.close()


# --- when ------------------------------------------------------------------------------------------


def test_hashed_once_and_started_before_the_first_block(model, layers, ids):
    happened = []

    class Watched(Prefetcher):
        def start(self, *args):
            happened.append("start")
            return super().start(*args)

    tables = {layer_id: engram.table for layer_id, engram in layers.engrams.items()}
    note = lambda stage, layer_id, begin, end: happened.append((stage, layer_id))  # noqa: E731
    hooks = [
        block.register_forward_pre_hook(lambda *_, number=number: happened.append(f"block {number}"))
        for number, block in enumerate(model.model.layers)
    ]
    watched = Watched(NgramHasher(layers.plan), tables, observer=note)
    with watched, torch.no_grad(), attach(model, layers.engrams, layers.plan, prefetcher=watched):
        model(ids)
    for hook in hooks:
        hook.remove()
    fetched = [("hash", 1), ("gather", 1), ("hash", 2), ("gather", 2)]
    assert happened[0] == "start" and happened.count("start") == 1
    assert [event for event in happened if event in fetched] == fetched
    assert [event for event in happened if event not in fetched] == [
        "start",
        "block 0",
        "block 1",
        ("wait", 1),
        "block 2",
        ("wait", 2),
    ]


def test_the_naive_schedule_waits_at_the_entry(model, layers, ids):
    happened = []
    note = lambda stage, layer_id, begin, end: happened.append((stage, layer_id))  # noqa: E731
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: happened.append("block 0"))
    with torch.no_grad(), attach(model, layers.engrams, layers.plan, background=False, observer=note):
        model(ids)
    hook.remove()
    assert {("wait", 1), ("wait", 2)} <= set(happened[: happened.index("block 0")])


def test_exposed_time_is_noted(model, layers, ids):
    exposed = ExposedTime("cpu")
    with torch.no_grad(), attach(model, layers.engrams, layers.plan, exposed=exposed):
        model(ids)
    assert [place for place, _ in exposed.seconds()] == ["start", 1, 2]
    assert all(0 <= seconds < 60 for _, seconds in exposed.seconds())
    exposed.clear()
    assert exposed.seconds() == []


def test_waits_are_told_to_whatever_has_an_around(model, layers, ids):
    """A clock of one's own stands around each wait, and nowhere else."""
    told = []

    class Marks:
        @contextmanager
        def around(self, place):
            told.append(("join", place))
            yield
            told.append(("joined", place))

    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: told.append("block 0"))
    with torch.no_grad(), attach(model, layers.engrams, layers.plan, exposed=Marks()):
        model(ids)
    hook.remove()
    joins = [(mark, place) for place in (1, 2) for mark in ("join", "joined")]
    assert told == [("join", "start"), ("joined", "start"), "block 0", *joins]


def test_exposed_time_on_the_clock_of_a_gpu(monkeypatch):
    class Event:
        clock = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            Event.clock += 3
            self.at = Event.clock

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    exposed = ExposedTime("cuda")
    with exposed.around(7):
        Event.clock += 10
    assert exposed.seconds() == [(7, 0.013)]


def test_rows_on_hand_are_neither_hashed_nor_looked_up(model, layers, ids):
    on_hand = OnHand(layers.engrams)
    poisoned = {i: Engram(e.fusion, DeviceTable(torch.full((5, 4), torch.nan))) for i, e in layers.engrams.items()}
    with torch.no_grad(), attach(model, poisoned, layers.plan, prefetcher=on_hand):
        first, second = model(ids).logits, model(ids).logits
        other = model.generate(make_ids(1, 4), max_new_tokens=3)
    assert first.isfinite().all() and torch.equal(first, second) and other.shape == (1, 7)
    assert not torch.equal(first, model(ids).logits)
    rows = {i: pending.wait() for i, pending in on_hand.start(ids).items()}
    columns = layers.engrams[1].fusion.config.columns
    assert rows[1].shape == (ids.numel() * columns, 4) and not torch.equal(rows[1], rows[2])


# --- detaching -------------------------------------------------------------------------------------


def everything_of(model):
    """What may not change: hooks, attributes, class, of every module."""
    found = {}
    for name, module in model.named_modules():
        plain = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        found[name] = type(module), plain
    return found


def test_detach_restores_everything(ids):
    model, layers = make_model(), make_layers()
    hook = model.model.register_forward_pre_hook(lambda *_: None)  # somebody else's stays
    before, weights = everything_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    want = model(ids).logits
    attached = attach(model, layers.engrams, layers.plan)
    assert everything_of(model) != before
    assert list(model.state_dict()) == list(weights)
    cache = model(ids, use_cache=True).past_key_values
    kind = type(cache)
    attached.detach()
    attached.detach()
    assert everything_of(model) == before
    assert type(cache) is kind.__bases__[0] and not [name for name in vars(cache) if "engram" in name]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, want)
    hook.remove()


def test_detached_when_the_block_ends_in_an_error(ids):
    model, layers = make_model(), make_layers()
    before = everything_of(model)
    with pytest.raises(KeyError, match="wrong"), attach(model, layers.engrams, layers.plan) as attached:
        raise KeyError("wrong")
    assert everything_of(model) == before
    with pytest.raises(RuntimeError, match="closed"):
        attached.prefetcher.start(ids.numpy())


def test_a_prefetcher_of_ones_own_stays_open(model, layers, ids):
    with Prefetcher(NgramHasher(layers.plan), {i: e.table for i, e in layers.engrams.items()}) as prefetcher:
        with attach(model, layers.engrams, layers.plan, prefetcher=prefetcher):
            model(ids)
        prefetcher.start(ids.numpy()).release()


def test_a_prefetcher_brings_its_hasher(model, layers, ids):
    tables = {layer_id: engram.table for layer_id, engram in layers.engrams.items()}
    with Prefetcher(DeviceHasher(layers.plan, "cpu"), tables) as prefetcher:
        got = logits_of(model, layers, ids, prefetcher=prefetcher)
    assert torch.equal(got, by_hand(model, layers, ids))


def test_tables_that_are_read_by_different_processors_are_refused(model, layers):
    class Elsewhere(DeviceTable):
        def __init__(self, rows):
            super().__init__(rows)
            self.index_device = torch.device("cuda")

    engrams = layers.engrams | {2: Engram(layers.engrams[2].fusion, Elsewhere(layers.weights[2]))}
    with pytest.raises(ValueError, match="place them alike"):
        attach(model, engrams, layers.plan)


def test_two_models_side_by_side(ids):
    one, two = make_model("qwen3"), make_model("llama")
    demo, v41 = make_layers((1,)), make_layers((0, 2), "v41")
    with torch.no_grad(), attach(one, demo.engrams, demo.plan), attach(two, v41.engrams, v41.plan):
        caches = [None, None]
        parts = []
        for t in range(ids.shape[1]):
            for number, model in enumerate((one, two)):
                out = model(ids[:, t : t + 1], past_key_values=caches[number], use_cache=True)
                caches[number] = out.past_key_values
                parts.append(out.logits)
        whole = one(ids).logits, two(ids).logits
    with torch.no_grad():
        assert torch.equal(whole[0], by_hand(one, demo, ids)) and torch.equal(whole[1], by_hand(two, v41, ids))
    for number in (0, 1):
        torch.testing.assert_close(torch.cat(parts[number::2], 1), whole[number], rtol=0, atol=1e-12)


def test_attached_twice(model, ids):
    """Two attachments to one model, each with a layer: as one with both."""
    layers = make_layers()
    first, second = ({i: layers.engrams[i]} for i in (1, 2))
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        want = generated_logits(model, ids)
    with torch.no_grad(), attach(model, first, layers.plan) as outer:
        with attach(model, second, layers.plan):
            got = generated_logits(model, ids)
        cache = model(ids, use_cache=True).past_key_values
        outer.detach()
    assert torch.equal(got, want) and cache.get_seq_length() == ids.shape[1]


# --- what is refused -------------------------------------------------------------------------------


def test_inputs_embeds_are_refused(model, layers, ids):
    embeds = model.model.embed_tokens(ids)
    with attach(model, layers.engrams, layers.plan):
        with pytest.raises(ValueError, match=r"inputs_embeds without input_ids.*give the model input_ids"):
            model(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="inputs_embeds"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)
        assert model(ids).logits.isfinite().all()


def test_packed_sequences_are_refused(model, layers, ids):
    with attach(model, layers.engrams, layers.plan), pytest.raises(ValueError, match="several sequences packed"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))


def test_layers_that_do_not_fit_are_refused(model, layers):
    engram = layers.engrams[1]
    other = EngramConfig.preset("tiny").replace(hc_mult=4)
    wide = {1: build_engram(other, HashPlan.build(other, VOCAB, PAD).layer(1))}
    config = EngramConfig.preset("tiny")
    plan = HashPlan.build(config.replace(heads=2), VOCAB, PAD)
    orders = HashPlan.build(config.replace(max_ngram=5, heads=2, table_size_per_order=(50,) * 4), VOCAB, PAD)
    larger, smaller = (
        HashPlan.build(config.replace(table_size_per_order=(size, size)), VOCAB, PAD) for size in (5000, 50)
    )
    for engrams, hashed, message in [
        ({}, layers.plan, "no Engram layers"),
        ({3: engram}, layers.plan, r"layer 3: the model has blocks 0 \.\. 2"),
        ({-1: engram}, layers.plan, "layer -1"),
        ({0: engram}, layers.plan, "layer_id=0"),
        (wide, layers.plan, "4 x 64 values.*1 x 64"),
        ({1: engram}, plan, "a plan of layer 1 with 4 columns"),
        ({1: engram}, orders, "a plan of layer 1 with 8 columns, n-grams up to 5; this .* n-grams up to 3"),
        ({1: engram}, larger, f"a plan of {larger.layer(1).rows} rows .* which has {engram.table.rows}"),
        ({1: engram}, smaller, f"a plan of {smaller.layer(1).rows} rows .* which has {engram.table.rows}"),
        ({1: engram, 2: make_layers((2,), "v41").engrams[2]}, layers.plan, "demo, v41"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach(model, engrams, hashed)
    assert not model.model._forward_pre_hooks


def test_vocabularies_that_do_not_fit_are_refused(model, layers):
    for vocab, message in [
        (CompressedVocab.from_map(np.arange(96)), "96 compressed ids; the plan was made for 97"),
        (np.arange(98), r"compressed id 97 in the vocabulary; the plan has 0 \.\. 96"),
        (np.arange(97.0), "float64"),
        ([[1, 2]], "one compressed id per token id"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach(model, layers.engrams, layers.plan, vocab)
    assert not model.model._forward_pre_hooks


class Wordless:
    """Has nothing that `attach` could call."""


WRONG = {
    "a model's name": (dict(model="Qwen/Qwen3-4B"), "str has no configuration of transformers"),
    "a layer": (dict(engrams=make_layers().engrams[1]), r"engrams is a Engram: give a mapping, \{block number"),
    "a list": (dict(engrams=[make_layers().engrams[1]]), "engrams is a list: give a mapping"),
    "nothing": (dict(engrams=None), "engrams is a NoneType: give a mapping"),
    "a word for a block": (dict(engrams={"1": make_layers().engrams[1]}), "layer '1' is a str: give the number of a"),
    "a float": (dict(engrams={1.0: make_layers().engrams[1]}), "layer 1.0 is a float"),
    "a truth": (dict(engrams={True: make_layers().engrams[1]}), "layer True is a bool"),
    "a fusion": (dict(engrams={1: make_layers().engrams[1].fusion}), "layer 1 is a DemoFusion: give an Engram"),
    "a table": (dict(engrams={1: make_layers().engrams[1].table}), "layer 1 is a DeviceTable: give an Engram"),
    "a configuration": (dict(plan=EngramConfig.preset("tiny")), "plan is a EngramConfig: give a HashPlan"),
    "a plan's text": (dict(plan=make_layers().plan.to_json()), "plan is a str: give a HashPlan"),
    "a tokenizer's name": (dict(vocab="tokenizer.json"), "vocab is a str: give a CompressedVocab"),
    "a dictionary": (dict(vocab={"a": 1}), "vocab is a dict: give a CompressedVocab"),
    "words": (dict(vocab=["a", "b"]), "vocab is a list: give a CompressedVocab"),
    "buffers": (dict(buffers="2"), "buffers='2': give how many"),
    "an observer": (dict(observer=Wordless()), "observer is a Wordless, without __call__"),
    "a clock": (dict(exposed=Wordless()), "exposed is a Wordless, without around"),
    "a source": (dict(prefetcher=Wordless()), "prefetcher is a Wordless, without start"),
    "a class": (dict(prefetcher=OnHand), "prefetcher is a OnHand, .* give a made object"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_what_is_not_what_attach_takes_is_refused_in_a_line(given, message, model, layers):
    right = dict(model=model, engrams=layers.engrams, plan=layers.plan, vocab=None)
    with pytest.raises(ValueError, match=message) as caught:
        attach(**(right | given))
    assert "\n" not in str(caught.value)
    assert not model.model._forward_pre_hooks and not any(block._forward_pre_hooks for block in model.model.layers)


def test_numbers_of_other_kinds_are_blocks(model, layers, ids):
    engrams = {np.int64(layer_id): engram for layer_id, engram in layers.engrams.items()}
    with attach(model, engrams, layers.plan, torch.arange(VOCAB)):
        got = model(ids).logits
    assert torch.equal(got, by_hand(model, layers, ids))


@pytest.mark.parametrize("known", [VOCAB, 90])
def test_more_token_ids_than_the_vocabulary_has_are_told(known, recwarn):
    model, layers = make_model(vocab_size=VOCAB + 8), make_layers()
    vocab = None if known == VOCAB else np.arange(known)
    for prefetcher in (None, OnHand(layers.engrams)):
        recwarn.clear()
        attach(model, layers.engrams, layers.plan, vocab, prefetcher=prefetcher).detach()
        said = [str(warning.message) for warning in recwarn if "token ids" in str(warning.message)]
        assert [text.split(": a")[0] for text in said] == [
            f"the model has token ids 0 .. 104, the vocabulary of Engram 0 .. {known - 1}"
        ] * (prefetcher is None)
    recwarn.clear()
    attach(make_model(), layers.engrams, layers.plan).detach()
    assert not [warning for warning in recwarn if "token ids" in str(warning.message)]


def test_models_without_one_list_of_blocks_are_refused(layers):
    with pytest.raises(ValueError, match="Linear has no configuration of transformers"):
        attach(nn.Linear(2, 2), layers.engrams, layers.plan)
    config = T5Config(num_layers=2, d_model=8, d_kv=4, d_ff=8, num_heads=2, vocab_size=20)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has 2 lists of 2 blocks"):
        find_blocks(T5ForConditionalGeneration(config))
    assert len(find_blocks(T5ForConditionalGeneration(config).decoder)[1]) == 2


def test_an_observer_and_a_prefetcher_are_refused(model, layers):
    with pytest.raises(ValueError, match="give the observer to the prefetcher"):
        attach(model, layers.engrams, layers.plan, observer=print, prefetcher=OnHand(layers.engrams))


def test_a_token_outside_the_vocabulary_is_refused(layers, ids):
    model = make_model(vocab_size=200)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        cache, at = DynamicCache(), ids.shape[1] - 1
        model(ids[:, :at], past_key_values=cache)
        with pytest.raises(ValueError, match="compressed ids contain 150"):
            model(ids[:, at:].clone().fill_(150), past_key_values=cache)
        got = model(ids[:, at:], past_key_values=cache).logits  # no block had run, so the cache is whole
    torch.testing.assert_close(
        got, by_hand(model, layers, ids)[:, at:], rtol=0, atol=1e-12
    )  # float64, sums in another order
    with pytest.raises(ValueError, match="token ids contain 150"):
        logits_of(model, layers, ids.clone().fill_(150), np.arange(VOCAB))


def test_a_block_by_itself_is_refused(model, layers):
    with attach(model, layers.engrams, layers.plan), pytest.raises(RuntimeError, match="block 1 ran by itself"):
        model.model.layers[1](torch.zeros(1, 2, 64, dtype=torch.float64))


def test_a_broken_forward_does_no_harm(model, layers, ids):
    def fail(*_):
        raise MemoryError("in block 2")

    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        for _ in range(3):  # more often than there are buffers
            hook = model.model.layers[2].register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                model(ids)
            hook.remove()
        got = model(ids).logits
    assert torch.equal(got, by_hand(model, layers, ids))


def stage(model, attached, ids):
    with attached.staging():
        attached.stage(ids)


def forward(model, attached, ids):
    model(ids, use_cache=False)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize(("background", "use"), [(True, forward), (False, forward), (True, stage), (False, stage)])
def test_a_fetch_that_fails_keeps_no_buffer(error, background, use, model, layers, ids, monkeypatch):
    table = layers.engrams[1].table
    kept = []  # errors, and with them the frames of all that they passed through

    def fail(rows, out=None):
        raise error

    with torch.no_grad(), attach(model, layers.engrams, layers.plan, background=background) as attached:
        for _ in range(3):  # more often than there are buffers
            with monkeypatch.context() as patch, pytest.raises((FetchError, KeyboardInterrupt)) as caught:
                patch.setattr(table, "start", fail)
                use(model, attached, ids)
            kept.append(caught)
        use(model, attached, ids)
        got = model(ids).logits
    assert torch.equal(got, by_hand(model, layers, ids))


@pytest.mark.parametrize("place", ["Step", "give"])
def test_an_interruption_before_a_step_is_known_keeps_no_buffer(place, model, layers, ids, monkeypatch):
    """Between the start of a fetch and the moment at which the step is stored."""

    def interrupted(*_):
        raise KeyboardInterrupt

    kept = []
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        for _ in range(3):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
                if place == "Step":
                    patch.setattr(attached_module, "Step", interrupted)
                else:
                    patch.setattr(attached._source.prefetcher, "is_done_here", lambda *given: False)
                    patch.setattr(attached._source.prefetcher._worker, "give", interrupted)
                model(ids, use_cache=False)
            kept.append(caught)
        got = model(ids).logits
    assert torch.equal(got, by_hand(model, layers, ids))


def test_a_step_whose_staging_failed_can_be_staged_again(model, layers, ids, monkeypatch):
    from transformers import DynamicCache

    table, cache = layers.engrams[1].table, DynamicCache(config=model.config)

    def fail(rows, out=None):
        raise OSError(5, "Input/output error")

    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        attached.stage(ids[:, :5], cache)
        first = model(ids[:, :5], past_key_values=cache, use_cache=True).logits
        with monkeypatch.context() as patch, pytest.raises(FetchError, match="Input/output error"):
            patch.setattr(table, "start", fail)
            attached.stage(ids[:, 5:], cache)
        attached.stage(ids[:, 5:], cache)
        rest = model(ids[:, 5:], past_key_values=cache, use_cache=True).logits
    whole = by_hand(model, layers, ids)
    assert torch.allclose(torch.cat([first, rest], dim=1), whole, atol=1e-10)  # float64, sums in another order
