"""What a CUDA graph needs to call the CPU, as two Triton kernels: ask and wait, then take what was answered.

Asking is one program, so that a GPU that waits is a GPU with one small block that waits. It looks at most so often:
a kernel that waited for good could not be stopped. Then, or where the CPU says that it failed, what is taken is NaN.

Words are read with `ld.acquire.sys` and written with `st.release.sys`: across the bus, with all that was read or
written besides in order. An atomic operation would not do: over PCIe it reads, and writes back, what the CPU may have
changed meanwhile. cuStreamWaitValue, which waits without a block, waits without an end, too.

    python -m pytest tests/ref/calling/test_call.py
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a Triton kernel are Triton's values, whatever Python is told)

from __future__ import annotations

import engram_ref.needs_torch  # noqa: F401

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_ref.gpu import INTERPRETED, on_device

IDS_AT_ONCE = 128
UNITS_PER_PROGRAM = 512  # of 16 bytes: the rows of 64 tokens of V4.1, 0.8 MB, are taken by 96 programs
_INTERPRETED = tl.constexpr(INTERPRETED)  # Triton's interpreter knows no assembly; there, one thread follows another
# Words of the mailbox, each in a cache line of its own, as both sides write: indices of int64. Each names a step: the
# last that asked, was answered (minus: the CPU could not), waited in vain, the first of those that waited in vain with
# that one (the others were queued behind it), and the last of those that the host knows of.
ASKED, ANSWERED, EXPIRED, FIRST, TOLD, IDS = 0, 16, 32, 48, 64, 80
SHORTER = 16  # times fewer looks behind a step that waited in vain; half a second of the usual several
_SHORTER = tl.constexpr(SHORTER)
_ANSWERED, _EXPIRED, _FIRST, _TOLD, _IDS = (tl.constexpr(word) for word in (ANSWERED, EXPIRED, FIRST, TOLD, IDS))
# How a call ended, for whoever takes the answer and for the next call; minus how many in a row, if it waited in vain.
_GOT_IT, _REFUSED = tl.constexpr(1), tl.constexpr(0)


@triton.jit
def _look(word):
    """What a word says; nothing that follows is read before it."""
    if _INTERPRETED:
        return tl.load(word, volatile=True)
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.s64 $0, [$1];", "=l,l", [word], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _post(word, value):
    """Write a word, after all that this program has written before; one thread does."""
    tl.debug_barrier()
    if _INTERPRETED:
        tl.store(word, value)
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first st.release.sys.global.s64 [$1], $2;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,l", [word, value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ids", "ids_b", "ids_t", "mailbox", "turn", "answered", "length", "count", "polls"])
def _ask(ids, ids_b, ids_t, mailbox, turn, answered, length, count, polls, LANES: tl.constexpr):
    for first in range(0, count, LANES):
        at = first + tl.arange(0, LANES)
        token = tl.load(ids + (at // length) * ids_b + (at % length) * ids_t, mask=at < count)
        tl.store(mailbox + _IDS + at, token, mask=at < count)
    mine = tl.load(turn) + 1
    in_a_row = tl.maximum(-tl.load(answered), 0)
    _post(mailbox, mine)
    tl.store(turn, mine)  # all threads have read it: `_post` waited for them
    # Steps that are queued behind one that waited in vain would each wait as long: they wait shorter. One that was
    # launched when the host knew is not queued; the word costs a way over the bus, so only these look at it.
    if in_a_row > 0:
        in_a_row = tl.where(_look(mailbox + _TOLD) < mine - 1, in_a_row, 0)
    left = tl.where(in_a_row > 0, tl.cdiv(polls, _SHORTER), polls)
    says = _look(mailbox + _ANSWERED)
    while (says != mine) & (says != -mine) & (left > 1):
        says = _look(mailbox + _ANSWERED)
        left -= 1
    in_vain = (says != mine) & (says != -mine)
    tl.store(answered, tl.where(in_vain, -1 - in_a_row, tl.where(says == mine, _GOT_IT, _REFUSED)))
    if in_vain:
        tl.store(mailbox + _FIRST, mine - in_a_row)
        _post(mailbox + _EXPIRED, mine)


@triton.jit(do_not_specialize=["answered", "units"])
def _take(sent, answered, out, units, UNITS: tl.constexpr, WORDS: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    at = unit[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [UNITS, WORDS]
    here = (unit < units)[:, None]
    # Volatile: none that a cache of the GPU has kept of an earlier answer in the same place.
    word = tl.load(sent + at, mask=here, volatile=True)
    tl.store(out + at, tl.where(tl.load(answered) == _GOT_IT, word, -1), mask=here)  # all bits set: NaN in every format


def ask(ids: Tensor, mailbox: Tensor, turn: Tensor, answered: Tensor, polls: int) -> None:
    """Send token ids to the CPU and wait for its answer, on the current stream.

    Args:
        ids: int64 [B, T], on the device.
        mailbox: int64 [IDS + B*T], page-locked.
        turn: int64 [1], on the device: calls so far; this is one more.
        answered: int32 [1], on the device: 1, 0, or minus how many calls in a row have waited in vain; 1 before the
            first call.
        polls: looks at the answer, at most; about a microsecond each over PCIe.
    """
    batch, length = ids.shape
    with on_device(ids.device):
        _ask[(1,)](
            ids, *ids.stride(), mailbox, turn, answered, length, batch * length, polls, LANES=IDS_AT_ONCE, num_warps=1
        )


def take(sent: Tensor, answered: Tensor, out: Tensor) -> None:
    """Copy what the CPU answered to the device; NaN if it did not.

    Args:
        sent: values, page-locked, contiguous; their bytes are whole words of four.
        answered: int32 [1], see `ask`.
        out: as many values, contiguous.
    """
    words, target = sent.view(-1).view(torch.int32), out.view(-1).view(torch.int32)
    aligned = not any((tensor.data_ptr() | tensor.nbytes) % 16 for tensor in (words, target))
    unit = 4 if aligned else 1  # words; Triton joins accesses only under masks that it knows to be alike
    units = len(words) // unit
    with on_device(out.device):
        _take[(triton.cdiv(units, UNITS_PER_PROGRAM),)](
            words, answered, target, units, UNITS=UNITS_PER_PROGRAM, WORDS=unit, num_warps=4
        )
