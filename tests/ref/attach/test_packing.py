"""Several sequences in one row: each gives what it gives alone, or the forward is refused by name."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from engram_ref.attach import attach
from engram_ref.attach.blocks import Given
from engram_ref.attach.packing import Packing, borders_of, require_apart
from engram_ref.hashing.device import DeviceHasher
from tests.ref.attach.models import Plainest, make_family, make_ids, make_layers, make_model

EXACT = dict(rtol=0, atol=1e-12)  # float64, logits of about 1; other shapes of the same sums differ by 1e-15
LENGTHS = (4, 1, 9, 1, 1, 2)  # shorter and longer than what the hash and the convolution look back
SEQUENCES = [row[:length] for row, length in zip(make_ids(len(LENGTHS), 9, seed=3), LENGTHS)]
PACKED = torch.cat(SEQUENCES)[None]
PLACES = torch.cat([torch.arange(length) for length in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
BLOCKS = (NUMBERS[:, None] == NUMBERS[None, :]).tril()[None, None]  # [1, 1, T, T]


def added(mask, hidden):
    """As a mask is added to scores; exp(-200) is below all that float64 tells apart from 0 beside 1."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)


def alone(model, sequences, start=0):
    """The logits of each, one after the other."""
    found = []
    for sequence in sequences:
        places = start + torch.arange(len(sequence))[None]
        found.append(model(sequence[None], position_ids=places, use_cache=False).logits[0])
    return torch.cat(found)


def collated(**options):
    features = [{"input_ids": sequence.tolist()} for sequence in SEQUENCES]
    batch = DataCollatorWithFlattening(**options)(features, return_tensors="pt")
    return {name: value for name, value in batch.items() if name != "labels"}


WAYS = {
    "position ids": lambda: dict(input_ids=PACKED, position_ids=PLACES),
    "from 7": lambda: dict(input_ids=PACKED, position_ids=PLACES + 7),
    "collator": lambda: collated(),
    "cu_seq_lens": lambda: collated(return_flash_attn_kwargs=True),
    "seq_idx": lambda: collated(return_seq_idx=True),
    "both": lambda: collated(return_flash_attn_kwargs=True, return_seq_idx=True),
    "booleans": lambda: dict(input_ids=PACKED, position_ids=PLACES, attention_mask=BLOCKS),
    "added": lambda: dict(input_ids=PACKED, position_ids=PLACES, attention_mask=added(BLOCKS, -1e9)),
    "less of it": lambda: dict(input_ids=PACKED, position_ids=PLACES, attention_mask=added(BLOCKS, -200)),
    "by kind": lambda: dict(input_ids=PACKED, position_ids=PLACES, attention_mask={"full_attention": BLOCKS}),
}


@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS)
def test_packed_sequences_give_what_they_give_alone(arguments, model, layers):
    given = arguments() | {"use_cache": False}
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = model(**given).logits[0]
        want = alone(model, SEQUENCES, int(given["position_ids"].min()))  # rotated in float32
        torch.testing.assert_close(got, want, **EXACT)
        one = model(PACKED, use_cache=False).logits[0]  # the comparison fails where they are taken for one sequence
        assert not torch.allclose(one[LENGTHS[0] :], want[LENGTHS[0] :], atol=1e-2)


def test_borders_matter_to_engram_too(model, layers, monkeypatch):
    monkeypatch.setattr("engram_ref.attach.attached.borders_of", lambda *_: None)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = model(PACKED, position_ids=PLACES, use_cache=False).logits[0]
        assert not torch.allclose(got, alone(model, SEQUENCES), atol=1e-3)


def test_rows_of_several_sequences_each(model, layers):
    """Another number of borders in each row of a batch."""
    rows = [[9, 2], [1, 1, 4, 5], [11]]
    ids = make_ids(3, 11, seed=6)
    places = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = model(ids, position_ids=places, use_cache=False).logits
        for logits, row, lengths in zip(got, ids, rows):
            torch.testing.assert_close(logits, alone(model, row.split(lengths)), **EXACT)


def test_on_the_device_too(model, layers):
    with torch.no_grad(), attach(model, layers.engrams, DeviceHasher(layers.plan, "cpu")):
        got = model(PACKED, position_ids=PLACES, use_cache=False).logits[0]
        torch.testing.assert_close(got, alone(model, SEQUENCES), **EXACT)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_of_packed_sequences(trained, layers):
    model = make_model().train()
    layers = make_layers((1,), layers.engrams[1].fusion.config.form, trained=trained)
    weights = [model.model.embed_tokens.weight, *layers.engrams[1].parameters()]
    weights += [layers.weights[1]] if trained else []
    with attach(model, layers.engrams, layers.plan):
        got = torch.autograd.grad(model(**collated(), use_cache=False).logits.square().sum(), weights)
        want = torch.autograd.grad(alone(model, SEQUENCES).square().sum(), weights)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # summed in another order


