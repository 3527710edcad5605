"""Triton's interpreter without the work that it repeats: six tenths of the time for a kernel of many small operations.

It replaces the functions of `triton.language` when a kernel is launched and puts them back when it ends. In each call
of a device function it replaces them once more, a millisecond and a half for nothing. For each value it describes type
and shape anew, though a kernel has a few of either; described and refused is the same as before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repeat_nothing() -> None:
    """For this process; a second call changes nothing."""
    real = interpreter._patch_lang

    def _patch_lang(fn):
        languages = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
        is_replaced = all(lang.static_range.__module__ == interpreter.__name__ for lang in languages)
        return interpreter._LangPatchScope() if is_replaced else real(fn)

    if real.__module__ == interpreter.__name__:
        interpreter._patch_lang = _patch_lang
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
        interpreter._convert_float = _quicker_conversion(interpreter._convert_float)
        tl.core.tensor.__init__ = _describe_tensor
        tl.core.block_type.__init__ = _quicker_block(tl.core.block_type.__init__)
        semantic = tl.semantic.TritonSemantic
        semantic.broadcast_impl_value = _quicker_broadcast(semantic.broadcast_impl_value)
        semantic.binary_op_type_checking_impl = _quicker_check(semantic.binary_op_type_checking_impl)


def _remembered(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's type of Triton's: `np_dtype` makes a dictionary of all types for each answer."""
    known: dict[str, Any] = {}

    def remembered(type_: Any) -> Any:
        name = type_.scalar.name  # of a block it is that of its elements
        if name not in known:
            known[name] = np_dtype(type_)
        return known[name]

    return remembered


def _quicker_conversion(convert: Callable[..., Any]) -> Callable[..., Any]:
    """From bfloat16 to float32 the bits are shifted: what `convert` computes from their parts, subnormals apart."""

    def quicker(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        return convert(values, source, target, rounding)

    return quicker


@functools.cache
def _shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """How a tensor says how many elements it has, and its shape."""
    return tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(size) for size in shape])


def _describe_tensor(self: Any, handle: Any, type: Any) -> None:
    """`tensor.__init__`."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    try:
        self.numel, self.shape = type.of_tensors
    except AttributeError:  # the first of this type
        self.numel, self.shape = type.of_tensors = _shape(type.shape if type.is_block() else ())


def _quicker_block(describe: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`: a shape that was allowed once is."""
    known: dict[tuple[Any, ...], Any] = {}

    def quicker(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if any(type(size) is not int for size in shape):
            describe(self, element_ty, shape)
        elif key in known:
            self.element_ty = element_ty
            self.shape, self.numel, self.name, self.of_tensors = known[key]
        else:
            describe(self, element_ty, shape)
            self.of_tensors = _shape(self.shape)
            known[key] = self.shape, self.numel, self.name, self.of_tensors

    return quicker


def _quicker_broadcast(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Two tensors of one shape stay what they are; it would compare the sizes of every axis."""

    def quicker(self: Any, left: Any, right: Any) -> Any:
        same = left.shape is right.shape  # one object a shape, see `_shape`
        return (left, right) if same else broadcast(self, left, right)

    return quicker


def _quicker_check(check: Callable[..., Any]) -> Callable[..., Any]:
    """Two tensors of one type of numbers are not converted, but for a quotient of halves, which is a float32."""

    def quicker(self: Any, left: Any, right: Any, *given: Any, **more: Any) -> Any:
        if isinstance(left, tl.tensor) and isinstance(right, tl.tensor):
            kind = left.dtype
            if kind.name == right.dtype.name and not (kind.is_ptr() or more.get("div_or_mod") or len(given) > 3):
                return self.broadcast_impl_value(left, right)
        return check(self, left, right, *given, **more)

    return quicker
