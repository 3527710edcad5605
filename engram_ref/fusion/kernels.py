"""Gate, convolution and the sum with the stream as one GPU kernel a layer, in Triton: one form each.

    demo(fusion, packed, hidden, out, past, padding, adds=True)     # packed: what `project` gave
    v41(fusion, packed, hidden, out, dead)

Everything is float32 inside and rounded once, where torch's operations of the demo's form round the update and then
the sum.

The demo's kernel has a program for each copy and tile of steps. It goes through the steps one after the other and
keeps, of the last REACH of them, one number each: what normalises the gated value, which the convolution multiplies
the values with that it reads once more.

    python -m pytest tests/ref/fusion/test_fused.py
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (the arguments of a Triton kernel are Triton's values, whatever Python is told)

from __future__ import annotations

from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_ref.config import V41_NORM_EPS
from engram_ref.fusion.base import CONV_NORM_EPS, GATE_FLOOR
from engram_ref.gpu import can_run_on, on_device

__all__ = ["can_run_on", "demo", "v41"]

STEPS_PER_PROGRAM = 32  # beginning REACH steps early, nine in the paper, costs a quarter of them
LANES_OF_ONE_STEP = 1024  # of a copy, for each program of a step of one token
_VALUES_PER_WARP = 512
_MOST_WARPS = 8
_DEMO_EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # what RMSNorm does when it is given none
_V41_EPS = tl.constexpr(V41_NORM_EPS)
_CONV_EPS = tl.constexpr(CONV_NORM_EPS)
_FLOOR = tl.constexpr(GATE_FLOOR)


@triton.jit(do_not_specialize=["padding_b", "padding_t", "length", "tiles"])
def _demo(
    packed, packed_b, packed_t, hidden, hidden_b, hidden_t, hidden_g, out, out_b, out_t, key_gain, query_gain,
    conv_gain, taps, past, padding, padding_b, padding_t, length, tiles,
    COPIES: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, REACH: tl.constexpr,
    RING: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, PART: tl.constexpr, ALONE: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    tile, copy = tl.program_id(0) % tiles, tl.program_id(1)
    packed += sequence * packed_b
    hidden += sequence * hidden_b + copy * hidden_g
    out += sequence * out_b + copy * HIDDEN
    if past is not None:
        past += (sequence * COPIES * REACH + copy) * HIDDEN  # [REACH, G, H] of this sequence, from this copy on
    if padding is not None:
        padding += sequence * padding_b
    keys, values = packed + copy * HIDDEN, packed + COPIES * HIDDEN
    lane = tl.arange(0, LANES)
    # Read as they are: no launch of their own, and no copy that a changed weight, or a captured graph, could outlive.
    gains = tl.load(key_gain + copy * HIDDEN + lane, mask=lane < HIDDEN, other=0.0).to(tl.float32)
    gains *= tl.load(query_gain + copy * HIDDEN + lane, mask=lane < HIDDEN, other=0.0).to(tl.float32)
    part = tl.program_id(2) * PART + tl.arange(0, PART)  # [PART], the lanes whose update this program writes
    weights = _weights(taps, conv_gain, copy * HIDDEN + part, part < HIDDEN, TAPS)

    start = tile * TILE
    ring = tl.zeros([RING], tl.float32)  # scales of the last steps, each where its number falls; 0 of padding
    for t in range(tl.maximum(start - REACH, 0), tl.minimum(start + TILE, length)):  # early, for their scales alone
        step = tl.cast(t, tl.int64)
        gate, scale = _demo_gate(keys, values, hidden, packed_t, hidden_t, step, gains, HIDDEN, LANES)
        if padding is not None:
            scale = tl.where(tl.load(padding + step * padding_t) != 0, 0.0, scale)
        ring = tl.where(tl.arange(0, RING) == t % RING, scale, ring)
        if t >= start:
            value = tl.load(values + step * packed_t + part, mask=part < HIDDEN, other=0.0).to(tl.float32)
            update = gate * value
            if TAPS > 0:
                mixed = _normed(values, packed_t, past, padding, padding_t, ring, t, part, COPIES, HIDDEN, REACH, RING)
                mixed *= weights[0]
                for k in tl.static_range(1, TAPS):
                    before = _normed(
                        values, packed_t, past, padding, padding_t, ring, t - k * DILATION, part,
                        COPIES, HIDDEN, REACH, RING,
                    )  # fmt: skip
                    mixed += weights[k] * before
                update += mixed * tl.sigmoid(mixed)
            if ADDS:
                update += tl.load(hidden + step * hidden_t + part, mask=part < HIDDEN, other=0.0).to(tl.float32)
            tl.store(out + step * out_t + part, update.to(out.dtype.element_ty), mask=part < HIDDEN)

    if past is not None and tile == 0:  # no other tile reads the past: who has read it puts the chunk's end there
        if not ALONE:  # the steps that are to be the past are another tile's
            for t in range(length - REACH, length):
                step = tl.cast(t, tl.int64)
                gate, scale = _demo_gate(keys, values, hidden, packed_t, hidden_t, step, gains, HIDDEN, LANES)
                if padding is not None:
                    scale = tl.where(tl.load(padding + step * padding_t) != 0, 0.0, scale)
                ring = tl.where(tl.arange(0, RING) == t % RING, scale, ring)
        for j in range(REACH):
            t = length + j - REACH
            row = _normed(values, packed_t, past, padding, padding_t, ring, t, part, COPIES, HIDDEN, REACH, RING)
            tl.debug_barrier()  # all threads have read what some of them now write
            tl.store(past + j * COPIES * HIDDEN + part, row, mask=part < HIDDEN)


@triton.jit
def _weights(taps, conv_gain, channel, here, TAPS: tl.constexpr):
    """The convolution's taps times its norm's gain, that of the step itself first: TAPS times [PART]."""
    found = ()
    for k in tl.static_range(TAPS):
        weight = tl.load(taps + channel * TAPS + (TAPS - 1 - k), mask=here, other=0.0).to(tl.float32)
        weight *= tl.load(conv_gain + channel, mask=here, other=0.0).to(tl.float32)
        found = found + (weight,)  # noqa: RUF005 (Triton knows no other way)
    return found


@triton.jit
def _demo_gate(keys, values, hidden, packed_t, hidden_t, step, gains, HIDDEN: tl.constexpr, LANES: tl.constexpr):
    """How far the value of a step is let through, and what normalises the gated value: see `DemoFusion`."""
    lane = tl.arange(0, LANES)
    key = tl.load(keys + step * packed_t + lane, mask=lane < HIDDEN, other=0.0).to(tl.float32)
    query = tl.load(hidden + step * hidden_t + lane, mask=lane < HIDDEN, other=0.0).to(tl.float32)
    value = tl.load(values + step * packed_t + lane, mask=lane < HIDDEN, other=0.0).to(tl.float32)
    norms = tl.rsqrt(tl.sum(key * key) / HIDDEN + _DEMO_EPS) * tl.rsqrt(tl.sum(query * query) / HIDDEN + _DEMO_EPS)
    score = tl.sum(query * gains * key) * norms / tl.sqrt(HIDDEN * 1.0)
    sign = tl.where(score > 0, 1.0, tl.where(score < 0, -1.0, 0.0))
    gate = tl.sigmoid(_root(score) * sign)
    return gate, gate * tl.rsqrt(gate * gate * (tl.sum(value * value) / HIDDEN) + _CONV_EPS)


@triton.jit
def _root(score):
    """Of its size, from the floor on; a NaN stays one."""
    size = tl.abs(score)
    return tl.sqrt(tl.where(size < _FLOOR, _FLOOR, size))


@triton.jit
def _normed(
    values, packed_t, past, padding, padding_t, ring, t, part,
    COPIES: tl.constexpr, HIDDEN: tl.constexpr, REACH: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """What the convolution sees of a step [PART]: its normalised gated value, or what is kept of it from before."""
    here = part < HIDDEN
    mine = t >= 0
    seen, step = mine, tl.cast(t, tl.int64)
    if padding is not None:
        seen = mine & (tl.load(padding + step * padding_t, mask=mine, other=1) == 0)
    value = tl.load(values + step * packed_t + part, mask=here & seen, other=0.0).to(tl.float32)
    scale = tl.sum(tl.where((tl.arange(0, RING) == t % RING) & mine, ring, 0.0))
    normed = scale * value  # 0 of what is no step of this chunk
    if past is not None:
        kept = tl.load(past + (REACH + t) * COPIES * HIDDEN + part, mask=here & (t < 0), other=0.0)
        normed = tl.where(mine, normed, kept)
    return normed


@triton.jit(do_not_specialize=["dead_n"])
def _v41(
    packed, hidden, hidden_n, hidden_g, out, q_weight, k_weight, dead, dead_n,
    COPIES: tl.constexpr, HIDDEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    position, copy = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, LANES)
    here = lane < HIDDEN
    packed += position * ((COPIES + 1) * HIDDEN)
    stream = tl.load(hidden + position * hidden_n + copy * hidden_g + lane, mask=here, other=0.0)
    key = tl.load(packed + copy * HIDDEN + lane, mask=here, other=0.0).to(tl.float32)
    value = tl.load(packed + COPIES * HIDDEN + lane, mask=here, other=0.0).to(tl.float32)
    gains = tl.load(q_weight + copy * HIDDEN + lane, mask=here, other=0.0).to(tl.float32)
    gains *= tl.load(k_weight + copy * HIDDEN + lane, mask=here, other=0.0).to(tl.float32)
    query = stream.to(tl.float32)
    norms = tl.rsqrt(tl.sum(query * query) / HIDDEN + _V41_EPS) * tl.rsqrt(tl.sum(key * key) / HIDDEN + _V41_EPS)
    score = tl.sum(query * gains * key) * norms / tl.sqrt(HIDDEN * 1.0)
    negative = score.to(tl.int32, bitcast=True) < 0  # the sign is copied, that of -0 too
    gate = tl.sigmoid(tl.where(negative, -_root(score), _root(score)))
    fused = (query + gate * value).to(stream.dtype)
    if dead is not None:
        fused = tl.where(tl.load(dead + position * dead_n) != 0, stream, fused)
    tl.store(out + (position * COPIES + copy) * HIDDEN + lane, fused, mask=here)


def demo(
    fusion: Any,
    packed: Tensor,
    hidden: Tensor,
    out: Tensor,
    past: Tensor | None,
    padding: Tensor | None = None,
    adds: bool = False,
) -> None:
    """The update of some steps of a `DemoFusion`, on the current stream, in one launch.

    Args:
        fusion: whose weights; nothing is checked.
        packed: keys and value, [B, T, (G+1)*H], each step contiguous.
        hidden: residual stream, [B, T, G, H], each copy contiguous.
        out: takes the update, [B, T, G, H], each step contiguous; it is neither of the others.
        past: normalised gated values before these steps, float32 [B, P, G, H], contiguous; it moves on to the end of
            these steps. None where there is nothing before, and nothing to come.
        padding: booleans [B, T]; what is true there no convolution sees.
        adds: give the stream and the update, not the update alone.
    """
    batch, length, copies, width = hidden.shape
    if not hidden.numel():
        return
    reach, kernel_size = fusion.reach, fusion.config.kernel_size
    shape = _demo_shape(width, reach, length)
    masked = (None, 0, 0) if padding is None else (padding.view(torch.uint8), *padding.stride())
    tiles = triton.cdiv(length, shape["TILE"])
    with on_device(out.device):
        _demo[(batch * tiles, copies, triton.cdiv(width, shape["PART"]))](
            packed, *packed.stride()[:2], hidden, *hidden.stride()[:3], out, *out.stride()[:2],
            fusion.key_gain, fusion.query_gain, fusion.conv_gain, fusion.conv_weight,
            past, *masked, length, tiles,
            COPIES=copies, HIDDEN=width, TAPS=kernel_size, DILATION=fusion.config.max_ngram, REACH=reach,
            ALONE=tiles == 1, ADDS=adds, **shape,
        )  # fmt: skip


def v41(fusion: Any, packed: Tensor, hidden: Tensor, out: Tensor, dead: Tensor | None = None) -> None:
    """The stream after a `V41Fusion` at some positions, on the current stream, in one launch.

    Args:
        fusion: whose weights; nothing is checked.
        packed: keys and value, [N, (G+1)*H], contiguous.
        hidden: residual stream, [N, G, H], each copy contiguous.
        out: takes the stream after the layer, [N, G, H], contiguous.
        dead: booleans [N]; where true the stream comes out as it went in, bit for bit.
    """
    count, copies, width = hidden.shape
    if not hidden.numel():
        return
    masked = (None, 0) if dead is None else (dead.view(torch.uint8), dead.stride(0))
    lanes = triton.next_power_of_2(width)
    with on_device(out.device):
        _v41[(count, copies)](
            packed, hidden, *hidden.stride()[:2], out, fusion.q_weight, fusion.k_weight, *masked,
            COPIES=copies, HIDDEN=width, LANES=lanes, num_warps=_warps(lanes),
        )  # fmt: skip


def _demo_shape(width: int, reach: int, length: int) -> dict[str, int]:
    """How a program cuts up a copy and its steps; a tile is at least as long as the convolution looks back."""
    lanes = triton.next_power_of_2(width)
    return {
        "RING": triton.next_power_of_2(reach + 1),
        "TILE": max(STEPS_PER_PROGRAM, reach),
        "LANES": lanes,
        # Of one token, weights and past are most of what is read: more programs read a part each.
        "PART": min(lanes, LANES_OF_ONE_STEP) if length == 1 else lanes,
        "num_warps": _warps(lanes),
    }


def _warps(lanes: int) -> int:
    return max(1, min(_MOST_WARPS, lanes // _VALUES_PER_WARP))
