"""fp8 rows to bfloat16, gathered and decoded in one pass, compiled: the fast path of `decoding`.

Nearly every block of 32 codes is in the middle of all ranges: no code is subnormal, zero or NaN, and neither is any
product. Then decoding is integer arithmetic on 16-bit lanes, because the two formats differ only in where their fields
stand and in the bias of the exponent (7 and 127):

    code       s eeee fff                     bfloat16   s eeeeeeee fffffff
    bits = sign | ((code without sign) << 4) + ((scale byte - 127 + 120) << 7)

Every other block is multiplied out in float32, whose range holds all products but those that bfloat16 calls infinite,
and rounded to the nearest, ties to even.

    python -m pytest tests/ref/rows/test_decoding.py
"""

# mypy: disable-error-code="call-arg, call-overload"
# (the signatures of functions that numba compiles are not those that mypy sees)

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engram_ref.config import SCALE_BLOCK
from engram_ref.loops import compiled, pointer
from engram_ref.rows.gather_fused import ask

_AHEAD = 32  # rows asked for ahead of the one that is decoded
_BYTE, _HALF, _WORD, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
# Scale bytes with which every normal code gives a normal product: exponents 1 .. 15 + byte - 7 are in 1 .. 254.
_LEAST_SCALE, _LARGEST_SCALE = 7, 246


class _Block:
    """Writes LLVM instructions on the 32 codes of one block."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def every(self, kind: Any, value: Any) -> Any:
        return ir.Constant(ir.VectorType(kind, SCALE_BLOCK), [value] * SCALE_BLOCK)

    def splat(self, scalar: Any) -> Any:
        vector = ir.VectorType(scalar.type, SCALE_BLOCK)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, _WORD(0))
        lanes = ir.Constant(ir.VectorType(_WORD, SCALE_BLOCK), [0] * SCALE_BLOCK)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def load(self, address: Any) -> Any:
        kind = ir.VectorType(_BYTE, SCALE_BLOCK).as_pointer()
        return self.builder.load(self.builder.inttoptr(address, kind), align=1)

    def store(self, values: Any, address: Any) -> None:
        self.builder.store(values, self.builder.inttoptr(address, values.type.as_pointer()), align=2)

    def any(self, flags: Any) -> Any:
        """Whether some lane's flag is set."""
        bits = ir.IntType(SCALE_BLOCK)
        return self.builder.icmp_unsigned("!=", self.builder.bitcast(flags, bits), bits(0))

    def is_plain(self, codes: Any) -> Any:
        """Whether no code is subnormal, zero or NaN: whether all magnitudes are in 0x08 .. 0x7E."""
        b = self.builder
        magnitude = b.and_(codes, self.every(_BYTE, 0x7F))
        above = b.sub(magnitude, self.every(_BYTE, 0x08))
        return b.not_(self.any(b.icmp_unsigned(">", above, self.every(_BYTE, 0x7E - 0x08))))

    def move_fields(self, codes: Any, scale: Any) -> Any:
        """The bits of the products, for plain blocks, as 16-bit integers."""
        b = self.builder
        wide = b.zext(codes, ir.VectorType(_HALF, SCALE_BLOCK))
        sign = b.shl(b.and_(wide, self.every(_HALF, 0x80)), self.every(_HALF, 8))
        fields = b.shl(b.and_(wide, self.every(_HALF, 0x7F)), self.every(_HALF, 4))
        bias = b.shl(b.sub(b.trunc(scale, _HALF), _HALF(7)), _HALF(7))  # 7 = 127 - 120
        return b.or_(sign, b.add(fields, self.splat(bias)))

    def multiply(self, codes: Any, scale: Any) -> Any:
        """The same for any block, in float32."""
        b = self.builder
        wide = b.zext(codes, ir.VectorType(_WORD, SCALE_BLOCK))
        magnitude = b.and_(wide, self.every(_WORD, 0x7F))
        subnormal = b.icmp_unsigned("<", magnitude, self.every(_WORD, 0x08))
        bias = b.select(subnormal, self.every(_WORD, 121 << 23), self.every(_WORD, 120 << 23))
        floats = ir.VectorType(_FLOAT, SCALE_BLOCK)
        value = b.bitcast(b.add(b.shl(magnitude, self.every(_WORD, 20)), bias), floats)
        # A subnormal code f / 8 * 2^-6 is (1 + f / 8) * 2^-6 - 2^-6: however the processor treats subnormal numbers.
        value = b.fsub(value, b.select(subnormal, self.every(_FLOAT, 2.0**-6), self.every(_FLOAT, 0.0)))
        is_nan = b.icmp_unsigned("==", magnitude, self.every(_WORD, 0x7F))
        value = b.select(is_nan, self.every(_FLOAT, float("nan")), value)
        product = b.bitcast(b.fmul(value, self.splat(self._power(scale))), wide.type)
        odd = b.and_(b.lshr(product, self.every(_WORD, 16)), self.every(_WORD, 1))
        rounded = b.lshr(b.add(b.add(product, self.every(_WORD, 0x7FFF)), odd), self.every(_WORD, 16))
        sign = b.shl(b.and_(wide, self.every(_WORD, 0x80)), self.every(_WORD, 8))
        return b.trunc(b.or_(rounded, sign), ir.VectorType(_HALF, SCALE_BLOCK))

    def _power(self, scale: Any) -> Any:
        """2^(byte - 127) as a float32: a subnormal for byte 0, NaN for 255."""
        b = self.builder
        bits = b.shl(b.zext(scale, _WORD), _WORD(23))
        bits = b.select(b.icmp_unsigned("==", scale, scale.type(0)), _WORD(1 << 22), bits)
        bits = b.select(b.icmp_unsigned("==", scale, scale.type(0xFF)), _WORD(0x7FC00000), bits)
        return b.bitcast(bits, _FLOAT)


