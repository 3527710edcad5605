"""A cache of transformers that carries histories along: what is done to it is done to them.

Beams reordered, sequences repeated or selected, all reset, the whole copied or pickled. What a history refuses is done
to neither. Cropping changes the length, of which a history learns before its next step (`CacheHistory.settle`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import engram_ref.needs_torch  # noqa: F401

from engram_ref.histories.cache import CacheHistory

_ATTRIBUTE = "_engram_histories"

Histories = dict[str, CacheHistory]  # by key


class _Copied(NamedTuple):
    """What a copy of a cache carries until it shows whether it has keys and values of its own."""

    shared: Histories  # of the cache that it is a copy of
    own: Histories  # as they were when it was copied
    layers: Sequence[Any]  # of that cache, which hold keys and values


def history_of(cache: Any, key: str) -> CacheHistory | None:
    """The history that a cache carries under this key."""
    return _histories(cache).get(key)


def _histories(cache: Any) -> Histories:
    """Those that a cache carries; none, if it follows nothing.

    A shallow copy has the layers of its cache, and what is done to one of the two is done to both; until somebody gives
    it others.
    """
    carried: Histories | _Copied = getattr(cache, _ATTRIBUTE, {})
    if not isinstance(carried, _Copied):
        return carried
    layers = getattr(cache, "layers", carried.layers)
    if len(layers) == len(carried.layers) and all(one is other for one, other in zip(layers, carried.layers)):
        return carried.shared
    setattr(cache, _ATTRIBUTE, carried.own)
    return carried.own


def follow(cache: Any, key: str, history: CacheHistory) -> None:
    """Let a cache carry a history, and do to it what is done to the cache."""
    if not hasattr(cache, _ATTRIBUTE):
        kind: Any = type(cache)
        setattr(cache, _ATTRIBUTE, {})
        cache.__class__ = _following(kind)
    _histories(cache)[key] = history


def unfollow(cache: Any, key: str) -> None:
    """Take a history away; a cache without one is as it was before the first."""
    histories = _histories(cache)
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
    if rest and isinstance(rest[0], dict) and _ATTRIBUTE in rest[0]:
        shared = _histories(cache)
        own = {key: history.forked() for key, history in shared.items()}
        rest[0] = {**rest[0], _ATTRIBUTE: _Copied(shared, own, getattr(cache, "layers", ()))}
    return _remake, (make, kind, *arguments[1:]), *rest


def _remake(make: Any, kind: type, *arguments: Any) -> Any:
    return make(_following(kind), *arguments)


def _and_then(method: Any, act: Any, moves: bool) -> Any:
    """A method of a cache that is refused before it does anything, or does the same to the histories."""

    @functools.wraps(method)
    def both(cache: Any, *args: Any, **kwargs: Any) -> Any:
        histories = _histories(cache).values()
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
