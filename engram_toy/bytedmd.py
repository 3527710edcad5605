"""The ByteDMD tracer: run plain Python on watched values, then price every read.

    from engram_toy.bytedmd import bytedmd, traced_eval

    bytedmd(lambda a, b, c: (a + b) + c, (10, 20, 30))        # 6, the price
    traced_eval(lambda a, b, c: (a + b) + c, (10, 20, 30))    # ([1, 2, 1, 2], 60): depths and the result

All live values lie on one stack, the last used on top; reading the value at depth d costs ceil(sqrt(d)),
writing and computing cost nothing. `bytedmd` and `traced_eval` have the names, arguments and meaning of the
original (github.com/cybertronai/ByteDMD, branch main of 2026-04-13), so either can stand in for the other.
What differs from it, apart from the price: docs/how-bytedmd-works.md, "Where it differs from the original".
`trace` says more: which kind of value (token, row, weight, ...) each read was of, and what it cost.

How it works: every argument is wrapped (`engram_toy.tracer.wrapping`) in a `Tracked` value, whose operators write a
log (`engram_toy.tracer.recorder`). When the function has returned, last uses are known, and
`engram_toy.tracer.stack` replays the log to find every read's depth.

What leaves the tracer: `int()`, `float()`, `bool()`, `hash()` and use as an index read the value once and
return a plain one, whose later reads are not seen (`math.sqrt` and `math.exp` call `float`). Write a square
root as `x ** 0.5` and an exponential as `math.e ** x`: both stay tracked.
"""

from __future__ import annotations

import gc
import importlib.util
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from engram_toy import definitions, floor
from engram_toy.tracer import stack
from engram_toy.tracer.recorder import Recorder
from engram_toy.tracer.tracked import Tracked
from engram_toy.tracer.wrapping import Unwrapper, Wrapper, leaves

