"""Hashing a few tokens at a time: the fused loop without the cost of calling it, for token-by-token decoding.

Hashing one token takes 0.05 us; unpacking two arrays for numba and making a third takes 0.5 us. So the ids are
read and the indices made as a C extension would: by the fields of NumPy's array structure and its function
table, both the same in NumPy 1 and 2. `_host` looks whether they lie where they should; where they do not
(another Python than CPython, 32 bits), `step` declines and the arrays are handed over the ordinary way.
Nothing of an object is looked at before its type is known to be numpy.ndarray itself.

    python bench/hashing_speed.py
"""

# mypy: disable-error-code="call-arg, call-overload, var-annotated"
# (the signatures of functions that numba compiles are not those that mypy sees)

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import NativeValue, box, intrinsic, models, register_model, unbox

from engram_ref.hashing.fused import hash_rows
from engram_ref.loops import compiled, pointer

_TYPE, _DATA, _NDIM, _SHAPE, _DESCR, _FLAGS = 8, 16, 24, 32, 56, 64  # bytes from the start of the object
_ARRAY_EMPTY = 184  # place of PyArray_Empty in NumPy's function table
_STEP_TOKENS = 64  # above this the arrays cost little and the GIL is let go
_HOST_NDARRAY, _HOST_INT64, _HOST_INT32, _HOST_EMPTY, _HOST_NONE = range(5)


class _Object(types.Opaque):
    """A Python object, passed as its address."""


_object = _Object("object by address")
register_model(_Object)(models.OpaqueModel)


@unbox(_Object)
def _unbox_object(numba_type, value, context):
    return NativeValue(value)


@box(_Object)
def _box_object(numba_type, value, context):
    return value


@intrinsic
def _address(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(value), generate


@intrinsic
def _none(typing_context):
    def generate(context, builder, signature, arguments):
        python = context.get_python_api(builder)
        none = python.borrow_none()
        python.incref(none)
        return none

    return _object(), generate


@intrinsic
def _release(typing_context, value):
    def generate(context, builder, signature, arguments):
        context.get_python_api(builder).decref(arguments[0])
        return context.get_dummy_value()

    return types.void(value), generate


@intrinsic
def _new_array(typing_context, function, descr, batch, length, columns):
    """PyArray_Empty(3, {batch, length, columns}, descr, 0), which keeps a reference to descr."""

    def generate(context, builder, signature, arguments):
        function, descr, *shape = arguments
        int32, int64, pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
        dimensions = builder.alloca(int64, 3)
        for axis, extent in enumerate(shape):
            builder.store(extent, builder.gep(dimensions, [int32(axis)]))
        descr = builder.inttoptr(descr, pointer)
        context.get_python_api(builder).incref(descr)
        signature = ir.FunctionType(pointer, [int32, int64.as_pointer(), pointer, int32])
        call = builder.inttoptr(function, signature.as_pointer())
        return builder.call(call, [int32(3), dimensions, descr, int32(0)])

    return _object(function, descr, batch, length, columns), generate


@njit(inline="always")
def _field(array, offset):
    return pointer(array + offset, types.int64(0))[0]


@njit(inline="always")
def _is_plain(array, host):
    """Whether the object at this address is an int64 array of two dimensions in C order; no subclass."""
    return (
        _field(array, _TYPE) == host[_HOST_NDARRAY]
        and pointer(array + _NDIM, types.int32(0))[0] == 2
        and _field(array, _DESCR) == host[_HOST_INT64]
        and pointer(array + _FLAGS, types.int32(0))[0] & 0x101 == 0x101  # C order, aligned
    )


@njit(inline="always")
def _view(array):
    shape = pointer(_field(array, _SHAPE), types.int64(0))
    return carray(pointer(_field(array, _DATA), types.int64(0)), (shape[0], shape[1]))


def _hash_step(ids_object, before_object, address, host_address):
    host = pointer(host_address, types.int64(0))
    ids, before = _address(ids_object), _address(before_object)
    has_history = before != host[_HOST_NONE]
    if not _is_plain(ids, host) or (has_history and not _is_plain(before, host)):
        return _none()
    tokens = _view(ids)
    if tokens.size == 0 or tokens.size > _STEP_TOKENS:
        return _none()
    past = _view(before) if has_history else carray(pointer(host_address, types.int64(0)), (0, 0))
    constants = pointer(address, types.int64(0))
    batch, length = tokens.shape
    columns = (constants[2] - 1) * constants[3]
    made = _new_array(host[_HOST_EMPTY], host[_HOST_INT32], batch, length, columns)
    if _address(made) == 0:
        return made  # no memory: the exception is set
    rows = carray(pointer(_field(_address(made), _DATA), types.int32(0)), (batch, length, columns))
    if hash_rows(tokens, past, address, rows):
        return made
    _release(made)
    return _none()


def _host() -> np.ndarray | None:
    """Addresses of this process that a step needs; None where arrays do not lie as they should."""
    if sys.implementation.name != "cpython" or object.__basicsize__ != _DATA or np.dtype(np.intp).itemsize != 8:
        return None
    sample = np.ones((3, 5), dtype=np.int64)
    found = [ctypes.c_int64.from_address(id(sample) + at).value for at in (_TYPE, _DATA, _DESCR)]
    shape = ctypes.c_int64.from_address(id(sample) + _SHAPE).value
    found += [ctypes.c_int32.from_address(id(sample) + at).value for at in (_NDIM, _FLAGS)]
    flags = found.pop() & 0x101
    if found != [id(np.ndarray), sample.ctypes.data, id(sample.dtype), 2] or flags != 0x101:
        return None
    if list((ctypes.c_int64 * 2).from_address(shape)) != [3, 5]:
        return None
    core = importlib.import_module(f"numpy.{'core' if np.__version__.startswith('1.') else '_core'}.multiarray")
    table = ctypes.pythonapi.PyCapsule_GetPointer
    table.restype, table.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    empty = ctypes.c_int64.from_address(table(core._ARRAY_API, None) + 8 * _ARRAY_EMPTY).value
    addresses = [id(np.ndarray), id(np.dtype(np.int64)), id(np.dtype(np.int32)), empty, id(None)]
    return np.array(addresses, dtype=np.int64)


def _no_step(ids: Any, before: Any, address: int, host: int) -> None:
    return None


_HOST = _host()
_compiled_step = compiled(_hash_step, [_object(_object, _object, types.int64, types.int64)])
# The compiled code itself: numba's dispatcher does not know the type `_Object`, and takes longer than a token.
_step = _compiled_step.overloads[_compiled_step.signatures[0]].entry_point


def step(dtype: np.dtype[Any]) -> tuple[Callable[[Any, Any, int, int], np.ndarray | None], int]:
    """`hash_step`, and the last of its arguments, for rows of `dtype`.

    `hash_step(ids, history's ids or None, address of the packed constants, this integer)` gives new rows
    [B, T, C], or None for anything but a few tokens in plain arrays. It takes any object as ids or history.
    """
    if _HOST is None or dtype != np.int32:
        return _no_step, 0
    return _step, _HOST.ctypes.data
