"""Whether operations are recorded as a program now: it would keep the rows of one example, as constants.

`torch.compile` is not meant: it leaves compiled code where rows are fetched.
"""

from __future__ import annotations

import engram_ref.needs_torch  # noqa: F401

import torch
from torch._guards import detect_fake_mode

ADVICE = "a traced or exported program would keep the rows of this example: use torch.compile"


def is_recorded() -> bool:
    """By `torch.export`, `torch.jit.trace` or `make_fx`, or computed with tensors that have no values."""
    return is_exported() or torch.jit.is_tracing() or _has_mode()


def is_exported() -> bool:
    """Whether the forward that runs is exported: torch says only that some thread of the process is about to export."""
    if not torch.compiler.is_exporting():
        return False
    return torch.compiler.is_dynamo_compiling() or detect_fake_mode() is not None  # with tensors that have no values


def _has_mode() -> bool:
    """Whether this thread's operations are written down, or have no values; `get_proxy_mode` tells of others', too."""
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch):
        return True
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
