"""Marked positions of every form: whatever stands there, a NaN too, reaches no other position and no weight."""

import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.fusion import make_fusion

FORMS = ["demo", "qwen", "v41"]
LENGTH = 20
# Two positions in the middle of a batch and two at its ends.
PADDING = torch.zeros(2, LENGTH, dtype=torch.bool)
PADDING[0, :2] = PADDING[0, 10] = PADDING[1, 0] = PADDING[1, -1] = True


def fusion_and_inputs(form, dtype, kernel_size=4, row_width=16):
    config = EngramConfig(
        layer_ids=(1,), max_ngram=2, heads=5, row_width=row_width, table_size_per_order=(101,), hidden=64, hc_mult=2,
        kernel_size=0 if form == "v41" else kernel_size, form=form, norm_eps=1e-6 if form == "qwen" else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(2, LENGTH, config.embedding_width, generator=generator).to(dtype)
    hidden = torch.randn(2, LENGTH, config.hc_mult, config.hidden, generator=generator).to(dtype)
    return make_fusion(config, "cpu", dtype), e, hidden


@pytest.mark.parametrize("form", FORMS)
def test_gradients_stop_at_padding_even_where_it_is_nan(form):
    fusion, e, hidden = fusion_and_inputs(form, torch.float64)

    def gradients(fill):
        inputs = [
            x.masked_fill(PADDING.view(2, LENGTH, *[1] * (x.dim() - 2)), fill).requires_grad_() for x in (e, hidden)
        ]
        out = fusion.add_to(inputs[1], inputs[0], padding=PADDING)
        return torch.autograd.grad(out[~PADDING].square().sum(), [*inputs, *fusion.parameters()])

    finite, poisoned = gradients(1.0), gradients(float("nan"))
    assert all(torch.equal(ours, want) and want.any() for ours, want in zip(poisoned, finite))
    assert not poisoned[0][PADDING].any() and not poisoned[1][PADDING].any()


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_no_position_beside_padding_becomes_nan(form, with_gradients):
    """In bfloat16 and with rows of odd lengths, of which a product alone lets a NaN pass on some processors."""
    for row_width in (1, 16, 20):
        fusion, e, hidden = fusion_and_inputs(form, torch.bfloat16, row_width=row_width)
        e[PADDING], hidden[PADDING] = float("nan"), float("nan")
        with torch.set_grad_enabled(with_gradients):
            assert fusion.add_to(hidden, e, padding=PADDING)[~PADDING].isfinite().all()


@pytest.mark.parametrize("wrong", [PADDING[:, 1:], PADDING.float()], ids=["shape", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_that_does_not_fit_is_refused(form, wrong):
    fusion, e, hidden = fusion_and_inputs(form, torch.float64)
    with pytest.raises(ValueError, match="hidden needs booleans"):
        fusion.add_to(hidden, e, padding=wrong)


@pytest.mark.parametrize("kernel_size", [0, 1, 4])
def test_where_a_batch_is_filled_up_qwen_adds_what_its_convolution_brings(kernel_size):
    """As transformers' class, which masks what the gate lets through: at the beginning nothing."""
    fusion, e, hidden = fusion_and_inputs("qwen", torch.float64, kernel_size)
    update = fusion(e, hidden, padding=PADDING)
    assert not update[0, :2].any() and not update[1, 0].any() and update[~PADDING].any()
