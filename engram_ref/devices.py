"""A device by what the user calls it, checked before torch is asked for something that is not there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch


def as_device(device: Any) -> torch.device:
    """The CPU, or a CUDA device of this machine.

    Args:
        device: a name, as "cpu", "cuda" or "cuda:1", or a `torch.device`.

    Raises:
        ValueError: something else, or CUDA where torch sees none.
    """
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"device {device!r}: use 'cpu' or 'cuda'")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: use 'cpu' or 'cuda'") from error
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(target)!r}: use 'cpu' or 'cuda'")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(target)!r}: torch sees no CUDA device on this machine; use 'cpu'")
    if target.type == "cuda" and target.index is not None and target.index >= torch.cuda.device_count():
        raise ValueError(f"device {str(target)!r}: torch sees {torch.cuda.device_count()} CUDA devices, from 0")
    return target


def side_stream(device: torch.device) -> Any:
    """A CUDA stream for rows: of high priority, as blocks of the model wait for its few programs, not they for them."""
    return torch.cuda.Stream(device, priority=-1)


def beside(stream: Any) -> AbstractContextManager[Any]:
    """On a side stream, behind what the current one has by now; on the current one itself, if that is None."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    return torch.cuda.stream(stream)
