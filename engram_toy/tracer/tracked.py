"""Watched values: what a traced function sees in place of its numbers.

A run's `Recorder` (`engram_toy.tracer.recorder`) makes subclasses of these, whose operators write its log.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NoReturn

PLAIN_TYPES = frozenset((int, float, bool, complex, str))  # closed under their own arithmetic, but for divmod
_ENTERED = "only lists, tuples and NumPy arrays are looked into, so pass its parts in one of these"


def is_array(value: Any) -> bool:
    """Whether `value` is a NumPy array. NumPy is never imported for this: where there is an array, it has been."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def plain_types() -> frozenset[type]:
    """PLAIN_TYPES and, where NumPy is loaded, its numbers and texts, whose arithmetic is closed as well."""
    return _with_numpy() if "numpy" in sys.modules else PLAIN_TYPES


@lru_cache(maxsize=1)
def _with_numpy() -> frozenset[type]:
    import numpy

    return PLAIN_TYPES | set(numpy.sctypeDict.values()) - {numpy.object_, numpy.void}


class Tracked:
    """One watched value. Each run has subclasses of its own, which hold that run's recorder and operators."""

    # Filled by `Recorder.watch`: without an __init__ an operation is a sixth faster.
    __slots__ = ("value", "id")
    _recorder: Any  # the run's `Recorder`, which imports this file
    value: Any
    id: int

    def __iter__(self) -> NoReturn:
        raise TypeError(f"a tracked {type(self.value).__name__} is one value, not iterable: {_ENTERED}")

    def __contains__(self, part: Any) -> NoReturn:
        raise TypeError(f"a tracked {type(self.value).__name__} is one value, not searched: {_ENTERED}")

    def __len__(self) -> NoReturn:
        raise TypeError(f"a tracked {type(self.value).__name__} is one value, without a length: {_ENTERED}")

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


class _TrackedObject(Tracked):
    """What is no number or text. (In `Tracked`, a __getattr__ would slow every access to its slots.)"""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or name in Tracked.__slots__:  # asked for by protocols, such as copying
            raise AttributeError(name)
        raise AttributeError(f"a tracked {type(self.value).__name__} has no {name!r}: {_ENTERED}")

    def __getitem__(self, key: Any) -> NoReturn:
        raise TypeError(f"a tracked {type(self.value).__name__} is one value, without items: {_ENTERED}")

    __setitem__: Any = lambda self, key, part: self[key]
