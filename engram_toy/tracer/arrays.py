"""Arrays of tracked values that compute and store as arrays of numbers do.

What: a NumPy array among the arguments becomes an array of objects, of which each element holds a NumPy scalar. Its
arithmetic is that of the array's own type: an int64 wraps, a float32 rounds.

Loaded only where there is an array; numba is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from engram_toy.tracer.tracked import Tracked

_TOTALS = ("reduce", "accumulate", "reduceat")  # of a ufunc, over an array


class TrackedArray(np.ndarray):
    """Tracked values, or constants, in an array of objects.

    Attributes:
        plain_dtype: what the plain program has here; None until it is asked for, then found from the elements.
    """

    plain_dtype: np.dtype | None

    def __array_finalize__(self, source: Any) -> None:
        self.plain_dtype = getattr(source, "plain_dtype", None)

    def __setitem__(self, index: Any, value: Any) -> None:
        # An array of objects stores whatever it is given, where `a[0] = 0.5` in one of integers stores 0: what is
        # stored is cast first, free of charge and under the number of the value that it comes from.
        super().__setitem__(index, self._cast(value) if self.dtype == object else value)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.average and args and isinstance(args[0], TrackedArray) and _dtype_of(args[0]).kind in "biu":
            args = (_cast_all(args[0], np.dtype(np.float64)), *args[1:])  # before it is weighted
        result = super().__array_function__(function, types, args, kwargs)
        if isinstance(result, TrackedArray) and not function.__name__.endswith("_like"):
            result.plain_dtype = None  # of `concatenate`, say, it is not that of the first array
        return result

    def dot(self, other: Any, out: Any = None) -> Any:
        """`np.dot`, which comes by `__array_function__`."""
        return np.dot(self, other, out)

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None, *args: Any, **options: Any) -> Any:
        """`np.mean`: NumPy's own asks an array of objects for its type, and divides by a float64."""
        plain = _dtype_of(self)
        if dtype is not None or out is not None or plain.kind not in "biufc":
            return super().mean(axis, dtype, out, *args, **options)
        wide = np.dtype(np.float32 if plain == np.float16 else np.float64 if plain.kind in "biu" else plain)
        mean = np.ndarray.mean(_cast_all(self, wide), axis, None, None, *args, **options)
        return _cast_all(mean, np.ones(1, plain).mean().dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        total = None
        if ufunc in (np.add, np.multiply) and method in _TOTALS and np.dtype(options.get("dtype") or object) == object:
            inputs, total = _widened(ufunc, method, inputs, out)
        bare = [x.view(np.ndarray) if isinstance(x, TrackedArray) else x for x in inputs]
        traced_out = any(isinstance(target, TrackedArray) for target in out)
        if out and not traced_out:
            options["out"] = out
        # Scalars warn of an integer's overflow, arrays do not.
        integers = all(_dtype_of(x).kind in "iub" for x in inputs if isinstance(x, TrackedArray))
        with np.errstate(over="ignore" if integers else None):
            result = getattr(ufunc, method)(*bare, **options)
        if total is not None and not out:
            result = _cast_all(result, total)
        if not traced_out:
            return tuple(map(_traced, result)) if isinstance(result, tuple) else _traced(result)
        results = result if isinstance(result, tuple) else (result,)
        for target, part in zip(out, results):
            _store_in_place(target, part, options.get("casting", "same_kind"))
        return out if isinstance(result, tuple) else out[0]

    def _cast(self, value: Any) -> Any:
        dtype = _dtype_of(self)
        if dtype.hasobject or dtype.names:
            return value
        if isinstance(value, (list, tuple, np.ndarray)):
            parts = np.array(value, dtype=object)
            return tracked_array([_cast_one(part, dtype) for part in parts.flat], parts.shape, dtype).view(np.ndarray)
        return _cast_one(value, dtype)


def tracked_array(parts: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype | None) -> TrackedArray:
    """These elements, in row-major order, as an array of objects."""
    array = np.empty(len(parts), object)
    for i, part in enumerate(parts):  # one by one: numpy would make axes of tuples
        array[i] = part
    traced = array.reshape(shape).view(TrackedArray)
    traced.plain_dtype = dtype
    return traced


def elements(array: np.ndarray) -> Iterator[Any]:
    """The elements of a plain array as scalars of its type; a structured one is a tuple of its fields."""
    return map(_fields, array.flatten())


def changed(before: np.ndarray, after: np.ndarray) -> list[tuple[tuple[int, ...], Any]]:
    """Where other elements stand than before, and which."""
    places = zip(np.ndindex(before.shape), before.flat, after.flat)
    return [(place, new) for place, old, new in places if new is not old]


def plain_array(parts: list[Any], array: np.ndarray) -> np.ndarray:
    """The array that the plain program has, from plain elements."""
    dtype = array.plain_dtype if isinstance(array, TrackedArray) else None
    if dtype is None or (not dtype.names and any(type(part) is not dtype.type for part in parts)):
        dtype = _common_dtype(parts)
    if dtype.hasobject:
        plain = np.empty(len(parts), object)
        for i, part in enumerate(parts):
            plain[i] = part
    else:
        plain = np.array(parts, dtype)
    return plain.reshape(array.shape)


def _fields(element: Any) -> Any:
    if isinstance(element, np.void) and element.dtype.names:
        return tuple(_fields(element[name]) for name in element.dtype.names)
    return element


def _dtype_of(array: TrackedArray) -> np.dtype:
    if array.dtype != object:  # such as `np.zeros_like(a, dtype=int)`
        return array.dtype
    if array.plain_dtype is None:
        array.plain_dtype = _common_dtype(x.value if isinstance(x, Tracked) else x for x in array.flat)
    return array.plain_dtype


def _common_dtype(values: Iterable[Any]) -> np.dtype:
    """What holds them all; a Python number takes the type of the NumPy scalars beside it."""
    samples: dict[Any, Any] = {getattr(value, "dtype", type(value)): value for value in values}
    if any(isinstance(value, (tuple, list, dict, set)) or value is None for value in samples.values()):
        return np.dtype(object)
    try:
        return np.result_type(*(key if isinstance(key, np.dtype) else value for key, value in samples.items()))
    except (TypeError, ValueError):  # none, or nothing that numpy has a number for
        return np.array(list(samples.values())).dtype


def _cast_one(part: Any, dtype: np.dtype) -> Any:
    value = part.value if isinstance(part, Tracked) else part
    if getattr(value, "dtype", None) == dtype:
        return part
    cell = np.empty((), dtype)
    cell[()] = value  # exactly as numpy stores it
    return part._recorder.watch(cell[()], part.id) if isinstance(part, Tracked) else cell[()]


def _cast_all(parts: Any, dtype: np.dtype) -> Any:
    """An array of these parts, or a single one, in another type: free of charge, and read in the same order."""
    if not isinstance(parts, np.ndarray):
        return _cast_one(parts, dtype)
    if parts.dtype != object or _dtype_of(parts.view(TrackedArray)) == dtype:
        return parts
    # NumPy goes through an array as it lies in memory, whatever the signs of its strides: the copy lies likewise.
    turned = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in parts.strides)
    cast = parts.view(np.ndarray)[turned].copy(order="K")[turned]
    for place in np.ndindex(parts.shape):
        cast[place] = _cast_one(cast[place], dtype)
    traced = cast.view(TrackedArray)
    traced.plain_dtype = dtype
    return traced


