"""What all ranks decide together: what goes wrong on one goes wrong on all, with the same words, and nobody waits.

    agree(group, error)                         # None where all went well; raises the same on all ranks
    require_same(group, plan.checksum, "the plan of shards")

A notice is what a rank says of its part: nothing, or an error, in so many bytes that everybody knows how many. A rank
that ends is noticed by the network (gloo) or by the group's time limit; `watched` makes one line of it.

    python -m pytest tests/ref/sharding/test_agreement.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
import torch.distributed as dist
from torch import Tensor

from engram_ref.quoting import one_line
from engram_ref.sharding.plan import NOTICE_BYTES

_KINDS: list[type[Exception]] = [ValueError, OSError, RuntimeError]  # 1, 2, 3 in the first byte of a notice
_TEXT, _SHOWN = 64, 16  # characters that are compared, and that are shown


class RankLost(ConnectionError):
    """Another rank ended, or did not come in time; the group is of no use any more."""


@contextmanager
def watched(group: Any) -> Iterator[None]:
    """Around a collective: whatever torch says of a rank that is gone becomes one line.

    Raises:
        RankLost: another rank ended or is late.
    """
    try:
        yield
    except RuntimeError as error:  # torch has no narrower class for it
        me = f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}"
        raise RankLost(
            f"{me}: the exchange of rows broke off: another rank ended, was killed or did not come in time "
            f"({one_line(_reason(error), 120)}); start all ranks anew"
        ) from error


def _reason(error: RuntimeError) -> str:
    """What gloo or nccl says, without the place in their sources before it and the advice behind it."""
    return re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition(". This is typically")[0]


def notice(error: BaseException | None) -> Tensor:
    """What a rank says of its part, uint8 [NOTICE_BYTES]: zeros if all went well."""
    said = torch.zeros(NOTICE_BYTES, dtype=torch.uint8, device="cpu")
    if error is not None:
        kind = next((number for number, kind in enumerate(_KINDS, 1) if isinstance(error, kind)), len(_KINDS))
        # Its length has one byte. It may be cut within a character, for which whoever reads it puts another.
        text = one_line(str(error) or type(error).__name__, NOTICE_BYTES - 2).encode()[: NOTICE_BYTES - 2]
        said[: 2 + len(text)] = torch.tensor([kind, len(text), *text], dtype=torch.uint8, device="cpu")
    return said


def first_error(notices: Tensor) -> Exception | None:
    """What the first rank to have an error says; notices [P, NOTICE_BYTES] of all ranks, on the CPU."""
    for rank, said in enumerate(notices):
        kind = int(said[0])
        if kind:
            text = bytes(said[2 : 2 + int(said[1])].tolist()).decode(errors="replace")
            return _KINDS[kind - 1](text if len(notices) == 1 else f"{text} (on rank {rank} of {len(notices)})")
    return None


def raise_first(notices: Tensor) -> None:
    """Raise it, if there is one."""
    error = first_error(notices)
    if error is not None:
        raise error


def agree(group: Any, error: BaseException | None) -> None:
    """Raise on all ranks what went wrong on one, the first of several; all must call it.

    Raises:
        ValueError: or OSError, or RuntimeError: what the first rank with an error has.
        RankLost: a rank did not come.
    """
    try:
        raise_first(gather(group, notice(error)))
    except (ValueError, OSError, RuntimeError) as first:
        raise first from error  # what this rank has met itself is its cause


@contextmanager
def agreed(group: Any) -> Iterator[None]:
    """Around what each rank does by itself: whatever one of them raises, all raise (`agree`)."""
    error = None
    try:
        yield
    except Exception as found:  # whatever it is, the others must hear of it: they would wait
        error = found
    agree(group, error)


def require_same(group: Any, mine: str, what: str) -> None:
    """Refuse, on all ranks, texts that are not the same on all.

    Args:
        group: of the ranks.
        mine: of at most 64 characters, such as a checksum.
        what: it is of, for the message.

    Raises:
        ValueError: some rank has another one than rank 0.
    """
    found = gather(group, torch.tensor(list(mine.ljust(_TEXT).encode()), dtype=torch.uint8, device="cpu"))
    for rank, other in enumerate(found):
        if not torch.equal(other, found[0]):
            shown = [bytes(text[:_SHOWN].tolist()).decode().strip() for text in (other, found[0])]
            raise ValueError(
                f"rank {rank} has another {what} ({shown[0]}) than rank 0 ({shown[1]}): make it on all ranks from the "
                "same configuration, vocabulary and table"
            )


def gather(group: Any, mine: Tensor, device: torch.device | None = None) -> Tensor:
    """What all ranks say, [P, ...], on the CPU; the same shape on each.

    Args:
        device: the group's, as the thread that made the group knows it; None asks in this one.
    """
    device = device or group_device(group)
    mine = mine.to(device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with watched(group):
        dist.all_gather(found, mine, group=group)
    return torch.stack(found).cpu()


def group_device(group: Any) -> torch.device:
    """Where the tensors of its collectives are: nccl moves what is on a GPU, gloo what is in host memory."""
    # The current GPU is a thread's own: in a new thread, as a prefetcher's, it is the first one, whose rank is another.
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
