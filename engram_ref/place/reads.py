"""What a text reads of the tables: how many rows of a step are distinct, how many never read before, how many hot.

    reads = count_reads(model, read_text(None), batches=(1, 64))
    reads.distinct[64]          # share of a step's row reads that are the first of their row in it

The first half of the text warms up, the second is counted; a step of so many tokens takes one token of each of as many
parts of the text, as decoding takes one of each sequence. Counts depend on the hash only through collisions, so a
tokenizer stands in for another where a checkpoint's own is not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engram_ref.hashing.ngram import NgramHasher
from engram_ref.hashing.plan import HashPlan
from engram_ref.place.model import Model
from engram_ref.vocab import load_tokenizer, vocab_for

MOST_TOKENS = 1 << 16  # of a text: enough to count with, and few enough for a second
_LEAST_TOKENS = 64
_STEPS = 64  # of a batch size that are looked at


@dataclass(frozen=True)
class Reads:
    """What one text reads of one model's tables, in shares of all row reads.

    Attributes:
        text: its name.
        tokens: of it that were counted.
        distinct: tokens a step -> reads that are the first of their row in the step.
        prompt_distinct: tokens of a prompt -> the same, of as many tokens in a row.
        first: reads of rows that were never read before.
        reuse_root: of the other reads, the mean root of the row reads since the last read of the same row.
        hits: reads of rows that the hot tier holds.
    """

    text: str
    tokens: int
    distinct: dict[int, float]
    first: float
    reuse_root: float
    hits: float
    prompt_distinct: dict[int, float] = field(default_factory=dict)


def count_reads(
    model: Model,
    text: tuple[str, str],
    batches: Sequence[int],
    hot_share: float = 0.0,
    tokenizer: str | None = None,
    prompts: Sequence[int] = (),
) -> Reads:
    """Hash a text and count.

    Args:
        text: its name and its content.
        batches: tokens a step.
        hot_share: of all rows, that the hot tier holds: those that the first half of the text reads most.
        tokenizer: as for `load_tokenizer`.
        prompts: tokens of each.

    Raises:
        ValueError: a text of too few tokens, or no such tokenizer.
    """
    rows = _rows(model, text, tokenizer)  # [T, rows a token]
    flat = rows.reshape(-1)
    half = len(rows) // 2 * rows.shape[1]  # in reads, at the end of a token
    name, _ = text
    # Stable: of the reads of a row, the earliest stands first.
    order = np.argsort(flat, kind="stable")  # sorting takes longest, and is done once
    begins = np.diff(flat[order], prepend=-1) > 0  # another row
    number, is_first = np.empty_like(flat), np.empty(len(flat), bool)
    # Rows by new numbers, without gaps: what marks or counts them is as small as may be.
    number[order], is_first[order] = np.cumsum(begins) - 1, begins
    return Reads(
        name,
        len(rows),
        {batch: _distinct(number.reshape(rows.shape), batch) for batch in batches},
        float(is_first[half:].mean()),
        _reuse_root(order, begins, half),
        _hits(number, half, round(hot_share * sum(model.rows))) / (len(flat) - half),
        {prompt: _distinct_in_a_row(number.reshape(rows.shape), prompt) for prompt in prompts},
    )


def _rows(model: Model, text: tuple[str, str], tokenizer: str | None) -> np.ndarray:
    """Row numbers of all layers, each row once over all of them, int64 [T, rows a token]."""
    name, content = text
    # Of a long text, little more is encoded than is looked at.
    ids = load_tokenizer(tokenizer).encode(content[: 8 * MOST_TOKENS], add_special_tokens=False).ids[:MOST_TOKENS]
    if len(ids) < _LEAST_TOKENS:
        raise ValueError(f"{name} has {len(ids)} tokens: give a text of at least {_LEAST_TOKENS}")
    config = model.config
    if config.form != "qwen":
        config = config.replace(compressed_size=None)  # another tokenizer's is as good to count with
    vocab = vocab_for(config, tokenizer)
    hasher = NgramHasher(HashPlan.for_vocab(config, vocab))
    compressed, begin, found = vocab([ids]), 0, []
    for layer_id, rows in zip(config.layer_ids, model.rows):
        found.append(hasher(compressed, layer_id)[0].astype(np.int64) + begin)
        begin += rows
    return np.concatenate(found, axis=1)


def _distinct(number: np.ndarray, batch: int) -> float:
    """Share of a step's reads that are the first of their row; 1, the most, where the text is too short to say."""
    steps = len(number) // batch
    if steps == 0:
        return 1.0
    # [steps, batch, rows a token]: the text in `batch` parts, and each gives a token to every step.
    return _mean_distinct(number[: steps * batch].reshape(batch, steps, -1).swapaxes(0, 1))


def _distinct_in_a_row(number: np.ndarray, tokens: int) -> float:
    """The same of a prompt; 1, the most, where the text is shorter."""
    prompts = len(number) // tokens
    return _mean_distinct(number[: prompts * tokens].reshape(prompts, tokens, -1)) if prompts else 1.0


def _mean_distinct(parts: np.ndarray) -> float:
    """Mean share of distinct numbers in parts, [P, T, rows a token]; of some, where there are many."""
    looked_at = np.unique(np.linspace(0, len(parts) - 1, min(len(parts), _STEPS)).astype(int))
    return float(np.mean([_count_distinct(parts[at]) / parts[at].size for at in looked_at]))


def _count_distinct(numbers: np.ndarray) -> int:
    """As many as there are distinct ones; marking is many times as fast as `np.unique`."""
    is_there = np.zeros(int(numbers.max()) + 1, bool)
    is_there[numbers] = True
    return int(np.count_nonzero(is_there))


def _reuse_root(order: np.ndarray, begins: np.ndarray, half: int) -> float:
    """Of reads in the order of their rows; where `begins`, the row is another than before."""
    again = ~begins[1:]
    later, earlier = order[1:][again], order[:-1][again]
    gaps = (later - earlier)[later >= half]  # row reads between the two
    return float(np.sqrt(gaps).mean()) if len(gaps) else 0.0


def _hits(number: np.ndarray, half: int, tier: int) -> int:
    if tier == 0:
        return 0
    counts = np.bincount(number[:half], minlength=int(number.max()) + 1)
    hot = np.zeros(len(counts), bool)
    hot[np.argsort(-counts, kind="stable")[:tier]] = True
    hot &= counts > 0  # a tier with room to spare holds nothing that the first half never read
    return int(hot[number[half:]].sum())
