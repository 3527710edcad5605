"""Empty caches before every pass: variants serve the same sequences, and none may find the rows of the one before it.

flush = CacheFlush(device)
flush()                         # before the clock of a pass begins
"""

from __future__ import annotations

import numpy as np
import torch

FLUSHED = 1 << 28  # bytes: more than the caches of most machines, and of a GPU, hold


class CacheFlush:
    """Writes memory that nobody needs, on the host and on an accelerator.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = np.zeros(FLUSHED // 8, np.int64)
        on_device = device.type == "cuda"
        self._device = torch.zeros(FLUSHED // 8, dtype=torch.int64, device=device) if on_device else None

    def __call__(self) -> None:
        """Flush, and wait until it is done."""
        self._host += 1
        if self._device is not None:
            self._device.add_(1)
            torch.cuda.synchronize(self._device.device)
