"""Skips everything here, loudly, where torch sees no CUDA device: `bench/gpu_checks.sh` runs it where there is one.

ENGRAM_STRESS_STEPS=1000 python -m pytest tests/cuda       where minutes count: a tenth of the steps under stress
"""

from pathlib import Path

import pytest

from tests.cuda.stress import steps

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


@pytest.fixture(scope="session")
def stress_steps():
    """How many steps the longest test takes; others take a share of them."""
    return steps(10_000)


class Locks:
    """CUDA's runtime, and what is page-locked through it."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.held = {}  # address: bytes

    def __getattr__(self, name):
        return getattr(self.runtime, name)

    def cudaHostRegister(self, address, nbytes, flags):
        error = self.runtime.cudaHostRegister(address, nbytes, flags)
        if int(error) == 0:
            self.held[address] = nbytes
        return error

    def cudaHostUnregister(self, address):
        self.held.pop(address)
        return self.runtime.cudaHostUnregister(address)


@pytest.fixture(autouse=True)
def nothing_stays_locked(monkeypatch):
    """Fails a test that leaves memory page-locked: in the next one CUDA would refuse to lock what takes its place."""
    import torch

    locks = Locks(torch.cuda.cudart())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: locks)
    yield
    assert locks.held == {}
