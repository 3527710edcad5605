"""How many rows a decode step fetches: all that it reads, each once a step, or only those never read before.

    count_steps(ids, config, tokens_per_step=512)      # counts over the second half of the steps

The text is hashed once, with its own context, and dealt to the steps: it is cut into as many parts as a step has
tokens, and every step reads the next token of each part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_toy.fast.last_reads import Linker, RowReads

LEAST_STEPS = 32  # fewer say nothing of a steady state


def deal(ids: np.ndarray, config: EngramConfig, plan: HashPlan, tokens_per_step: int) -> RowReads:
    """The row reads of a text, dealt to decode steps of so many tokens; what fills no step is left out.

    Raises:
        ValueError: the text is too short for LEAST_STEPS steps.
    """
    steps = len(ids) // tokens_per_step
    if steps < LEAST_STEPS:
        raise ValueError(
            f"{len(ids):,} tokens are {steps} steps of {tokens_per_step:,}: a steady state needs {LEAST_STEPS} at least"
        )
    order = np.arange(steps * tokens_per_step).reshape(tokens_per_step, steps).T.ravel()
    hasher = NgramHasher(plan)
    linker = Linker(len(order), len(plan.layers), config.columns, tokens_per_step)
    for layer in plan.layers:
        rows = hasher(ids[None, : len(order)], layer.layer_id)[0]  # [T, C]
        linker.add_layer(np.ascontiguousarray(rows[order]), [*layer.offsets, layer.rows])
    return linker.finish()


def count_steps(ids: np.ndarray, config: EngramConfig, plan: HashPlan, tokens_per_step: int) -> dict[str, Any]:
    """Reads of the second half of the steps: all, those that are the first of their row in a step, and the first ever.

    Args:
        ids: compressed, int64 [T].
    """
    reads = deal(ids, config, plan, tokens_per_step)
    steps = len(reads.links) // reads.step_reads
    counted = steps - steps // 2
    begin = steps // 2 * reads.step_reads
    number = np.arange(begin, len(reads.links), dtype=np.int64)
    links = reads.links[begin:]
    return {
        "tokens": steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "steps_counted": counted,
        "reads": len(links),
        "distinct_in_step": int((links < number // reads.step_reads * reads.step_reads).sum()),
        "first_ever": int((links < 0).sum()),
    }
