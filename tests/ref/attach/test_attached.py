"""Engram in a decoder of transformers: the sums of a forward written by hand, and everything as before afterwards."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, DynamicCache

from engram_ref.attach import ExposedTime, attach
from engram_ref.attach.on_hand import OnHand
from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_rows
from engram_ref.hashing import NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.layer import Engram
from engram_ref.prefetch import Prefetcher
from engram_ref.rows.rows import Rows
from engram_ref.tables import make_table
from engram_ref.tables.device import DeviceTable
from engram_ref.vocab import CompressedVocab
from tests.ref.attach.models import VOCAB, add_by_hand, by_hand, make_ids, make_layers, make_model


@pytest.fixture(scope="module")
def layers():
    return make_layers()


# --- equal to what is written by hand -------------------------------------------------------------


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


def test_blocks_may_stand_in_a_module_that_gets_no_token_ids(layers, ids):
    """BERT's kin: the module above it gets them."""
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    model = BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).double().eval()
    into_block = []
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
        assert attached.decoder is model.bert
        hook = model.bert.encoder.layer[1].register_forward_pre_hook(lambda block, args: into_block.append(args[0]))
        whole = model(ids, output_hidden_states=True)
        hook.remove()
        assert torch.equal(add_by_hand(layers, 1, whole.hidden_states[1], ids), into_block[0])
        cache = model(ids[:, :4], use_cache=True).past_key_values
        rest = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole.logits[:, 4:], rtol=0, atol=1e-12)  # float64, sums in another order


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


def test_numbers_of_other_kinds_are_blocks(model, layers, ids):
    engrams = {np.int64(layer_id): engram for layer_id, engram in layers.engrams.items()}
    with attach(model, engrams, layers.plan, torch.arange(VOCAB)):
        got = model(ids).logits
    assert torch.equal(got, by_hand(model, layers, ids))


# --- when -----------------------------------------------------------------------------------------


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


# --- detaching ------------------------------------------------------------------------------------


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
