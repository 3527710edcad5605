"""A cache of transformers that carries histories along: what is done to it is done to them.

Beams reordered, sequences repeated or selected, all reset, the whole copied or pickled. What a history refuses is done
to neither. Cropping changes the length, of which a history learns before its next step (`CacheHistory.settle`).
"""

from __future__ import annotations

import functools
from typing import Any

import engram_ref.needs_torch  # noqa: F401

from engram_ref.histories.cache import CacheHistory

_ATTRIBUTE = "_engram_histories"


def history_of(cache: Any, key: str) -> CacheHistory | None:
    """The history that a cache carries under this key."""
    return getattr(cache, _ATTRIBUTE, {}).get(key)


def follow(cache: Any, key: str, history: CacheHistory) -> None:
    """Let a cache carry a history, and do to it what is done to the cache."""
    if not hasattr(cache, _ATTRIBUTE):
        kind: Any = type(cache)
        setattr(cache, _ATTRIBUTE, {})
        cache.__class__ = _following(kind)
    getattr(cache, _ATTRIBUTE)[key] = history


def unfollow(cache: Any, key: str) -> None:
    """Take a history away; a cache without one is as it was before the first."""
    histories = getattr(cache, _ATTRIBUTE, {})
    histories.pop(key, None)
    if not histories and hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)
        cache.__class__ = type(cache).__bases__[0]


@functools.cache
def _following(kind: type) -> type:
    """A subclass of a kind of cache, of the same name, whose methods also act on the histories."""
    namespace = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__reduce_ex__": _reduce}
    for name, act in _ACTS.items():
        if hasattr(kind, name):
            namespace[name] = _and_then(getattr(kind, name), act, moves=name != "reset")
    return type(kind.__name__, (kind,), namespace)


def _reduce(cache: Any, protocol: Any) -> Any:
    """For copies and pickles: as the kind of cache does it, the subclass named by the kind that it follows."""
    kind: Any = type(cache).__bases__[0]
    make, arguments, *rest = kind.__reduce_ex__(cache, protocol)
    if not arguments or arguments[0] is not type(cache):
        raise ValueError(f"a {kind.__name__} with Engram's history, which cannot be copied or pickled: detach() first")
    histories = {key: history.forked() for key, history in getattr(cache, _ATTRIBUTE).items()}
    state, *others = rest  # a dict: it has the histories
    return _remake, (make, kind, *arguments[1:]), {**state, _ATTRIBUTE: histories}, *others


def _remake(make: Any, kind: type, *arguments: Any) -> Any:
    return make(_following(kind), *arguments)


def _and_then(method: Any, act: Any, moves: bool) -> Any:
    """A method of a cache that is refused before it does anything, or does the same to the histories."""

    @functools.wraps(method)
    def both(cache: Any, *args: Any, **kwargs: Any) -> Any:
        histories = getattr(cache, _ATTRIBUTE, {}).values()
        if moves:
            for history in histories:
                history.require_movable()
        result = method(cache, *args, **kwargs)
        for history in histories:
            act(history, *args, **kwargs)
        return result

    return both


_ACTS = {
    "reorder_cache": lambda history, beam_idx: history.select(beam_idx),
    "batch_select_indices": lambda history, indices: history.select(indices),
    "batch_repeat_interleave": lambda history, repeats: history.repeat(repeats),
    "reset": lambda history: history.reset(),
}
