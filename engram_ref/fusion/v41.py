"""The gate of DeepSeek-V4.1-Flash: looked-up rows and the residual stream become the stream after the layer.

    fusion = V41Fusion(config)
    hidden = fusion(e, hidden)              # e: [B, T, C*D] looked-up rows, hidden: [B, T, G, H]

One projection without bias gives a key for each residual copy and one value for all. Key and stream are compared,
both normalised, in float32; a sigmoid of the signed square root of the result gates the value, and the stream plus
the gated value is rounded once. There is no convolution, so positions know nothing of each other and a sequence may
be cut anywhere. At a DEAD position (an image) the gate is 0 and the stream passes through bit for bit.

Differences from the demo's gate (`engram_ref.fusion.demo`): eps, the sign of 0, and the sum with the stream, which
belongs to the layer.

    python -m pytest tests/ref/fusion/test_v41*.py
"""

from __future__ import annotations

import math

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor, nn

from engram_ref.config import V41_NORM_EPS, EngramConfig
from engram_ref.fusion.base import (
    GATE_FLOOR,
    Fusion,
    ShortConvHistory,
    block_sizes,
    check_positions,
    is_differentiated,
    mean_square,
    side_by_side,
    spans,
    without,
)
from engram_ref.fusion.projection import Fp8Projection, PlainProjection


