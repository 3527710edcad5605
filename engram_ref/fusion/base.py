"""What the forms of the fusion share: the checks, the cut into blocks, and one way to call any of them.

A fusion holds the weights of one Engram layer after the lookup; `make_fusion` (`engram_ref.fusion.factory`) picks its
class by the configuration.

    hidden = fusion.add_to(hidden, e)       # e: [B, T, C*D] looked-up rows, hidden: [B, T, G, H]
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import ModuleType

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from engram_ref.compiled import numba_works
from engram_ref.config import EngramConfig, require_int

GATE_FLOOR = 1e-6  # under the square root: in the code of the demo and of V4.1, not in the paper
CONV_NORM_EPS = 1e-5  # of the demo
# Without autograd: positions that are projected at once, and values of the stream that are then fused at once.
# On a CPU the former are enough for the matrix product to run at full speed and the latter stay in the cache; an
# accelerator only has its memory to save.
CPU_BLOCKS = (1 << 10, 1 << 19)
ACCELERATOR_BLOCKS = (1 << 14, 1 << 26)


class Fusion(nn.Module, ABC):
    """Looked-up rows and the residual stream before a layer become the stream after it.

    Args:
        config: geometry.
        fused: whether what follows the projection is done in one pass, where no derivatives are asked for: by one
            kernel on CUDA (with Triton; not float64), by compiled loops on a CPU (with numba; float32 only). None where
            it can be, False never, True must it be. It is rounded once; torch's operations in its place give the same
            up to rounding.

    Attributes:
        form: of the configurations that it is made for.
        config, fused: as above; `fused` may be set.

    Raises:
        ValueError: a configuration of another form.
    """

    form: str
    has_one_pass = True  # whether kernels and loops know the form

    def __init__(self, config: EngramConfig, fused: bool | None = None) -> None:
        super().__init__()
        if config.form != self.form:
            raise ValueError(
                f"a configuration of form {config.form!r}; {type(self).__name__} is the form {self.form!r}: "
                "let make_fusion pick the class"
            )
        self.config = config
        self.fused = fused

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    def reach(self) -> int:
        """Positions before a chunk that its update depends on; there are none without a convolution."""
        return 0

    @property
    def inner_dtype(self) -> torch.dtype:
        """In which everything after the projection is computed: float32, or float64 for float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def one_pass(self) -> ModuleType | None:
        """What does in one pass all that follows the projection; None where torch's operations are to do it.

        Raises:
            ValueError: `fused` is True, and nothing can.
        """
        # Kernels and loops pass no derivatives on, and torch.compile writes kernels of its own.
        if self.fused is False or is_differentiated() or torch.compiler.is_compiling():
            return None
        found = _one_pass_on(self.device.type, self.dtype) if self.has_one_pass else None
        if found is None and self.fused:
            raise ValueError(
                f"fused=True for {self.dtype} on {self.device}, form {self.form}: one pass is for the forms demo and "
                "v41, with Triton on CUDA and no float64, or with numba on a CPU and float32; use fused=None"
            )
        return found

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights."""

    @abstractmethod
    def add_to(
        self,
        hidden: Tensor,
        e: Tensor,
        history: ShortConvHistory | None = None,
        dead: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the layer, whatever the form.

        Args:
            hidden: the stream before it, [B, T, G, H].
            e: looked-up rows, [B, T, C*D].
            history: of the demo's convolution, what came before this chunk; it is read and advanced.
            dead: in the form v41, booleans [B, T]; where true the stream passes through bit for bit.
            padding: booleans [B, T], true where a batch is filled up: nothing of these positions reaches another one.

        Raises:
            ValueError: wrong shape or dtype, or an argument that this form does not know.
        """

    def _check(self, name: str, given: Tensor, width: int, hidden: Tensor) -> None:
        """Refuse what does not fit this layer, or `given` [B, T, width] that does not fit `hidden`."""
        copies, size = self.config.hc_mult, self.config.hidden
        if hidden.ndim != 4 or hidden.shape[2:] != (copies, size):
            raise ValueError(f"hidden of shape {tuple(hidden.shape)}; this layer needs [B, T, {copies}, {size}]")
        if given.shape != (*hidden.shape[:2], width):
            raise ValueError(
                f"{name} of shape {tuple(given.shape)}; hidden of shape {tuple(hidden.shape)} needs "
                f"[{hidden.shape[0]}, {hidden.shape[1]}, {width}]"
            )
        dtype, device = self.dtype, self.device  # asked once: a forward has a dozen such questions
        for what, tensor in ((name, given), ("hidden", hidden)):
            if tensor.dtype != dtype or tensor.device.type != device.type:
                raise ValueError(
                    f"{what} is {tensor.dtype} on {tensor.device}; this layer is {dtype} on {device}: "
                    "convert one of them with .to()"
                )


