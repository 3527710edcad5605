"""Errors with Engram attached: what is refused in a line; forwards, fetches and stagings that fail do no harm."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CLIPConfig, CLIPModel, DynamicCache

from engram_ref.attach import attach
from engram_ref.attach import attached as attached_module
from engram_ref.attach.blocks import find_blocks
from engram_ref.attach.on_hand import OnHand
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_ref.layer import Engram, build_engram
from engram_ref.prefetch import FetchError
from engram_ref.tables.device import DeviceTable
from engram_ref.vocab import CompressedVocab
from tests.ref.attach.models import PAD, VOCAB, Plainest, by_hand, make_layers, make_model

TOWER = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, vocab_size=20)
HEADS = dict(encoder_ffn_dim=8, decoder_ffn_dim=8)
ENCODER_DECODER = {
    "T5": lambda encoder, decoder: dict(
        num_layers=encoder, num_decoder_layers=decoder, d_model=8, d_kv=4, d_ff=8, num_heads=2
    ),
    "Bart": lambda encoder, decoder: dict(
        encoder_layers=encoder, decoder_layers=decoder, d_model=8,
        encoder_attention_heads=2, decoder_attention_heads=2, **HEADS,
    ),
    "ProphetNet": lambda encoder, decoder: dict(
        num_encoder_layers=encoder, num_decoder_layers=decoder, hidden_size=8,
        num_encoder_attention_heads=2, num_decoder_attention_heads=2, **HEADS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def layers():
    return make_layers()


# --- what is refused ------------------------------------------------------------------------------


def test_tables_that_are_read_by_different_processors_are_refused(model, layers):
    class Elsewhere(DeviceTable):
        def __init__(self, rows):
            super().__init__(rows)
            self.index_device = torch.device("cuda")

    engrams = layers.engrams | {2: Engram(layers.engrams[2].fusion, Elsewhere(layers.weights[2]))}
    with pytest.raises(ValueError, match="place them alike"):
        attach(model, engrams, layers.plan)


def test_inputs_embeds_are_refused(model, layers, ids):
    embeds = model.model.embed_tokens(ids)
    with attach(model, layers.engrams, layers.plan):
        with pytest.raises(
            ValueError, match=r"inputs_embeds without input_ids.*give the model input_ids.*its text decoder alone"
        ):
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
    config = CLIPConfig(text_config=TOWER, vision_config=TOWER)
    with pytest.raises(ValueError, match=r"CLIPModel has 2 lists of 3 blocks.*or model\.model\.language_model"):
        attach(CLIPModel(config), layers.engrams, layers.plan)


@pytest.mark.parametrize("depths", [(2, 2), (3, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["T5", "Bart", "ProphetNet"])
def test_of_an_encoder_and_a_decoder_it_is_the_decoder(kind, depths):
    config = getattr(transformers, f"{kind}Config")(**ENCODER_DECODER[kind](*depths), vocab_size=20)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with pytest.raises(ValueError, match=r"is an encoder and a decoder.*give model\.get_decoder\(\)"):
        find_blocks(model)
    decoder, blocks = find_blocks(model.get_decoder())
    assert decoder is model.get_decoder() and len(blocks) == depths[1]
    if kind != "T5":
        alone = getattr(transformers, f"{kind}ForCausalLM")(config)
        assert len(find_blocks(alone)[1]) == depths[1]


def test_blocks_that_nothing_with_token_ids_is_around_are_refused(layers):
    class OfValues(Plainest):
        def forward(self, hidden, mask=None):
            return hidden

    with pytest.raises(ValueError, match=r"no forward around the blocks of OfValues names input_ids"):
        attach(OfValues(3), layers.engrams, layers.plan)


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
    want = by_hand(model, layers, ids)[:, at:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)  # float64, sums in another order
    known = np.arange(VOCAB)
    with attach(model, layers.engrams, layers.plan, known), pytest.raises(ValueError, match="token ids contain 150"):
        model(ids.clone().fill_(150))


def test_a_block_by_itself_is_refused(model, layers):
    with attach(model, layers.engrams, layers.plan), pytest.raises(RuntimeError, match="block 1 ran by itself"):
        model.model.layers[1](torch.zeros(1, 2, 64, dtype=torch.float64))


def test_a_block_that_is_wrapped_to_be_computed_again_is_refused(layers, ids):
    model = make_model().train()
    with attach(model, layers.engrams, layers.plan):
        apply_activation_checkpointing(model, check_fn=lambda module: module in set(model.model.layers))
        loss = model(ids, labels=ids, use_cache=False).loss
        with pytest.raises(RuntimeError, match=r"block 2 ran by itself.*wrapped for it before attach"):
            loss.backward()


@pytest.mark.parametrize("staged", [False, True])
def test_a_block_that_runs_twice_has_no_past(staged, layers, ids):
    """The convolution would take the second time for new positions; without a past each time is the same."""
    model = make_model()
    once, blocks = model.model.layers[1].forward, model.model.layers

    def looped(hidden, *args, **kwargs):
        hidden = once(hidden, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, DynamicCache)}
        return blocks[2](hidden, *args, **kwargs)  # and then the decoder calls it, too

    model.model.layers[1].forward = looped
    for form, refused in (("demo", True), ("v41", False)):
        layers = make_layers((2,), form)
        with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached:
            want = model(ids, use_cache=False).logits
            for _ in range(2):
                cache = DynamicCache()
                with attached.staging() if staged else nullcontext():
                    if staged:
                        attached.stage(ids, cache)
                    if refused:
                        with pytest.raises(ValueError, match="block 2 runs several times in one forward"):
                            model(ids, past_key_values=cache)
                    else:
                        assert torch.equal(model(ids, past_key_values=cache).logits, want)


@pytest.mark.parametrize("change", ["another", "wrapped", "fewer"])
def test_a_block_that_was_replaced_is_missed(change, layers, ids):
    model = make_model()
    blocks = model.model.layers
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        want = model(ids).logits
        if change == "wrapped":
            blocks[2] = nn.Sequential(blocks[2])
            blocks[2].forward = blocks[2][0].__call__
            assert torch.equal(model(ids).logits, want)
            return
        if change == "another":
            blocks[1] = make_model().model.layers[1]
        else:
            del blocks[2]
        with pytest.raises(ValueError, match=r"block [12] was replaced since attach\(\)"):
            model(ids)


def test_programs_that_would_keep_the_rows_of_an_example_are_refused(layers, ids):
    model = make_model().requires_grad_(False)
    by_fx = [lambda model, args, early=early: make_fx(model, pre_dispatch=early)(*args) for early in (False, True)]
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        for make in (torch.jit.trace, torch.export.export, *by_fx):
            with pytest.raises(ValueError, match=r"would keep the rows of this example: use torch\.compile"):
                make(Logits(model), (ids,))


class Meanwhile(nn.Module):
    """What happens in another thread while this is exported."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        thread = threading.Thread(target=self.act)
        thread.start()
        thread.join()
        return x + 1


def test_another_thread_may_export_something_meanwhile(model, layers, ids):
    found = []

    def act():
        with torch.no_grad():
            found.append(model(ids).logits)
            with attached.staging(), pytest.raises(ValueError, match="staged were None"):  # it is compared, too
                model(ids)

    with attach(model, layers.engrams, layers.plan) as attached:
        torch.export.export(Meanwhile(act), (torch.zeros(1),), strict=False)
    assert torch.equal(found[0], by_hand(model, layers, ids))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


# --- what fails -----------------------------------------------------------------------------------


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
