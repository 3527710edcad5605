"""Tracking the leaves of nested arguments, and giving plain values back.

Lists, tuples and NumPy arrays are walked, left to right, and keep their types; a container that is met twice stays one
container. Any other object is a leaf. What comes out is searched further: dicts, sets, deques and the attributes of
objects, too, hold plain values when a run has ended.

The caller's containers are never replaced: what stands for one of them turns into it again, and it is written to only
where the function has changed it.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable
from operator import is_not
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any

from engram_toy.tracer.recorder import Recorder
from engram_toy.tracer.tracked import Tracked, is_array

# What an operation has not done yet, it is not charged for: iterators and generators, coroutines, asynchronous ones.
_LAZY = ("__next__", "__await__", "__anext__")
_NOT_SEARCHED = (type, ModuleType, TracebackType)  # they lead to all that is loaded
_CALLED = (FunctionType, MethodType, BuiltinFunctionType)


def leaves(value: Any) -> list[Any]:
    """What lies in lists, tuples and arrays, left to right, in any nesting; a container that recurs is walked once."""
    found: list[Any] = []
    walked: set[int] = set()

    def walk(container: Any) -> None:
        walked.add(id(container))
        items = list(container.flat) if is_array(container) else container
        if all(issubclass(kind, Tracked) for kind in set(map(type, items))):  # a million values of padding, say
            found.extend(items)
            return
        for item in items:
            if isinstance(item, Tracked) or not (isinstance(item, (list, tuple)) or is_array(item)):
                found.append(item)
            elif id(item) not in walked:
                walk(item)

    walk([value])
    return found


def rebuilt(container: Any, parts: Iterable[Any]) -> Any:
    """A list or tuple of the same type and attributes with other parts."""
    kind = type(container)
    if kind is list or kind is tuple:
        return kind(parts)
    if isinstance(container, list):
        copy: Any = list.__new__(kind)
        list.extend(copy, parts)
    else:
        parts = tuple(parts)
        try:
            copy = tuple.__new__(kind, parts)  # the constructor of a named tuple takes its parts one by one
        except TypeError:
            copy = kind(parts)  # a type of C, such as `time.struct_time`, has no other
    for name in _attribute_names(container):
        object.__setattr__(copy, name, getattr(container, name))
    return copy


def _attribute_names(value: Any) -> list[str]:
    names = list(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                names.append(name)
    return names


class Wrapper:
    """Wraps arguments; `inputs` counts the values so far, which are numbered in the order of wrapping."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.inputs = 0
        # By address: an argument, held so that nothing else gets its address, and what stands for it.
        self._wrapped: dict[int, tuple[Any, Any]] = {}
        self._changeable: list[tuple[Any, Any, Any]] = []  # an argument, what stands for it, and that as it was

    def wrap(self, value: Any) -> Any:
        """Track every leaf of `value`, in copies of its containers.

        Raises:
            ValueError: it holds a value of another traced run.
        """
        if value.__class__ in self.recorder.plain_types:
            return self._leaf(value)  # equal numbers may be one object: they are never shared
        if id(value) not in self._wrapped:
            self._wrapped[id(value)] = value, self._wrap_object(value)
        return self._wrapped[id(value)][1]

    def _leaf(self, value: Any) -> Tracked:
        if isinstance(value, Tracked):
            self.recorder.check_own(value)
        self.inputs += 1
        return self.recorder.watch(value, self.inputs - 1)

    def _wrap_object(self, value: Any) -> Any:
        if isinstance(value, list):
            copy = rebuilt(value, ())
            self._wrapped[id(value)] = value, copy  # before its parts: a list may hold itself
            list.extend(copy, self._wrap_parts(value))
            before = list(copy)
        elif isinstance(value, tuple):
            return rebuilt(value, self._wrap_parts(value))
        elif is_array(value) and type(value).__name__ in ("ndarray", "TrackedArray"):  # of a subclass, who knows
            copy = self._wrap_array(value)
            before = copy.copy()
        else:
            return self._leaf(value)
        self._changeable.append((value, copy, before))
        return copy

    def _wrap_parts(self, values: Iterable[Any]) -> list[Any]:
        values = list(values)
        if not self.recorder.plain_types.issuperset(map(type, values)):
            return list(map(self.wrap, values))
        first, self.inputs = self.inputs, self.inputs + len(values)
        return list(self.recorder.watch_plain(values, first))

    def _wrap_array(self, array: Any) -> Any:
        from engram_toy.tracer.arrays import elements, tracked_array

        copy = tracked_array(self._wrap_parts(elements(array)), array, array.dtype)
        copy.flags.writeable = array.flags.writeable
        return copy

    def originals(self) -> dict[int, tuple[Any, Any]]:
        """What stands for a container of the caller, and that container; by the address of the former."""
        return {id(copy): (copy, value) for value, copy in self._wrapped.values() if not isinstance(copy, Tracked)}

    def write_back(self, unwrap: Unwrapper) -> None:
        """Give every argument list and array what the function has changed in it, plain."""
        for original, copy, before in self._changeable:
            if isinstance(original, list):
                if len(copy) != len(before) or any(map(is_not, copy, before)):
                    list.__setitem__(original, slice(None), list(map(unwrap, copy)))
            else:
                from engram_toy.tracer.arrays import changed

                if copy.shape != before.shape:
                    raise ValueError(
                        f"the function has reshaped an argument in place, {before.shape} to {copy.shape}: "
                        "return a.reshape(...) instead"
                    )
                for place, part in changed(before, copy):
                    original[place] = unwrap(part)


