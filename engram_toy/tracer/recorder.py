"""The log of one run, and the operators of watched values that write it.

An operation on `Tracked` values computes the plain result, appends the operands' numbers to the log and wraps
the result under the next number. Instruction k of a run stores value `inputs + k`; what it stores may be dead
at once.
"""

from __future__ import annotations

import math
import operator
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from itertools import chain, count, islice
from reprlib import repr as shortened
from typing import Any, NoReturn

from engram_toy.tracer.tracked import Tracked, _TrackedObject, is_array, plain_types

_FLUSH_EVERY = 1 << 12  # instructions: their columns are still in the cache


class Recorder:
    """Log of one run: what each instruction reads.

    Only the thread that made it may log, and only until it is closed: reads of several threads have no order, and a
    value that is kept from one run to the next would be taken for one of the latter's.

    Attributes:
        left, right, third: operands, as in `engram_toy.tracer.stack.Log`; call `flush` before reading them.
        unstored: numbers that stand for nothing, as in `engram_toy.tracer.stack.Log`.
        labels: kinds given to values by hand, by number.
        escapes: how often a value left the tracer, by conversion.
        owned: whether the calling thread may log.
        shared: whether another thread has tried to.
        plain, opaque: the run's Tracked subclasses, for `plain_types` and for other objects.
    """

    def __init__(self) -> None:
        self.left = array("i")
        self.right = array("i")
        self.third: dict[int, int] = {}
        self.unstored = array("i")
        self.labels: dict[int, str] = {}
        self.escapes: Counter[str] = Counter()
        # Appending to a list is three times cheaper than to an array: numbers are handed out in blocks, and after each
        # block the lists are emptied into the arrays.
        self.recent_left: list[int] = []
        self.recent_right: list[int] = []
        self.plain_types = plain_types()
        namespace = {"__slots__": (), "_recorder": self, "__array_ufunc__": _beside_an_array}
        # A traced operation costs some twenty times the plain one, and most of a run's time. So numbers and texts have
        # a class of their own, whose operators are spelt out; those of all else go through `instruction`.
        self.plain: type[Tracked] = type("Tracked", (Tracked,), namespace)
        self.opaque: type[Tracked] = type("TrackedObject", (_TrackedObject,), dict(namespace))
        self.shared = self._closed = False
        self._owner = threading.RLock()
        self._owner.acquire()
        # Asked before every operation: of the ways to tell threads apart, the one that takes no time worth measuring.
        self.owned: Callable[[], bool] = self._owner._is_owned  # type: ignore[attr-defined]

    def start(self, inputs: int) -> None:
        """Values 0 .. inputs-1 are the arguments; the next number is the first instruction's."""
        self.ids = chain.from_iterable(self._blocks(inputs))
        self.next_id = self.ids.__next__
        _add_operators(self.plain, self, spelt_out=True)
        _add_operators(self.opaque, self, spelt_out=False)

    def _blocks(self, first: int) -> Iterator[range]:
        for start in count(first, _FLUSH_EVERY):
            self.flush()
            yield range(start, start + _FLUSH_EVERY)

    def flush(self) -> None:
        """Complete the columns."""
        self.left.fromlist(self.recent_left)  # `extend` takes twice as long
        self.right.fromlist(self.recent_right)
        self.recent_left.clear()
        self.recent_right.clear()

    def close(self) -> None:
        """End the run: its values can no longer be computed with."""
        self.flush()
        self._closed = True
        self._owner.release()

    def refuse(self, value: Tracked) -> NoReturn:
        """Say why this thread may not log an operation on a value of this run."""
        if self._closed:
            raise ValueError(f"{shortened(value.value)} was kept from a traced run that has ended: return it instead")
        self.shared = True
        raise _other_thread()

    def check_threads(self) -> None:
        """Raise ValueError if another thread was refused, whatever became of its error."""
        if self.shared:
            raise _other_thread()

    def check_own(self, value: Tracked) -> None:
        """Raise ValueError for a value of another run."""
        if value._recorder is not self:
            raise ValueError(
                f"{shortened(value.value)} belongs to another traced run: keep no values between runs, and use none of "
                "an outer run within an inner one"
            )

    def watch(self, value: Any, id: int) -> Tracked:
        """Wrap a value that already has a number."""
        watched = self.plain() if value.__class__ in self.plain_types else self.opaque()
        watched.value = value
        watched.id = id
        return watched

    def watch_plain(self, values: Sequence[Any], first: int) -> list[Tracked]:
        """The same for many of `plain_types`, numbered from `first`: a row, or a million values of padding."""
        watched = [self.plain() for _ in values]
        for id, (tracked, value) in enumerate(zip(watched, values), first):
            tracked.value = value
            tracked.id = id
        return watched

    def inner_product(self, a: Sequence[Any], b: Sequence[Any]) -> Any:
        """What `total = a[0] * b[0]`, then `total = total + a[i] * b[i]`, computes and logs, in half the time.

        Returns NotImplemented where a value is not a plain tracked one: the loop must then be run.
        """
        if len(a) != len(b) or {*map(type, a), *map(type, b)} != {self.plain}:
            return NotImplemented
        if not self.owned():
            self.refuse(a[0])
        total = a[0].value * b[0].value
        for x, y in zip(a[1:], b[1:]):
            total = total + x.value * y.value
        stored = list(islice(self.ids, 2 * len(a) - 1))  # product, then product and sum in turn
        left, right = stored[:], stored[:]
        left[0], right[0] = a[0].id, b[0].id
        left[1::2], right[1::2] = [x.id for x in a[1:]], [y.id for y in b[1:]]
        left[2::2], right[2::2] = stored[:-1:2], stored[1::2]  # the sum so far, and the new product
        self.recent_left.extend(left)
        self.recent_right.extend(right)
        return self.watch(total, stored[-1])

    def instruction(self, compute: Callable[..., Any], *operands: Any) -> Any:
        """Any operation on any mixture of tracked and other operands."""
        tracked = [x for x in operands if isinstance(x, Tracked)]
        for x in tracked:
            self.check_own(x)
        if not self.owned():
            self.refuse(tracked[0])
        result = compute(*(x.value if isinstance(x, Tracked) else x for x in operands))
        self._read(*(x.id for x in tracked))
        return self._store(result, self.next_id())

    def _read(self, *ids: int) -> None:
        self.recent_left.append(ids[0] if ids else -1)
        self.recent_right.append(ids[1] if len(ids) > 1 else -1)
        if len(ids) > 2:
            self.third[len(self.left) + len(self.recent_left) - 1] = ids[2]

    def _store(self, result: Any, id: int) -> Any:
        """Wrap a result; the parts of a tuple, list or array are stored one after the other."""
        if isinstance(result, Tracked):
            self.unstored.append(id)
            return result
        if not isinstance(result, (tuple, list)) and not is_array(result):
            return self.watch(result, id)
        parts = []
        for part in result.flat if is_array(result) else result:
            parts.append(self._store(part, id))
            self._read()
            id = self.next_id()
        self.unstored.append(id)  # one more than there are parts
        if is_array(result):
            from engram_toy.tracer.arrays import tracked_array

            return tracked_array(parts, result, getattr(result, "plain_dtype", None))
        return parts if isinstance(result, list) else tuple(parts)


