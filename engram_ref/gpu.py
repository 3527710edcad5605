"""Triton's side of the machine: where kernels run, and how one is launched there. Needs Triton; kernels import this.

    if can_run_on(out.device):
        with on_device(out.device):
            kernel[(programs,)](...)

Triton's interpreter (TRITON_INTERPRET=1 in the environment before the first import) runs the kernels on a CPU, slowly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import engram_ref.needs_torch  # noqa: F401

import torch
import triton


@triton.jit
def _nothing():
    return


INTERPRETED = not isinstance(_nothing, triton.JITFunction)  # Triton settles it when it decorates a kernel


def can_run_on(device: torch.device) -> bool:
    """Whether the kernels run there: on CUDA, and anywhere in Triton's interpreter."""
    return device.type == "cuda" or INTERPRETED


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
