"""A cache of transformers that carries histories along: what is done to it is done to them.

Beams reordered, sequences repeated or selected, all reset, the whole copied or pickled. What a history refuses is done
to neither. Cropping changes the length, of which a history learns before its next step (`CacheHistory.settle`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import engram_ref.needs_torch  # noqa: F401

from torch import Tensor

from engram_ref.histories.cache import CacheHistory

_ATTRIBUTE = "_engram_histories"

Histories = dict[str, CacheHistory]  # by key


class _Carried:
    """Histories, and who carries them: a cache, and shallow copies of it as long as all have the same layers.

    What is done to one of these is done to all; until somebody gives other layers to one of them, be it the original.
    """

    def __init__(self, histories: Histories) -> None:
        self.histories = histories
        # The oldest first. A copy of this, deep or from a file, begins with none: caches that are made with it join.
        self._carriers: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def join(self, cache: Any) -> None:
        """From now on a cache carries these histories."""
        setattr(cache, _ATTRIBUTE, self)
        self._carriers[cache] = None

    def part(self) -> None:
        """Whoever has other layers than the oldest goes its own way; asked before each use of the histories.

        So nothing has been done to them since the layers were given, and a fork is what they were at that moment.
        """
        carriers = [cache for cache in self._carriers if getattr(cache, _ATTRIBUTE, None) is self]
        apart = [cache for cache in carriers[1:] if not _same_layers(cache, carriers[0])]
        if apart:
            others = _Carried({key: history.forked() for key, history in self.histories.items()})
            for cache in apart:
                others.join(cache)
            others.part()

    def __reduce__(self) -> Any:
        return _Carried, (self.histories,)


def _same_layers(cache: Any, other: Any) -> bool:
    """Whether two caches hold their keys and values in the same layers; not if they do not show them."""
    ours = _layers_of(cache)
    return any(ours) and ours == _layers_of(other)


def _layers_of(cache: Any) -> list[list[int]]:
    """By which objects a cache holds keys and values, one list for it, or one for each cache inside of it."""
    if hasattr(cache, "layers"):
        # An empty list is about to be filled: only who has that very list gets the layers.
        return [[id(layer) for layer in cache.layers] or [id(cache.layers)]]
    held = [part for name, part in vars(cache).items() if name != _ATTRIBUTE]
    if inside := [part for part in held if hasattr(part, "get_seq_length")]:
        return [layers for part in inside for layers in _layers_of(part)]
    return [[id(part) for part in held if isinstance(part, (list, dict, Tensor))]]  # of a kind of its own


def history_of(cache: Any, key: str) -> CacheHistory | None:
    """The history that a cache carries under this key."""
    return _histories(cache).get(key)


def _histories(cache: Any) -> Histories:
    """Those that a cache carries; none, if it follows nothing."""
    carried: _Carried | None = getattr(cache, _ATTRIBUTE, None)
    if carried is None:
        return {}
    carried.join(cache)  # a copy that its class has made by its own `__copy__` has not yet
    carried.part()
    return getattr(cache, _ATTRIBUTE).histories


def follow(cache: Any, key: str, history: CacheHistory) -> None:
    """Let a cache carry a history, and do to it what is done to the cache."""
    if not hasattr(cache, _ATTRIBUTE):
        kind: Any = type(cache)
        _Carried({}).join(cache)
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
    for name, act_on in _ACTS.items():
        if hasattr(kind, name):
            namespace[name] = _and_then(getattr(kind, name), act_on)
    return type(kind.__name__, (kind,), namespace)


def _reduce(cache: Any, protocol: Any) -> Any:
    """For copies and pickles: as the kind of cache does it, the subclass named by the kind that it follows."""
    kind: Any = type(cache).__bases__[0]
    make, arguments, *rest = kind.__reduce_ex__(cache, protocol)
    if not arguments or arguments[0] is not type(cache):
        raise ValueError(f"a {kind.__name__} with Engram's history, which cannot be copied or pickled: detach() first")
    return _remake, (make, kind, getattr(cache, _ATTRIBUTE), *arguments[1:]), *rest


def _remake(make: Any, kind: type, carried: _Carried, *arguments: Any) -> Any:
    """A cache without its state, that carries these histories before anybody can part from it unnoticed."""
    made = make(_following(kind), *arguments)
    carried.join(made)
    return made


def _and_then(method: Any, act_on: Callable[..., Callable[[], None]]) -> Any:
    """A method of a cache that does the same to the histories; what one of them refuses is done to none."""

    @functools.wraps(method)
    def both(cache: Any, *args: Any, **kwargs: Any) -> Any:
        acts = [act_on(history, *args, **kwargs) for history in _histories(cache).values()]
        result = method(cache, *args, **kwargs)
        for act in acts:
            act()
        return result

    return both


def _select(history: CacheHistory, sequences: Any) -> Callable[[], None]:
    history.require_movable()
    return partial(history.select, history.numbers(sequences))


def _repeat(history: CacheHistory, repeats: int) -> Callable[[], None]:
    history.require_movable()
    return partial(history.repeat, repeats)


# What is going to be done to a history, once the cache has done it.
_ACTS: dict[str, Callable[..., Callable[[], None]]] = {
    "reorder_cache": lambda history, beam_idx: _select(history, beam_idx),
    "batch_select_indices": lambda history, indices: _select(history, indices),
    "batch_repeat_interleave": _repeat,
    "reset": lambda history: history.reset,
}
