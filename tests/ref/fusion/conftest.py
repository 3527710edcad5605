"""Fixtures of both fusions; each module says by `small_blocks` how small its blocks are."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["with autograd", "in blocks"])
def either_path(request, small_blocks):
    """Both ways through `forward`."""
    with torch.set_grad_enabled(request.param == "with autograd"):
        yield
