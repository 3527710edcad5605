"""Arrays of tracked values that compute and store as arrays of numbers do.

What: a NumPy array among the arguments becomes an array of objects, of which each element holds a NumPy scalar.
How: whatever NumPy does with such arrays is done twice. On the objects it writes the log: which values are read, and in
which order. On plain arrays of the same values it is the plain program, from which the values of the result are taken:
an int64 wraps, a float32 rounds, a NaN is the maximum.

Loaded only where there is an array; numba is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter, eq, index, ne
from typing import Any

import numpy as np

from engram_toy.tracer.tracked import Tracked

# Methods that go past `__array_ufunc__` and `__array_function__`.
_METHODS = ["__pow__", "argmax", "argmin", "argpartition", "argsort", "choose", "fill", "item", "mean", "partition"]
_METHODS += ["put", "searchsorted", "sort", "tolist"]
# Functions of operands alone, that multiply them.
_PRODUCTS = (np.dot, np.einsum, np.inner, np.outer, np.tensordot, np.vdot)
# Python's, which take the type of an array beside them.
_NUMBERS = frozenset((bool, int, float, complex))
# What compares structured arrays, where the ufunc of the sign has no loop for them.
_COMPARE: dict[Any, Callable[..., Any]] = {np.equal: eq, np.not_equal: ne}
# The ufuncs by which NumPy computes an operator with one of its scalars on the left, and the operator itself, which the
# tracked value on the right has.
_ARITHMETIC: dict[Any, str] = {np.add: "add", np.subtract: "sub", np.multiply: "mul", np.divide: "truediv"}
_ARITHMETIC |= {np.floor_divide: "floordiv", np.remainder: "mod", np.divmod: "divmod", np.power: "pow"}
_ARITHMETIC |= {np.left_shift: "lshift", np.right_shift: "rshift", np.matmul: "matmul"}
_ARITHMETIC |= {np.bitwise_and: "and", np.bitwise_or: "or", np.bitwise_xor: "xor"}
_COMPARISON: dict[Any, str] = {np.equal: "__eq__", np.not_equal: "__ne__", np.less: "__gt__"}
_COMPARISON |= {np.less_equal: "__ge__", np.greater: "__lt__", np.greater_equal: "__le__"}


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
        if function in (np.real, np.imag):
            return getattr(args[0], function.__name__)
        if any(callable(x) and not isinstance(x, type) for x in (*args, *kwargs.values())):  # it may read: call it once
            result = super().__array_function__(function, types, args, kwargs)
            if isinstance(result, TrackedArray):
                result.plain_dtype = None
            return result
        if function in (np.dot, np.outer) and len(args) > 2:
            args, kwargs = args[:2], {**kwargs, "out": args[2]}
        return _twice(function, args, kwargs, _objects(args) if function in _PRODUCTS else args)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return call_ufunc(ufunc, method, inputs, options)

    def astype(self, dtype: Any, *args: Any, **options: Any) -> Any:
        """Numbers, of which each is read once."""
        array, dtype = self, np.dtype(dtype)
        if self.dtype == object and {dtype.kind, _dtype_of(self).kind} <= set("biufc"):
            array = tracked_array([_convert(part, dtype) for part in self.flat], self, dtype)
        return np.ndarray.astype(array, dtype, *args, **options)

    def dot(self, other: Any, out: Any = None) -> Any:
        """`np.dot`, which comes by `__array_function__`."""
        return np.dot(self, other, out)

    @property
    def itemsize(self) -> int:
        """Of the plain program's array."""
        return _dtype_of(self).itemsize

    @property
    def nbytes(self) -> int:
        """Of the plain program's array."""
        return self.size * self.itemsize

    def _cast(self, value: Any) -> Any:
        dtype = _dtype_of(self)
        if dtype.hasobject or dtype.names:
            return value
        if hasattr(value, "__len__") and not isinstance(value, (Tracked, str, bytes)):
            parts = np.array(value, dtype=object)
            if parts.ndim or isinstance(value, np.ndarray):  # not a dict or a set
                whole = _typed(value) or (isinstance(value, TrackedArray) and not _dtype_of(value).hasobject)
                cast = _convert if whole else _cast_one  # of objects, NumPy stores one by one
                return tracked_array([cast(part, dtype) for part in parts.flat], parts, dtype).view(np.ndarray)
        return _cast_one(value, dtype)


