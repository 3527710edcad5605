"""The same indices in one pass over the ids, compiled: the fast path of `NgramHasher`, one thread.

NumPy makes a 64-bit array for every shift, product and remainder. Here the hashes of 64 tokens are made on the stack,
eight at a time; then the indices of all heads, so that the constants of a head are read once for 64 tokens. What costs
is the remainder: a 64-bit division per index. It is replaced by a multiplication by the reciprocal in double precision
and one of 32 bits, exact for every modulus from 2^13 up (below), on eight heads at a time. Smaller ones, of toy tables,
are divided by. Compiling takes a few seconds once; numba then keeps the machine code on disk.

    python -m pytest tests/ref/hashing/test_fused.py
    python bench/hashing_speed.py

The remainder of h < 2^63 by p, 2^13 <= p < 2^31:

    q = round(double(h) * double(1/p))    to the nearest integer. h/p is at most 2^50, and each of three roundings, of
                                          h, of 1/p and of the product, changes it by at most 2^-53 of that: by 3/8
                                          together. So q is less than 7/8 away from h/p
    r = h - q*p                           hence congruent to h, and between -7/8 p and 7/8 p. It fits 32 bits, so only
                                          the lower 32 of h and of q*p are computed

A negative r needs one p more. Adding 2^52 rounds to an integer and leaves it in the lower bits of the double.
"""

# mypy: disable-error-code="call-arg, call-overload, var-annotated"
# (the signatures of functions that numba compiles are not those that mypy sees)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types, uint64
from numba.core import cgutils
from numba.extending import intrinsic

from engram_ref.hashing.plan import HashPlan, LayerPlan
from engram_ref.loops import compiled, emit_prefetch, pointer

_LANES = 8  # heads reduced at once
# Constants before the multipliers: compressed size, compressed pad, longest n-gram, heads, segment end, least modulus.
_MAX_NGRAM, _HEADS, _SEGMENT_END, _LEAST, _HEADER = 2, 3, 4, 5, 6
_LEAST_MODULUS = 2**13  # for which the remainder is exact: see above
_TO_INTEGER = 2.0**52  # a double of this size has no fraction
_NARROW = np.uint64(2**32)  # vocabularies whose ids have no upper half
_DEAD = np.uint64(2**64 - 1)  # DEAD, -1, read as an unsigned number
_BLOCK = 64  # tokens whose hashes are made before their remainders, which share their constants
_HASHES = 512  # that are kept meanwhile: of so many tokens, or of fewer where an n-gram is longer than 9
_AS_DOUBLES = 8 * _HASHES  # bytes behind the hashes: the same, converted once for all heads
# Doubles of eight heads, in two registers of AVX2: AVX-512 has more units for these than for its own. In this order one
# instruction puts the lower halves of both side by side, columns in order.
_PARTS = [[0, 1, 4, 5], [2, 3, 6, 7]]
_SIGNATURES = [f"boolean(int64[:,:], int64[:,:], int64, {rows}[:,:,::1])" for rows in ("int32", "int64")]
NO_HISTORY = np.empty((0, 0), dtype=np.int64)


def can_fuse(plan: HashPlan) -> bool:
    """Whether the compiled loop takes n-grams of this length: up to 512."""
    return plan.max_ngram <= _HASHES


def pack(plan: HashPlan, layer: LayerPlan, offsets: bool) -> np.ndarray:
    """All constants of a layer in one array, in the loop's order: header, multipliers, then 3 rows [C]."""
    primes = layer.primes
    return np.array(
        [plan.compressed_size, plan.pad_compressed, plan.max_ngram, plan.heads]
        + [_DEAD if plan.segment_end is None else plan.segment_end]  # where none is, what blocks anyway
        + [min(primes)]
        + list(layer.multipliers)
        + list(primes)
        + np.reciprocal(np.array(primes, np.float64)).view(np.uint64).tolist()
        + (list(layer.offsets) if offsets else [0] * len(primes)),
        dtype=np.uint64,
    )


