"""Looking at a word and posting one, compiled: the fast path of `words`.

python -m pytest tests/ref/calling/test_words.py
"""

# mypy: disable-error-code="call-arg, call-overload, var-annotated"
# (the signatures of functions that numba compiles are not those that mypy sees)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engram_ref.loops import compiled

_WORD = ir.IntType(64)


@intrinsic
def _load_acquire(typing_context, address):
    """The word there; nothing that follows is read before it."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(place, "acquire", align=8)

    return types.int64(address), generate


@intrinsic
def _store_release(typing_context, address, value):
    """Write the word there, after all that was written before."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], place, "release", align=8)
        return context.get_dummy_value()

    return types.void(address, value), generate


def _look(address, least, looks):
    value = _load_acquire(address)
    for _ in range(looks - 1):
        if value >= least:
            break
        value = _load_acquire(address)
    return value


def _post(address, value):
    _store_release(address, value)


# look(address, least, looks) -> what the word said last: looked at so often, or until it said `least` or more.
look = compiled(_look, ["int64(int64, int64, int64)"], nogil=True)
# post(address, value): write it.
post = compiled(_post, ["void(int64, int64)"], nogil=True)