def is_differentiated() -> bool:
    """Whether derivatives may be asked of what is computed now: backwards, or forwards beside it, or in torch.func."""
    # Derivatives that go forwards do so under no_grad, too, and so does vmap, inside of which nothing may be written in
    # place; torch has no public question for them.
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@functools.cache
def _one_pass_on(device_type: str, dtype: torch.dtype) -> ModuleType | None:
    """The kernels or the compiled loops, where they can serve."""
    if device_type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("engram_ref.fusion.kernels")  # float32 inside, too little for float64
    if device_type == "cpu" and dtype == torch.float32 and numba_works():
        return importlib.import_module("engram_ref.fusion.fused")
    return None


def side_by_side(tensor: Tensor) -> Tensor:
    """The tensor, or a copy in which the values of its last dimension are neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block_sizes(device: torch.device) -> tuple[int, int]:
    """Without autograd: positions to project at once, and values of the stream to fuse at once."""
    return CPU_BLOCKS if device.type == "cpu" else ACCELERATOR_BLOCKS


def check_positions(name: str, marked: Tensor | None, hidden: Tensor) -> None:
    """Refuse marks that are not one boolean for each position of `hidden`."""
    if marked is None:
        return
    if marked.dtype != torch.bool or marked.shape != hidden.shape[:2] or marked.device.type != hidden.device.type:
        raise ValueError(
            f"{name} of shape {tuple(marked.shape)}, {marked.dtype} on {marked.device}: hidden needs booleans "
            f"{list(hidden.shape[:2])} on {hidden.device}"
        )


def without(e: Tensor, marked: Tensor) -> Tensor:
    """Rows [..., C*D] for a product, zeros at marked positions [...], whose own may be anything."""
    # A gradient of 0 times a NaN is NaN; and torch 2.13's products of bfloat16, on a CPU with AMX, let a NaN into the
    # next row where C*D is no multiple of 32. Elsewhere rows keep apart by themselves.
    apart = e.device.type != "cpu" and not is_differentiated()
    return e if apart else e.masked_fill(marked[..., None], 0)


def mean_square(x: Tensor) -> Tensor:
    """Over the last dimension, which stays: [..., 1]."""
    # A norm is one pass; x.square() would write as much again.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]


def spans(start: int, stop: int, step: int) -> Iterator[slice]:
    """Slices of `step`, the last one shorter, that cover start .. stop - 1."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


class ShortConvHistory:
    """What the convolution needs of each sequence's past, carried from chunk to chunk.

    A new history stands before the start of its sequences; `forward` reads and advances it:

        history = ShortConvHistory(fusion, batch_size)
        for chunk in chunks:
            update = fusion(chunk.e, chunk.hidden, history)

    `copy` keeps a state to return to, for instance before tokens that may be rejected. Whatever computes a chunk a
    second time, as `torch.utils.checkpoint` does for its gradients, must be given a copy of the state before it.

    Attributes:
        values: the last (K-1) * max_ngram gated values, normalised, before the norm's gain: [B, P, G, H].
    """

    def __init__(self, fusion: Fusion, batch_size: int) -> None:
        require_int("batch_size", batch_size, 0)
        shape = (batch_size, fusion.reach, fusion.config.hc_mult, fusion.config.hidden)
        # Where nothing was, the convolution adds nothing.
        self.values = torch.zeros(shape, dtype=fusion.inner_dtype, device=fusion.device)

    def advance(self, values: Tensor) -> None:
        """Put what comes next in place of what was."""
        if is_differentiated():
            self.values = values.detach().clone()  # gradients still need the old ones
        else:
            self.values.copy_(values)  # where a captured graph reads them

    def copy(self) -> ShortConvHistory:
        """An independent history in the same state."""
        return copy.deepcopy(self)

    def check(self, fusion: Fusion, batch_size: int) -> None:
        """Refuse a batch, or a layer, that this is not the history of."""
        needed = (batch_size, fusion.reach, fusion.config.hc_mult, fusion.config.hidden)
        if tuple(self.values.shape) != needed or self.values.dtype != fusion.inner_dtype:
            raise ValueError(
                f"a history of {tuple(self.values.shape)}, {self.values.dtype}; {batch_size} sequences of this layer "
                f"need {needed}, {fusion.inner_dtype}: make one with ShortConvHistory(fusion, batch_size)"
            )