def _method(name: str) -> Any:
    method = getattr(np.ndarray, name)
    return lambda self, *args, **options: _twice(method, (self, *args), options, (self, *args))


def _part(name: str) -> Any:
    def part(array: TrackedArray) -> Any:
        if _dtype_of(array).kind == "c":
            raise ValueError(f".{name} of a traced complex array is not traced: pass its parts as two arrays")
        return _twice(attrgetter(name), (array,), {}, (array,))

    return property(part)


def _refused(name: str) -> Any:
    method = getattr(np.ndarray, name)

    def refuse(self: Any, *args: Any, **options: Any) -> Any:
        if self.dtype != object:
            return method(self, *args, **options)
        raise ValueError(f"{name} of a traced array is not traced: its bytes are pointers, take its elements")

    return refuse


for _name in ("byteswap", "tobytes", "tofile"):
    setattr(TrackedArray, _name, _refused(_name))
for _name in _METHODS:
    setattr(TrackedArray, _name, _method(_name))
for _name in ("real", "imag"):
    setattr(TrackedArray, _name, _part(_name))


def call_ufunc(ufunc: Any, method: str, inputs: Any, options: dict[str, Any]) -> Any:
    """What NumPy asks for where a tracked value, or an array of them, is among the operands of a ufunc."""
    if method == "__call__" and not options and isinstance(inputs[-1], Tracked):
        operator = _operator_of(ufunc, inputs[0], inputs[-1].value)
        if operator is not None:
            return getattr(inputs[-1], operator)(inputs[0][()])
    # Nothing that is called below may have a tracked value alone among its operands: NumPy would ask here again.
    if method == "at" and isinstance(inputs[1], Tracked):
        inputs = (inputs[0], _place(inputs[1]), *inputs[2:])
    if isinstance(options.get("where"), Tracked):
        bool(options["where"])  # the read
        options = {**options, "where": options["where"].value}
    outputs = [out for out in options.get("out", ()) if out is not None]
    if any(isinstance(out, Tracked) for out in outputs):
        raise TypeError("return arrays must be of ArrayType")
    call = ufunc if method == "__call__" else getattr(ufunc, method)
    if set("".join(ufunc.types)) <= set("O->"):  # made by `np.frompyfunc`: it may read, too
        result = call(*(_cell(x) if isinstance(x, Tracked) else _bare(x) for x in inputs), **options)
        return result.view(TrackedArray) if isinstance(result, np.ndarray) else result
    if not any(isinstance(x, TrackedArray) for x in (*inputs, *outputs, options.get("where"))):
        numbers = [*(x for i, x in enumerate(inputs) if method != "at" or i != 1), *outputs]
        if not all(map(_is_numeric, numbers)):  # NumPy computes with objects, in the plain program as well
            among = any(_untyped(x) and not any(isinstance(part, np.generic) for part in _values(x)) for x in inputs)
            return call(*(_python_cell(x, among) if isinstance(x, Tracked) else x for x in inputs), **options)
    if method == "at" and _typed(inputs[0]) and len(inputs) > 2:
        return _write_at(ufunc, *inputs)
    operands = _objects(inputs, but=1 if method in ("at", "reduceat") else None)  # indices stay what they are
    if method == "at" and _untyped(inputs[0]):  # and so does what is written to
        operands = (inputs[0], *operands[1:])
    if ufunc in _COMPARE and any(isinstance(x, TrackedArray) and _dtype_of(x).names for x in inputs):
        call = _COMPARE[ufunc]
    return _twice(call, inputs, options, operands)


def _operator_of(ufunc: Any, left: Any, right: Any) -> str | None:
    """The operator of the value on the right, if NumPy computes that of a scalar of its own on the left."""
    if isinstance(left, np.generic) and ufunc in _ARITHMETIC:
        return f"__r{_ARITHMETIC[ufunc]}__"
    known = isinstance(right, np.generic) or type(right) in (bool, int, float, complex, str)
    scalar = type(left) is np.ndarray and left.ndim == 0 and left.dtype != object  # so that of a comparison comes
    return _COMPARISON.get(ufunc) if known and scalar else None


def _python_cell(part: Any, among_objects: bool) -> np.ndarray:
    """A traced value for NumPy to compute with as an object: beside objects it makes Python numbers of its own."""
    if among_objects and isinstance(part.value, (np.number, np.bool_)):
        part = part._recorder.watch(part.value.item(), part.id)
    return _cell(part)


