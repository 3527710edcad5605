"""A ByteDMD tracer as slow and literal as its definition: the stack is a list, every read walks it.

Shares no code with `engram_toy`: it logs events with their operands and replays them once last uses are known.
"""

import math
import operator


class Watched:
    """A value whose operations are written to the events of its run."""

    def __init__(self, run, value):
        self.run, self.value, self.name = run, value, len(run.names)
        run.names.append(self.name)


class Run:
    """Names of all values in order of creation, and events (operands, results)."""

    def __init__(self):
        self.names, self.events = [], []
        self.wrapped = {}  # by address: a container that is met twice is one

    def apply(self, function, *operands):
        plain = [x.value if isinstance(x, Watched) else x for x in operands]
        result = function(*plain)
        read = [x.name for x in operands if isinstance(x, Watched)]
        if isinstance(result, tuple):
            stored = tuple(Watched(self, part) for part in result)
            self.events.append((read, [part.name for part in stored]))
            return stored
        stored = Watched(self, result)
        self.events.append((read, [stored.name]))
        return stored

    def leave(self, function, watched):
        self.events.append(([watched.name], []))
        return function(watched.value)


BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "lshift", "rshift", "and", "or", "xor"]
COMPARISON = ["eq", "ne", "lt", "le", "gt", "ge"]
UNARY = {"neg": operator.neg, "pos": operator.pos, "abs": abs, "invert": operator.invert, "floor": math.floor}
CONVERSION = {"bool": bool, "int": int, "float": float, "hash": hash, "index": operator.index}


def _install():
    functions = {name: getattr(operator, f"__{name}__") for name in BINARY + COMPARISON}
    functions |= {"divmod": divmod, "pow": pow, "round": round, **UNARY}
    for name, f in functions.items():
        setattr(Watched, f"__{name}__", lambda self, *others, f=f: self.run.apply(f, self, *others))
        if name in [*BINARY, "divmod", "pow"]:
            setattr(Watched, f"__r{name}__", lambda self, other, f=f: self.run.apply(f, other, self))
    for name, f in CONVERSION.items():
        setattr(Watched, f"__{name}__", lambda self, f=f: self.run.leave(f, self))


_install()


def oracle_trace(func, args):
    """Depths of all reads of `func(*args)`, for arguments of nested lists and tuples of numbers."""
    run = Run()
    wrapped = [_wrap(run, argument) for argument in reversed(args)][::-1]
    inputs = list(run.names)
    live_to_the_end = set(_names(func(*wrapped)))
    last = {}
    for time, (read, _) in enumerate(run.events):
        last.update(dict.fromkeys(read, time))
    last.update(dict.fromkeys(live_to_the_end, math.inf))

    stack = [name for name in reversed(inputs) if name in last]  # the top is first: most of what is read lies near it
    depths = []
    for time, (read, stored) in enumerate(run.events):
        depths += [stack.index(name) + 1 for name in read]
        for name in dict.fromkeys(read):
            stack.remove(name)
            stack.insert(0, name)
        for name in read:
            if last[name] == time and name in stack:
                stack.remove(name)
        for name in stored:
            if name in last:
                stack.insert(0, name)
    return depths


def _wrap(run, value):
    if not isinstance(value, (list, tuple)):
        return Watched(run, value)
    if id(value) not in run.wrapped:
        run.wrapped[id(value)] = type(value)(_wrap(run, part) for part in value)
    return run.wrapped[id(value)]


def _names(value):
    if isinstance(value, Watched):
        return [value.name]
    return [name for part in value for name in _names(part)] if isinstance(value, (list, tuple)) else []
