"""The demo's gate and short convolution: looked-up rows and the residual stream become an update to that stream.

    fusion = DemoFusion(config)
    hidden = hidden + fusion(e, hidden)     # e: [B, T, C*D] looked-up rows, hidden: [B, T, G, H]

For each residual copy g a key K_g(e) is compared with the stream, a sigmoid of the signed square root of their
normalised inner product gates one shared value V(e), and a short causal convolution over time is added
(public demo `deepseek-ai/Engram`; Engram paper, arXiv 2601.07372). What is done otherwise than there, for speed, says
so where it is done; the state dict has the demo's names.

Float16 and bfloat16 are multiplied as they are, and everything after the projection is float32, rounded once at the
end. To continue a sequence chunk by chunk, hand in a `ShortConvHistory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor, nn

from engram_ref.config import EngramConfig
from engram_ref.fusion.base import (
    CONV_NORM_EPS,
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

CPU_CONV_VALUES = 1 << 20  # convolved at once, when nothing else is done with them


class DemoFusion(Fusion):
    """Gate and short convolution of the demo.

    Args:
        config: geometry; `kernel_size` 0 means that there is no convolution.
        device, dtype: of the parameters, and of what goes in and comes out: any of torch's four real dtypes.
        fused: whether gate and convolution are done in one pass; see `Fusion`.

    Raises:
        ValueError: a configuration of another form.
    """

    form = "demo"
    projection_bias: nn.Parameter | None

    def __init__(
        self,
        config: EngramConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(config, fused)
        copies, hidden, taps = config.hc_mult, config.hidden, config.kernel_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        # One product for all: key_0 | ... | key_{G-1} | value.
        self.projection_weight = parameter((copies + 1) * hidden, config.embedding_width)
        self.projection_bias = parameter((copies + 1) * hidden)
        self.key_gain = parameter(copies, hidden)
        self.query_gain = parameter(copies, hidden)
        self.conv_gain = parameter(copies, hidden) if taps else None
        self.conv_weight = parameter(copies * hidden, 1, taps) if taps else None  # as a depthwise Conv1d has it
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights as torch's own `Linear` and `Conv1d` begin, gains 1."""
        bound = self.config.embedding_width**-0.5
        nn.init.uniform_(self.projection_weight, -bound, bound, generator=generator)
        if self.projection_bias is not None:
            nn.init.uniform_(self.projection_bias, -bound, bound, generator=generator)
        if self.conv_weight is not None:
            bound = self.config.kernel_size**-0.5
            nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        for gain in (self.key_gain, self.query_gain, self.conv_gain):
            if gain is not None:
                nn.init.ones_(gain)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, the input and the update."""
        return self.projection_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.projection_weight.device

    @property
    def norm_eps(self) -> tuple[float, float]:
        """Of the norms of key and query, and of the convolution's."""
        # The former is RMSNorm's own when it is given none; float16 and bfloat16 it, too, computes in float32.
        return torch.finfo(self.inner_dtype).eps, CONV_NORM_EPS

    @property
    def reach(self) -> int:
        """How many steps the convolution looks back."""
        return max(0, self.config.kernel_size - 1) * self.config.max_ngram

    def forward(
        self, e: Tensor, hidden: Tensor, history: ShortConvHistory | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """What is to be added to the residual stream.

        Args:
            e: looked-up rows, [B, T, C*D].
            hidden: residual stream, [B, T, G, H].
            history: what came before this chunk; it is read, and moved to the end of the chunk.
            padding: booleans [B, T]; where true there is nothing that the convolution could see.

        Returns:
            [B, T, G, H].

        Raises:
            ValueError: wrong shape or dtype, or a history of another batch.
        """
        return self._update(e, hidden, history, padding, self.one_pass())

    def add_to(
        self,
        hidden: Tensor,
        e: Tensor,
        history: ShortConvHistory | None = None,
        dead: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the layer: `hidden` and what `forward` gives.

        Raises:
            ValueError: as `forward`, or dead positions, which the demo's form does not know.
        """
        if dead is not None:
            raise ValueError("dead positions: the demo's form knows none; leave dead out, or use form v41")
        one_pass = self.one_pass()
        update = self._update(e, hidden, history, padding, one_pass, adds=True)
        return hidden + update if one_pass is None else update

    def _update(
        self,
        e: Tensor,
        hidden: Tensor,
        history: ShortConvHistory | None,
        padding: Tensor | None,
        one_pass: ModuleType | None,
        adds: bool = False,
    ) -> Tensor:
        """What `forward` gives; if `adds`, for one pass only, the sum with the stream."""
        self._check("e", e, self.config.embedding_width, hidden)
        self._check_history(hidden, history)
        check_positions("padding", padding, hidden)
        if padding is not None:
            e = without(e, padding)
            if is_differentiated():
                hidden = hidden.masked_fill(padding[..., None, None], 0)
        if is_differentiated() or torch.compiler.is_compiling():
            # Blocks are written with `out=`, which passes no gradients back; the compiler makes its own.
            return self._combine_at_once(self.project(e), hidden, history, padding)

        def project(rows: slice, steps: slice) -> Tensor:
            return self.project(e[rows, steps])

        if one_pass is None:
            return self._combine_in_blocks(project, hidden, history, padding)
        return self._combine_in_one_pass(one_pass, project, hidden, history, padding, adds)

    def project(self, e: Tensor) -> Tensor:
        """The first half: keys and value of rows [B, T, C*D], side by side, [B, T, (G+1)*H]."""
        return nn.functional.linear(e, self.projection_weight, self.projection_bias)

    def combine(self, packed: Tensor, hidden: Tensor, history: ShortConvHistory | None = None) -> Tensor:
        """The second half: the update, as `forward` gives it, from what `project` gave."""
        self._check("packed", packed, len(self.projection_weight), hidden)
        self._check_history(hidden, history)
        if is_differentiated() or torch.compiler.is_compiling():
            return self._combine_at_once(packed, hidden, history)
        one_pass = self.one_pass()
        if one_pass is None:
            return self._combine_in_blocks(lambda rows, steps: packed[rows, steps], hidden, history)
        return self._combine_in_one_pass(one_pass, lambda rows, steps: packed[rows, steps], hidden, history)

    def _combine_at_once(
        self, packed: Tensor, hidden: Tensor, history: ShortConvHistory | None, padding: Tensor | None = None
    ) -> Tensor:
        past = None if history is None else history.values
        update, past = self._fuse(packed, hidden, self.gains(), past, padding)
        if history is not None:
            history.advance(past)
        return update

    def _combine_in_blocks(
        self,
        project: Callable[[slice, slice], Tensor],
        hidden: Tensor,
        history: ShortConvHistory | None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Block by block: a few short sequences together, or a long one in chunks that follow one another.

        Args:
            project: gives the packed keys and value of some sequences and steps.
        """
        batch, length = hidden.shape[:2]
        gains = self.gains()
        update = torch.empty_like(hidden, memory_format=torch.contiguous_format)  # [B, T, G, H]
        positions, values = block_sizes(hidden.device)
        together = min(max(1, positions // max(1, length)), max(1, batch))  # sequences
        # Fewer steps than a few times the reach would spend their time on what lies before them.
        steps = max(values // (together * gains.gate.numel()), 4 * self.reach, 1)
        for rows in spans(0, batch, together):
            past = None if history is None else history.values[rows]  # [b, P, G, H]
            for chunk in spans(0, length, positions):
                packed = project(rows, chunk)  # [b, t, (G+1)*H]
                for span in spans(chunk.start, chunk.stop, steps):
                    part = packed[:, span.start - chunk.start : span.stop - chunk.start]
                    filled = None if padding is None else padding[rows, span]
                    _, past = self._fuse(part, hidden[rows, span], gains, past, filled, update[rows, span])
            if history is not None:
                assert past is not None
                history.values[rows] = past
        return update

    def _combine_in_one_pass(
        self,
        one_pass: ModuleType,
        project: Callable[[slice, slice], Tensor],
        hidden: Tensor,
        history: ShortConvHistory | None,
        padding: Tensor | None = None,
        adds: bool = False,
    ) -> Tensor:
        """The same by what `one_pass` gave, which cuts nothing up: blocks are those of the projection."""
        batch, length = hidden.shape[:2]
        hidden = side_by_side(hidden)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)  # [B, T, G, H]
        positions, _ = block_sizes(hidden.device)
        together = min(max(1, positions // max(1, length)), max(1, batch))  # sequences
        if history is None and length > positions and self.reach:
            history = ShortConvHistory(self, batch)  # from block to block
        for rows in spans(0, batch, together):
            past = None if history is None or not self.reach else history.values[rows]
            for steps in spans(0, length, positions):
                packed = side_by_side(project(rows, steps))  # [b, t, (G+1)*H]
                filled = None if padding is None else padding[rows, steps]
                one_pass.demo(self, packed, hidden[rows, steps], out[rows, steps], past, filled, adds)
        return out

    def gains(self) -> Gains:
        """The learned gains in the inner dtype, multiplied together where they always meet."""
        # A few values once a call, instead of a product for every value of the stream.
        inner = self.inner_dtype
        gate = self._gain(self.key_gain, inner) * self._gain(self.query_gain, inner)  # [G, H]
        if self.conv_weight is None or self.conv_gain is None:
            return Gains(gate, None)
        taps = self.conv_weight.to(inner).view(*gate.shape, -1)  # [G, H, K]
        taps = taps * self._gain(self.conv_gain, inner).unsqueeze(-1)
        return Gains(gate, taps.permute(2, 0, 1).contiguous())  # [K, G, H]

    def _gain(self, weight: Tensor, inner: torch.dtype) -> Tensor:
        """What a norm multiplies with, [G, H], in the inner dtype."""
        return weight.to(inner)

    def _fuse(
        self,
        packed: Tensor,
        hidden: Tensor,
        gains: Gains,
        past: Tensor | None,
        padding: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The update of some steps, also in `out` if given, and the past of the steps that follow."""
        dtype, inner = hidden.dtype, gains.gate.dtype
        hidden = hidden.to(inner)
        packed = packed.to(inner).unflatten(-1, (-1, self.config.hidden))  # [B, T, G+1, H]
        value = packed[..., -1:, :]  # [B, T, 1, H]
        gate, scale = _gate_and_scale(packed, hidden, gains.gate, *self.norm_eps)  # [B, T, G, 1]
        if padding is not None:
            gate = self._at_padding(gate, padding)
        if gains.taps is None:
            gated = torch.mul(gate, value, out=out)
            return gated.to(dtype), gated[:, :0]
        normed = scale * value  # [B, T, G, H]
        if padding is not None:
            normed = normed.masked_fill(padding[..., None, None], 0)
        mixed = causal_conv(normed, gains.taps, self.config.max_ngram, past)
        update = torch.addcmul(nn.functional.silu(mixed, inplace=True), gate, value, out=out)
        return update.to(dtype), _last(past, normed, self.reach)

    def _at_padding(self, gate: Tensor, padding: Tensor) -> Tensor:
        """The gate [B, T, G, 1] where a batch is filled up: what it lets through there, nobody looks at."""
        return gate

    def _check_history(self, hidden: Tensor, history: ShortConvHistory | None) -> None:
        if history is not None:
            history.check(self, hidden.shape[0])

    # --- the checkpoint's names -------------------------------------------------------------------

    def named_views(self) -> dict[str, Tensor]:
        """Every weight under the name that it has in the demo's checkpoint, as a view into the parameters."""
        copies = range(self.config.hc_mult)
        weights = self.projection_weight.split(self.config.hidden)
        assert self.projection_bias is not None
        biases = self.projection_bias.split(self.config.hidden)
        views: dict[str, Tensor] = {"value_proj.weight": weights[-1], "value_proj.bias": biases[-1]}
        for g in copies:
            views[f"key_projs.{g}.weight"] = weights[g]
            views[f"key_projs.{g}.bias"] = biases[g]
            views[f"norm1.{g}.weight"] = self.key_gain[g]
            views[f"norm2.{g}.weight"] = self.query_gain[g]
            if self.conv_gain is not None:
                views[f"short_conv.norms.{g}.weight"] = self.conv_gain[g]
        if self.conv_weight is not None:
            views["short_conv.conv.weight"] = self.conv_weight
        return views

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, view in self.named_views().items():
            destination[prefix + name] = view if keep_vars else view.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            error_msgs.append("assign=True: the weights of this module are packed, so they can only be copied in")
            return
        views = self.named_views()
        for name, view in views.items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.extend([prefix + name] if strict else [])
            elif given.shape != view.shape:
                error_msgs.append(f"{prefix + name} has shape {tuple(given.shape)}, needs {tuple(view.shape)}")
            else:
                with torch.no_grad():
                    view.copy_(given)
        if strict:
            unexpected_keys.extend(
                key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in views
            )


class Gains(NamedTuple):
    """Learned gains that always meet, multiplied."""

    gate: Tensor  # [G, H], of key times query
    taps: Tensor | None  # [K, G, H], the convolution's with its norm's gain


def causal_conv(x: Tensor, weight: Tensor, dilation: int, past: Tensor | None = None) -> Tensor:
    """Depthwise convolution over time that looks back only, without bias.

    Args:
        x: [B, T, ...], channels last.
        weight: [K, ...], one tap after the other; the last one is for the step itself.
        dilation: steps between two taps.
        past: [B, P, ...], the steps before x; before those there is nothing.

    Returns:
        y[t] = sum over k of weight[K-1-k] * x[t - k*dilation], [B, T, ...].
    """
    if is_differentiated() or x.device.type != "cpu":
        return _shift_and_add(x, weight, dilation, past)
    reach = (len(weight) - 1) * dilation
    steps = max(CPU_CONV_VALUES // max(1, x[:, :1].numel()), reach, 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for span in spans(0, x.shape[1], steps):
        before = x[:, span.start - reach : span.start] if span.start else past
        _shift_and_add(x[:, span], weight, dilation, before, out=y[:, span])
    return y


def _shift_and_add(x: Tensor, weight: Tensor, dilation: int, past: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`causal_conv` of all steps at once."""
    length = x.shape[1]
    # A pass over the steps per tap, channels last as they come: a Conv1d would have them transposed, there and back.
    y = torch.mul(x, weight[-1], out=out)
    for back in range(1, len(weight)):
        tap, shift = weight[-1 - back], back * dilation
        if shift < length:
            y[:, shift:].addcmul_(x[:, : length - shift], tap)
        if past is not None:
            first = max(0, past.shape[1] - shift)  # of the past's steps, the first that this tap reaches
            start = max(0, shift - past.shape[1])
            count = max(0, min(shift, length) - start)
            y[:, start : start + count].addcmul_(past[:, first : first + count], tap)
    return y


def _gate_and_scale(
    packed: Tensor, hidden: Tensor, gains: Tensor, eps: float, conv_eps: float
) -> tuple[Tensor, Tensor]:
    """How far each copy's value is let through, and what normalises the gated value: twice [B, T, G, 1]."""
    width = hidden.shape[-1]
    squares = mean_square(packed)  # [B, T, G+1, 1]
    of_keys, of_value = squares[..., :-1, :], squares[..., -1:, :]
    of_query = mean_square(hidden)  # [B, T, G, 1]
    # A norm is one factor for a whole copy: it comes after the sum, and no normalised copy is written.
    score = (hidden * gains).mul_(packed[..., :-1, :]).sum(dim=-1, keepdim=True)
    score = score * (of_keys + eps).rsqrt() * (of_query + eps).rsqrt() / math.sqrt(width)
    gate = torch.sigmoid(score.abs().clamp_min(GATE_FLOOR).sqrt() * score.sign())
    # A value V times its gate has the mean square gate^2 * mean(V^2).
    return gate, gate * (gate.square() * of_value + conv_eps).rsqrt()


def _last(past: Tensor | None, steps: Tensor, count: int) -> Tensor:
    """The last `count` of the steps, those of the past included; fewer where there are no more."""
    # Compiled, what is written over the past is made of the past even where nothing of it is left: a write that needs
    # none of it torch 2.11 does first, and the convolution reads afterwards. The compiler leaves the copy out.
    if past is not None and (torch.compiler.is_compiling() or steps.shape[1] < count):
        steps = torch.cat([past, steps], dim=1)
    return steps[:, max(0, steps.shape[1] - count) :]