def test_a_block_diagonal_mask_with_padding_in_it(model, layers):
    """Padding stands between the sequences, before and behind them."""
    places = torch.tensor([1, 2, 3, 6, 7, 8, 9])
    ids = torch.zeros(1, 11, dtype=torch.long)
    sequences = [make_ids(1, 3, seed=1)[0], make_ids(1, 4, seed=2)[0]]
    ids[0, places] = torch.cat(sequences)
    number = torch.full((11,), -1)
    number[places] = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    mask = (number[:, None] == number[None, :]).tril() & (number >= 0)
    positions = torch.tensor([[0, 0, 1, 2, 0, 0, 0, 1, 2, 3, 0]])
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = model(ids, attention_mask=mask[None, None], position_ids=positions, use_cache=False).logits[0, places]
        torch.testing.assert_close(got, alone(model, sequences), **EXACT)


def test_a_packed_cache_cannot_go_on(model, layers):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        cache = DynamicCache()
        got = model(PACKED, position_ids=PLACES, attention_mask=BLOCKS, past_key_values=cache).logits[0]
        torch.testing.assert_close(got, alone(model, SEQUENCES), **EXACT)
        with pytest.raises(ValueError, match="several sequences packed into one row, of which none can go on"):
            model(make_ids(1, 1), past_key_values=cache)


# --- refused ---------------------------------------------------------------------------------------

CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
REFUSED = {
    "with a cache": (dict(position_ids=PLACES), "transformers attends across their borders: use_cache=False"),
    "lengths alone": (dict(cu_seq_lens_q=CU, use_cache=False), r"packed into one row \(cu_seq_lens_q\)"),
    "of keys": (dict(cu_seq_lens_k=CU, use_cache=False), r"packed into one row \(cu_seq_lens_k\)"),
    "numbers alone": (dict(seq_idx=NUMBERS[None], use_cache=False), r"packed into one row \(seq_idx\)"),
    "other lengths": (
        dict(position_ids=PLACES, cu_seq_lens_q=CU[[0, 1, 3, 4, 5, 6]], use_cache=False),
        r"\(cu_seq_lens_q\), and other borders",
    ),
    "lengths by another name": (dict(cu_seqlens=CU, use_cache=False), r"packed into one row \(cu_seqlens\)"),
    "numbers by another name": (dict(document_ids=NUMBERS[None], use_cache=False), r"\(document_ids\), and other"),
    "numbers of another shape": (dict(segment_ids=NUMBERS, use_cache=False), r"segment_ids of shape \(18,\)"),
    "a mask that numbers": (dict(attention_mask=NUMBERS[None] + 1), "an attention mask with numbers above 1"),
    "a list": (dict(input_ids=[[1, 2]]), "input_ids is a list: give a tensor of token ids"),
    "beside a mask": (dict(attention_mask=torch.ones_like(PACKED), cu_seq_lens_q=CU), "cu_seq_lens_q"),
    "a tree": (dict(attention_mask=BLOCKS | (torch.arange(18) == 0)), "neither causal nor block-diagonal"),
    "integers": (dict(attention_mask=BLOCKS.long()), r"shape \(1, 1, 18, 18\), torch.int64: give booleans"),
    "too short": (dict(position_ids=PLACES[:, 1:]), r"position_ids of shape \(1, 17\)"),
    "of pictures": (dict(position_ids=PLACES.expand(3, 1, 18)), r"position_ids of shape \(3, 1, 18\)"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_other_packings_are_refused(arguments, message, model, layers):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan), pytest.raises(ValueError, match=message):
        model(**dict(input_ids=PACKED) | arguments)


CROSSED = {  # by name of a family, and what of it crosses the borders that position_ids say
    "GptOss": "block 1 of this model attends across their borders",
    "OPT": "block 1 of this model attends across their borders",
    "Lfm2": "recurrent or convolutional blocks",
    "Qwen3Next": "recurrent or convolutional blocks",
}


@pytest.mark.parametrize(("name", "message"), CROSSED.items(), ids=CROSSED)
def test_models_that_cross_the_borders_are_refused(name, message, layers):
    model, second = make_family(name), SEQUENCES[2]
    both, places = torch.cat([SEQUENCES[0], second])[None], torch.cat([torch.arange(4), torch.arange(9)])[None]
    with torch.no_grad():
        crossed = model(both, position_ids=places, use_cache=False).logits[0, 4:]
        assert not torch.allclose(crossed, model(second[None], use_cache=False).logits[0], atol=1e-3)
        with attach(model, layers.engrams, layers.plan):
            with pytest.raises(ValueError, match=f"several sequences in one row.*{message}"):
                model(both, position_ids=places, use_cache=False)
            assert model(second[None], use_cache=False).logits.isfinite().all()


def test_a_decoder_that_keeps_its_mask_from_its_blocks_is_refused(layers):
    decoder = Plainest(3).double()
    with torch.no_grad(), attach(decoder, layers.engrams, layers.plan):
        with pytest.raises(ValueError, match="several sequences in one row; block 1 of this model attends across"):
            decoder(PACKED, BLOCKS)
        assert torch.equal(decoder(PACKED, torch.ones_like(BLOCKS).tril()), decoder(PACKED))


def test_what_a_block_is_told_of_borders():
    borders = NUMBERS.diff(prepend=NUMBERS[:1])[None] != 0
    causal = torch.ones(1, 1, 18, 18, dtype=torch.bool).tril()

    class Flex:
        def __init__(self, mask):
            self.mask_mod = lambda row, head, one, other: mask[row, head, one, other]

    bias, to_come = torch.zeros(1, 4, 18, 18), torch.nn.functional.pad(BLOCKS, (0, 6), value=True)  # a static cache's
    apart = [((BLOCKS,), {}), ((None,), {"mask": added(BLOCKS, -1e9)}), ((), {"mask": Flex(BLOCKS)})]
    apart += [((bias, BLOCKS), {}), ((to_come,), {})]
    across = [((causal,), {}), ((), {"mask": added(causal, -1e9)}), ((), {"mask": Flex(causal)}), ((PLACES,), {})]
    across += [((bias,), {}), ((~BLOCKS,), {}), ((~causal,), {}), ((BLOCKS.int(),), {})]
    for args, kwargs in apart:
        require_apart(borders, "block 1", args, kwargs, flash=False)
    for args, kwargs in [*across, ((), {"position_ids": PLACES})]:
        with pytest.raises(ValueError, match="block 1 of this model attends across"):
            require_apart(borders, "block 1", args, kwargs, flash=False)
    # Every row and every head counts; what has another batch is a bias, and no mask.
    both = borders.repeat(2, 1)
    for one, other, dim in ((BLOCKS, causal, 0), (causal, BLOCKS, 0), (BLOCKS, causal, 1), (causal, BLOCKS, 1)):
        mask = torch.cat([one, other], dim)
        with pytest.raises(ValueError, match="block 1 of this model attends across"):
            require_apart(both if dim == 0 else borders, "block 1", (mask,), {}, flash=False)
    require_apart(both, "block 1", (BLOCKS.repeat(2, 3, 1, 1),), {}, flash=False)
    require_apart(borders, "block 1", (bias.repeat(3, 1, 1, 1), BLOCKS), {}, flash=False)
    require_apart(borders, "block 1", (), {"position_ids": PLACES, "attention_mask": None}, flash=True)
    with pytest.raises(ValueError, match="attends across"):
        require_apart(borders, "block 1", (), {"position_ids": None}, flash=True)


def test_staged_steps_hold_one_sequence_a_row(model, layers):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan) as attached, attached.staging():
        for _ in range(3):  # more often than there are buffers
            with pytest.raises(ValueError, match="several sequences in one row of a staged step"):
                attached.stage(PACKED, None, BLOCKS)
        attached.stage(PACKED)
        with pytest.raises(ValueError, match="several sequences in one row of a staged step"):
            model(PACKED, position_ids=PLACES, use_cache=False)


