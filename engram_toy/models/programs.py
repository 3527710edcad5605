"""What is priced: both models at three boundaries, in any layout, as plain functions of plain arguments.

    lookup   the row reads alone: table rows in, their values out
    layer    hash, rows, projections, gate, convolution (kv-bank: hash, rows, projections, attention over them)
    block    the layer, its residual addition, and causal self-attention

A ratio between two layouts says nothing without the boundary: each adds reads that both layouts share. Engram comes in
three forms, the demo's, DeepSeek-V4.1's and Qwen3.8-Flash-Next's. V4.1's decodes its rows within the lookup, and its
layer has no convolution but does the residual addition itself. Which form it is, the weights say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engram_toy.bytedmd import label
from engram_toy.functional import Matrix, Vector
from engram_toy.fusion import v41
from engram_toy.fusion.demo import EngramWeights, embed, engram
from engram_toy.fusion.qwen import QwenWeights, engram_qwen
from engram_toy.hashing import NgramHasher, hash_columns
from engram_toy.models.attention import AttentionWeights, attention
from engram_toy.models.endings import ENDINGS, ended
from engram_toy.models.kv_bank import BankWeights, kv_bank
from engram_toy.models.layouts import Layout

MODELS = ("engram", "kv-bank")
BOUNDARIES = ("lookup", "layer", "block")


@dataclass(frozen=True)
class Workload:
    """One model, its inputs and its weights, as plain numbers in nested lists.

    Attributes:
        model: "engram" or "kv-bank".
        plan: the hash plan, as `HashPlan.to_json` writes it.
        layer_id: the layer of the plan that is looked up.
        compressed_ids: the text, [T].
        table: [rows][D] for engram, [rows][D + D/32] codes and scales for its V4.1 form, [rows][2H] for kv-bank.
        hidden: residual stream before the layer, [T][H]; one copy.
        layer: weights of the layer.
        attention: weights of the attention behind it.
    """

    model: str
    plan: Mapping[str, Any]
    layer_id: int
    compressed_ids: Sequence[int]
    table: Matrix
    hidden: Matrix
    layer: EngramWeights | v41.V41Weights | QwenWeights | BankWeights
    attention: AttentionWeights

    def row_indices(self) -> list[list[int]]:
        """The lookup stream, [T][C], in plain integers."""
        return NgramHasher(self.plan)(self.compressed_ids, self.layer_id)


@dataclass(frozen=True)
class Program:
    """A function, its arguments (the first starts on top of the stack), and the kind of each argument's values."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kinds: tuple[str, ...]


def build(
    workload: Workload, boundary: str, layout: Layout, padding: int, hold: bool = True, ending: str = ENDINGS[0]
) -> Program:
    """The program of one boundary in one layout, with `padding` values between the two parts of the table.

    Args:
        hold: return the padding, so that it stays live. The two-stack definition buries by position alone
            and charges what is returned: there, do not hold.
        ending: of the lookup, one of ENDINGS. Layer and block end by themselves.

    Raises:
        ValueError: no such boundary or ending, or an ending of another boundary than the lookup.
    """
    above, below = layout.split(workload.table)
    pad = [0] * padding  # never read: it is live for being returned
    if boundary == "lookup":
        # Plain row numbers: hashing is no part of it.
        function = _lookup(type(workload.layer), workload.row_indices(), layout, hold, ending)
        return Program(function, (above, pad, below), ("row", "pad", "row"))
    if boundary not in BOUNDARIES:
        raise ValueError(f"no boundary {boundary!r}: use one of {', '.join(BOUNDARIES)}")
    if ending != ENDINGS[0]:
        raise ValueError(f"ending {ending!r} of the {boundary}: only the lookup has endings, leave it out")
    constants = NgramHasher(workload.plan).layer(workload.layer_id)
    arguments: dict[str, tuple[str, Any]] = {
        # In this order on the stack: what stands behind `pad` is buried by it.
        "tokens": ("token", list(workload.compressed_ids)),
        "multipliers": ("hash constant", list(constants["multipliers"])),
        "primes": ("hash constant", list(constants["primes"])),
        "offsets": ("hash constant", list(constants["offsets"])),
        "pad_id": ("hash constant", workload.plan["pad_compressed"]),
        "above": ("row", above),
        "hidden": ("activation", workload.hidden),  # [T][H]
        "layer": ("weight", tuple(workload.layer)),
        "attention": ("weight", tuple(workload.attention) if boundary == "block" else ()),
        "pad": ("pad", pad),
        "below": ("row", below),
    }
    function = _layer(type(workload.layer), workload.plan["max_ngram"], layout, boundary == "block", hold)
    kinds, values = zip(*arguments.values())
    return Program(function, values, kinds)


def _lookup(
    form: type, indices: Sequence[Sequence[int]], layout: Layout, hold: bool, ending: str
) -> Callable[..., Any]:
    deliver = v41.embed if form is v41.V41Weights else embed

    def function(above: Matrix, pad: Vector, below: Matrix) -> Any:
        table = layout.join(above, below)
        kept = ended(ending, deliver, layout.lookups(table, indices))
        return (kept, pad) if hold else (kept,)  # what is neither read nor returned occupies no depth

    return function


def _layer(form: type, max_ngram: int, layout: Layout, with_attention: bool, hold: bool) -> Callable[..., Any]:
    def function(
        tokens: Vector,
        multipliers: Vector,
        primes: Vector,
        offsets: Vector,
        pad_id: Any,
        above: Matrix,
        hidden: Matrix,
        layer: tuple[Any, ...],
        attention_weights: tuple[Any, ...],
        pad: Vector,
        below: Matrix,
    ) -> Any:
        segment_end = pad_id if form is QwenWeights else None  # the same id ends a text and stands before it
        hashed = hash_columns(tokens, multipliers, primes, offsets, pad_id, segment_end=segment_end)
        indices = label(hashed, "row index")
        lookups = layout.lookups(layout.join(above, below), indices)
        out = _apply(form(*layer), hidden, lookups, max_ngram)  # [T][H]
        if with_attention:
            adds = form is v41.V41Weights  # by itself
            stream = out if adds else [[a + b for a, b in zip(x, u)] for x, u in zip(hidden, out)]
            out = attention(stream, AttentionWeights(*attention_weights))
        return (out, pad) if hold else (out,)

    return function


def _apply(weights: Any, hidden: Matrix, lookups: Iterable[Sequence[Vector]], max_ngram: int) -> list[list[Any]]:
    """The layer on one residual copy, [T][H]: an update to the stream, or in the V4.1 form the stream after it."""
    if isinstance(weights, BankWeights):
        return kv_bank(hidden, lookups, weights)
    copies = [[x] for x in hidden]  # [T][1][H]
    if isinstance(weights, v41.V41Weights):
        return [one for (one,) in v41.engram_v41(copies, lookups, weights)]
    if isinstance(weights, QwenWeights):
        return [one for (one,) in engram_qwen(copies, lookups, weights, max_ngram)]
    return [one for (one,) in engram(copies, lookups, weights, max_ngram)]
