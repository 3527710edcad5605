"""From token ids to the rows of all layers in one GPU kernel, in Triton, for a step of a few tokens.

A program has one position and a few columns of one layer: it compresses and hashes the last N ids by itself, some
dozen operations on a few words, then reads its rows where they lie, fp8 decoded on the way, and writes their values.
So it waits three times for memory: for ids, for what they are compressed to, for rows; all else is asked for beside.
A second launch would cost more than hashing again in every program, as long as all programs run at once.

The history may be advanced where it lies. Then nobody may write before everybody has read: every program of a sequence
counts itself as done, and the last one, which knows that it is, advances it and sets the count back to 0.

    python -m pytest tests/ref/lookup/test_device.py
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel are Triton's values, whatever Python is told)

from __future__ import annotations

import engram_ref.needs_torch  # noqa: F401

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_ref.gpu import on_device
from engram_ref.hashing.kernels import advance, compress, remainder, remember
from engram_ref.hashing.plan import HashPlan
from engram_ref.ids import DEAD
from engram_ref.rows.kernels import LayerRows, bfloat16_bits, load_scaled, words_at, write_values

_DEAD = tl.constexpr(DEAD)


@triton.jit(
    do_not_specialize=[
        "ids", "ids_b", "ids_t", "mask", "mask_b", "mask_t", "vocab", "before", "before_b", "addresses", "out", "after",
        "done", "met_tokens", "met_ids", "length", "tokens", "known", "size", "pad", "stand_in", "past", "kept",
    ]
)  # fmt: skip
def _look_up(
    ids, ids_b, ids_t, mask, mask_b, mask_t, vocab, before, before_b, constants, addresses, out, rows, compressed,
    after, done, met_tokens, met_ids, length, tokens, known, size, pad, stand_in, past, kept,
    N: tl.constexpr, SPAN: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
    SCALED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, CODE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr,
):  # fmt: skip
    position, layer = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    sequence, t = position // length, position % length
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)  # [TILE]
    here = column < COLUMNS
    is_first = (tl.program_id(1) == 0) & (layer == 0)
    ids += sequence * ids_b
    before += sequence * before_b
    if mask is not None:
        mask += sequence * mask_b
    constants += layer * (N + 3 * COLUMNS)

    # What waits for nothing is asked for first: behind a store no load is moved before it.
    prime = tl.load(constants + N + column, mask=here, other=1).to(tl.uint64, bitcast=True)
    offset = tl.load(constants + N + COLUMNS + column, mask=here, other=0)
    reciprocal = tl.load(constants + N + 2 * COLUMNS + column, mask=here, other=0).to(tl.uint64, bitcast=True)
    table = tl.load(addresses + layer)
    scales = tl.load(addresses + tl.num_programs(2) + layer, mask=SCALED)
    s = tl.arange(0, SPAN)  # of the last N ids, the newest first
    multiplier = tl.load(constants + s, mask=s < N, other=0)

    at = t - s
    c = tl.load(before + past + at, mask=(s < N) & (at < 0), other=_DEAD)
    now = compress(ids, ids_t, mask, mask_t, vocab, at, (s < N) & (at >= 0), known, stand_in, met_tokens)
    c = tl.where(at >= 0, now, c)
    bad = (c < _DEAD) | (c >= size)
    remember(met_ids, c, bad)
    tl.store(compressed + position + s, tl.where(bad, _DEAD, c), mask=is_first & (s == 0))
    blocked = tl.min(tl.where(bad | (c == _DEAD), s, N), 0)  # the first that is, and all before it, count as padding
    product = tl.where(s < blocked, c, pad) * multiplier
    mix = tl.zeros([TILE], tl.uint64)
    for k in tl.static_range(N):
        of_id = tl.sum(tl.where(s == k, product, 0), 0)
        mix = mix ^ tl.where(column // HEADS >= k - 1, of_id, 0).to(tl.uint64, bitcast=True)
    row = remainder(mix, prime, reciprocal).to(tl.int64) + offset
    place = (layer * tokens + position) * COLUMNS + column
    tl.store(rows + place, row.to(rows.dtype.element_ty), mask=here)

    lane = tl.arange(0, LANES)
    wanted = here[:, None] & (lane < WORDS)[None, :]
    if SCALED:
        codes, scales = table.to(tl.pointer_type(tl.int8)), scales.to(tl.pointer_type(tl.uint8))
        found = load_scaled(codes, scales, row, here, CODE_STRIDE, SCALE_STRIDE, BLOCKS, LANES, ALIGNED)
    else:
        found = tl.load(words_at(table.to(out.dtype), row, WORDS, lane, ALIGNED), mask=wanted)

    if after is not None:  # while the rows are on their way
        mine = is_first & (t == 0)
        if done is not None:
            tl.debug_barrier()  # all threads of this program have read the history
            everybody = length * tl.num_programs(1) * tl.num_programs(2)
            mine = tl.atomic_add(done + sequence, 1) == everybody - 1
            tl.store(done + sequence, 0, mask=mine)
        advance(
            ids, ids_t, mask, mask_t, vocab, before, after + sequence * kept, mine, length, known, size, stand_in,
            past, kept, met_tokens, WINDOW,
        )  # fmt: skip

    if SCALED:
        write_values(out, bfloat16_bits(found[0], found[1]), place, here, BLOCKS, LANES, OUT_ALIGNED)
    else:
        tl.store(words_at(out, place, WORDS, lane, ALIGNED), found, mask=wanted)


def look_up(
    tables: LayerRows,
    out: Tensor,
    done: Tensor | None,
    plan: HashPlan,
    ids: Tensor,
    before: Tensor,
    constants: Tensor,
    row_dtype: torch.dtype,
    met_ids: Tensor,
    *,
    vocab: Tensor | None,
    met_tokens: Tensor | None,
    mask: Tensor | None,
    stand_in: int,
    compressed: Tensor,
    after: Tensor | None,
) -> Tensor:
    """Values of the rows of several layers, and the row numbers [L, B, T, C], on the current stream, in one launch.

    Args:
        tables: of these layers.
        out: [L, B*T*C, D] of the tables' dtype, contiguous, takes the values.
        done: zeros, int32 [B], and zeros again when this has run; None where `after` shares no memory with `before`.
        plan, ids, before, constants, row_dtype, met_ids, vocab, met_tokens, mask, stand_in, compressed, after: see
            `engram_ref.hashing.kernels.hash_layers`.
    """
    batch, length = ids.shape
    columns = len(plan.layers[0].primes)
    rows = torch.empty((len(constants), batch, length, columns), dtype=row_dtype, device=ids.device)  # [L, B, T, C]
    _, target, shape = tables.launch(out)
    unused = {"WORDS": 0, "CODE_STRIDE": 0, "SCALE_STRIDE": 0, "BLOCKS": 0, "OUT_ALIGNED": 0}
    kept = 0 if after is None else after.shape[1]
    masked = (None, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())
    with on_device(ids.device):
        _look_up[(batch * length, triton.cdiv(columns, shape["TILE"]), len(constants))](
            ids, *ids.stride(), *masked, vocab, before, before.stride(0), constants, tables.addresses, target, rows,
            compressed, after, done, met_tokens, met_ids, length, batch * length, 0 if vocab is None else len(vocab),
            plan.compressed_size, plan.pad_compressed, stand_in, before.shape[1], kept,
            N=plan.max_ngram, SPAN=triton.next_power_of_2(plan.max_ngram), HEADS=plan.heads, COLUMNS=columns,
            WINDOW=triton.next_power_of_2(max(1, kept)), SCALED=tables.scaled, **{**unused, **shape},
        )  # fmt: skip
    return rows
