"""A cache of transformers that carries histories along: what is done to it is done to them.

Beams reordered, sequences repeated or selected, all reset, the whole copied or pickled. What a history refuses is done
to neither. Cropping changes the length, of which a history learns before its next step (`CacheHistory.settle`). Layers
bear a mark of their last use, so a cache is refused that is given layers which were used by another since, or left, and
so is a shallow copy with layers of its own, or the cache that it was made of: the one that is used first goes on.
"""

from __future__ import annotations

import functools
import secrets
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import engram_ref.needs_torch  # noqa: F401

from engram_ref.histories.cache import CacheHistory

_ATTRIBUTE = "_engram_histories"
_MARK = "_engram_mark"

Histories = dict[str, CacheHistory]  # by key


class _Carried:
    """Histories, and which layers they are of; shallow copies of a cache carry the same."""

    def __init__(self, histories: Histories, mark: str | None = None) -> None:
        self.histories = histories
        self._mark = mark  # on the layers that these histories are of; copies of a layer bear it, too
        self._owner: Any = None  # by a weak reference, the cache that used them last; it counts where no mark is

    def is_of(self, cache: Any) -> bool:
        """Not if its layers were last used with other histories, or when these were at another position."""
        mark = getattr(_first_layer(cache), _MARK, None)
        own = mark == self._mark if mark or self._mark else self._owner is None or self._owner() is cache
        # Layers that hold nothing are of any.
        return own or not self.histories or cache.get_seq_length() == 0

    def require_own(self, cache: Any) -> None:
        """Refuse a cache whose layers these histories are not of.

        Raises:
            ValueError: it is one.
        """
        if not self.is_of(cache):
            raise ValueError(
                f"a {type(cache).__name__} with layers that it had left, or of another cache, of which its history is "
                "not: copy.deepcopy a cache that is to go on in two ways, begin with a new one, or `remember` what is "
                "in these layers"
            )

    def mark(self, cache: Any) -> None:
        """The layers are about to be used, after which they are not what copies of them are."""
        layer = _first_layer(cache)
        self._mark, self._owner = None if layer is None else secrets.token_hex(8), weakref.ref(cache)
        if layer is not None:
            setattr(layer, _MARK, self._mark)

    def release(self, cache: Any) -> None:
        """A cache is about to be copied: where layers bear no mark, the one of both that is used first goes on.

        Raises:
            ValueError: another one goes on already.
        """
        if self._mark is None:
            self.require_own(cache)
            self._owner = None

    def __reduce__(self) -> Any:
        return _Carried, (self.histories, self._mark)


def _first_layer(cache: Any) -> Any:
    """The first of the layers that a decoder appends to, if it can bear a mark: the others go with it."""
    # Those of the encoder's output are read only, and may be shared.
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    first = layers[0] if isinstance(layers, (list, tuple)) and layers else None
    return first if hasattr(first, "__dict__") else None


def history_of(cache: Any, key: str) -> CacheHistory | None:
    """The history that a cache carries under this key, if it does; None carries nothing.

    Raises:
        ValueError: the cache has layers of another history.
    """
    carried = _carried_by(cache)
    if carried is None:
        return None
    carried.require_own(cache)
    return _used(cache, carried).get(key)


def _carried_by(cache: Any) -> _Carried | None:
    """What a cache carries; None if it follows nothing."""
    return getattr(cache, _ATTRIBUTE, None)


def _used(cache: Any, carried: _Carried) -> Histories:
    """The histories, which the layers of a cache are of from here on."""
    carried.mark(cache)
    return carried.histories


def follow(cache: Any, key: str, history: CacheHistory) -> None:
    """Let a cache carry a history, in the place of one under the same key, and do to it what is done to the cache."""
    carried = _carried_by(cache)
    if carried is None:
        kind: Any = type(cache)
        carried = _Carried({})
        setattr(cache, _ATTRIBUTE, carried)
        cache.__class__ = _following(kind)
    elif not carried.is_of(cache):
        carried.histories.clear()  # what the layers hold is to be told under the other keys, too
    _used(cache, carried)[key] = history


def unfollow(cache: Any, key: str) -> None:
    """Take a history away; a cache without one is as it was before the first."""
    carried = _carried_by(cache)
    if carried is None:
        return
    carried.histories.pop(key, None)
    if not carried.histories:
        delattr(cache, _ATTRIBUTE)
        cache.__class__ = type(cache).__bases__[0]
        layer = _first_layer(cache)
        if layer is not None:
            vars(layer).pop(_MARK, None)


@functools.cache
def _following(kind: type) -> type:
    """A subclass of a kind of cache, of the same name, whose methods also act on the histories."""
    namespace = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__reduce_ex__": _reduce}
    for name, act_on in _ACTS.items():
        if hasattr(kind, name):
            namespace[name] = _and_then(getattr(kind, name), act_on, whatever_it_holds=name == "reset")
    return type(kind.__name__, (kind,), namespace)


def _reduce(cache: Any, protocol: Any) -> Any:
    """For copies and pickles: as the kind of cache does it, the subclass named by the kind that it follows."""
    kind: Any = type(cache).__bases__[0]
    make, arguments, *rest = kind.__reduce_ex__(cache, protocol)
    if not arguments or arguments[0] is not type(cache):
        raise ValueError(f"a {kind.__name__} with Engram's history, which cannot be copied or pickled: detach() first")
    carried = getattr(cache, _ATTRIBUTE)
    carried.release(cache)
    return _remake, (make, kind, carried, *arguments[1:]), *rest


def _remake(make: Any, kind: type, carried: _Carried, *arguments: Any) -> Any:
    """A cache without its state, that carries these histories."""
    made = make(_following(kind), *arguments)
    setattr(made, _ATTRIBUTE, carried)
    return made


def _and_then(method: Any, act_on: Callable[..., Callable[[], None]], whatever_it_holds: bool) -> Any:
    """A method of a cache that does the same to the histories; what one of them refuses is done to none.

    Args:
        whatever_it_holds: also to a cache whose layers are not of these histories.
    """

    @functools.wraps(method)
    def both(cache: Any, *args: Any, **kwargs: Any) -> Any:
        carried = _carried_by(cache)
        if carried is None:  # detached
            return method(cache, *args, **kwargs)
        if not whatever_it_holds:
            carried.require_own(cache)
        acts = [act_on(history, *args, **kwargs) for history in carried.histories.values()]
        result = method(cache, *args, **kwargs)
        for act in acts:
            act()
        carried.mark(cache)
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