def _place(place: Any) -> Any:
    """A traced index of `ufunc.at`: a bool is a mask."""
    if isinstance(place.value, (bool, np.bool_)):
        return bool(place)
    return index(place) if hasattr(place.value, "__index__") else place.value  # which NumPy refuses


def _is_numeric(value: Any) -> bool:
    """Whether NumPy has numbers here and not objects; of its subclasses of arrays, who knows."""
    value = _value(value)
    if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
        return False
    return np.asarray(value).dtype.kind in "biufc"


def tracked_array(parts: Sequence[Any], like: np.ndarray, dtype: np.dtype | None) -> TrackedArray:
    """These elements, in row-major order, as an array of objects that lies in memory as another one does."""
    flat = np.empty(len(parts), object)
    for i, part in enumerate(parts):  # one by one: numpy would make axes of tuples
        flat[i] = part
    array = np.empty_like(like.view(np.ndarray), dtype=object)
    array[...] = flat.reshape(like.shape)
    traced = array.view(TrackedArray)
    traced.plain_dtype = dtype
    return traced


def elements(array: np.ndarray) -> Iterator[Any]:
    """The elements of a plain array as scalars of its type; a structured one is a tuple of its fields."""
    flat = array.flatten()
    return map(_fields, flat) if flat.dtype.kind in "OV" else iter(flat)


def changed(before: np.ndarray, after: np.ndarray) -> list[tuple[tuple[int, ...], Any]]:
    """Where other elements stand than before, and which."""
    places = zip(np.ndindex(before.shape), before.flat, after.flat)
    return [(place, new) for place, old, new in places if new is not old]


def plain_array(parts: list[Any], array: np.ndarray, beside: Iterable[np.dtype] = ()) -> np.ndarray:
    """The array that the plain program has, from plain elements.

    Args:
        beside: types that count as well where the array has none of its own.
    """
    dtype = array.plain_dtype if isinstance(array, TrackedArray) else None
    kept = dtype is not None and (dtype.hasobject or dtype.names)
    if dtype is None or (not kept and any(type(part) is not dtype.type for part in parts)):
        dtype = _common_dtype([*parts, *(np.empty(0, other) for other in beside)])
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
        array.plain_dtype = _common_dtype(_values(array))
    return array.plain_dtype


def _common_dtype(values: Iterable[Any]) -> np.dtype:
    """What holds them all; a Python number takes the type of the NumPy scalars beside it."""
    values = list(values)
    samples: dict[Any, Any] = {getattr(value, "dtype", type(value)): value for value in values}
    if any(isinstance(value, (tuple, list, dict, set)) or value is None for value in samples.values()):
        return np.dtype(object)
    try:
        return np.result_type(*(key if isinstance(key, np.dtype) else value for key, value in samples.items()))
    except (TypeError, ValueError):  # none, or nothing that numpy has a number for
        texts = all(isinstance(value, (str, bytes)) for value in values)  # of which the longest counts
        return np.array(values if texts else list(samples.values())).dtype


def _cast_one(part: Any, dtype: np.dtype) -> Any:
    """As NumPy stores an element: an integer that does not fit is refused."""
    return _stored(part, dtype, _value(part))


def _convert(part: Any, dtype: np.dtype) -> Any:
    """As NumPy converts an array: an integer that does not fit wraps."""
    return _stored(part, dtype, np.asarray(_value(part)))


def _stored(part: Any, dtype: np.dtype, value: Any) -> Any:
    if getattr(_value(part), "dtype", None) == dtype:
        return part
    stored = _cell(value, dtype)[()]
    return part._recorder.watch(stored, part.id) if isinstance(part, Tracked) else stored


def _value(part: Any) -> Any:
    return part.value if isinstance(part, Tracked) else part


def _cell(part: Any, dtype: Any = object) -> np.ndarray:
    """One element as an array without axes, exactly as NumPy stores it."""
    cell = np.empty((), dtype)
    cell[()] = part
    return cell