class V41Fusion(Fusion):
    """Projection and gate of DeepSeek-V4.1-Flash, with the checkpoint's names: `wkv`, `q_weight`, `k_weight`.

    Args:
        config: geometry, of form v41.
        device: of the weights.
        dtype: of the gains, of what goes in and of what comes out: any of torch's four real dtypes.
        fp8: keep the projection as fp8 codes and scales (`wkv.weight`, `wkv.scale`), in half the memory of bfloat16,
            and decode it as it is used: the same numbers as from the decoded weights, to the bit.
        fused: whether the gate is done in one pass; see `Fusion`.

    Raises:
        ValueError: a configuration of another form, or with `fp8` a projection that is not made of 32 x 32 blocks.
    """

    form = "v41"

    def __init__(
        self,
        config: EngramConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(config, fused)
        copies, hidden = config.hc_mult, config.hidden
        inputs, outputs = config.embedding_width, (copies + 1) * hidden
        self.wkv = Fp8Projection(inputs, outputs, device) if fp8 else PlainProjection(inputs, outputs, device, dtype)
        self.q_weight = nn.Parameter(torch.ones((copies, hidden), device=device, dtype=dtype))
        self.k_weight = nn.Parameter(torch.ones((copies, hidden), device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The projection as torch's own `Linear` begins, gains 1."""
        self.wkv.reset_parameters(generator)
        nn.init.ones_(self.q_weight)
        nn.init.ones_(self.k_weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of the gains, the input and the result."""
        return self.q_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.q_weight.device

    def forward(self, e: Tensor, hidden: Tensor, dead: Tensor | None = None) -> Tensor:
        """The residual stream after the layer.

        Args:
            e: looked-up rows, [B, T, C*D]; those of dead positions do not matter.
            hidden: residual stream before it, [B, T, G, H].
            dead: booleans [B, T]; where true the stream comes out as it went in, bit for bit.

        Returns:
            [B, T, G, H].

        Raises:
            ValueError: wrong shape or dtype.
        """
        self._check("e", e, self.config.embedding_width, hidden)
        check_positions("dead", dead, hidden)
        if not (is_differentiated() or torch.compiler.is_compiling()):
            return self._fuse_in_blocks(e, hidden, dead)
        if dead is not None:
            e = without(e, dead)
        return self._fuse(self.project(e), hidden, self.gains(), dead)

    def add_to(
        self,
        hidden: Tensor,
        e: Tensor,
        history: ShortConvHistory | None = None,
        dead: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the layer, as `forward` gives it; padding is dead.

        Raises:
            ValueError: as `forward`, or a history, for which this form has no use.
        """
        if history is not None:
            raise ValueError("a history: the form v41 has no convolution to carry on; leave history out")
        if padding is not None:
            dead = padding if dead is None else dead | padding
        return self(e, hidden, dead)

    def project(self, e: Tensor) -> Tensor:
        """Keys and value of rows [..., C*D], side by side, [..., (G+1)*H]: key_0 | ... | key_{G-1} | value."""
        return self.wkv(e)

    def gate(self, packed: Tensor, hidden: Tensor, dead: Tensor | None = None) -> Tensor:
        """How far each copy's value is let through: float32 [..., G], float64 for float64.

        Args:
            packed: what `project` gave, [..., (G+1)*H].
            hidden: residual stream, [..., G, H].
            dead: booleans [...]; where true the gate is 0.
        """
        packed = packed.to(self.inner_dtype).unflatten(-1, (-1, self.config.hidden))  # [..., G+1, H]
        return _gate(packed[..., :-1, :], hidden.to(packed.dtype), self.gains(), dead)[..., 0]

    def gains(self) -> Tensor:
        """The learned gains multiplied together, [G, H] in the inner dtype."""
        inner = self.inner_dtype
        return self.q_weight.to(inner) * self.k_weight.to(inner)

    def _fuse_in_blocks(self, e: Tensor, hidden: Tensor, dead: Tensor | None) -> Tensor:
        """Positions need nothing of each other, so all sequences lie end to end: N = B*T of them."""
        one_pass = self.one_pass()
        out = torch.empty(hidden.shape, dtype=self.dtype, device=hidden.device)  # [B, T, G, H]
        e, hidden, dead = e.flatten(0, 1), hidden.flatten(0, 1), None if dead is None else dead.flatten()
        into = out.flatten(0, 1)  # [N, G, H], a view
        positions, values = block_sizes(hidden.device)
        for chunk in spans(0, len(e), positions):
            rows, some = e[chunk], None if dead is None else dead[chunk]  # [n, C*D], [n]
            packed = self.project(rows if some is None else without(rows, some))  # [n, (G+1)*H]
            if one_pass is None:
                self._fuse_block(packed, hidden[chunk], some, into[chunk], values)
            else:
                one_pass.v41(self, packed, side_by_side(hidden[chunk]), into[chunk], some)
        return out

    def _fuse_block(self, packed: Tensor, hidden: Tensor, dead: Tensor | None, out: Tensor, values: int) -> None:
        """Some positions, so many values of the stream at once."""
        gains = self.gains()
        for span in spans(0, len(packed), max(1, values // gains.numel())):
            out[span] = self._fuse(packed[span], hidden[span], gains, None if dead is None else dead[span])

    def _fuse(self, packed: Tensor, hidden: Tensor, gains: Tensor, dead: Tensor | None) -> Tensor:
        """The stream after the layer [..., G, H], from what `project` gave and the stream before it."""
        stream = hidden.to(gains.dtype)
        if dead is not None:
            # A gradient of 0 times a NaN is NaN: nothing of a dead position may reach a product.
            stream = stream.masked_fill(dead[..., None, None], 0)
        packed = packed.to(gains.dtype).unflatten(-1, (-1, self.config.hidden))  # [..., G+1, H]
        gate = _gate(packed[..., :-1, :], stream, gains, dead)
        fused = _add_gated(stream, gate, packed[..., -1:, :]).to(hidden.dtype)
        return fused if dead is None else torch.where(dead[..., None, None], hidden, fused)


def _gate(keys: Tensor, hidden: Tensor, gains: Tensor, dead: Tensor | None) -> Tensor:
    """[..., G, 1] from keys and stream [..., G, H] and gains [G, H]; 0 where dead [...]."""
    scale = (mean_square(hidden) + V41_NORM_EPS).rsqrt() * (mean_square(keys) + V41_NORM_EPS).rsqrt()
    dot = (hidden * gains).mul_(keys).sum(dim=-1, keepdim=True) * scale / math.sqrt(hidden.shape[-1])
    gate = _signed_sqrt(dot).sigmoid()
    return gate if dead is None else gate.masked_fill(dead[..., None, None], 0)


def _signed_sqrt(dot: Tensor) -> Tensor:
    # The sign is copied: an inner product of +0 opens the gate a little more than half, -0 a little less.
    return torch.copysign(dot.abs().clamp_min(GATE_FLOOR).sqrt(), dot)


def _add_gated(hidden: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    """Stream [..., G, H] plus gate [..., G, 1] times value [..., 1, H], not yet rounded to the stream's dtype."""
    return torch.addcmul(hidden, gate, value)
