"""Several sequences in one row: found as transformers finds them, laid apart, and put together again.

    borders = borders_of(given, past=0, use_cache=False, config=model.config)      # booleans [B, T], or None: no border
    packing = Packing(borders, gap)
    wide = packing.spread(hidden)                           # [B, T, ...] -> [B, W, ...]
    hidden = packing.pick(wide)                             # and back

transformers sees borders in `position_ids` that do not go on by one, where there is neither a mask nor a cache, and in
a mask [B, 1, T, T] that is block-diagonal. Between two sequences the layers get positions of nothing, so that each
gives what it gives alone, to the bit of its rows. Where the borders cannot be known, or transformers would attend
across them, the forward is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engram_ref.attach.blocks import LENGTHS, Given
from engram_ref.attach.padding import chosen, visible
from engram_ref.ids import DEAD

_MEND = "give a padded batch"
_SEVERAL = "several sequences in one row"
_RESTART = f"position_ids do not go on by one, as of {_SEVERAL}"
_TOLD_APART = ("position_ids", "cu_seq_lens_q", "cu_seqlens_q")  # by which flash attention keeps sequences apart


class Packing:
    """How the positions of some rows are laid apart.

    Args:
        borders: booleans [B, T], true where a position begins a sequence although it is not the row's first.
        gap: positions of nothing between two sequences.

    Attributes:
        apart: booleans [B, W], true where nothing is.
    """

    def __init__(self, borders: Tensor, gap: int) -> None:
        batch, length = borders.shape
        # So many positions as the layers look back: DEAD to the hash, padding to the convolution.
        numbers = torch.arange(length, device=borders.device).expand(batch, length)
        self._wide = numbers + gap * borders.cumsum(1)  # [B, T], of each position among the wide ones
        shape = (batch, int(self._wide.max()) + 1)  # [B, W]
        self._source = torch.zeros(shape, dtype=torch.int64, device=borders.device).scatter(1, self._wide, numbers)
        self.apart = torch.ones(shape, dtype=torch.bool, device=borders.device).scatter(1, self._wide, False)

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        if self.apart.device == device:
            return self
        moved = object.__new__(Packing)
        moved._wide, moved._source, moved.apart = (x.to(device) for x in (self._wide, self._source, self.apart))
        return moved

    def spread(self, values: Tensor) -> Tensor:
        """[B, T, ...] -> [B, W, ...]; where nothing is stands the row's first value."""
        return _take(values, self._source)

    def lay_padding(self, padding: Tensor | None) -> Tensor:
        """Where no token is, booleans [B, W], of padding [B, T] or none."""
        return self.apart if padding is None else self.spread(padding.to(self.apart.device)) | self.apart

    def pick(self, values: Tensor) -> Tensor:
        """[B, W, ...] -> [B, T, ...]."""
        return _take(values, self._wide)


def _take(values: Tensor, positions: Tensor) -> Tensor:
    return values[torch.arange(len(values), device=values.device)[:, None], positions]


def borders_of(given: Given, past: int, use_cache: bool, config: Any, recurs: bool = False) -> Tensor | None:
    """Where sequences begin behind others in one row: booleans [B, T], or None where none does.

    Args:
        given: the arguments of the forward.
        past: positions in the cache.
        use_cache: whether there is a cache, or will be.
        config: of the model.
        recurs: its blocks mix positions by states or convolutions, too, which know no borders.

    Raises:
        ValueError: borders that the model would cross, or that are not said in a way that it follows.
    """
    batch, length = given.ids.shape
    if length == 1:
        return None
    mask = chosen(given.mask)
    if by_positions(given, config):
        found = _in_positions(given, use_cache, config)
    else:
        found = _in_mask(mask, length, past) if isinstance(mask, Tensor) and mask.ndim == 4 else None
    if found is not None:
        found = found.expand(batch, length)
    for name, said in given.packed.items():
        _compare(name, said, found, batch, length)
    if found is not None and recurs:
        raise ValueError(f"{_SEVERAL} of a model with recurrent or convolutional blocks, which mix them: {_MEND}")
    if found is not None and past:
        raise ValueError(f"{_SEVERAL} behind a cache of {past} positions: {_MEND}")
    return found


