"""Decoder blocks with random weights, so that prefetch has real compute to hide behind.

The sizes are those of published dense models; the weights are drawn at random on the device, because time does not
depend on what they say. Engram is added to the residual stream just before the second block.

    backbone = build_backbone("qwen3-4b", blocks=None, device=device, dtype=torch.bfloat16, hidden_if_none=1280)
    cache = backbone.new_cache(batch=64, context=4096)          # None where context is 0: prefill
    out = backbone.step(embeds, cache, before_second)           # [B, T, H]; the cache is as it was before

"none" has no blocks: the step is what is added. A path names a `config.json` of a dense decoder. Transformers is
imported only where blocks are wanted; no code comes from the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.setup.decoder_sizes import SIZES as PUBLISHED
from bench.setup.decoder_sizes import BlockShape, flops_per_token
from engram_ref.config import require_int
from engram_ref.rows.memory import require_bytes

Insert = Callable[[Tensor], Tensor]  # residual stream [B, T, H] -> the same, with something added

# What is built by name: the published sizes, and one of ours for machines without an accelerator.
SIZES: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    "tiny": dict(
        model_type="qwen3",
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
}
_NO_VOCABULARY = 8  # where embeddings are given and no token is wanted
BACKBONES = ("none", *SIZES)
_DENSE = {"llama": "4.45", "qwen2": "4.45", "qwen3": "4.51"}  # gated dense decoders -> since which transformers
_INTEGERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class Backbone:
    """No blocks at all: the layer by itself.

    Attributes:
        name: as it was asked for.
        hidden: width of the residual stream.
        blocks: how many there are.
        parameters_bytes: of all blocks.
    """

    def __init__(self, name: str, hidden: int) -> None:
        self.name = name
        self.hidden = hidden
        self.blocks = 0
        self.parameters_bytes = 0

    def flops_per_token(self, context: int) -> int:
        """As the function of this name, for all blocks."""
        return 0

    def new_cache(self, batch: int, context: int, tokens: int = 1) -> Any:
        """Keys and values of `context` random positions for steps of `tokens` tokens; None where there are none.

        Raises:
            ValueError: it does not fit into the device's memory.
        """
        return None

    def step(self, embeds: Tensor, cache: Any, before_second: Insert) -> Tensor:
        """Run the blocks, without gradients.

        Args:
            embeds: what enters the first block, [B, T, H].
            cache: from `new_cache`; the tokens stand behind its context. It is the same after the step.
            before_second: given the residual stream before the second block; what it returns goes on.

        Returns:
            [B, T, H].
        """
        with torch.no_grad():
            return before_second(embeds)


class Decoder(Backbone):
    """A transformers decoder without its vocabulary: blocks and final norm.

    Args:
        name: of the backbone.
        model: a base model (`Qwen3Model`, ...) with at least two layers.
        shape: of its blocks.
    """

    def __init__(self, name: str, model: Any, shape: BlockShape) -> None:
        super().__init__(name, shape.hidden)
        self._model = model
        self._shape = shape
        self.blocks = len(self._model.layers)
        self.parameters_bytes = parameter_bytes(self._model.layers)

    def flops_per_token(self, context: int) -> int:
        """As the function of this name, for all blocks."""
        return flops_per_token(self._shape, self.blocks, context)

    def new_cache(self, batch: int, context: int, tokens: int = 1) -> Any:
        """Keys and values of `context` random positions; nothing is computed for them."""
        if context == 0:
            return None
        parameter = next(self._model.parameters())
        size = (batch, self._shape.kv_heads, context + tokens, self._shape.head_dim)  # [B, KV heads, positions, D]
        require_bytes(2 * self.blocks * torch.Size(size).numel() * parameter.dtype.itemsize, parameter.device)
        generator = torch.Generator(parameter.device).manual_seed(0)

        def normal() -> Tensor:
            # Keys are normalised to about 1 each, and values leave their projection at about that size.
            return torch.empty(size, dtype=parameter.dtype, device=parameter.device).normal_(generator=generator)

        return _steady_cache([(normal(), normal()) for _ in range(self.blocks)], context)

    @property
    def shape(self) -> BlockShape:
        """Sizes of a block."""
        return self._shape

    @property
    def embedding(self) -> Tensor:
        """Of the tokens, [vocabulary, H]."""
        return self._model.embed_tokens.weight

    def step(self, embeds: Tensor, cache: Any, before_second: Insert, **where: Tensor | None) -> Tensor:
        """Run the blocks, without gradients; see Backbone.

        Args:
            where: the model's `position_ids` and `attention_mask`, where the cache does not imply them.
        """
        second: nn.Module = self._model.layers[1]
        hook = second.register_forward_pre_hook(_replacing_input(before_second), with_kwargs=True)
        try:
            with torch.no_grad():
                out = self._model(inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None, **where)
        finally:
            hook.remove()
        return out.last_hidden_state


def _replacing_input(insert: Insert) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook; some releases of transformers give the residual stream by position, some by name."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (insert(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": insert(kwargs["hidden_states"])}

    return hook


def _steady_cache(stored: list[tuple[Tensor, Tensor]], context: int) -> Any:
    """A transformers cache that every step finds as the first one did.

    The step's own keys and values go behind the context, where the next step's will overwrite them. Nothing is
    concatenated, so a step does not copy the whole cache as `DynamicCache` does.

    Args:
        stored: keys and values of every block, each [B, KV heads, context + tokens, D].
        context: positions that stay.
    """
    from transformers import DynamicCache

    class SteadyCache(DynamicCache):
        """Of fixed length: what is put behind the context is overwritten by the next step."""

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = stored[layer_idx]
            end = context + key_states.shape[-2]
            if key_states.shape[0] != keys.shape[0] or end > keys.shape[-2]:
                raise ValueError(
                    f"a step of {key_states.shape[0]} x {key_states.shape[-2]} tokens; this cache was made for "
                    f"{keys.shape[0]} x {keys.shape[-2] - context}: make one with new_cache(batch, context, tokens)"
                )
            keys[:, :, context:end] = key_states
            values[:, :, context:end] = value_states
            return keys[:, :, :end], values[:, :, :end]  # [B, KV heads, context + T, D]

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return context

        def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
            if isinstance(query_length, Tensor):  # older releases give the positions themselves
                query_length = len(query_length)
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
        return Backbone(name, hidden_if_none)
    fields = _checked(name, _fields(name), blocks)
    model = _empty_model({**fields, "vocab_size": vocabulary}, dtype, attention)
    require_bytes(parameter_bytes(model), device)
    _materialise(model, device)
    return Decoder(name, model, _shape(model.config))


def measure_backbone(name: str, blocks: int | None, vocabulary: int) -> tuple[BlockShape, int, int]:
    """Sizes of a block, how many blocks, and how many parameters with the embedding: before anything is allocated."""
    fields = _checked(name, _fields(name), blocks)
    model = _empty_model({**fields, "vocab_size": vocabulary}, torch.bfloat16)
    return _shape(model.config), len(model.layers), sum(parameter.numel() for parameter in model.parameters())


def _fields(name: str) -> dict[str, Any]:
    if name in SIZES:
        return dict(SIZES[name])
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"no backbone {name!r}: use one of {', '.join(BACKBONES)}, or the path of a config.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a config.json: {error}") from None
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
    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"this transformers has no {kind}: pip install 'transformers>={_DENSE[kind]}'")
    config = CONFIG_MAPPING[kind].from_dict(fields)
    config._attn_implementation = attention
    model_class: Any = MODEL_MAPPING[type(config)]
    with _default_dtype(dtype), torch.device("meta"):
        return model_class(config).eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _materialise(model: Any, device: torch.device) -> None:
    """Memory and random weights; scaled as for training, so that the residual stream grows only slowly."""
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # the others are norms
    owners = [(name, module) for name, module in model.named_modules() if module._buffers]
    for name, module in owners:  # the rotary embedding's frequencies, which were never computed
        assert "inv_freq" in module._buffers, name
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, type(module)(config=model.config).to(device))


def _shape(config: Any) -> BlockShape:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return BlockShape(config.hidden_size, config.intermediate_size, heads, config.num_key_value_heads, head_dim)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