class _Lanes:
    """Writes LLVM instructions on vectors of `count` lanes.

    By hand, because the compiler's own vectoriser gives up on this loop: it cannot tell that writing the
    indices leaves the constants as they are.
    """

    def __init__(self, builder: Any, count: int) -> None:
        self.builder = builder
        self.count = count
        self.wide = ir.VectorType(ir.IntType(64), count)
        self.narrow = ir.VectorType(ir.IntType(32), count)
        self.real = ir.VectorType(ir.DoubleType(), count)

    def pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def every(self, value: float, kind: Any = None) -> Any:
        return ir.Constant(kind or self.wide, [value] * self.count)

    def pick(self, x: Any, y: Any, places: list[int]) -> Any:
        """The lanes at these places of x and y, one behind the other."""
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.count), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        return self.pick(first, undefined, [0] * self.count)

    def low(self, x: Any) -> Any:
        return self.builder.and_(x, self.every(2**32 - 1))

    def times(self, real: Any, reciprocal: Any) -> Any:
        """Their product, rounded to an integer that lies in the lower bits of each lane."""
        product = self.builder.fmul(self.splat(real), reciprocal, flags=("contract",))
        return self.builder.fadd(product, self.every(_TO_INTEGER, self.real), flags=("contract",))

    def quotients(self, real: Any, reciprocals: Any) -> Any:
        """Lower 32 bits of each rounded product of a number and a lane's reciprocal."""
        parts = _PARTS if self.count == _LANES else [list(range(self.count))]
        lanes = _Lanes(self.builder, len(parts[0]))
        products = [lanes.times(real, self.pick(reciprocals, reciprocals, part)) for part in parts]
        words = [self.builder.bitcast(each, ir.VectorType(ir.IntType(32), 2 * lanes.count)) for each in products]
        mixed = [lane for part in parts for lane in part]
        return self.pick(words[0], words[-1], [2 * mixed.index(lane) for lane in range(self.count)])

    def remainder(self, h: Any, real: Any, p: Any, reciprocals: Any) -> Any:
        """h mod each p, by the lines of the module's docstring; of h the lower 32 bits, and all of it as a double."""
        b = self.builder
        r = b.sub(self.splat(h), b.mul(self.quotients(real, reciprocals), p))
        other = b.add(r, p)
        return b.select(b.icmp_unsigned("<", r, other), r, other)  # a negative one has wrapped around