def _twice(call: Callable[..., Any], args: Any, options: dict[str, Any], operands: Any) -> Any:
    """The outcome of a call on tracked values, with the values that it has on plain ones.

    Args:
        operands: what it is called with where it is traced, in place of `args`.
    """
    given = [args, *options.values()]
    plain_args, plain_options = _plain(args, given), {name: _plain(x, given) for name, x in options.items()}
    try:
        plain = call(*plain_args, **plain_options)
    except TypeError:
        out = options.get("out")
        if not any(map(_untyped, out if isinstance(out, tuple) else (out,))):
            raise
        plain_options["out"] = _open_to_all(out, plain_options["out"])
        plain = call(*plain_args, **plain_options)
    traced_options = {name: _bare(x) for name, x in options.items()}
    if "out" in options and isinstance(call, np.ufunc) and any(map(_typed, options["out"])):
        traced_options["casting"] = "unsafe"  # a traced value becomes a number by a read, as in `x[0] = a[0]`
        traced_options["out"] = tuple(map(_roomy, traced_options["out"]))
    with np.errstate(all="ignore"):  # the plain call has warned
        traced = call(*_bare(operands), **traced_options)
    if "out" in options and isinstance(call, np.ufunc):
        for out, used, numbers in zip(options["out"], traced_options["out"], plain_options["out"]):
            if used.__class__ is np.ndarray and _typed(out) and used is not out:
                out[...] = numbers
    if plain is None:  # it has changed an array
        target = _target(args, options)
        if isinstance(target, np.ndarray):
            _settle(call, target, _target(plain_args, plain_options))
    result, out = _settle(call, traced, plain), options.get("out")
    if not isinstance(out, tuple):
        return result if out is None else out
    results = result if isinstance(result, tuple) else (result,)
    stored = tuple(part if target is None else target for target, part in zip(out, results))
    return stored if isinstance(result, tuple) else stored[0]


def _write_at(ufunc: np.ufunc, target: np.ndarray, places: Any, values: Any) -> None:
    """`ufunc.at` of an array of numbers: what comes of traced values becomes a number by a read, as in `x[0] = a[0]`.

    Beside objects NumPy would compute with Python numbers, which take their type from the values.
    """
    numbers, places, values = target.view(np.ndarray), _bare(places), np.asarray(_bare(values))
    if not _traces(values):
        ufunc.at(numbers, places, values)
        return
    plain, plain_values = numbers.copy(), _plain(values)
    ufunc.at(plain, _plain(places), plain_values)
    old_dtype, value_dtype, _ = ufunc.resolve_dtypes((plain.dtype, plain_values.dtype, plain.dtype), casting="unsafe")

    def write(old: Any, value: Any) -> Any:
        made = ufunc(_cell(_convert(old, old_dtype)), _cell(_convert(value, value_dtype)))
        return _cell(_convert(made, plain.dtype), plain.dtype)[()]

    with np.errstate(all="ignore"):  # the plain call has warned
        np.frompyfunc(write, 2, 1).at(_object(numbers), places, values)  # in the ufunc's own order
    numbers[...] = plain


def _target(args: Any, options: dict[str, Any]) -> Any:
    """What a function that returns nothing changes."""
    return args[0] if args else next((options[name] for name in ("a", "arr", "dst") if name in options), None)


def _plain(value: Any, given: Any = ()) -> Any:
    """A copy of what the plain program has here.

    Args:
        given: all that the call is given. An untraced array of objects that are Python numbers takes its type from the
            traced arrays in it, as a single Python number does: it may be `np.zeros(n, a.dtype)`.
    """
    if isinstance(value, Tracked):
        return value.value
    if type(value) in (list, tuple):
        return type(value)([_plain(part, given) for part in value])
    if not isinstance(value, np.ndarray):
        return value
    plain = value.view(np.ndarray)
    if value.dtype == object:
        parts = _values(value)
        beside: Iterable[np.dtype] = ()
        dtype = getattr(value, "plain_dtype", None)
        if dtype is None or dtype.kind in "OV":
            kinds = set(map(type, parts))
            if any(issubclass(kind, (tuple, list, np.ndarray)) for kind in kinds):
                parts = list(map(_plain, parts))  # a structured element is a tuple of tracked values
            elif _untyped(value) and _NUMBERS.issuperset(map(type, value.flat)):
                beside = _dtypes(given)
        plain = plain_array(parts, value, beside)
    copy = _laid_like(value, plain.dtype)
    copy[...] = plain
    return copy


def _roomy(out: Any) -> Any:
    """What traced results are written to in place of narrow integers, where they would not wrap but overflow."""
    narrow = _typed(out) and out.dtype.kind in "iu" and out.itemsize < 8
    return _laid_like(out, np.int64) if narrow else out


