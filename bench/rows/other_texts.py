"""What one text says of rows, for texts of any kind: reuse, price, a hot tier, what a step fetches, a shuffled control.

    measure_text(parts, vocab)       # a record: counts and prices of at most TOKENS tokens

The same tokens shuffled have the same frequencies and none of the order: what is then still seen before is due to
frequent tokens alone.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from bench.rows.cases import LAYOUTS
from bench.rows.whole_model import MODELS, STEP, step_price
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_toy.fast.last_reads import Linker, RowReads
from engram_toy.fast.placing import as_read, price_steps
from engram_toy.fast.rows import among, price_rows, start

TOKENS = 100_000  # of every text that has as many: reuse grows with length
HOT_SHARE = 0.01  # of the rows: the tier that is quoted of the standard library, too
ORDERS = (2, 3, 4)  # of n-grams: those of V4.1; the paper's table has two of them
WEIGHED = {"paper-100b": "dense-4b", "v41-flash": "v41-flash"}  # table -> the model beside it

Record = dict[str, Any]


def seen_before(ids: np.ndarray, order: int) -> float:
    """Share of the n-grams of a text that stood in it before."""
    if len(ids) < order:
        return 0.0
    grams = ids
    for length in range(2, order + 1):  # an n-gram is the number of the one before it, and its last token
        _, number = np.unique(grams, return_inverse=True)
        grams = number[: len(ids) - length + 1] * (int(ids.max()) + 1) + ids[length - 1 :]
    return 1 - len(np.unique(grams)) / len(grams)


def shuffled(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same tokens in an order that Python's own generator draws."""
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    return ids[order]


def measure_ids(ids: np.ndarray, plans: dict[str, tuple[EngramConfig, HashPlan]]) -> Record:
    """Reuse of n-grams, and per table what its rows do.

    Args:
        ids: compressed, int64 [T].
        plans: name of a table, one of WEIGHED -> its geometry and hash constants.
    """
    return {
        "tokens": len(ids),
        "seen_before": {str(order): seen_before(ids, order) for order in ORDERS},
        "tables": {name: _table(name, ids, config, plan) for name, (config, plan) in plans.items()},
    }


def _table(name: str, ids: np.ndarray, config: EngramConfig, plan: HashPlan) -> Record:
    rows = _rows(ids, plan)
    reads = link(rows, plan, 1)
    prices = {layout: price_rows(reads, start(reads, held), config.row_bytes()) for layout, held in LAYOUTS.items()}
    dealt = link(rows[:, deal_order(len(ids), STEP)], plan, STEP)
    model = MODELS[WEIGHED[name]]
    around = model.decoding("expected" if model.experts else "", STEP)
    steps = price_steps(as_read(dealt, held=True), start(dealt, True), config.row_bytes(), [model.above(around, STEP)])
    share = int(steps.prices.sum()) / (steps.prices.shape[1] * step_price(around.read_bytes, model.blocks))
    return {
        "reads": len(reads.links),
        "distinct_rows": len(reads.rows),
        "row_bytes": config.row_bytes(),
        "price": {layout: priced.total for layout, priced in prices.items()},
        "hot": _hot(rows, config, plan),
        "step_tokens": STEP,
        "step_reads": len(dealt.links),
        "distinct_in_step": int(dealt.first_in_step().sum()),
        "step_price_share": share,
    }


def _rows(ids: np.ndarray, plan: HashPlan) -> np.ndarray:
    """Row numbers of every layer, [L, T, C]."""
    # Hashed once, with its own context, however it is dealt out afterwards.
    hasher = NgramHasher(plan)
    return np.stack([hasher(ids[None], layer.layer_id)[0] for layer in plan.layers])


def deal_order(tokens: int, tokens_per_step: int) -> np.ndarray:
    """Order of a text's tokens if it is cut into as many parts as a step has tokens, and each step takes one of each.

    Raises:
        ValueError: there is no whole step.
    """
    steps = tokens // tokens_per_step
    if not steps:
        raise ValueError(f"{tokens:,} tokens fill no step of {tokens_per_step:,}: take a longer text")
    return np.arange(steps * tokens_per_step).reshape(tokens_per_step, steps).T.ravel()


def link(rows: np.ndarray, plan: HashPlan, tokens_per_step: int) -> RowReads:
    """Linked reads of row numbers [L, T, C]."""
    linker = Linker(rows.shape[1], len(plan.layers), rows.shape[2], tokens_per_step)
    for layer, found in zip(plan.layers, rows):
        linker.add_layer(np.ascontiguousarray(found), [*layer.offsets, layer.rows])
    return linker.finish()


def _hot(rows: np.ndarray, config: EngramConfig, plan: HashPlan) -> Record:
    """A tier of the rows that are most frequent in the first half, charged on the second, the table held live."""
    half = rows.shape[1] // 2
    calibration, reads = link(rows[:, :half], plan, 1), link(rows[:, half:], plan, 1)
    hot = np.sort(calibration.ranked()[: int(HOT_SHARE * reads.table_rows)])
    hit = among(reads.rows, hot)[1]
    with_tier, without = (
        price_rows(reads, start(reads, True, *tier), config.row_bytes()).total for tier in ((hot,), ())
    )
    return {
        "reads": len(reads.links),
        "reads_of_tier": int(reads.frequency()[hit].sum()),
        "price": with_tier,
        "price_without": without,
    }


def measure_batch(parts: list[np.ndarray], plans: dict[str, tuple[EngramConfig, HashPlan]], tokens: int) -> Record:
    """Independent texts as one batch: what a step reads once only, beside one text dealt out to as many places.

    Args:
        parts: compressed ids of each; those shorter than `tokens` are left out.
        tokens: steps.
    """
    batch = np.stack([part[:tokens] for part in parts if len(part) >= tokens])  # [B, T]
    found: Record = {"texts": len(batch), "steps": tokens, "tables": {}}
    for name, (_, plan) in plans.items():
        hasher = NgramHasher(plan)
        rows = np.stack([hasher(batch, layer.layer_id) for layer in plan.layers])  # [L, B, T, C]
        by_step = rows.transpose(0, 2, 1, 3).reshape(len(plan.layers), -1, rows.shape[3])  # [L, T*B, C]
        reads = link(by_step, plan, len(batch))
        found["tables"][name] = {
            "reads": len(reads.links),
            "distinct_in_step": int(reads.first_in_step().sum()),
            "first_ever": int((reads.links < 0).sum()),
        }
    return found
