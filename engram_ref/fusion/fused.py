"""Gate, convolution and the sum with the stream on a CPU, one pass over the steps, compiled: float32 only.

    demo(fusion, packed, hidden, out, past, padding, adds=True)     # packed: what `project` gave
    v41(fusion, packed, hidden, out, dead)

The functions of `engram_ref.fusion.kernels`, for a CPU. Torch's operations go over a stream some ten times, each time
through the cache; here a step of one copy is read, gated, convolved and written while its values are in the first-level
cache, channels last, so that every loop is over neighbours and is compiled to vector instructions. SiLU's exponential
is spelt out for that reason: numba calls the C library's for one value at a time, which takes as long as all the rest.

    e^x = 2^n * e^r     n = x / ln 2 rounded, so |r| <= ln 2 / 2; ln 2 in two parts, the first of 9 bits, so that n
                        times it is exact; a polynomial of degree 6 is off by 2^-23 of e^r at most

Copies know nothing of each other: several threads share them where there is much to do. Needs numba.

    python -m pytest tests/ref/fusion/test_fused.py
"""

# mypy: disable-error-code="no-untyped-def, call-arg, call-overload, var-annotated"
# (functions that numba compiles; their types and signatures are not those that mypy sees)

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from engram_ref.config import V41_NORM_EPS
from engram_ref.fusion.base import CONV_NORM_EPS, GATE_FLOOR
from engram_ref.loops import compiled, pointer
from engram_ref.rows.gather import in_threads

__all__ = ["demo", "v41"]

_F32, _BYTE = np.float32(0), np.uint8(0)
_DEMO_EPS = np.float32(torch.finfo(torch.float32).eps)  # what RMSNorm does when it is given none
_V41_EPS, _CONV_EPS, _FLOOR = np.float32(V41_NORM_EPS), np.float32(CONV_NORM_EPS), np.float32(GATE_FLOOR)
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_MOST = np.float32(88.0)  # e^88 is below float32's largest value
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(k)) for k in range(2, 7))
_ONE, _SHIFT = np.float32(1), np.float32(1.5 * 2**23)  # whose neighbours are the integers
_FREE = {"reassoc", "contract"}  # sums in any order, so in vectors; infinities and NaNs stay what they are
_ONE_ROUNDING = {"contract"}  # a product and a sum in one instruction