def _beside_an_array(value: Tracked, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """What NumPy calls: of an array beside this value it would make Python numbers, which take their type from it."""
    from engram_toy.tracer.arrays import call_ufunc

    return call_ufunc(ufunc, method, inputs, options)


def _other_thread() -> ValueError:
    return ValueError(
        "the traced function computed with its values in a second thread: reads of several threads have no order, so "
        "compute in one"
    )


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "divmod": divmod,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "matmul": operator.matmul,
}
_COMPARISON: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": abs,
    "invert": operator.invert,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": lambda x: math.trunc(x) if hasattr(x, "__trunc__") else int(x),  # NumPy's float32 has none
}
_CONVERSION: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "hash": hash,
}
# How the operators look in Python, where there is a sign for them.
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "and": "&", "or": "|"}
_SIGNS |= {"xor": "^", "lshift": "<<", "rshift": ">>", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">"}
_SIGNS |= {"ge": ">="}


def _add_operators(cls: type[Tracked], recorder: Recorder, spelt_out: bool) -> None:
    for name, compute in {**_BINARY, **_COMPARISON}.items():
        general = _general(recorder, compute)
        if spelt_out and name == "mul":
            general = _unless_repeated(recorder, general)
        fast = spelt_out and name in _SIGNS
        setattr(cls, f"__{name}__", _spelt_out(cls, recorder, _SIGNS[name], general) if fast else general)
    for name, compute in _BINARY.items():
        setattr(cls, f"__r{name}__", _reflected(recorder, compute))
    for name, apply in _UNARY.items():
        setattr(cls, f"__{name}__", _general(recorder, apply))
    for name, convert in _CONVERSION.items():
        setattr(cls, f"__{name}__", _conversion(recorder, name, convert))
    if spelt_out:
        setattr(cls, "__rmul__", _unless_repeated(recorder, _reflected(recorder, operator.mul)))
    setattr(cls, "__pow__", _general(recorder, pow))
    setattr(cls, "__rpow__", _reflected(recorder, pow))
    setattr(cls, "__round__", _general(recorder, round))


