"""The hash as one GPU kernel, in Triton: token ids to compressed ids to rows of all layers, the history moved on.

It leaves the CPU out: it neither synchronises nor brings a number back. So it cannot refuse a bad id on the spot: the
id counts as DEAD, and is stored where the caller looks for it later. Triton's interpreter (TRITON_INTERPRET=1 in the
environment before the first import) runs the same code on a CPU, slowly, for tests.

One program has a tile of positions of one sequence, and all columns of all layers side by side as lanes.

The remainder of any 64-bit h by p >= 2, without a division, from M = floor(2^64 / p):

    q = floor(h * M / 2^64)       M is less than 1 below 2^64 / p and h less than 2^64, so the product is less
                                  than 1 below h / p: q is floor(h / p) or one less
    r = h - q * p                 therefore in 0 .. 2p - 1: at most one subtraction of p is left to do

    python -m pytest tests/ref/hashing/test_device.py tests/ref/rows/test_kernels.py
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel are Triton's values, whatever Python is told)

from __future__ import annotations

from collections.abc import Sequence

import engram_ref.needs_torch  # noqa: F401

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_ref.gpu import can_run_on, on_device
from engram_ref.hashing.plan import INT64_MAX, HashPlan, LayerPlan
from engram_ref.ids import DEAD

__all__ = ["can_run_on", "hash_layers", "pack_constants"]

TOKENS_PER_PROGRAM = 16
_INDICES_PER_PROGRAM = 512  # four a thread: more do not fit into registers
_WARP = 32
_DEAD = tl.constexpr(DEAD)


@triton.jit(
    do_not_specialize=[
        "ids", "ids_b", "ids_t", "mask", "mask_b", "mask_t", "vocab", "before", "before_b", "after", "met_tokens",
        "met_ids", "length", "tiles", "tokens", "known", "size", "pad", "segment_end", "stand_in", "past", "kept",
    ]
)  # fmt: skip
def _hash(
    ids, ids_b, ids_t, mask, mask_b, mask_t, vocab, before, before_b, constants, rows, compressed, after, met_tokens,
    met_ids, length, tiles, tokens, known, size, pad, segment_end, stand_in, past, kept,
    N: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, LAYERS: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    t = tile * TILE + tl.arange(0, TILE)  # [TILE]
    inside = t < length
    ids += sequence * ids_b
    before += sequence * before_b
    if mask is not None:
        mask += sequence * mask_b
    lane = tl.arange(0, LANES)
    here = lane < LAYERS * COLUMNS
    column = lane % COLUMNS
    constants += (lane // COLUMNS) * (N + 3 * COLUMNS)  # [LANES], of each lane's layer

    blocked = t < 0
    mix = tl.zeros([TILE, LANES], tl.uint64)
    for s in tl.static_range(N):
        at = t - s
        now = compress(ids, ids_t, mask, mask_t, vocab, at, inside & (at >= 0), known, stand_in, met_tokens)
        c = tl.where(at >= 0, now, tl.load(before + past + at, mask=inside & (at < 0), other=_DEAD))
        bad = (c < _DEAD) | (c >= size)
        remember(met_ids, c, bad)
        if s == 0 and compressed is not None:
            tl.store(compressed + sequence * length + t, tl.where(bad, _DEAD, c), mask=inside)
        blocked = blocked | bad | (c == _DEAD)
        if s > 0:
            blocked = blocked | (c == segment_end)
        multiplier = tl.load(constants + s, mask=here, other=0)  # [LANES]
        product = tl.where(blocked, pad, c)[:, None] * multiplier[None, :]
        # The column of an n-gram is made of the last n ids: its lane takes part in the first n of N shifts.
        mix = mix ^ tl.where((column // HEADS >= s - 1)[None, :], product, 0).to(tl.uint64, bitcast=True)

    prime = tl.load(constants + N + column, mask=here, other=1).to(tl.uint64, bitcast=True)
    offset = tl.load(constants + N + COLUMNS + column, mask=here, other=0)
    reciprocal = tl.load(constants + N + 2 * COLUMNS + column, mask=here, other=0).to(tl.uint64, bitcast=True)
    row = remainder(mix, prime[None, :], reciprocal[None, :]).to(tl.int64) + offset[None, :]
    place = ((lane // COLUMNS) * tokens + sequence * length)[None, :] + t[:, None]
    tl.store(
        rows + place * COLUMNS + column[None, :], row.to(rows.dtype.element_ty), mask=inside[:, None] & here[None, :]
    )

    if after is not None:  # no other tile's program of this sequence reads `before`, which may be `after`
        advance(
            ids, ids_t, mask, mask_t, vocab, before, after + sequence * kept, tile == 0, length, known, size, stand_in,
            past, kept, met_tokens, WINDOW,
        )  # fmt: skip


@triton.jit
def advance(
    ids, ids_t, mask, mask_t, vocab, before, after, mine, length, known, size, stand_in, past, kept, met_tokens,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Put the last ids of one sequence's `before` and chunk into `after`, if it is this program's to do."""
    j = tl.arange(0, WINDOW)
    at = j + length - kept  # from the chunk's start; what is negative came before
    here = mine & (j < kept)
    now = compress(ids, ids_t, mask, mask_t, vocab, at, here & (at >= 0), known, stand_in, met_tokens)
    now = tl.where((now < _DEAD) | (now >= size), _DEAD, now)
    c = tl.where(at >= 0, now, tl.load(before + past + at, mask=here & (at < 0) & (at >= -past), other=_DEAD))
    tl.debug_barrier()  # all threads have read what some of them now write
    tl.store(after + j, c, mask=here)


