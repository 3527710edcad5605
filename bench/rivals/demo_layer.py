"""The demo's layer after the lookup, in plain PyTorch: what fusion speed and half-precision error are compared with.

One linear per key, one `RMSNorm` per copy, and a `Conv1d` on the transposed tensor, as the public demo
`deepseek-ai/Engram` computes them, and under its parameter names. It is a baseline, not a way to run the layer.

    plain = DemoWay(config)
    plain.load_state_dict(fusion.state_dict())
    update = plain(e, hidden)        # what DemoFusion(config)(e, hidden) gives, up to rounding
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from engram_ref.config import EngramConfig
from engram_ref.fusion.base import CONV_NORM_EPS, GATE_FLOOR


class DemoWay(nn.Module):
    """Gate and short convolution, one module per weight of the demo's checkpoint.

    Args:
        config: geometry; without taps (`kernel_size` 0) there is no convolution.
        where: `device` and `dtype` of the parameters.
    """

    def __init__(self, config: EngramConfig, **where: Any) -> None:
        super().__init__()
        width, hidden = config.embedding_width, config.hidden
        copies = range(config.hc_mult)
        self.key_projs = nn.ModuleList(nn.Linear(width, hidden, **where) for _ in copies)
        self.value_proj = nn.Linear(width, hidden, **where)
        self.norm1 = nn.ModuleList(nn.RMSNorm(hidden, **where) for _ in copies)  # key, then query; torch's eps
        self.norm2 = nn.ModuleList(nn.RMSNorm(hidden, **where) for _ in copies)
        self.short_conv = ShortConv(config, **where) if config.kernel_size else None

    def forward(self, e: Tensor, hidden: Tensor) -> Tensor:
        """What is added to the residual stream, [B, T, G, H], from rows [B, T, C*D] and that stream."""
        gates = torch.stack([self._gate(g, e, hidden[:, :, g]) for g in range(len(self.key_projs))], dim=2)
        value = gates.unsqueeze(-1) * self.value_proj(e).unsqueeze(2)  # [B, T, G, H]
        return value if self.short_conv is None else value + self.short_conv(value)

    def _gate(self, copy: int, e: Tensor, query: Tensor) -> Tensor:
        key = self.norm1[copy](self.key_projs[copy](e))
        score = (key * self.norm2[copy](query)).sum(dim=-1) / math.sqrt(query.shape[-1])  # [B, T]
        return (score.abs().clamp_min(GATE_FLOOR).sqrt() * score.sign()).sigmoid()


class ShortConv(nn.Module):
    """SiLU of a causal depthwise convolution over time, of values that are normalised copy by copy."""

    def __init__(self, config: EngramConfig, **where: Any) -> None:
        super().__init__()
        channels = config.hc_mult * config.hidden
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden, eps=CONV_NORM_EPS, **where) for _ in range(config.hc_mult))
        self.conv = nn.Conv1d(
            channels,
            channels,
            config.kernel_size,
            groups=channels,
            bias=False,
            padding=(config.kernel_size - 1) * config.max_ngram,
            dilation=config.max_ngram,
            **where,
        )

    def forward(self, value: Tensor) -> Tensor:
        """[B, T, G, H] from [B, T, G, H]."""
        normed = torch.cat([norm(value[:, :, g]) for g, norm in enumerate(self.norms)], dim=-1)  # [B, T, G*H]
        mixed = nn.functional.silu(transposed_conv(self.conv, normed))
        return mixed.view(value.shape)


def transposed_conv(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A padded `Conv1d` over time of [B, T, channels], cut to T: there and back through [B, channels, T]."""
    return conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2).contiguous()