def test_behind_a_cache_they_are_refused(model, layers):
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        cache = DynamicCache()
        model(make_ids(1, 2), past_key_values=cache)
        mask = torch.nn.functional.pad(BLOCKS, (2, 0), value=True)
        with pytest.raises(ValueError, match="several sequences in one row behind a cache of 2 positions"):
            model(PACKED, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("hidden", [None, -1e9, -1e3])
def test_a_sequence_that_begins_exactly_behind_a_cache_is_refused(length, hidden, model, layers):
    """The chunk is one sequence, so there is no border in it: only what it sees of the cache tells."""
    ids = make_ids(2, 5 + length, seed=8)
    causal = torch.ones(5 + length, 5 + length, dtype=torch.bool).tril()[None, None, 5:].repeat(2, 1, 1, 1)
    anew = causal.clone()
    anew[1, :, :, :5] = False  # the second row alone
    some = causal.clone()
    some[1, :, :, 4] = False  # sees old positions of the cache, not the newest: the tokens before it are not known

    def go_on(mask):
        cache = DynamicCache()
        model(ids[:, :5], past_key_values=cache)
        if hidden:
            mask = added(mask, hidden)
        return model(ids[:, 5:], attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        torch.testing.assert_close(go_on(causal), model(ids, use_cache=False).logits[:, 5:], **EXACT)
        for mask in (anew, some):
            with pytest.raises(ValueError, match="a sequence begins behind a cache of 5 positions"):
                go_on(mask)


def test_a_row_of_nothing_but_padding_so_far_may_begin_behind_a_cache(model, layers):
    """Left padding that fills the first chunk: there is nothing to go on from, and nothing to see."""
    ids = make_ids(2, 9, seed=4)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :5] = real[1, :3] = False
    mask = (real[:, None, :] & real[:, :, None] & torch.ones(9, 9, dtype=torch.bool).tril())[:, None]
    places = (real.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache()
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        model(ids[:, :4], attention_mask=mask[:, :, :4, :4], position_ids=places[:, :4], past_key_values=cache)
        last = dict(attention_mask=mask[:, :, 4:], position_ids=places[:, 4:], past_key_values=cache)
        got = model(ids[:, 4:], **last).logits
        torch.testing.assert_close(got[0, 1:], alone(model, [ids[0, 5:]]), **EXACT)
        torch.testing.assert_close(got[1], alone(model, [ids[1, 3:]])[1:], **EXACT)


def test_what_is_one_sequence_stays_one(model, layers):
    length = PACKED.shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    biased = distance.double().masked_fill(~causal, -1e9)  # as ALiBi
    window = causal & (distance > -3)
    for arguments in (
        dict(position_ids=torch.arange(length)[None] + 5),
        dict(position_ids=torch.arange(length)),
        dict(attention_mask=causal),
        dict(attention_mask=biased),
        dict(attention_mask={"sliding_attention": window}),
        dict(seq_idx=torch.zeros_like(PACKED), cu_seq_lens_q=torch.tensor([0, length])),
        dict(attention_mask=torch.ones_like(PACKED), position_ids=PLACES),  # with a mask, positions are only rotated
    ):
        packed = {name: arguments.pop(name) for name in ("seq_idx", "cu_seq_lens_q") if name in arguments}
        given = Given(PACKED, None, arguments.get("attention_mask"), None, arguments.get("position_ids"), packed)
        assert borders_of(given, 0, True, model.config) is None


def test_flash_attention_sees_only_what_it_sees():
    class Config:
        _attn_implementation = "flash_attention_2"

    def borders(ids, places, mask=None):
        return borders_of(Given(ids, None, mask, None, places), 0, False, Config)

    ones = torch.ones_like(PACKED)
    assert borders(PACKED, PLACES).sum() == len(LENGTHS) - 1
    assert torch.equal(borders(PACKED, PLACES, ones), borders(PACKED, PLACES))  # a mask that hides nothing is left out
    assert borders(PACKED, PLACES, ones * (torch.arange(18) > 0)) is None  # any other is all that is looked at
    for ids, places in ((PACKED.expand(2, -1), PLACES), (PACKED, PLACES + torch.arange(18) // 9)):
        with pytest.raises(ValueError, match="this attention would attend across"):
            borders(ids, places)


def test_a_step_of_one_token_does_not_look_into_its_mask(model, layers, monkeypatch):
    """Flash attention leaves a mask of ones out: to know would wait for the device, and a capture could not."""
    monkeypatch.setattr("engram_ref.attach.packing.is_flash", lambda config: True)
    cache, ids = DynamicCache(), make_ids(2, 5)
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        model(ids[:, :4], attention_mask=torch.ones(2, 4), past_key_values=cache)
        monkeypatch.setattr("engram_ref.attach.packing._hides_nothing", lambda mask: 1 / 0)
        got = model(ids[:, 4:], attention_mask=torch.ones(2, 5), past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids[:, :], use_cache=False).logits[:, 4:], **EXACT)


def test_laid_apart_and_put_together():
    borders = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    packing = Packing(borders, 2)
    values = torch.arange(1, 13).view(3, 4)
    wide = packing.spread(values).masked_fill(packing.apart, 0)
    assert wide.tolist() == [
        [1, 2, 0, 0, 3, 4, 0, 0, 0, 0],
        [5, 6, 7, 8, 0, 0, 0, 0, 0, 0],
        [9, 0, 0, 10, 0, 0, 11, 0, 0, 12],
    ]
    assert torch.equal(packing.pick(wide), values)