_MOST_KINDS = 256  # a read's kind takes one byte
_WORTH_COMPILING = 200_000  # values; below this, loading numba takes longer than it saves


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run read.

    Attributes:
        result: what the function returned, plain.
        depths: depth of every read, in order.
        kinds: kind of every read value, in order, as an index into `kind_names`.
        kind_names: the arguments' kinds, "activation" for computed values, and names given by `label`.
        instructions: operations logged.
        escapes: how often a value left the tracer, by conversion ("index", "bool", "float", ...).
        untracked: values in the result that the tracer does not know: constants, and what escaped.
        compiled: whether depths were found, and are counted, with numba and numpy.
    """

    result: Any
    depths: array[int]
    kinds: bytes
    kind_names: tuple[str, ...]
    instructions: int
    escapes: dict[str, int]
    untracked: int
    compiled: bool

    def cost(self, bytes_per_element: int = 1) -> int:
        """ByteDMD price of the run, for elements of so many bytes."""
        return stack.price(self.depths, bytes_per_element)

    def tally(self) -> dict[str, Counter[int]]:
        """Per kind: how many reads there were at each depth."""
        by_kind: dict[str, Counter[int]] = {name: Counter() for name in self.kind_names}
        for (kind, depth), reads in _engine(self.compiled)[1].tally(self.kinds, self.depths).items():
            by_kind[self.kind_names[kind]][depth] = reads
        return by_kind


@dataclass(frozen=True, slots=True)
class Recording:
    """What one run did, before anything is priced.

    Attributes:
        log: its instructions.
        kind_of_value: kind of every value of the log, as an index into `kind_names`.
        argument_sizes: how many values each argument is, argument 0 first.
        result, kind_names, escapes, untracked: as in `Trace`.
    """

    result: Any
    log: stack.Log
    kind_of_value: bytearray
    kind_names: tuple[str, ...]
    argument_sizes: tuple[int, ...]
    escapes: dict[str, int]
    untracked: int

    @property
    def argument_inputs(self) -> list[Sequence[int]]:
        """The inputs that every argument is, argument 0 first; they are numbered from the last argument on."""
        sizes = self.argument_sizes[::-1]
        found: list[Sequence[int]] = [range(end - size, end) for end, size in zip(accumulate(sizes), sizes)]
        return found[::-1]

    def trace(self, definition: str = "lru", compiled: bool | None = None) -> Trace:
        """Find the depth of every read; arguments as for the function `trace`."""
        log = self.log
        if compiled is None:
            long = log.inputs + len(log.left) >= _WORTH_COMPILING
            compiled = long and importlib.util.find_spec("numba") is not None and _compiled_engine() is not None
        distances, counting = _engine(compiled)
        return Trace(
            result=self.result,
            depths=distances.depths(log, definition),
            kinds=counting.read_kinds(log, definitions.reads_like(definition), self.kind_of_value),
            kind_names=self.kind_names,
            instructions=len(log.left),
            escapes=self.escapes,
            untracked=self.untracked,
            compiled=compiled,
        )


def label(values: list[Any], kind: str) -> list[Any]:
    """Name the kind of a list of computed values, for the counts of `trace`. Returns `values`.

    The first value decides whether the list is traced: in a plain run this costs nothing worth timing.
    """
    first = values
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, Tracked):
        labels = first._recorder.labels
        labels.update((leaf.id, kind) for leaf in leaves(values) if isinstance(leaf, Tracked))
    return values


def trace(
    func: Callable[..., Any],
    args: Sequence[Any],
    kinds: Sequence[str] | None = None,
    definition: str = "lru",
    compiled: bool | None = None,
) -> Trace:
    """Run `func(*args)` once on tracked values and find the depth of every read.

    Args:
        kinds: a name per argument for what its values are ("token", "weight", ...).
        definition: one of `engram_toy.definitions.DEFINITIONS`; "lru" is one stack.
        compiled: find depths with numba, in plain Python, or (None) with numba where it is installed and
            the run is long. The depths are the same.

    Raises:
        ValueError: an unknown definition; not one kind per argument, or too many; a result whose work is still to be
            done; values of another run, or used in a second thread.
    """
    definitions.check_definition(definition)
    return record(func, args, kinds, definition != "lru").trace(definition, compiled)


def record(
    func: Callable[..., Any], args: Sequence[Any], kinds: Sequence[str] | None = None, fixed_depths: bool = True
) -> Recording:
    """Run `func(*args)` once on tracked values and keep its log, unpriced; arguments as for `trace`.

    Args:
        fixed_depths: note the arguments' depths, which every definition but "lru" needs.
    """
    if not hasattr(args, "__len__"):  # `bytedmd(f, 5)`
        raise ValueError(f"args is a {type(args).__name__}: give the arguments as a tuple, such as (10, 20, 30)")
    kinds = ["argument"] * len(args) if kinds is None else kinds
    if len(kinds) != len(args):
        raise ValueError(f"{len(kinds)} kinds for {len(args)} arguments: give one name per argument")
    # Millions of values, none of them in a cycle: the collector would walk them again and again for nothing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _record(func, args, kinds, fixed_depths)
    finally:
        if collecting:
            gc.enable()


def _record(func: Callable[..., Any], args: Sequence[Any], kinds: Sequence[str], fixed_depths: bool) -> Recording:
    recorder = Recorder()
    wrapper = Wrapper(recorder)
    wrapped: list[Any] = []
    sizes: list[int] = []  # of the arguments, in values
    for argument in reversed(args):  # laid down last to first: argument 0 ends on top
        before = wrapper.inputs
        wrapped.insert(0, wrapper.wrap(argument))
        sizes.insert(0, wrapper.inputs - before)
    argument_depth = _argument_depth(wrapped, wrapper.inputs) if fixed_depths else None
    recorder.start(wrapper.inputs)
    parts: list[Any] = []
    try:
        returned = func(*wrapped)
        parts = leaves(returned)  # before what holds them is made plain
    finally:
        recorder.close()
        unwrap = Unwrapper(recorder, wrapper.originals())
        wrapper.write_back(unwrap)  # what it did before an error, too
    recorder.check_threads()
    result = unwrap(returned)
    ids = [part.id for part in parts if isinstance(part, Tracked)]
    live = list(dict.fromkeys(ids))
    columns = (recorder.left, recorder.right, recorder.third)
    log = stack.Log(wrapper.inputs, *columns, live, argument_depth, recorder.unstored)
    numbered = list(zip(reversed(kinds), reversed(sizes)))  # in the order of the values' numbers
    names, codes = _kind_codes(kinds, numbered, recorder.labels, len(log.left))
    return Recording(result, log, codes, names, tuple(sizes), dict(recorder.escapes), len(parts) - len(ids))


def _argument_depth(arguments: list[Any], inputs: int) -> array[int]:
    """Position of every input in the flattened arguments, from 1: its depth, where that is fixed."""
    position = array("i", bytes(4 * inputs))
    met = dict.fromkeys([leaf.id for leaf in leaves(arguments)])  # what is met twice lies where it was first
    for depth, value in enumerate(met, start=1):
        position[value] = depth
    return position


def _kind_codes(
    kinds: Sequence[str], sizes: Sequence[tuple[str, int]], labels: dict[int, str], computed: int
) -> tuple[tuple[str, ...], bytearray]:
    """Names of the kinds, and for every value of the run the position of its kind among them."""
    names = tuple(dict.fromkeys([*kinds, "activation", *labels.values()]))
    if len(names) > _MOST_KINDS:
        raise ValueError(f"{len(names)} kinds of values, computed ones included: give at most {_MOST_KINDS} names")
    code = {name: position for position, name in enumerate(names)}
    codes = bytearray().join(bytes([code[kind]]) * size for kind, size in [*sizes, ("activation", computed)])
    for value, kind in labels.items():
        codes[value] = code[kind]
    return names, codes


def _engine(compiled: bool) -> tuple[Any, Any]:
    """The modules that find depths and count reads: plain Python, or numba and numpy."""
    if not compiled:
        return definitions, stack
    engine = _compiled_engine()
    if engine is None:
        raise ValueError("compiled=True, but numba cannot be used here: repair it, or leave `compiled` out")
    return engine


@lru_cache(maxsize=1)
def _compiled_engine() -> tuple[Any, Any] | None:
    """The compiled modules, loaded only here; None, with a warning, where they cannot be."""
    try:
        import numba

        if getattr(numba.config, "DISABLE_JIT", False):  # by NUMBA_DISABLE_JIT, to debug: it compiles nothing
            return None
        from engram_toy.fast import definitions as fast_definitions
        from engram_toy.fast import stack as fast_stack
    # What a broken installation raises: numpy too new or too old for numba, libraries of LLVM missing or foreign.
    except (ImportError, OSError, AttributeError, RuntimeError, SystemError, ValueError) as error:
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        warnings.warn(f"numba is not used, plain Python prices the run more slowly ({cause})", stacklevel=2)
        return None
    return fast_definitions, fast_stack


def traced_eval(func: Callable[..., Any], args: Sequence[Any], definition: str = "lru") -> tuple[list[int], Any]:
    """Depth of every read of `func(*args)`, in order, and its plain result.

    Argument lists and arrays receive what the function left in them. Use `trace` for counts by kind.
    """
    run = trace(func, args, definition=definition)
    return run.depths.tolist(), run.result


def trace_to_bytedmd(trace: Iterable[int], bytes_per_element: int) -> int:
    """ByteDMD price of reads at these depths, such as `traced_eval` returns them."""
    return stack.price(trace, bytes_per_element)


def bytedmd(func: Callable[..., Any], args: Sequence[Any], bytes_per_element: int = 1, definition: str = "lru") -> int:
    """ByteDMD price of `func(*args)`: the sum over all bytes read of ceil(sqrt(depth of the byte)).

    Under the definition "floor" no read has a depth: the price is what any memory manager must pay at least
    (`engram_toy.floor`).
    """
    if definition == "floor":
        return floor.floor(*floor.waits(record(func, args).log), bytes_per_element)
    return trace(func, args, definition=definition).cost(bytes_per_element)
