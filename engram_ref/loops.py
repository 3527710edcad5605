"""What the compiled loops share: pointers from addresses, cache lines asked for, and numba's cache where there is one.

    hash_rows = compiled(_hash_rows, ["boolean(int64[:,:], int64)"], nogil=True)

Needs numba: imported only where `engram_ref.compiled.numba_works`.
"""

# mypy: disable-error-code="call-overload"
# (numba's own signatures do not know all that it takes)

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

# `from a.b import c, d`, over several lines or one, and `import a.b`: much sooner than a parser, at every import.
_IMPORTS = re.compile(r"^\s*(?:from|import)\s+([\w.]+)(?:\s+import\s+(\([^)]*\)|[^\n]*))?", re.M)


@intrinsic
def pointer(typing_context, address, value):
    """`address` as a pointer to values of the type of `value`."""
    kind = types.CPointer(value)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(address, value), generate


def emit_prefetch(builder: Any, address: Any, to_write: bool, level: int) -> None:
    """Write the instruction that asks for the cache line at `address`, an integer: into the L1 (3) or L2 (2) cache."""
    byte, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
    prefetch, data = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind), int32(1)
    builder.call(prefetch, [builder.inttoptr(address, byte), int32(int(to_write)), int32(level), data])


def compiled(function: Callable[..., Any], signatures: list[Any], **options: bool) -> Any:
    """`function` compiled for these signatures only, from numba's cache where it can have one."""
    dispatcher: Any = njit(**options)(function)
    with suppress(RuntimeError, OSError):  # numba may write neither beside this file nor in the user's cache
        dispatcher._cache = _Cache(function)  # what `cache=True` does
    for signature in signatures:
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


class _Cache(FunctionCache):
    """A cache that knows no machine code of other sources, and stores nothing where it cannot."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # numba's own stamp is the time and the size of the one file that a function is in. A loop holds the code and
        # the constants of others, too, and files of two releases may have the same time: so all count, by content.
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _sources(function.__module__))

    def save_overload(self, *overload: Any) -> None:
        try:
            super().save_overload(*overload)
        except OSError:  # the disk is full, or has become read-only
            self.disable()

    def load_overload(self, *overload: Any) -> Any:
        try:
            return super().load_overload(*overload)
        except OSError:  # its files may not be read
            return None


@functools.cache
def _sources(module: str) -> str:
    """Digest of the files of a module and of what it imports from this package, by whatever way."""
    found, waiting = set[Path](), [_file(module)]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in found:
            found.add(path)
            waiting += [_file(name) for name in _imported(path)]
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _imported(path: Path) -> Iterator[str]:
    """Every name of a module that a file may import; some are names in a module instead, some stand in a docstring."""
    for module, names in _IMPORTS.findall(path.read_text(encoding="utf-8")):
        yield from (module, *(f"{module}.{name}" for name in re.findall(r"\w+", names)))


def _file(module: str) -> Path | None:
    """Of a module of this package; None of any other."""
    package, *names = module.split(".")
    if package != __package__:
        return None
    place = Path(__file__).parent.joinpath(*names)
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
