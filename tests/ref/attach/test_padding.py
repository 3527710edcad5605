"""Padding with Engram attached: a padded sequence gives what it gives alone, and no mask is read wrongly."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from engram_ref.attach import attach
from engram_ref.attach.padding import padding_of
from tests.ref.attach.models import by_hand, make_ids, make_layers, make_model, padded_batch

SEQUENCES = [row[:length] for row, length in zip(make_ids(3, 9), (9, 5, 1))]


def tokens(logits, mask):
    """The logits of each sequence's tokens."""
    return [row[marks.bool()] for row, marks in zip(logits, mask)]


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_equals_the_forward_by_hand(side, model, layers):
    """Padding counts as pad in the demo's form and as dead in v41."""
    ids, mask, positions = padded_batch(SEQUENCES, 11, "right" if side == "right" else "left")
    if side == "holes":
        mask[0, 6] = mask[1, 7:9] = 0
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    with torch.no_grad():
        assert torch.equal(got, by_hand(model, layers, ids, mask, positions))
        assert not torch.allclose(got, by_hand(model, layers, ids, None, positions))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("implementation", "dtype", "atol"),
    [
        ("sdpa", torch.float64, 1e-12),
        ("eager", torch.float32, 1e-5),  # a mask that is added; transformers' own overflows in float64
    ],
)
@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("cached", ["no", "dynamic", "static"])
def test_a_padded_sequence_gives_what_it_gives_alone(side, implementation, dtype, atol, form, cached):
    model, layers = make_model(attn_implementation=implementation, dtype=dtype), make_layers(form=form, dtype=dtype)
    ids, mask, positions = padded_batch(SEQUENCES, 11, side)
    cache = {"no": None, "dynamic": DynamicCache(), "static": StaticCache(config=model.config, max_cache_len=16)}[
        cached
    ]
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        got = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for ours, sequence in zip(tokens(got, mask), SEQUENCES):
            torch.testing.assert_close(ours, model(sequence[None]).logits[0], rtol=0, atol=atol)


# --- masks -----------------------------------------------------------------------------------------

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril() & LEFT[:, None, None, :].bool()  # [B, 1, T, T]


def test_two_dimensions():
    assert torch.equal(padding_of(LEFT, 2, 5, 0), LEFT == 0)
    assert torch.equal(padding_of(LEFT, 2, 4, 1), LEFT[:, 1:] == 0)
    assert torch.equal(padding_of(LEFT.bool(), 2, 5, 0), LEFT == 0)
    assert torch.equal(padding_of(LEFT[:1], 2, 5, 0), LEFT[:1].expand(2, 5) == 0)
    assert torch.equal(padding_of(torch.ones(2, 9), 2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert padding_of(None, 2, 5, 0) is None


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -torch.inf, -1e4, -1e3, -60])
def test_four_dimensions(hidden):
    longer = torch.nn.functional.pad(CAUSAL, (0, 3))  # a static cache has columns to come
    added = torch.zeros(longer.shape).masked_fill(~longer, hidden)
    for mask in (CAUSAL, longer, added, {"full_attention": longer}, {"sliding_attention": added}):
        assert torch.equal(padding_of(mask, 2, 5, 0), LEFT == 0)
    assert torch.equal(padding_of(added[:, :, 1:], 2, 4, 1), LEFT[:, 1:] == 0)
    assert padding_of({"full_attention": None}, 2, 5, 0) is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (LEFT[:, :4], r"\(2, 4\) for 2 sequences of 0 cached and 5 new"),
        (LEFT[None], r"shape \(1, 2, 5\)"),
        (LEFT.expand(2, 5).repeat(2, 1), r"\(4, 5\) for 2 sequences"),
        (CAUSAL[:, :, 1:], "for 5 new positions"),
        ("causal", "that is a str"),
    ],
)
def test_other_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        padding_of(mask, 2, 5, 0)