@intrinsic
def _power_of_two(typing_context, shifted):
    """2^n of n + _SHIFT, whose last bits are those of n: put where a float32 has its exponent, biased by 127."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        biased = builder.add(bits, ir.IntType(32)(127))
        return builder.bitcast(builder.shl(biased, ir.IntType(32)(23)), ir.FloatType())

    return types.float32(types.float32), generate


@njit(fastmath=_ONE_ROUNDING)  # in the order that it is written in: what rounds to an integer must not vanish
def _exp(x):
    """e^x in float32, for vectors; from 88 on what it is there."""
    x = _MOST if x > _MOST else x
    x = -_MOST if x < -_MOST else x
    shifted = x * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = (x - n * _LN_2_HIGH) - n * _LN_2_LOW
    series = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    return _power_of_two(shifted) * series


@njit(fastmath=_FREE)
def _sums(key, query, gains, width):
    """Of key^2, of query^2 and of their product with the gains."""
    keys, queries, products = _F32, _F32, _F32
    for h in range(width):
        keys += key[h] * key[h]
        queries += query[h] * query[h]
        products += query[h] * gains[h] * key[h]
    return keys, queries, products


@njit(fastmath=_FREE)
def _square(value, width):
    total = _F32
    for h in range(width):
        total += value[h] * value[h]
    return total


@njit
def _score(key, query, gains, width, eps):
    keys, queries, products = _sums(key, query, gains, width)
    scale = np.float32(1 / math.sqrt(keys / np.float32(width) + eps))
    scale *= np.float32(1 / math.sqrt(queries / np.float32(width) + eps))
    return products * scale / np.float32(math.sqrt(width))


@njit
def _demo_gate(score):
    """Of a score of 0 half open."""
    sign = 1.0 if score > 0 else (-1.0 if score < 0 else 0.0 * score)
    return _opened(abs(score), sign)


@njit
def _opened(size, sign):
    """The gate of a score of this size, from the floor on; a NaN stays one."""
    size = _FLOOR if size < _FLOOR else size
    return np.float32(1 / (1 + math.exp(-sign * math.sqrt(size))))


@njit(fastmath=_FREE)
def _add_tap(mixed, tap, scale, value, width):
    for h in range(width):
        mixed[h] += tap[h] * (scale * value[h])


@njit
def _clear(target, width):
    for h in range(width):
        target[h] = _F32


@njit
def _scaled(target, scale, value, width):
    for h in range(width):
        target[h] = scale * value[h]


@njit(fastmath=_ONE_ROUNDING, error_model="numpy")  # a division by 0 is no branch
def _write(out, stream, gate, value, mixed, width):
    """The update of a step: its gated value and SiLU of what the convolution made, and the stream if there is one."""
    for h in range(width):
        out[h] = stream[h] + (gate * value[h] + mixed[h] / (_ONE + _exp(-mixed[h])))


def _demo_steps(
    first, last, sizes, packed, packed_b, packed_t, hidden, hidden_b, hidden_t, hidden_g, out, out_b, out_t,
    gains, taps, past, padding, padding_b, padding_t, zeros, mixes,
):  # fmt: skip
    """All steps of the copies `first` .. `last` - 1 of all sequences, B*G of them."""
    length, copies, width, kernel_size, dilation, adds = sizes
    reach = max(kernel_size - 1, 0) * dilation
    scales = np.empty((reach + 1, copies), np.float32)  # of the last steps
    shown = np.empty(reach + 1, np.bool_)  # whether the convolution may see them
    row = 4 * copies * width
    mixed, nothing = pointer(mixes + 4 * first * width, _F32), pointer(zeros, _F32)
    for b in range(first // copies, (last - 1) // copies + 1):
        some = range(max(first - b * copies, 0), min(last - b * copies, copies))
        values = packed + b * packed_b + row
        before = past + b * reach * row  # [P, G, H]
        for t in range(length):
            value = pointer(values + t * packed_t, _F32)
            square = _square(value, width) / np.float32(width)
            shown[t % (reach + 1)] = padding == 0 or pointer(padding + b * padding_b + t * padding_t, _BYTE)[0] == 0
            for g in some:
                key = pointer(packed + b * packed_b + t * packed_t + 4 * g * width, _F32)
                stream = pointer(hidden + b * hidden_b + t * hidden_t + g * hidden_g, _F32)
                gate = _demo_gate(_score(key, stream, pointer(gains + 4 * g * width, _F32), width, _DEMO_EPS))
                scales[t % (reach + 1), g] = gate * np.float32(1 / math.sqrt(gate * gate * square + _CONV_EPS))
                _clear(mixed, width)
                for k in range(kernel_size):
                    s = t - k * dilation
                    tap = pointer(taps + (kernel_size - 1 - k) * row + 4 * g * width, _F32)
                    if s >= 0 and shown[s % (reach + 1)]:
                        _add_tap(mixed, tap, scales[s % (reach + 1), g], pointer(values + s * packed_t, _F32), width)
                    elif s < 0 and past != 0:
                        _add_tap(mixed, tap, _ONE, pointer(before + (reach + s) * row + 4 * g * width, _F32), width)
                target = pointer(out + b * out_b + t * out_t + 4 * g * width, _F32)
                _write(target, stream if adds else nothing, gate, value, mixed, width)
        for j in range(reach if past != 0 else 0):
            s = length + j - reach
            for g in some:
                kept = pointer(before + j * row + 4 * g * width, _F32)
                if s < 0:  # it moves to an earlier place
                    _scaled(kept, _ONE, pointer(before + (length + j) * row + 4 * g * width, _F32), width)
                elif shown[s % (reach + 1)]:
                    _scaled(kept, scales[s % (reach + 1), g], pointer(values + s * packed_t, _F32), width)
                else:
                    _clear(kept, width)


def _v41_positions(first, last, sizes, packed, hidden, hidden_n, hidden_g, out, gains, dead, dead_n):
    """The positions `first` .. `last` - 1."""
    copies, width = sizes
    for n in range(first, last):
        value = pointer(packed + 4 * (n * (copies + 1) + copies) * width, _F32)
        is_dead = dead != 0 and pointer(dead + n * dead_n, _BYTE)[0] != 0
        for g in range(copies):
            stream = pointer(hidden + n * hidden_n + g * hidden_g, _F32)
            target = pointer(out + 4 * (n * copies + g) * width, _F32)
            if is_dead:
                for h in range(width):
                    target[h] = stream[h]
                continue
            key = pointer(packed + 4 * (n * (copies + 1) + g) * width, _F32)
            score = _score(key, stream, pointer(gains + 4 * g * width, _F32), width, _V41_EPS)
            gate = _opened(abs(score), math.copysign(1.0, score))
            for h in range(width):
                target[h] = stream[h] + gate * value[h]


_INT = "int64"
_demo_steps = compiled(_demo_steps, [f"void(int64, int64, UniTuple(int64, 6), {', '.join([_INT] * 18)})"], nogil=True)
_v41_positions = compiled(
    _v41_positions, [f"void(int64, int64, UniTuple(int64, 2), {', '.join([_INT] * 8)})"], nogil=True
)


def demo(
    fusion: Any,
    packed: Tensor,
    hidden: Tensor,
    out: Tensor,
    past: Tensor | None,
    padding: Tensor | None = None,
    adds: bool = False,
) -> None:
    """The update of some steps of a `DemoFusion`; see `engram_ref.fusion.kernels.demo`."""
    batch, length, copies, width = hidden.shape
    packed, gains = packed.float(), fusion.gains()
    taps = gains.gate if gains.taps is None else gains.taps
    # The compiled loop knows addresses alone: whatever the caller's defaults are, these are its types.
    zeros = torch.zeros(width, dtype=torch.float32, device="cpu")
    mixes = torch.empty(batch * copies, width, dtype=torch.float32, device="cpu")
    masked = (0, 0, 0) if padding is None else (padding.data_ptr(), *padding.stride())
    arguments = (
        (length, copies, width, fusion.config.kernel_size, fusion.config.max_ngram, int(adds)),
        packed.data_ptr(), *_in_bytes(packed, 2), hidden.data_ptr(), *_in_bytes(hidden, 3), out.data_ptr(),
        *_in_bytes(out, 2), gains.gate.data_ptr(), taps.data_ptr(), 0 if past is None else past.data_ptr(), *masked,
        zeros.data_ptr(), mixes.data_ptr(),
    )  # fmt: skip
    in_threads(lambda first, last: _demo_steps(first, last, *arguments), batch * copies, out.nbytes)


def v41(fusion: Any, packed: Tensor, hidden: Tensor, out: Tensor, dead: Tensor | None = None) -> None:
    """The stream after a `V41Fusion` at some positions; see `engram_ref.fusion.kernels.v41`."""
    count, copies, width = hidden.shape
    packed, gains = packed.float(), fusion.gains()
    masked = (0, 0) if dead is None else (dead.data_ptr(), dead.stride(0))
    arguments = (
        (copies, width), packed.data_ptr(), hidden.data_ptr(), *_in_bytes(hidden, 2), out.data_ptr(), gains.data_ptr(),
        *masked,
    )  # fmt: skip
    in_threads(lambda first, last: _v41_positions(first, last, *arguments), count, out.nbytes)


def _in_bytes(tensor: Tensor, dimensions: int) -> list[int]:
    """From one to the next, in each of the first dimensions."""
    return [stride * tensor.itemsize for stride in tensor.stride()[:dimensions]]
