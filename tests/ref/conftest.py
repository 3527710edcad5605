"""Fixtures of the reference's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """For tensors so small that several threads are slower, and much slower where others compute too."""
    import torch  # the tests of hashing and of the plan run without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