def _widened(ufunc: np.ufunc, method: str, inputs: Any, out: Any) -> tuple[Any, np.dtype | None]:
    """An array of numbers in the type in which NumPy adds or multiplies it up, and the type of the total."""
    array, *rest = inputs
    plain = _dtype_of(array) if isinstance(array, TrackedArray) else np.dtype(object)
    if plain.kind not in "biufc":
        return inputs, None
    total = ufunc.reduce(np.empty(0, plain)).dtype  # bools and small integers become integers of 64 bits
    if out:
        total = np.result_type(plain, _dtype_of(out[0]) if isinstance(out[0], TrackedArray) else out[0].dtype)
    halves = total == np.float16 and method != "accumulate"  # which NumPy rounds only once they are all added up
    return (_cast_all(array, np.dtype(np.float32) if halves else total), *rest), total


def _traced(result: Any) -> Any:
    return result.view(TrackedArray) if type(result) is np.ndarray and result.dtype == object else result


def _store_in_place(target: Any, result: Any, casting: Any) -> None:
    """What `a += b` and `out=` do."""
    if not isinstance(target, TrackedArray) or target.dtype != object:
        target[...] = result
    elif casting == "unsafe":  # numpy's own mean: there, the plain program has another type
        target.view(np.ndarray)[...] = result
        target.plain_dtype = None
    else:
        computed = _dtype_of(np.asarray(result, object).view(TrackedArray))
        if not np.can_cast(computed, _dtype_of(target), casting):
            raise TypeError(f"{computed} does not fit into an array of {_dtype_of(target)}: compute a new array")
        target[...] = result