@triton.jit
def compress(ids, ids_t, mask, mask_t, vocab, at, here, known, stand_in, met_tokens):
    """Compressed ids of the tokens at some places of a sequence; DEAD elsewhere, and where there is no such token."""
    looked = here
    if mask is not None:
        masked = tl.load(mask + at * mask_t, mask=here, other=0) != 0
        looked = here & (masked == 0)
    c = tl.load(ids + at * ids_t, mask=looked, other=_DEAD).to(tl.int64)
    if vocab is not None:
        unknown = looked & ((c < 0) | (c >= known))
        remember(met_tokens, c, unknown)
        c = tl.load(vocab + c, mask=looked & (unknown == 0), other=_DEAD).to(tl.int64)
    if mask is not None:
        c = tl.where(here & masked, stand_in, c)
    return c


@triton.jit
def remember(word, value, bad):
    """Store a bad value, if there is one: in the first of two words if it is negative, else in the second."""
    tl.store(word + (value >= 0).to(tl.int32), value, mask=bad)


@triton.jit
def remainder(h, prime, reciprocal):
    """Of any 64-bit number by a prime, without a division: see above."""
    r = h - tl.umulhi(h, reciprocal + tl.zeros_like(h)) * prime
    return tl.where(r >= prime, r - prime, r)


def pack_constants(layers: Sequence[LayerPlan], device: torch.device) -> Tensor:
    """What `hash_layers` needs of these layers: multipliers, primes, offsets, reciprocals. [L, N + 3 C] int64"""
    return torch.tensor(
        [[*x.multipliers, *x.primes, *x.offsets, *(_signed(2**64 // p) for p in x.primes)] for x in layers],
        dtype=torch.int64,
        device=device,
    )


def _signed(word: int) -> int:
    """The signed integer with the bits of an unsigned 64-bit one: torch has no other."""
    return word - 2**64 if word > INT64_MAX else word


def hash_layers(
    plan: HashPlan,
    ids: Tensor,
    before: Tensor,
    constants: Tensor,
    row_dtype: torch.dtype,
    met_ids: Tensor,
    *,
    vocab: Tensor | None = None,
    met_tokens: Tensor | None = None,
    mask: Tensor | None = None,
    stand_in: int = DEAD,
    compressed: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Row indices of several layers of a plan, in one launch. [L, B, T, C]

    A bad id counts as DEAD, so that every index is one of the layer's rows whatever is in `ids`.

    Args:
        plan: of these layers.
        ids: compressed ids, or token ids where there is a `vocab`: [B, T], int32 or int64, with any strides.
        before: the compressed ids before them, int64 [B, W], W >= N - 1, DEAD where there are none; its rows are
            contiguous.
        constants: of the layers, from `pack_constants`.
        row_dtype: of the indices, int32 or int64.
        met_ids: int64 [2], takes compressed ids outside -1 .. compressed_size - 1: a negative one, and another.
        vocab: compressed id of each token id, contiguous.
        met_tokens: int64 [2], takes token ids that `vocab` does not have, as `met_ids` does.
        mask: booleans [B, T], with any strides; where true the id is not looked at and `stand_in` is the compressed id.
        compressed: int64 [B, T], contiguous, takes the compressed ids.
        after: int64 [B, W], contiguous, takes the compressed ids before the next chunk; it may be `before` itself.
    """
    batch, length = ids.shape
    columns = len(plan.layers[0].primes)
    rows = torch.empty((len(constants), batch, length, columns), dtype=row_dtype, device=ids.device)  # [L, B, T, C]
    shape = _shape(plan.max_ngram, len(constants) * columns, length)
    tiles = triton.cdiv(length, shape["TILE"])
    kept = 0 if after is None else after.shape[1]
    segment_end = DEAD if plan.segment_end is None else plan.segment_end
    masked = (None, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())
    with on_device(ids.device):
        _hash[(batch * tiles,)](
            ids, *ids.stride(), *masked,
            vocab, before, before.stride(0), constants, rows, compressed, after, met_tokens,
            met_ids, length, tiles, batch * length, 0 if vocab is None else len(vocab), plan.compressed_size,
            plan.pad_compressed, segment_end, stand_in, before.shape[1], kept,
            N=plan.max_ngram, HEADS=plan.heads, COLUMNS=columns, LAYERS=len(constants),
            WINDOW=triton.next_power_of_2(max(1, kept)), **shape,
        )  # fmt: skip
    return rows


def _shape(max_ngram: int, columns: int, length: int) -> dict[str, int]:
    """How a program cuts up positions and the columns of all layers."""
    lanes = triton.next_power_of_2(columns)
    # N - 1 positions at least, or the whole chunk: only a sequence's first tile may read what came before, as it may
    # overwrite it.
    tile = max(min(TOKENS_PER_PROGRAM, _INDICES_PER_PROGRAM // lanes), triton.next_power_of_2(max_ngram - 1))
    tile = 1 if length == 1 else tile  # every other length shares one compiled kernel
    warps = max(1, min(4, tile * lanes // (2 * _WARP)))
    return {"TILE": tile, "LANES": lanes, "num_warps": warps}