def _general(recorder: Recorder, compute: Callable[..., Any]) -> Any:
    instruction = recorder.instruction
    return lambda self, *others: instruction(compute, self, *others)


def _reflected(recorder: Recorder, compute: Callable[..., Any]) -> Any:
    instruction = recorder.instruction
    return lambda self, other, *modulus: instruction(compute, other, self, *modulus)


def _unless_repeated(recorder: Recorder, multiply: Callable[..., Any]) -> Any:
    # A container's `*` computes nothing: told NotImplemented, Python itself repeats it, in place for `*=`, after one
    # conversion by `__index__`. So its parts stay the objects that they are. Of plain numbers alone the original makes
    # new values, and so do we.
    def operate(self: Tracked, other: Any) -> Any:
        container = isinstance(other, (tuple, MutableSequence)) and hasattr(self.value, "__index__")
        numbers = type(other) in (list, tuple) and recorder.plain_types.issuperset(map(type, other))
        return NotImplemented if container and not numbers else multiply(self, other)

    return operate


def _conversion(recorder: Recorder, name: str, convert: Callable[[Any], Any]) -> Any:
    left, right, next_id = recorder.recent_left.append, recorder.recent_right.append, recorder.next_id
    escapes, owned, refuse = recorder.escapes, recorder.owned, recorder.refuse
    unstored = recorder.unstored.append

    def leave(self: Tracked) -> Any:
        if not owned():
            refuse(self)
        result = convert(self.value)
        left(self.id)
        right(-1)
        unstored(next_id())  # the result leaves the tracer: nothing is stored
        escapes[name] += 1
        return result

    return leave


# With `operator.mul` called and __init__ run, an operation takes 1.6 times as long; Python has no other way to
# make one function per sign without a call in it.
_SOURCE = """
def operate(self, other):
    if not owned():
        refuse(self)
    kind = other.__class__
    if kind is cls:
        value = self.value {sign} other.value
        left(self.id)
        right(other.id)
    elif kind in plain_types:
        value = self.value {sign} other
        left(self.id)
        right(-1)
    else:
        return general(self, other)
    result = cls()
    result.value = value
    result.id = next_id()
    return result
"""
_CODE = {sign: compile(_SOURCE.format(sign=sign), f"<tracked {sign}>", "exec") for sign in _SIGNS.values()}


def _spelt_out(cls: type[Tracked], recorder: Recorder, sign: str, general: Callable[..., Any]) -> Any:
    """An operator of plain values written out: the lines of which nearly every run consists."""
    names = {
        "cls": cls,
        "owned": recorder.owned,
        "refuse": recorder.refuse,
        "left": recorder.recent_left.append,
        "right": recorder.recent_right.append,
        "next_id": recorder.next_id,
        "plain_types": recorder.plain_types,
        "general": general,
    }
    exec(_CODE[sign], names)
    return names["operate"]