@intrinsic
def _decode_block(typing_context, codes, scale, target):
    """Decode the 32 codes at one address, with the scale at another, to a third."""

    def generate(context, builder, signature, arguments):
        source, scale_at, target = arguments
        block = _Block(builder)
        codes = block.load(source)
        scale = builder.load(builder.inttoptr(scale_at, _BYTE.as_pointer()))
        above = builder.sub(scale, _BYTE(_LEAST_SCALE))
        in_range = builder.icmp_unsigned("<=", above, _BYTE(_LARGEST_SCALE - _LEAST_SCALE))
        with builder.if_else(builder.and_(in_range, block.is_plain(codes)), likely=True) as (plain, other):
            with plain:
                block.store(block.move_fields(codes, builder.zext(scale, _HALF)), target)
            with other:
                block.store(block.multiply(codes, scale), target)
        return context.get_dummy_value()

    return types.void(codes, scale, target), generate


@njit(inline="always")
def _number(rows, is_int64, at):
    """The row number that stands at `at`; where there are no numbers, `at` itself."""
    if rows == 0:
        return at
    if is_int64:
        return pointer(rows, np.int64(0))[at]
    return np.int64(pointer(rows, np.int32(0))[at])


def _decode_rows(codes, code_stride, scales, scale_stride, rows, is_int64, first, last, width, out):
    blocks = width // SCALE_BLOCK
    for at in range(first, min(first + _AHEAD, last)):
        row = _number(rows, is_int64, at)
        ask(codes + row * code_stride, width)
        ask(scales + row * scale_stride, blocks)
    target = out + first * width * 2
    for at in range(first, last):
        if at + _AHEAD < last:
            row = _number(rows, is_int64, at + _AHEAD)
            ask(codes + row * code_stride, width)
            ask(scales + row * scale_stride, blocks)
        row = _number(rows, is_int64, at)
        code, scale = codes + row * code_stride, scales + row * scale_stride
        for block in range(blocks):
            _decode_block(code, scale + block, target)
            code += SCALE_BLOCK
            target += SCALE_BLOCK * 2


# decode_rows(address of the first row's codes, bytes from one row's codes to the next, the same for scales, address of
# the row numbers or 0 for all rows in order, whether they are int64 (else int32), first and last: which of them to do,
# values of a row, address of the output).
_ARGUMENTS = ["void(int64, int64, int64, int64, int64, boolean, int64, int64, int64, int64)"]
decode_rows = compiled(_decode_rows, _ARGUMENTS, nogil=True)
