"""Skips everything here, loudly, where torch sees no CUDA device: `bench/gpu_checks.sh` runs it where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: bench/gpu_checks.sh runs this on one"))


@pytest.fixture
def device():
    import torch

    return torch.device("cuda")
