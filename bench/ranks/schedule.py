"""Ranks that wait for each other, step after step: what coupling costs beside the bytes, and who is waited for.

    simulate(ranks=64, steps=1000, jitter=0.05, exchange_s=100e-6, window_s=56e-6, rest_s=20e-3, seed=0)

Each rank runs a step of its own length: the window, in which the exchange should hide, then the rest of the model.
Lengths vary by normal noise, cut off at 0, and one rank may be slower than the others, always.
"""

from __future__ import annotations

from typing import Any

import numpy as np

REST_S = 20e-3  # the rest of a decode step: at 512 sequences, near the paper's 4B model (9,032 tokens/s)
JITTERS = (0.0, 0.01, 0.05)  # standard deviation of a step, as a share of it: assumed, as what follows
SLOWER = (0.0, 0.1)  # by how much one rank is, as a share
STEPS = 1000  # the mean of so many is off by less than 0.2 % at the largest jitter
TOKENS = 64  # of a rank and step, of those in PHASES


def simulate(
    ranks: int,
    steps: int,
    jitter: float,
    exchange_s: float,
    window_s: float,
    rest_s: float,
    seed: int = 0,
    slower: float = 0.0,
) -> dict[str, float]:
    """Seconds a step, coupled and alone, and who waited how long; means over ranks and steps.

    Args:
        ranks: in the group.
        steps: of each.
        jitter: standard deviation of a step's length, as a share of it.
        exchange_s: from the last rank's request until rows have arrived.
        window_s, rest_s: compute before the rows are needed, and after.
        seed: of the noise.
        slower: of rank 0, as a share.

    Returns:
        step_s: of the coupled ranks; alone_s: of the mean rank by itself; slowest_s: of the slowest by itself;
        waited_s: a rank waits for rows in a step; waited_for_s: the part of it spent on ranks that began later.
    """
    rng = np.random.default_rng(seed)
    lengths = np.maximum(0.0, 1 + jitter * rng.standard_normal((steps, ranks)))  # [S, P]
    lengths[:, 0] *= 1 + slower
    windows, rests = window_s * lengths, rest_s * lengths
    begun, needed, waits = np.empty_like(lengths), np.empty_like(lengths), np.empty_like(lengths)
    now = np.zeros(ranks)
    for step in range(steps):
        begun[step], needed[step] = now, now + windows[step]
        # The exchange begins when the last rank has begun its step, as every owner must have been asked. A rank that is
        # behind its window when rows arrive goes on at once; one that is ahead waits.
        waits[step] = np.maximum(0.0, now.max() + exchange_s - needed[step])
        now = needed[step] + waits[step] + rests[step]
    own = np.maximum(0.0, begun + exchange_s - needed)  # what one's own exchange takes, were all ranks in step
    # Without an exchange every rank would run for itself: that is what the waits are compared with.
    alone = (window_s + rest_s) * lengths.sum(axis=0)
    return {
        "step_s": float(now.max() / steps),
        "alone_s": float(alone.mean() / steps),
        "slowest_s": float(alone.max() / steps),
        "waited_s": float(waits.mean()),
        "waited_for_s": float((waits - own).mean()),
    }


def schedule_table(model: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decode steps over Ethernet with the model's numbers: every number of ranks, with noise and a straggler."""
    found = []
    for entry in model:
        if (entry["phase"], entry["tokens"]) != ("decode", TOKENS) or "Ethernet" not in entry["link"]:
            continue
        for jitter in JITTERS:
            for slower in SLOWER:
                times = simulate(
                    entry["ranks"], STEPS, jitter, entry["seconds"], entry["window_s"], REST_S, slower=slower
                )
                chosen = {"link": entry["link"], "ranks": entry["ranks"], "jitter": jitter, "slower": slower}
                found.append({**chosen, "exchange_s": entry["seconds"], **times})
    return found
