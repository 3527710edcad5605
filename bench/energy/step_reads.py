"""How many rows a decode step fetches: all that it reads, each once a step, or only those never read before.

    count_steps(ids, config, tokens_per_step=512)      # counts over the second half of the steps

The text is dealt to the steps as `bench.rows.cases.read_rows` does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.rows.cases import check_steps, read_rows
from engram_ref.config import EngramConfig


def count_steps(ids: np.ndarray, config: EngramConfig, tokens_per_step: int) -> dict[str, Any]:
    """Reads of the second half of the steps: all, those that are the first of their row in a step, and the first ever.

    Args:
        ids: compressed, int64 [T].

    Raises:
        ValueError: the text has too few steps.
    """
    check_steps(len(ids), tokens_per_step)
    reads = read_rows(ids, config, "decode", tokens_per_step)
    steps = len(reads.links) // reads.step_reads
    counted = steps - steps // 2  # the first half warms up
    begin = steps // 2 * reads.step_reads
    number = np.arange(begin, len(reads.links), dtype=np.int64)
    links = reads.links[begin:]
    return {
        "tokens": steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "steps_counted": counted,
        "reads": len(links),
        # A link names the read before of the same row; one to an earlier step, or to none, is the first in its step.
        "distinct_in_step": int((links < number // reads.step_reads * reads.step_reads).sum()),
        "first_ever": int((links < 0).sum()),
    }
