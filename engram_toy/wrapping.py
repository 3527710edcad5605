"""Tracking the leaves of nested arguments, and giving plain values back.

Lists, tuples and NumPy arrays are walked, left to right; a container that is met twice stays one container.
Any other object is a leaf. NumPy is never imported here: where there is an array, it has been.
"""

from __future__ import annotations

import sys
from typing import Any

from engram_toy.tracked import PLAIN_TYPES, Recorder, Tracked


def is_array(value: Any) -> bool:
    """Whether `value` is a NumPy array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def leaves(value: Any) -> list[Any]:
    """What lies in lists, tuples and arrays, left to right, in any nesting; a container that recurs is walked once."""
    found: list[Any] = []
    walked: set[int] = set()

    def walk(container: Any) -> None:
        walked.add(id(container))
        items = container.flatten().tolist() if is_array(container) else container
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


class Wrapper:
    """Wraps arguments; `inputs` counts the values so far, which are numbered in the order of wrapping."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.inputs = 0
        self._wrapped: dict[int, Any] = {}
        self._written_back: list[tuple[Any, Any]] = []

    def wrap(self, value: Any) -> Any:
        """Track every leaf of `value`, in copies of its containers."""
        if value.__class__ in PLAIN_TYPES:
            return self._leaf(value)  # equal numbers may be one object: they are never shared
        known = self._wrapped.get(id(value))
        if known is None:
            known = self._wrap_object(value)
            self._wrapped[id(value)] = known
        return known

    def _leaf(self, value: Any) -> Tracked:
        self.inputs += 1
        return self.recorder.watch(value, self.inputs - 1)

    def _wrap_object(self, value: Any) -> Any:
        if isinstance(value, list):
            copy: Any = []
            self._wrapped[id(value)] = copy  # before its parts: a list may hold itself
            if PLAIN_TYPES.issuperset(map(type, value)):  # a row, or a million values of padding
                copy.extend(map(self.recorder.plain, value, range(self.inputs, self.inputs + len(value))))
                self.inputs += len(value)
            else:
                copy.extend(map(self.wrap, value))
        elif isinstance(value, tuple):
            return tuple(map(self.wrap, value))
        elif is_array(value):
            copy = value.astype(object)
            copy.flat = [self.wrap(x) for x in value.flatten().tolist()]
        else:
            return self._leaf(value)
        self._written_back.append((value, copy))
        return copy

    def write_back(self, unwrap: Unwrapper) -> None:
        """Give every argument list and array the plain contents that the function left in it."""
        for original, copy in self._written_back:
            original[... if is_array(original) else slice(None)] = unwrap(copy)


class Unwrapper:
    """Plain values for tracked ones, in any nesting; shared lists stay shared."""

    def __init__(self) -> None:
        self._plain: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tracked):
            return value.value
        if not isinstance(value, (list, tuple)) and not is_array(value):
            return value
        known = self._plain.get(id(value))
        if known is None:
            known = self._walk(value)
            self._plain[id(value)] = known
        return known

    def _walk(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if is_array(value):
            plain = [self(x) for x in value.flatten().tolist()]
            return sys.modules["numpy"].array(plain).reshape(value.shape)
        copy: list[Any] = []
        self._plain[id(value)] = copy
        copy.extend([item.value if isinstance(item, Tracked) else self(item) for item in value])
        return copy
