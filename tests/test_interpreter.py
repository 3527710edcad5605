"""Triton's interpreter, made quicker for the tests: what it describes, converts and refuses is what it was."""

import sys

import numpy as np
import pytest

pytest.importorskip("triton", reason="there is no interpreter without Triton")

import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import _quicker_block, _quicker_conversion, _remembered, repeat_nothing


def test_bfloat16_becomes_float32_as_before_and_subnormals_exactly():
    """All 65,536: what a GPU does, too, is a shift; the interpreter's own way loses the subnormal numbers."""
    repeat_nothing()
    bits = np.arange(1 << 16, dtype=np.uint16)
    own = _quicker_conversion(None)(bits, tl.bfloat16, tl.float32, None)
    assert own.dtype == np.uint32 and (own == bits.astype(np.uint32) << 16).all()
    real = vars(sys.modules["triton.runtime.interpreter"])["_convert_float"].__closure__[0].cell_contents
    normal = (bits & 0x7F80 != 0) | (bits & 0x7FFF == 0)
    assert (real(bits, tl.bfloat16, tl.float32, None) == own)[normal].all()


def test_other_conversions_are_the_interpreters():
    asked = _quicker_conversion(lambda *given: given)
    assert asked("values", tl.float32, tl.bfloat16, None) == ("values", tl.float32, tl.bfloat16, None)


def test_shapes_are_described_and_refused_as_before():
    def described(init, element, shape):
        block = object.__new__(tl.core.block_type)
        init(block, element, shape)
        return block.element_ty, block.shape, block.numel, block.name

    def real(self, element_ty, shape):
        if 3 in shape:
            raise ValueError("a power of 2")
        self.element_ty, self.shape, self.numel, self.name = (
            element_ty,
            tuple(shape),
            len(shape),
            f"{element_ty} {shape}",
        )

    quicker = _quicker_block(real)
    for _ in range(2):
        for element, shape in ((tl.int8, [4]), (tl.int8, [4, 2]), (tl.float32, [4]), (tl.pointer_type(tl.int8), [4])):
            assert described(quicker, element, shape) == described(real, element, shape)
        with pytest.raises(ValueError, match="a power of 2"):
            described(quicker, tl.int8, [3])


def test_types_of_numpy_are_those_of_the_interpreter():
    repeat_nothing()
    real = interpreter._get_np_dtype.__closure__
    remembered = _remembered(next(cell.cell_contents for cell in real if callable(cell.cell_contents)))
    for _ in range(2):
        assert remembered(tl.bfloat16) == np.uint16 and remembered(tl.pointer_type(tl.float32)) == np.uint64
        assert remembered(tl.block_type(tl.int1, [4])) == np.bool_
        assert remembered(tl.block_type(tl.pointer_type(tl.int8), [4])) == np.uint64


def test_operands_are_converted_and_broadcast_as_before(monkeypatch):
    """All pairs of kinds and shapes, numbers among them, for sums and for quotients."""
    repeat_nothing()
    semantic = interpreter.interpreter_semantic
    names = ("binary_op_type_checking_impl", "broadcast_impl_value")
    quicker = {name: getattr(type(semantic), name) for name in names}
    real = {name: found.__closure__[0].cell_contents for name, found in quicker.items()}

    def tensor(kind, shape):
        values = np.ones(shape, interpreter._get_np_dtype(kind))
        return tl.tensor(interpreter.TensorHandle(values, kind), tl.block_type(kind, list(shape)) if shape else kind)

    def converted(by, *given):
        for name, function in by.items():
            monkeypatch.setattr(type(semantic), name, function)
        try:
            made = semantic.binary_op_type_checking_impl(*given)
            return [(str(found.type), found.handle.data.tolist()) for found in made]
        except (TypeError, ValueError, AttributeError) as error:  # there are no constants of bfloat16
            return type(error)

    kinds = [tl.int1, tl.int8, tl.uint8, tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64]
    operands = [tensor(kind, shape) for kind in kinds for shape in ((), (4,), (2, 4))] + [tensor(tl.int8, [2]), 2, 0.5]
    found = set()
    for left in operands:
        for right in operands:
            for given in ((), (False, False, True, True), (True, True, False)):
                made = converted(quicker, left, right, *given)
                assert made == converted(real, left, right, *given)
                found.add(str(made))
    assert len(found) > 100