def _typed(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype != object


def _untyped(value: Any) -> bool:
    """Whether it is an array of objects that was not made from a traced one."""
    return isinstance(value, np.ndarray) and value.dtype == object and not isinstance(value, TrackedArray)


def _open_to_all(out: Any, plain: Any) -> Any:
    """What stands for `out` in the plain call, but that untraced objects may become any: the traced call's own stay."""
    if isinstance(out, tuple):
        return tuple(map(_open_to_all, out, plain))
    return plain.astype(object) if _untyped(out) else plain


def _dtypes(given: Any) -> Iterator[np.dtype]:
    """The types of the traced arrays of numbers."""
    for value in given:
        if isinstance(value, (list, tuple)):
            yield from _dtypes(value)
        elif isinstance(value, TrackedArray) and _dtype_of(value).kind in "biufc":
            yield _dtype_of(value)


def _laid_like(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A new array in which NumPy goes its ways in the same order: that of memory, whatever the signs of strides."""
    turned: Any = (..., *(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides))
    return np.empty_like(array.view(np.ndarray)[turned], dtype=dtype)[turned]


def _values(array: np.ndarray) -> list[Any]:
    return list(map(_value, array.flat))


def _traces(value: Any) -> bool:
    return isinstance(value, Tracked) or (isinstance(value, np.ndarray) and value.dtype == object)


def _objects(operands: Any, but: int | None = None) -> Any:
    """Untraced arrays among the operands as arrays of NumPy scalars: NumPy would make Python numbers of them."""
    if not any(map(_traces, operands)):
        return operands
    return tuple(x if i == but else _object(x) for i, x in enumerate(operands))


def _object(value: Any) -> Any:
    if isinstance(value, Tracked):
        return _cell(value)
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype == object:
        return value
    array = np.asarray(value)
    objects = _laid_like(array, object)
    for place, element in zip(np.ndindex(array.shape), elements(array)):
        objects[place] = element
    return objects


def _bare(value: Any) -> Any:
    """Arrays as NumPy's own, on which it does what it does with any objects."""
    if type(value) in (list, tuple):
        return type(value)(map(_bare, value))
    return value.view(np.ndarray) if isinstance(value, TrackedArray) else value


def _settle(call: Any, traced: Any, plain: Any) -> Any:
    """What was traced, with the values of the plain program under the numbers of the traced ones."""
    if isinstance(traced, (tuple, list)) and len(traced) == len(plain):
        parts = [_settle(call, *pair) for pair in zip(traced, plain)]
        return parts if isinstance(traced, list) else tuple.__new__(type(traced), parts)
    if isinstance(traced, np.ndarray):
        return _settle_array(call, traced, np.asarray(plain))
    if isinstance(plain, (np.generic, bool, int, float, complex)):
        return traced._recorder.watch(plain, traced.id) if isinstance(traced, Tracked) else plain
    return traced


def _settle_array(call: Any, traced: np.ndarray, plain: np.ndarray) -> Any:
    if traced.shape != plain.shape:
        name = getattr(call, "__name__", call)
        raise ValueError(f"{name} of traced values has shape {traced.shape}, not {plain.shape}: keep NaN out of it")
    cells = traced.view(np.ndarray)
    if traced.dtype != object:
        if traced.dtype != plain.dtype:
            return plain
        if traced.tobytes() != plain.tobytes():
            cells[...] = plain
        return traced
    if not plain.dtype.hasobject and not plain.dtype.names and not _holds(cells, plain):
        if not cells.flags.writeable:  # the zeros of `imag`
            traced = cells = cells.copy("K")
        for place in np.ndindex(plain.shape):
            part = cells[place]
            value = plain[place]
            cells[place] = part._recorder.watch(value, part.id) if isinstance(part, Tracked) else value
    result = traced if isinstance(traced, TrackedArray) else traced.view(TrackedArray)
    result.plain_dtype = plain.dtype
    return result


def _holds(cells: np.ndarray, plain: np.ndarray) -> bool:
    """Whether an array of objects holds these very values: then it may be a view, which stays what it is."""
    values = _values(cells)
    same_type = all(type(value) is plain.dtype.type for value in values)
    return same_type and np.array(values, plain.dtype).tobytes() == plain.tobytes()
