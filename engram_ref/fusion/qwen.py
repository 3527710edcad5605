"""The layer of Qwen3.8-Flash-Next: looked-up rows and the residual stream become an update to that stream.

    fusion = QwenFusion(config)
    hidden = hidden + fusion(e, hidden)     # e: [B, T, C*D] looked-up rows, hidden: [B, T, G, H]

It is the demo's layer (`engram_ref.fusion.demo`, whose ways of computing it takes) but for four things: bias, eps,
gains and padding. The state dict has the names of transformers' `Qwen4ExpTextPLELayer`.

    python -m pytest tests/ref/fusion/test_qwen.py
"""

from __future__ import annotations

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor, nn

from engram_ref.config import EngramConfig
from engram_ref.fusion.demo import DemoFusion


class QwenFusion(DemoFusion):
    """Gate and short convolution of Qwen3.8-Flash-Next.

    Args:
        config: geometry, of form qwen.
        device, dtype: of the parameters, and of what goes in and comes out: any of torch's four real dtypes.
        fused: None or False: torch's operations compute this form, everywhere.

    Raises:
        ValueError: a configuration of another form.
    """

    form = "qwen"
    has_one_pass = False

    def __init__(
        self,
        config: EngramConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(config, device, dtype, fused)
        self.projection_bias = None  # the model projects without

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights as torch's own `Linear` and `Conv1d` begin, gains 1, which are stored as 0."""
        super().reset_parameters(generator)
        for gain in (self.key_gain, self.query_gain, self.conv_gain):
            if gain is not None:
                nn.init.zeros_(gain)

    @property
    def norm_eps(self) -> tuple[float, float]:
        """Of the norms of key and query, and of the convolution's: one for all."""
        assert self.config.norm_eps is not None
        return self.config.norm_eps, self.config.norm_eps

    def _gain(self, weight: Tensor, inner: torch.dtype) -> Tensor:
        return 1 + weight.to(inner)  # stored as their distance from 1

    def _at_padding(self, gate: Tensor, padding: Tensor) -> Tensor:
        return gate.masked_fill(padding[..., None, None], 0)  # only the convolution brings something, from before

    def named_views(self) -> dict[str, Tensor]:
        """Every weight under the name that it has in the model's checkpoint, as a view into the parameters."""
        value = self.config.hidden
        views: dict[str, Tensor] = {
            "key_proj.weight": self.projection_weight[:-value],
            "value_proj.weight": self.projection_weight[-value:],
            "norm_key.weight": self.key_gain.view(-1),
            "norm_query.weight": self.query_gain.view(-1),
        }
        if self.conv_gain is not None and self.conv_weight is not None:
            views |= {"norm_conv.weight": self.conv_gain.view(-1), "conv1d.weight": self.conv_weight}
        return views
