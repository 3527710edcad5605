"""Decoder blocks with random weights, so that prefetch has real compute to hide behind.

The sizes are those of published dense models. Engram is attached before the second block, as to any model of
transformers.

    backbone = build_backbone("qwen3-4b", blocks=None, device=device, dtype=torch.bfloat16, hidden_if_none=1280)
    cache = backbone.new_cache(batch=64, context=4096)          # None where context is 0: prefill
    with attach(backbone.model, {1: engram}, plan): ...
    out = backbone.step(ids, cache)                             # [B, T, H]
    cache.rewind()                                              # the cache is as it was before

"none" has no blocks: the step is what is attached. A path names a `config.json` of a dense decoder. Transformers is
imported only where blocks are wanted; no code comes from the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.setup.decoder_sizes import SIZES as PUBLISHED
from bench.setup.decoder_sizes import BlockShape
from engram_ref.config import require_int
from engram_ref.files.small_files import read_small
from engram_ref.quoting import one_line
from engram_ref.rows.memory import require_bytes

# What is built by name: the published sizes, and one of ours for machines without an accelerator.
SIZES: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    "tiny": dict(
        **dict(model_type="qwen3", hidden_size=256, intermediate_size=768),
        **dict(num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    ),
}
_NO_VOCABULARY = 8  # where embeddings are given and no token is wanted
BACKBONES = ("none", *SIZES)
_DENSE = ("llama", "qwen2", "qwen3")  # gated decoders
_INTEGERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class Backbone:
    """A transformers decoder without an output vocabulary: embedding, blocks and final norm. Engram is attached to it.

    Args:
        name: as it was asked for.
        model: a base model (`Qwen3Model`, ...) with at least two layers, or `NoBlocks`.
        shape: of its blocks; None where there are none.

    Attributes:
        hidden: width of the residual stream.
        blocks: how many there are.
        parameters_bytes: of all blocks.
    """

    def __init__(self, name: str, model: Any, shape: BlockShape | None) -> None:
        self.name, self.model, self._shape = name, model, shape
        self.hidden: int = model.config.hidden_size
        self.blocks = len(model.layers) if shape else 0
        self.parameters_bytes = parameter_bytes(model.layers)

    @property
    def shape(self) -> BlockShape:
        """Sizes of a block."""
        assert self._shape is not None
        return self._shape

    def new_cache(self, batch: int, context: int, tokens: int = 1) -> Any:
        """Keys and values of `context` random positions for steps of `tokens` tokens; None without any positions.

        Raises:
            ValueError: it does not fit into the device's memory.
        """
        if context == 0:
            return None
        if not self.blocks:
            return Positions(context)
        parameter = next(self.model.parameters())
        size = (batch, self.shape.kv_heads, context + tokens, self.shape.head_dim)  # [B, KV heads, positions, D]
        require_bytes(2 * self.blocks * torch.Size(size).numel() * parameter.dtype.itemsize, parameter.device)
        generator = torch.Generator(parameter.device).manual_seed(0)

        def normal() -> Tensor:
            # Keys are normalised to about 1 each, and values leave their projection at about that size.
            return torch.empty(size, dtype=parameter.dtype, device=parameter.device).normal_(generator=generator)

        return _steady_cache([(normal(), normal()) for _ in range(self.blocks)], context)

    def step(self, ids: Tensor, cache: Any, **where: Tensor | None) -> Tensor:
        """Run the model, without gradients.

        Args:
            ids: token ids [B, T].
            cache: from `new_cache`; the tokens stand behind its context.
            where: the model's `position_ids` and `attention_mask`, where the cache does not imply them.

        Returns:
            [B, T, H].
        """
        with torch.no_grad():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **where)
        return out.last_hidden_state


class Positions:
    """How many positions a steady cache holds: its context, and what a step has put behind it."""

    def __init__(self, context: int) -> None:
        self.context, self.seen = context, 0

    def rewind(self) -> None:
        """Back to the context: the next step overwrites what this one has put behind it."""
        self.seen = 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """As transformers asks."""
        return self.context + self.seen


class NoBlocks(nn.Module):
    """A decoder whose two blocks do nothing: what is attached to it, by itself.

    Args:
        hidden: width of the residual stream.
        device, dtype: of it.
    """

    def __init__(self, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=hidden, num_hidden_layers=2, vocab_size=0, use_cache=False)
        self.config.get_text_config = lambda: self.config
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])  # Engram is attached before the second
        generator = torch.Generator(device).manual_seed(0)
        self._stream = torch.randn((1024, hidden), generator=generator, device=device, dtype=dtype)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        """Random numbers for every token id, given from block to block."""
        hidden = self._stream[input_ids % len(self._stream)]  # [B, T, H]
        for block in self.layers:
            hidden = block(hidden)
        if past_key_values is not None:
            past_key_values.seen = input_ids.shape[1]
        return SimpleNamespace(last_hidden_state=hidden)


def _steady_cache(stored: list[tuple[Tensor, Tensor]], context: int) -> Any:
    """A transformers cache that every step finds as the first one did.

    The step's own keys and values go behind the context, where the next step's will overwrite them.

    Args:
        stored: keys and values of every block, each [B, KV heads, context + tokens, D].
        context: positions that stay.
    """
    from transformers import DynamicCache

    class SteadyCache(Positions, DynamicCache):
        """Of fixed length: what is put behind the context is overwritten by the next step, after `rewind`."""

        def __init__(self) -> None:
            DynamicCache.__init__(self)
            Positions.__init__(self, context)

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = stored[layer_idx]
            end = context + key_states.shape[-2]
            if key_states.shape[0] != keys.shape[0] or end > keys.shape[-2]:
                raise ValueError(
                    f"a step of {key_states.shape[0]} x {key_states.shape[-2]} tokens; this cache was made for "
                    f"{keys.shape[0]} x {keys.shape[-2] - context}: make one with new_cache(batch, context, tokens)"
                )
            # In place: to concatenate, as DynamicCache does, would copy the whole cache in every step.
            keys[:, :, context:end] = key_states
            values[:, :, context:end] = value_states
            if layer_idx == len(stored) - 1:
                self.seen = key_states.shape[-2]
            return keys[:, :, :end], values[:, :, :end]  # [B, KV heads, context + T, D]

        def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
            return context + query_length, 0

    return SteadyCache()


def build_backbone(
    name: str,
    blocks: int | None,
    device: torch.device,
    dtype: torch.dtype,
    hidden_if_none: int,
    vocabulary: int = _NO_VOCABULARY,
    attention: str = "sdpa",
) -> Backbone:
    """A backbone with random weights.

    Args:
        name: one of BACKBONES, or the path of a `config.json` of a llama, qwen2 or qwen3 model.
        blocks: how many of the model's blocks; None for all.
        device, dtype: of weights and cache; they are drawn there, nothing is converted.
        hidden_if_none: width of the residual stream of the backbone "none".
        vocabulary: token ids that have an embedding.
        attention: how transformers computes it, by the name under which it knows the function.

    Raises:
        ValueError: no such backbone, fewer than two blocks, or more than memory holds.
        OSError: the file cannot be read.
    """
    if name == "none":
        return Backbone(name, NoBlocks(hidden_if_none, device, dtype), None)
    fields = _checked(name, _fields(name), blocks)
    model = _empty_model({**fields, "vocab_size": vocabulary}, dtype, attention)
    require_bytes(parameter_bytes(model), device)  # counted of a model without memory
    _materialise(model, device)
    return Backbone(name, model, BlockShape.of(model.config.to_dict()))


def check_backbone(name: str, blocks: int | None) -> None:
    """Refuse at once what `build_backbone` would refuse of a description, whatever memory there is.

    Raises:
        ValueError, OSError: as there.
    """
    if name != "none":
        _checked(name, _fields(name), blocks)


def measure_backbone(name: str, blocks: int | None, vocabulary: int) -> tuple[BlockShape, int, int]:
    """Sizes of a block, how many blocks, and how many parameters with the embedding: before anything is allocated."""
    fields = _checked(name, _fields(name), blocks)
    model = _empty_model({**fields, "vocab_size": vocabulary}, torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return BlockShape.of(model.config.to_dict()), len(model.layers), parameters


def _fields(name: str) -> dict[str, Any]:
    if name in SIZES:
        return dict(SIZES[name])
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"no backbone {name!r}: use one of {', '.join(BACKBONES)}, or the path of a config.json")
    try:
        fields = json.loads(read_small(path, mend="give a config.json"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a config.json: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a config.json: it holds a {type(fields).__name__}, not an object")
    return fields


def _checked(name: str, fields: dict[str, Any], blocks: int | None) -> dict[str, Any]:
    """The fields with `blocks` blocks and next to no vocabulary, where they describe a model that is counted right."""
    if fields.get("model_type") not in _DENSE:
        raise ValueError(f"{name}: model_type={fields.get('model_type')!r}; dense decoders only: {', '.join(_DENSE)}")
    for field in _INTEGERS:
        require_int(f"{name}: {field}", fields.get(field), 1)
    sliding = {kind for kind in fields.get("layer_types") or () if kind != "full_attention"}
    if fields.get("use_sliding_window") or sliding:
        raise ValueError(f"{name}: sliding attention is not supported; use a model with full attention in every block")
    most = fields["num_hidden_layers"]
    blocks = most if blocks is None else blocks
    if not 2 <= blocks <= most:
        raise ValueError(f"{blocks} blocks of {name}: take 2 .. {most}; Engram stands before the second one")
    vocabulary = dict(vocab_size=_NO_VOCABULARY, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return {**fields, **vocabulary, "num_hidden_layers": blocks, "layer_types": None, "sliding_window": None}


def _empty_model(fields: dict[str, Any], dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The base model without memory."""
    try:
        from transformers import CONFIG_MAPPING, MODEL_MAPPING
    except ImportError:
        raise ValueError("backbones other than 'none' are built by transformers: pip install transformers") from None
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    config._attn_implementation = attention
    model_class: Any = MODEL_MAPPING[type(config)]
    with _default_dtype(dtype), torch.device("meta"):
        model = model_class(config).eval().requires_grad_(False)
        _fuse_norms(model)
    return model


def _fuse_norms(model: Any) -> None:
    """Every RMSNorm as torch's own."""
    # One kernel instead of six on CUDA: a step slower than an engine's would hide more of a fetch than an engine does.
    named = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    for name, norm in named:
        parent, _, own = name.rpartition(".")
        fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon).requires_grad_(False)
        setattr(model.get_submodule(parent), own, fused)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _materialise(model: Any, device: torch.device) -> None:
    """Memory, and random weights: time does not depend on what they say."""
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # scaled as for training, so that the residual stream grows only slowly
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # the others are norms
    owners = [(name, module) for name, module in model.named_modules() if module._buffers]
    for name, module in owners:  # the rotary embedding's frequencies, which were never computed
        assert "inv_freq" in module._buffers, name
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, type(module)(config=model.config).to(device))


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
