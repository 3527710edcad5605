"""The decoder in a model of transformers, its list of blocks, and what of a forward's arguments matters here.

    decoder, blocks = find_blocks(model)        # Qwen3ForCausalLM -> its Qwen3Model and the ModuleList in it

Found by structure, not by name: the only list of as many modules as the configuration has hidden layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from engram_ref.hashing import HashPlan
from engram_ref.layer import Engram, check_plan


def find_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder in a model, and its list of blocks.

    Raises:
        ValueError: there is none, or more than one.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} has no configuration of transformers: give a model of transformers")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    inside: set[nn.Module] = set()  # blocks may hold lists of as many experts
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count and child not in inside:
                found.append((module, child))
                inside.update(child.modules())
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {count} blocks; Engram goes into a decoder with one: "
            "give the decoder by itself (model.model)"
        )
    return found[0]


def check_layers(model: Any, blocks: nn.ModuleList, engrams: Mapping[int, Engram], plan: HashPlan) -> None:
    """Refuse layers that do not go into this model.

    Raises:
        ValueError: none, no such block, another width, another plan, or several forms.
    """
    if not engrams:
        raise ValueError("no Engram layers: give at least one, by the number of the block that it goes before")
    hidden = model.config.get_text_config().hidden_size
    for layer_id, engram in engrams.items():
        config = engram.fusion.config
        if not 0 <= layer_id < len(blocks):
            raise ValueError(f"layer {layer_id}: the model has blocks 0 .. {len(blocks) - 1}")
        if config.hidden != hidden or config.hc_mult != 1:
            raise ValueError(
                f"an Engram layer for {config.hc_mult} x {config.hidden} values; the residual stream of this model is "
                f"1 x {hidden}: build it from a configuration with hc_mult=1 and hidden={hidden}"
            )
        check_plan(config, plan.layer(layer_id))
    forms = sorted({engram.fusion.config.form for engram in engrams.values()})
    if len(forms) > 1:
        raise ValueError(f"layers of the forms {', '.join(forms)} in one model: they treat padding differently")


class Given(NamedTuple):
    """The arguments of a decoder's forward that matter to Engram."""

    ids: Tensor
    cache: Any
    mask: Any
    position: Any  # `cache_position`, which some releases of transformers hand over: where the chunk begins
    use_cache: bool | None


def reader(decoder: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Given]:
    """A function that picks them from the arguments of the decoder's forward, by position or by name."""
    names = list(inspect.signature(decoder.forward).parameters)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        given = {**dict(zip(names, args)), **kwargs}
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if ids is None:
            raise ValueError(
                "inputs_embeds without input_ids: Engram looks rows up by token ids; give the model input_ids, or "
                "detach Engram first"
            )
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "several sequences packed into one row (cu_seq_lens_q): Engram would look across their borders; give a "
                "padded batch"
            )
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: give a Cache of transformers")
        return Given(ids, cache, given.get("attention_mask"), given.get("cache_position"), given.get("use_cache"))

    return read


def cache_in(output: Any) -> Any:
    """The cache that a decoder gave back, or None."""
    parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
