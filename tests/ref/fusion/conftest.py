"""Fixtures of all fusions; the blocks are small for V4.1's gate, and another module says itself how small."""

import pytest
import torch

from engram_ref.fusion import base, projection


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything is cut: 13 positions are projected, 2 fused (of the usual size), and 64 output rows multiplied."""
    monkeypatch.setattr(base, "CPU_BLOCKS", (13, 300))
    monkeypatch.setattr(projection, "CPU_BLOCK", 64 * 96)


@pytest.fixture(params=["with autograd", "in blocks"])
def either_path(request, small_blocks):
    """Both ways through `forward`."""
    with torch.set_grad_enabled(request.param == "with autograd"):
        yield
