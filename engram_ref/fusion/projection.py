"""A projection without bias, its weights plain or kept in fp8: the same bits from both.

    wkv = Fp8Projection(inputs=6144, outputs=25600)
    wkv.load_state_dict({"weight": codes, "scale": scales})     # [25600, 6144] and [800, 192]: blocks of 32 x 32
    packed = wkv(e)                                             # [..., 6144] -> [..., 25600]

Codes and scales take half the memory of bfloat16. They become values a block of output rows at a time, just before
that block is multiplied, so that the whole matrix never lies in memory.

    python -m pytest tests/ref/fusion/test_projection.py
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor, nn

from engram_ref.config import SCALE_BLOCK
from engram_ref.fusion.base import spans
from engram_ref.rows.decoding import dequantise_rows
from engram_ref.rows.fp8 import CODE_DTYPE, SCALE_DTYPE, check_pair, dequantise, has_nan, quantise

# Values of one block of output rows, on a CPU and on an accelerator: enough for a product to run at full speed.
CPU_BLOCK = 1 << 22
ACCELERATOR_BLOCK = 1 << 28  # the projection of DeepSeek-V4.1-Flash is one: one product, and nothing to put together


class Projection(nn.Module, ABC):
    """The product with a matrix [outputs, inputs].

    Attributes:
        shape: of the matrix.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shape = (outputs, inputs)

    @abstractmethod
    def rows(self, span: slice, dtype: torch.dtype) -> Tensor:
        """Some output rows of the matrix, [n, inputs]; plain weights as they are, fp8 in `dtype`."""

    def forward(self, e: Tensor) -> Tensor:
        """[..., outputs] from [..., inputs], both in one dtype."""
        # Plain weights, too: a product that is cut by output rows may sum in another order than the whole one.
        pieces = [nn.functional.linear(e, self.rows(span, e.dtype)) for span in self.blocks(e.device)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def blocks(self, device: torch.device) -> list[slice]:
        """The output rows that are multiplied together; every block begins with a new scale."""
        outputs, inputs = self.shape
        values = CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK
        return list(spans(0, outputs, max(1, values // (inputs * SCALE_BLOCK)) * SCALE_BLOCK))

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform weights, as torch's own `Linear` begins."""

    @property
    def bound(self) -> float:
        """Of the size of new weights."""
        return self.shape[1] ** -0.5


class PlainProjection(Projection):
    """Weights as they are multiplied: `weight` [outputs, inputs].

    A state dict with fp8 codes and scales is turned into values as it is loaded.

    Args:
        inputs, outputs: sizes.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.empty(self.shape, device=device, dtype=dtype))
        self.reset_parameters()

    def rows(self, span: slice, dtype: torch.dtype) -> Tensor:
        """Some output rows of the weights, a view."""
        return self.weight[span]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform weights, as torch's own `Linear` begins."""
        nn.init.uniform_(self.weight, -self.bound, self.bound, generator=generator)

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
        codes = state_dict.get(prefix + "weight")
        if codes is not None and codes.dtype == CODE_DTYPE:
            state_dict = dict(state_dict)
            try:
                scales = check_fp8(codes, state_dict.pop(prefix + "scale", None), prefix)
            except ValueError as error:
                error_msgs.append(str(error))
                return
            if tuple(codes.shape) == self.shape:  # otherwise what follows says so
                state_dict[prefix + "weight"] = self._values(codes, scales)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """All values of codes and scales."""
        values = torch.empty(self.shape, device=codes.device, dtype=self.weight.dtype)
        for span in self.blocks(codes.device):  # float32 in between takes four times the memory of the codes
            values[span] = _decoded(codes, scales, span, values.dtype)
        return values


class Fp8Projection(Projection):
    """Weights as codes and scales; in its state dict `weight` float8_e4m3fn and `scale` float8_e8m0fnu.

    They are constants: gradients pass through the product, but do not reach them.

    Args:
        inputs, outputs: sizes, multiples of 32.
        device: where codes and scales are.

    Raises:
        ValueError: a matrix that is not made of blocks of 32 x 32.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str | None = None) -> None:
        super().__init__(inputs, outputs)
        if inputs % SCALE_BLOCK or outputs % SCALE_BLOCK:
            raise ValueError(
                f"a projection of [{outputs}, {inputs}]: fp8 weights are made of blocks of {SCALE_BLOCK} x "
                f"{SCALE_BLOCK}; keep others plain, with fp8=False"
            )
        self._codes: Tensor
        self._scales: Tensor
        scales_shape = (outputs // SCALE_BLOCK, inputs // SCALE_BLOCK)
        # Bytes, which `.to(dtype)` leaves alone.
        self.register_buffer("_codes", torch.empty(self.shape, device=device, dtype=torch.uint8))
        self.register_buffer("_scales", torch.empty(scales_shape, device=device, dtype=torch.uint8))
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The codes, float8_e4m3fn [outputs, inputs], a view."""
        return self._codes.view(CODE_DTYPE)

    @property
    def scale(self) -> Tensor:
        """The scales, float8_e8m0fnu [outputs / 32, inputs / 32], a view."""
        return self._scales.view(SCALE_DTYPE)

    def rows(self, span: slice, dtype: torch.dtype) -> Tensor:
        """Some output rows of the matrix, decoded."""
        return _decoded(self.weight, self.scale, span, dtype)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform weights, as torch's own `Linear` begins, quantised."""
        if self._codes.is_meta:
            return
        for span in self.blocks(self._codes.device):
            drawn = torch.empty(self._codes[span].shape, dtype=torch.float32, device=self._codes.device)
            codes, scales = quantise(drawn.uniform_(-self.bound, self.bound, generator=generator), SCALE_BLOCK)
            self._codes[span] = codes.view(torch.uint8)
            self._scales[_of_scales(span)] = scales.view(torch.uint8)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"], destination[prefix + "scale"] = self.weight, self.scale

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
        names = [prefix + "weight", prefix + "scale"]
        given = state_dict.get(names[0]), state_dict.get(names[1])
        if strict:
            missing_keys.extend(name for name, tensor in zip(names, given) if tensor is None)
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in names)
        if all(tensor is None for tensor in given):
            return
        try:
            codes, scales = self._accept(*given, prefix)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if local_metadata.get("assign_to_params_buffers"):
            self._codes, self._scales = codes, scales
        else:
            self._codes.copy_(codes)
            self._scales.copy_(scales)

    def _accept(self, codes: Tensor | None, scales: Tensor | None, prefix: str) -> tuple[Tensor, Tensor]:
        """Both as bytes, if they can be this matrix."""
        if codes is None or codes.dtype != CODE_DTYPE:
            what = "missing" if codes is None else str(codes.dtype)
            raise ValueError(
                f"{prefix}weight is {what}; this projection keeps {CODE_DTYPE} codes: quantise the weights, in blocks "
                f"of {SCALE_BLOCK} x {SCALE_BLOCK}, or make the layer with fp8=False"
            )
        scales = check_fp8(codes, scales, prefix)
        if tuple(codes.shape) != self.shape:
            raise ValueError(f"{prefix}weight has shape {tuple(codes.shape)}, needs {self.shape}")
        return codes.view(torch.uint8), scales.view(torch.uint8)


def check_fp8(codes: Tensor, scales: Tensor | None, prefix: str = "") -> Tensor:
    """The scales of a projection's codes, refused unless they belong to them.

    Args:
        codes: float8_e4m3fn [O, I].
        scales: float8_e8m0fnu [O / 32, I / 32].
        prefix: in front of both names, for the message.

    Raises:
        ValueError: no scales, scales of blocks of another size, or a code or a scale that is NaN.
    """
    if scales is None:
        raise ValueError(
            f"{prefix}weight holds {CODE_DTYPE} codes and {prefix}scale is missing: give both, or plain weights"
        )
    try:
        check_pair(codes, scales, SCALE_BLOCK)
    except ValueError as error:
        raise ValueError(f"{prefix}weight and {prefix}scale: {error}") from error
    if has_nan(codes.view(torch.uint8), scales.view(torch.uint8)):
        raise ValueError(f"{prefix}weight or {prefix}scale holds a NaN: these bytes are not the weights of a layer")
    return scales


def _decoded(codes: Tensor, scales: Tensor, span: slice, dtype: torch.dtype) -> Tensor:
    codes, scales = codes[span], scales[_of_scales(span)]
    if dtype != torch.bfloat16:
        return dequantise(codes, scales, SCALE_BLOCK, dtype)
    # With scales of its own, a row of the matrix is a row as of a table: those are decoded by compiled loops.
    spread = scales.view(torch.uint8).repeat_interleave(SCALE_BLOCK, dim=0)  # [n, inputs / 32]
    return dequantise_rows(torch.cat([codes.view(torch.uint8), spread], dim=1), codes.shape[1])


def _of_scales(span: slice) -> slice:
    """Where the scales of some output rows are."""
    return slice(span.start // SCALE_BLOCK, -(-span.stop // SCALE_BLOCK))