def _column_writer(count: int) -> Callable[..., None]:
    """A compiled `write(rows, slot, hashes, tokens, constants, column, columns)`: indices of `count` columns.

    The hashes of `tokens` tokens lie from the address `hashes` on, and the index of the first in column 0 goes to the
    address `slot`. `column` is the first that is written; `columns` are all of a row, and so many places are between
    the constants of a column. They begin with its modulus.
    """

    @intrinsic
    def write(typing_context, rows, slot, hashes, tokens, constants, column, columns):
        def generate(context, builder, signature, arguments):
            _, slot, hashes, tokens, constants, column, columns = arguments
            dtype = signature.args[0].dtype
            lanes, int64 = _Lanes(builder, count), ir.IntType(64)
            itemsize = int64(dtype.bitwidth // 8)
            max_ngram = builder.load(builder.gep(constants, [int64(_MAX_NGRAM)]))
            loaded, at = [], builder.add(builder.add(max_ngram, max_ngram.type(_HEADER)), column)
            for kind in (lanes.wide, lanes.real, lanes.wide):
                place = builder.bitcast(builder.gep(constants, [at]), kind.as_pointer())
                loaded.append(builder.load(place, align=8))
                at = builder.add(at, columns)
            p, reciprocals, offset = loaded
            p, first = builder.trunc(p, lanes.narrow), builder.add(slot, builder.mul(column, itemsize))
            words = lanes.pointer(hashes, ir.IntType(32))
            doubles = lanes.pointer(builder.add(hashes, hashes.type(_AS_DOUBLES)), ir.DoubleType())
            # The lines of the next block, as many for each index, so that they come while this one is computed: a Xeon
            # did not run ahead of a stream by itself beyond a page, and waited for lines that were asked for at once.
            past = builder.mul(builder.mul(tokens, itemsize), builder.add(columns, column))
            ahead = builder.add(slot, past)
            with cgutils.for_range(builder, tokens) as loop:
                h = builder.load(builder.gep(words, [builder.add(loop.index, loop.index)]))
                real = builder.load(builder.gep(doubles, [loop.index]))
                index = lanes.remainder(h, real, p, reciprocals)
                if dtype == types.int32:
                    index = builder.add(index, builder.trunc(offset, lanes.narrow))
                else:
                    index = builder.add(builder.zext(index, lanes.wide), offset)
                place = builder.add(first, builder.mul(loop.index, builder.mul(columns, itemsize)))
                line = builder.add(ahead, builder.mul(loop.index, int64(count * dtype.bitwidth // 8)))
                emit_prefetch(builder, line, to_write=True, level=3)
                builder.store(index, lanes.pointer(place, index.type), align=dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(rows, slot, hashes, tokens, constants, column, columns), generate

    return write


_write_lanes = _column_writer(_LANES)
_write_one = _column_writer(1)


@intrinsic
def _stack(typing_context):
    """The address of room for _HASHES hashes and as many doubles, as long as the function runs that asks for it."""

    def generate(context, builder, signature, arguments):
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), 2 * _HASHES))
        room.align = 32
        return builder.ptrtoint(room, ir.IntType(64))

    return types.int64(), generate


@intrinsic
def _hash_lanes(typing_context, ids, constants, segment_end, hashes, order):
    """As `_hash_one` for _LANES tokens, and whether their own ids are valid.

    `ids` is the address of the id of the first; all that count before it lie before it, side by side. Valid ones have
    no upper half.
    """

    def generate(context, builder, signature, arguments):
        ids, constants, segment_end, hashes, order = arguments
        lanes, int64 = _Lanes(builder, _LANES), ir.IntType(64)
        size, pad, max_ngram = (builder.load(builder.gep(constants, [int64(at)])) for at in range(3))
        # blocked: -1 where it is so; as flags of one bit they would be packed and unpacked each time
        state = {
            name: cgutils.alloca_once_value(builder, lanes.every(value))
            for name, value in (("h", 0), ("blocked", 0), ("end", -1))
        }
        own = builder.load(lanes.pointer(ids, lanes.wide), align=8)
        valid = builder.icmp_unsigned("<=", builder.add(own, lanes.every(1)), lanes.splat(size))
        with cgutils.for_range(builder, max_ngram) as loop:
            h, blocked, end = (builder.load(place) for place in state.values())
            place = builder.sub(ids, builder.mul(loop.index, int64(8)))
            c = builder.load(lanes.pointer(place, lanes.wide), align=8)
            ends = builder.or_(builder.icmp_signed("==", c, lanes.every(-1)), builder.icmp_signed("==", c, end))
            blocked = builder.or_(blocked, builder.sext(ends, lanes.wide))
            builder.store(blocked, state["blocked"])
            builder.store(lanes.splat(segment_end), state["end"])
            multiplier = builder.load(builder.gep(constants, [builder.add(loop.index, int64(_HEADER))]))
            is_blocked = builder.icmp_signed("<", blocked, lanes.every(0))
            known = lanes.low(builder.select(is_blocked, lanes.splat(pad), c))
            h = builder.xor(h, builder.mul(known, lanes.splat(multiplier)))
            builder.store(h, state["h"])
            with builder.if_then(builder.icmp_signed(">", loop.index, int64(0))):
                place = builder.add(hashes, builder.mul(builder.sub(loop.index, int64(1)), order))
                builder.store(h, lanes.pointer(place, lanes.wide), align=8)
                place = builder.add(place, int64(_AS_DOUBLES))
                builder.store(builder.sitofp(h, lanes.real), lanes.pointer(place, lanes.real), align=8)
        bits = ir.IntType(_LANES)
        return builder.icmp_unsigned("==", builder.bitcast(valid, bits), bits(2**_LANES - 1))

    return types.boolean(ids, constants, segment_end, hashes, order), generate


@njit(inline="always")
def _hash_one(ids, before, constants, b, t, segment_end, hashes, order):
    """Hashes of all orders for one token, `order` bytes apart from the address `hashes` on; are its ids valid."""
    size, pad, max_ngram = constants[0], constants[1], types.intp(constants[_MAX_NGRAM])
    past = before.shape[1]
    h = uint64(0)
    blocked, valid = False, True
    end = _DEAD
    for s in range(max_ngram):
        c = _DEAD  # before the start, unless a history reaches there
        if t >= s:
            c = uint64(ids[b, t - s])
        elif t - s + past >= 0:
            c = uint64(before[b, t - s + past])
        valid &= c + uint64(1) <= size  # DEAD + 1 is 0
        blocked |= (c == _DEAD) | (c == end)
        end = segment_end  # of the ids before this one; its own does not end what it belongs to
        h ^= (pad if blocked else c) * constants[_HEADER + s]
        if s:
            pointer(hashes + (s - 1) * order, uint64(0))[0] = h
            pointer(hashes + _AS_DOUBLES + (s - 1) * order, 0.0)[0] = types.int64(h)
    return valid


@njit(inline="always")
def _write_all(rows, constants, slot, hashes, order, tokens):
    """Indices of all columns of some tokens."""
    max_ngram, heads, columns = types.intp(constants[_MAX_NGRAM]), types.intp(constants[_HEADS]), rows.shape[2]
    column = 0
    for s in range(max_ngram - 1):
        end = column + heads
        while column + _LANES <= end:
            _write_lanes(rows, slot, hashes + s * order, tokens, constants, column, columns)
            column += _LANES
        while column < end:
            _write_one(rows, slot, hashes + s * order, tokens, constants, column, columns)
            column += 1


@njit(inline="always")
def _divide_all(rows, constants, b, begin, hashes, order, tokens):
    """The same by divisions, where a modulus is too small to do without."""
    heads, columns = types.intp(constants[_HEADS]), rows.shape[2]
    moduli = types.intp(constants[_MAX_NGRAM]) + _HEADER
    for t in range(tokens):
        for column in range(columns):
            h = pointer(hashes + column // heads * order + 8 * t, uint64(0))[0]
            rows[b, begin + t, column] = h % constants[moduli + column] + constants[moduli + 2 * columns + column]


@njit(inline="always")
def _hash_all(ids, before, address, rows, segment_end):
    constants = pointer(address, uint64(0))
    context = types.intp(constants[_MAX_NGRAM]) - 1
    batch, length, columns = rows.shape
    slot, first_id, hashes = types.intp(rows.ctypes.data), types.intp(ids.ctypes.data), _stack()
    together = ids.strides[1] == 8 and constants[0] <= _NARROW
    block = min(_BLOCK, _HASHES // context)
    order = 8 * block
    valid = True
    for b in range(batch):
        for begin in range(0, length, block):
            tokens = min(block, length - begin)
            t = begin
            while t < begin + tokens:
                at = hashes + 8 * (t - begin)
                if together and t >= context and t + _LANES <= begin + tokens:
                    some = first_id + b * ids.strides[0] + t * 8
                    valid &= _hash_lanes(some, constants, segment_end, at, order)
                    t += _LANES
                else:
                    valid &= _hash_one(ids, before, constants, b, t, segment_end, at, order)
                    t += 1
            if constants[_LEAST] < _LEAST_MODULUS:
                _divide_all(rows, constants, b, begin, hashes, order, tokens)
            else:
                _write_all(rows, constants, slot, hashes, order, tokens)
            slot += tokens * columns * rows.itemsize
    return valid


def _hash_unsegmented(ids, before, address, rows):
    return _hash_all(ids, before, address, rows, _DEAD)


def _hash_segmented(ids, before, address, rows):
    return _hash_all(ids, before, address, rows, pointer(address, uint64(0))[_SEGMENT_END])


# Apart, because the end of a segment inside the one loop, or both loops in one function, made the first slower.
_unsegmented = compiled(_hash_unsegmented, _SIGNATURES, nogil=True)
_segmented = compiled(_hash_segmented, _SIGNATURES, nogil=True)


def _hash_rows(ids, before, address, rows):
    constants = pointer(address, uint64(0))
    if rows.size == 0:
        return False
    past = before.shape[1]
    if past != 0 and (past != types.intp(constants[_MAX_NGRAM]) - 1 or before.shape[0] != rows.shape[0]):
        return False
    if constants[_SEGMENT_END] == _DEAD:
        return _unsegmented(ids, before, address, rows)
    return _segmented(ids, before, address, rows)


# hash_rows(ids int64 [B, T], history int64 [B, N-1] or NO_HISTORY, address of the packed constants, rows int32
# or int64 [B, T, C]) -> whether rows now holds the indices. It does not where an id is outside the vocabulary,
# the batch is empty or the history is not of these sequences. Other types of argument are a TypeError.
hash_rows = compiled(_hash_rows, _SIGNATURES, nogil=True)


def _hash_tokens(tokens, vocab, before, address, stride, rows, compressed):
    layers, batch, length, columns = rows.shape
    constants = pointer(address, uint64(0))
    if columns != types.intp((constants[_MAX_NGRAM] - uint64(1)) * constants[_HEADS]):
        return False
    if tokens.shape != (batch, length) or compressed.shape != (batch, length):
        return False
    if rows.size == 0 or (before.shape[1] != 0 and before.shape[0] != batch):
        return False
    known = uint64(len(vocab))
    valid = True
    # All of them before any is hashed: what a hash writes drives the map out of the cache.
    for b in range(batch):
        for t in range(length):
            token = uint64(tokens[b, t])
            valid &= token < known
            compressed[b, t] = vocab[token if token < known else uint64(0)]
    if not valid:
        return False
    for layer in range(layers):
        valid &= hash_rows(compressed, before, address + layer * stride, rows[layer])
    return valid


_ids, _map = types.int64[:, :], types.Array(types.int64, 1, "C", readonly=True)
# hash_tokens(token ids int64 [B, T], the vocabulary's map int64 [tokens], history as above, address of the packed
# constants of the first layer, bytes from one layer's to the next, rows int32 or int64 [L, B, T, C], compressed ids
# int64 [B, T]) -> whether the last two now hold rows and compressed ids of all layers; as above.
hash_tokens = compiled(
    _hash_tokens,
    [
        types.boolean(_ids, _map, _ids, types.int64, types.int64, row[:, :, :, ::1], types.int64[:, ::1])
        for row in (types.int32, types.int64)
    ],
    nogil=True,
)
