"""The page "Put Engram into your model" runs from top to bottom; what of it does not run says so."""

import re

import pytest

from tests.ref.guides.pages import run_page, text_of

pytestmark = pytest.mark.slow

PAGE = "put-engram-into-your-model.md"


def test_the_guide_runs():
    blocks, names = run_page(PAGE)
    assert len(blocks) == 9
    assert names["tokens"].shape == (1, 11) and names["logits"].isfinite().all()
    assert [place for place, _ in names["waited"]] == ["start", 1]
    assert not names["model"].model._forward_pre_hooks
    assert names["engram"].fusion.projection_weight.grad.any()


def test_what_does_not_run_says_so():
    before = re.findall(r"([^\n]*\n)\n```py\n", text_of(PAGE))
    assert len(before) == 1 and "has not been run here" in before[0]