def by_positions(given: Given, config: Any) -> bool:
    """Whether `position_ids` say where sequences begin, and not a mask."""
    mask = chosen(given.mask)
    return mask is None or (is_flash(config) and _hides_nothing(mask))


def is_flash(config: Any) -> bool:
    """Whether attention gets no mask."""
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def _hides_nothing(mask: Any) -> bool:
    """Whether transformers leaves a mask [B, positions] out before flash attention, which then looks at positions."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all())


def refuse_numbered(mask: Any) -> None:
    """Refuse a mask [B, positions] that numbers the sequences of a row, 1, 2, 3, ...: transformers takes it for ones.

    Raises:
        ValueError: a number above 1.
    """
    mask = chosen(mask)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.dtype != torch.bool and bool((mask > 1).any()):
        raise ValueError(
            "an attention mask with numbers above 1, as of several sequences in one row, which transformers attends "
            f"across: give position_ids that begin anew with each sequence and no mask, or {_MEND}"
        )


def require_continued(columns: Tensor, recent: Tensor, pad: int, past: int) -> None:
    """Refuse a chunk whose first token does not see the newest one in the cache: a sequence that begins there.

    Args:
        columns: of the mask, for the chunk and R positions before it; only those of four dimensions say it.
        recent: compressed ids of these positions, [B, R]; DEAD or `pad` where no token is.
        past: positions in the cache.

    Raises:
        ValueError: the first token of a row does not see it.
    """
    if columns.ndim != 4:
        return
    batch, remembered = recent.shape
    sees = visible(columns).expand(batch, -1, -1)  # [B, T, R + T]
    recent, numbers = recent.to(sees.device), torch.arange(remembered, device=sees.device)
    tokens = (recent != DEAD) & (recent != pad)
    newest = torch.where(tokens, numbers, -1).amax(dim=1)  # [B], -1 where there is nothing to go on from
    real = sees[:, :, remembered:].diagonal(dim1=1, dim2=2)  # [B, T]
    first = real.int().argmax(dim=1)  # [B], the chunk's first token
    linked = sees[torch.arange(batch, device=sees.device), first, newest.clamp_min(0)]
    if ((newest >= 0) & real.any(dim=1) & ~linked).any():
        raise ValueError(
            f"an attention mask in which a sequence begins behind a cache of {past} positions, whose newest it does "
            f"not see: use a new cache for it, or {_MEND}"
        )


def require_apart(borders: Tensor, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], flash: bool) -> None:
    """Refuse a block that mixes positions across borders: not every model tells its blocks of them.

    Args:
        borders: [B, T].
        name: of the block, for messages.
        args, kwargs: that it is called with.
        flash: it gets no mask; what it is told of positions counts.

    Raises:
        ValueError: it does, or that cannot be seen.
    """
    values = [*args, *kwargs.values()]
    masks = [x for x in values if isinstance(x, Tensor) and _could_be_mask(x, borders.shape[1])]
    rules = [rule for rule in (getattr(value, "mask_mod", None) for value in values) if rule is not None]
    if masks:  # or what only looks like one, such as a bias, which hides nothing
        across = all(_crosses(visible(mask)[:, :, : borders.shape[1]], borders) for mask in masks)
    elif rules:  # flex attention asks a function about single pairs
        row, first = borders.nonzero(as_tuple=True)
        across = bool(rules[0](row, torch.zeros_like(row), first, first - 1).any())
    else:
        across = not (flash and any(value is not None for key, value in kwargs.items() if key in _TOLD_APART))
    if across:
        raise ValueError(
            f"{_SEVERAL}; {name} of this model attends across their borders, mixes them, or has a mask of its own: "
            f"{_MEND}"
        )


def _could_be_mask(values: Tensor, length: int) -> bool:
    """Of a static cache, a mask has columns to come."""
    shaped = values.ndim == 4 and values.shape[2] == length <= values.shape[3]
    return shaped and (values.dtype == torch.bool or values.is_floating_point())


def _crosses(sees: Tensor, borders: Tensor) -> bool:
    """Whether a position sees another sequence than its own, by `sees`, [B, T, T]."""
    number = borders.to(sees.device).cumsum(1)  # of the sequence, [B, T]
    across = number[:, :, None] != number[:, None, :]
    if sees.shape == across.shape:
        across &= sees  # in place: of [B, T, T], memory costs more to get than to write to
    else:
        across = across & sees
    return bool(across.view(torch.uint8).max())  # `any` takes 20 times as long on a CPU


def _in_positions(given: Given, use_cache: bool, config: Any) -> Tensor | None:
    """Borders where `position_ids` do not go on by one, which is where transformers sees them."""
    positions = given.positions
    if positions is None:
        return None
    positions = positions[None] if positions.ndim == 1 else positions  # [B or 1, T], of some models several of these
    if positions.shape[-1] != given.ids.shape[1]:
        raise ValueError(f"position_ids of shape {tuple(positions.shape)} for token ids of {tuple(given.ids.shape)}")
    borders = torch.zeros_like(positions, dtype=torch.bool)
    borders[..., 1:] = positions.diff(dim=-1) != 1
    if not borders.any():
        return None
    if positions.ndim != 2:
        raise ValueError(f"position_ids of shape {tuple(positions.shape)} that do not go on by one: {_MEND}")
    if use_cache:
        raise ValueError(
            f"{_RESTART}, and there is a cache, with which transformers attends across their borders: use_cache=False, "
            f"or {_MEND}"
        )
    if is_flash(config) and not _seen_by_flash(positions, borders, len(given.ids)):
        raise ValueError(f"{_RESTART}; this attention would attend across their borders: {_MEND}")
    return borders


def _seen_by_flash(positions: Tensor, borders: Tensor, batch: int) -> bool:
    """Whether flash attention attends within these borders: it sees those of one row, by its smallest position."""
    starts = positions == positions.min()
    return batch == 1 and bool(starts[:, 0].all()) and torch.equal(starts[:, 1:], borders[:, 1:])


def _in_mask(mask: Tensor, length: int, past: int) -> Tensor | None:
    """Borders where a position does not see the one before it, in a mask [B, H, T, P]; padding is passed over."""
    sees = visible(mask)[:, :, past : past + length]  # [B, T, T]
    real = sees.diagonal(dim1=1, dim2=2)  # [B, T]
    numbers = torch.arange(length, device=sees.device)
    newest = torch.where(real, numbers, -1).cummax(dim=1).values  # [B, T], the last token up to each position
    before = torch.nn.functional.pad(newest[:, :-1], (1, 0), value=-1)  # [B, T], the last position with a token
    linked = sees.gather(2, before.clamp_min(0)[:, :, None])[:, :, 0]  # [B, T]
    borders = real & (before >= 0) & ~linked
    if not borders.any():
        return None
    tokens = sees & real[:, :, None] & real[:, None, :]
    if _crosses(tokens.tril(), borders):
        raise ValueError(
            "an attention mask in which a position sees not the one before it, but others: neither causal nor "
            f"block-diagonal, so the tokens before it are not known; {_MEND}"
        )
    return borders


def _compare(name: str, said: Any, found: Tensor | None, batch: int, length: int) -> None:
    """Refuse what speaks of other borders than those that are followed."""
    said = torch.as_tensor(said)
    borders = torch.zeros(batch, length, dtype=torch.bool, device=said.device)
    if not name.startswith(LENGTHS):
        if said.shape != borders.shape:
            raise ValueError(f"{name} of shape {tuple(said.shape)} for token ids of {(batch, length)}")
        borders[:, 1:] = said.diff(dim=1) != 0
    else:
        starts = said[(said > 0) & (said < batch * length)]
        borders.view(-1)[starts.to(torch.int64)] = True
        borders[:, 0] = False
    followed = torch.zeros_like(borders) if found is None else found.to(borders.device)
    if not torch.equal(borders, followed):
        raise ValueError(
            f"several sequences packed into one row ({name}), and other borders or none by position_ids or mask, which "
            f"attention may cross: give position_ids that begin anew with each sequence, or {_MEND}"
        )