class Unwrapper:
    """Plain values for tracked ones, in whatever holds them.

    What can be changed is changed in place, and what holds no tracked value is left alone, so that everything stays
    what it is and shared parts stay shared.

    Args:
        originals: the caller's containers, as `Wrapper.originals` gives them.
    """

    def __init__(self, recorder: Recorder, originals: dict[int, tuple[Any, Any]]) -> None:
        self._recorder = recorder
        # By address: what was met, held so that nothing else gets its address, and the plain thing for it.
        self._plain = originals

    def __call__(self, value: Any) -> Any:
        """The plain thing for `value`.

        Raises:
            ValueError: a value of another run, or work that is still to be done.
        """
        if isinstance(value, Tracked):
            self._recorder.check_own(value)
            return value.value
        if value.__class__ in self._recorder.plain_types or value is None or isinstance(value, _NOT_SEARCHED):
            return value
        if id(value) not in self._plain:
            self._plain[id(value)] = value, value  # before its parts: it may hold itself
            self._plain[id(value)] = value, self._search(value)
        return self._plain[id(value)][1]

    def _search(self, value: Any) -> Any:
        refuse_lazy(value)
        if isinstance(value, (tuple, frozenset)):
            parts = list(map(self, value))
            if not any(map(is_not, parts, value)):
                return value
            return rebuilt(value, parts) if isinstance(value, tuple) else type(value)(parts)
        if is_array(value):
            return self._array(value)
        if isinstance(value, _CALLED):
            self._refuse_kept(value, _held(value))
            return value
        if isinstance(value, (list, deque)):
            plain = self._recorder.plain
            parts = [item.value if item.__class__ is plain else self(item) for item in value]
            if any(map(is_not, parts, value)):
                value.clear()
                value.extend(parts)
        elif isinstance(value, set):
            parts = list(map(self, value))
            if any(map(is_not, parts, value)):
                value.clear()
                value.update(parts)
        elif isinstance(value, dict):
            self._dict(value)
        for name in _attribute_names(value):
            part = getattr(value, name)
            if self(part) is not part:
                object.__setattr__(value, name, self(part))
        if type(value) not in (list, deque, set, dict):
            self._refuse_kept(value, gc.get_referents(value))
        return value

    def _refuse_kept(self, value: Any, parts: Iterable[Any]) -> None:
        """Raise ValueError for what would go on with tracked parts, as nothing can be put in their place."""
        if any(self(part) is not part for part in parts):
            raise ValueError(
                f"the result holds a {type(value).__name__} that keeps traced values: return what it is made of or "
                "computes, say in a list"
            )

    def _dict(self, value: dict[Any, Any]) -> None:
        items = list(dict.items(value))  # an OrderedDict's own would hash its keys
        plain = [(self(key), self(part)) for key, part in items]
        if any(new is not key for (new, _), (key, _) in zip(plain, items)):
            value.clear()
        elif not any(new is not part for (_, new), (_, part) in zip(plain, items)):
            return
        for key, part in plain:
            value[key] = part

    def _array(self, value: Any) -> Any:
        from engram_toy.tracer.arrays import TrackedArray, plain_array

        if value.dtype != object:
            return value.view(type(value).__mro__[1]) if isinstance(value, TrackedArray) else value
        items = list(value.flat)
        parts = list(map(self, items))
        if not isinstance(value, TrackedArray) and not any(map(is_not, parts, items)):
            return value
        return plain_array(parts, value)


def _held(function: Any) -> list[Any]:
    """What a function or a method goes on with when it is called."""
    if not isinstance(function, FunctionType):
        return [function.__self__]
    closure = gc.get_referents(*(function.__closure__ or ()))
    return [*closure, function.__defaults__, function.__kwdefaults__]


def refuse_lazy(value: Any) -> None:
    """Raise ValueError for what would be computed only when it is asked for: it could not be priced."""
    if any(hasattr(type(value), name) for name in _LAZY):
        if hasattr(value, "close") and hasattr(type(value), "send"):
            value.close()  # or Python warns that it was never awaited
        name = type(value).__name__
        raise ValueError(
            f"the result holds a {name}, whose work is not done yet: use it up in the function, say by list()"
        )
