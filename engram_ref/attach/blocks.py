"""The decoder in a model of transformers, its list of blocks, and what of a forward's arguments matters here.

    decoder, blocks = find_blocks(model)        # Qwen3ForCausalLM -> its Qwen3Model and the ModuleList in it

Found by structure, not by name: the only list of as many modules as the configuration has hidden layers, and the
innermost module around it that is given token ids.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.ngram import NgramHasher
from engram_ref.hashing.plan import HashPlan
from engram_ref.layer import Engram, check_plan
from engram_ref.tables.device import DeviceTable


def find_blocks(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder in a model, and its list of blocks.

    Raises:
        ValueError: there is none, or more than one, or an encoder beside it, or nothing around it is given token ids.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} has no configuration of transformers: give a model of transformers")
    if getattr(config, "is_encoder_decoder", False) and model.get_encoder() is not model.get_decoder():
        raise ValueError(
            f"{type(model).__name__} is an encoder and a decoder; Engram goes into the decoder: give "
            "model.get_decoder()"
        )
    count = _count(config.get_text_config())
    found: dict[str, nn.ModuleList] = {}
    inside: set[nn.Module] = set()  # blocks may hold lists of as many experts
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module not in inside:
            found[path] = module
            inside.update(module.modules())
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {count} blocks; Engram goes into a decoder with one: "
            "give the decoder by itself, such as model.model, model.decoder or model.model.language_model"
        )
    ((path, blocks),) = found.items()
    return _with_ids(model, path), blocks


def _count(config: Any) -> int | None:
    """How many blocks the decoder has; the first two names are of configurations that have an encoder's, too."""
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def _with_ids(model: nn.Module, path: str) -> nn.Module:
    """The innermost module around a list of blocks whose forward names `input_ids`."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    raise ValueError(
        f"no forward around the blocks of {type(model).__name__} names input_ids, by which Engram looks rows up: "
        "give the model around it that has one"
    )


def check_arguments(
    engrams: Any, plan: Any, buffers: Any, observer: Any, exposed: Any, prefetcher: Any
) -> dict[int, Engram]:
    """The layers by block number, and a refusal of whatever is not what `attach` takes.

    Raises:
        ValueError: says what is wanted.
    """
    if not isinstance(engrams, Mapping):
        raise ValueError(f"engrams is a {type(engrams).__name__}: give a mapping, {{block number: Engram}}")
    for layer_id, engram in engrams.items():
        if isinstance(layer_id, bool) or not hasattr(layer_id, "__index__"):
            raise ValueError(f"layer {layer_id!r} is a {type(layer_id).__name__}: give the number of a block, an int")
        if not isinstance(engram, Engram):
            raise ValueError(f"layer {layer_id} is a {type(engram).__name__}: give an Engram, as build_engram makes it")
    if not isinstance(plan, (HashPlan, NgramHasher, DeviceHasher)):
        raise ValueError(f"plan is a {type(plan).__name__}: give a HashPlan, as HashPlan.build makes it, or a hasher")
    if isinstance(buffers, bool) or not isinstance(buffers, int):
        raise ValueError(f"buffers={buffers!r}: give how many fetches may be in flight, an int")
    for name, given, method in (
        ("observer", observer, "__call__"),
        ("exposed", exposed, "around"),
        ("prefetcher", prefetcher, "start"),
    ):
        if given is not None and (isinstance(given, type) or not hasattr(given, method)):
            shown = given.__name__ if isinstance(given, type) else type(given).__name__
            raise ValueError(f"{name} is a {shown}, without {method}: give a made object that has it, or leave it out")
    return {operator.index(layer_id): engram for layer_id, engram in engrams.items()}


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


def tell_larger(decoder: Any, known: int) -> None:
    """Warn of a model that has more token ids than are known to its vocabulary; many embeddings are padded."""
    embedding = getattr(decoder, "embed_tokens", None)
    weight = getattr(embedding, "weight", None)
    count = decoder.config.get_text_config().vocab_size if weight is None else len(weight)
    if count > known:
        warnings.warn(
            f"the model has token ids 0 .. {count - 1}, the vocabulary of Engram 0 .. {known - 1}: a forward with a "
            "token beyond is refused; if it can come, compress with the vocabulary that the model was trained with",
            stacklevel=3,
        )


def tell_apart(model: Any, engrams: Mapping[int, Engram]) -> None:
    """Warn, on several ranks, of weights that are none of the model's: what reduces its gradients passes them over."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    own = {id(parameter) for parameter in model.parameters()}
    weights: list[Tensor] = [weight for engram in engrams.values() for weight in engram.parameters()]
    tables = [engram.table for engram in engrams.values()]
    weights += [table.weight for table in tables if isinstance(table, DeviceTable) and table.weight is not None]
    if any(weight.requires_grad and id(weight) not in own for weight in weights):
        warnings.warn(
            f"training on {dist.get_world_size()} ranks with Engram weights that are not in the model that attach() "
            "was given: unless a module around it holds them, DDP and FSDP leave each rank its own. Before you wrap "
            "it, model.engrams = nn.ModuleDict({'1': engram}), and for rows model.rows = weight; or reduce their "
            "gradients yourself",
            stacklevel=3,
        )


class Given(NamedTuple):
    """The arguments of a decoder's forward that matter to Engram."""

    ids: Tensor
    cache: Any
    mask: Any
    use_cache: bool | None
    positions: Any = None  # `position_ids`
    packed: Mapping[str, Any] = {}  # what else says that several sequences lie in one row, by name


CACHES = ("cache", "past_key_values", "cache_params")  # by release and kind of model, the name of a decoder's cache
_PASTS = ("state", "mems", "layer_past", "past_key_value")  # a past in another form than a cache
_RECURRENT = ("linear", "mamba", "conv", "recurrent", "hybrid")  # in what configurations call a kind of block
LENGTHS = "cu_seq"  # how the names of running lengths begin: cu_seq_lens_q, cu_seqlens, ...
_NUMBERS = ("seq_idx", "sequence_ids", "segment_ids", "document_ids")  # which sequence of its row a position is of


def is_on_accelerator(value: Any) -> bool:
    """Whether the CPU would have to wait to know it."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def reader(decoder: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Given]:
    """A function that picks them from the arguments of the decoder's forward, by position or by name.

    It raises a ValueError for arguments that Engram cannot follow, among them every cache that it does not know.
    """
    by_name = named_arguments(decoder)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        given = by_name(args, kwargs)
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError(
                "inputs_embeds without input_ids: Engram looks rows up by token ids; give the model input_ids (a model "
                "that embeds them itself, as for images: its text decoder alone), or detach Engram first"
            )
        if not isinstance(ids, Tensor):
            raise ValueError(f"input_ids is a {type(ids).__name__}: give a tensor of token ids, [B, T]")
        if ids.ndim != 2:
            raise ValueError(f"token ids of shape {tuple(ids.shape)}: give a batch of sequences, [B, T]")
        packed = {
            name: said
            for name, said in given.items()
            if said is not None and (name in _NUMBERS or name.startswith(LENGTHS))
        }
        mask, use_cache, positions = (given.get(name) for name in ("attention_mask", "use_cache", "position_ids"))
        return Given(ids, cache_among(given), mask, use_cache, positions, packed)

    return read


def named_arguments(decoder: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """A function that gives the arguments of the decoder's forward by the names that this release has for them.

    It raises a ValueError for more positional arguments than the forward names, and inside of `torch.func.vmap`.
    """
    parameters = inspect.signature(decoder.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(names):
            raise ValueError(f"{len(args)} arguments by position; the decoder's forward names {len(names)}: name them")
        given = {**dict(zip(names, args)), **kwargs}
        if torch._C._are_functorch_transforms_active():
            given = {name: unwrapped(name, v) if isinstance(v, Tensor) else v for name, v in given.items()}
        return given

    return by_name


def unwrapped(name: str, value: Tensor) -> Tensor:
    """What `torch.func` has wrapped, as it does with all that a transformed function is given."""
    plain = torch.func.debug_unwrap(value)
    if plain.ndim != value.ndim:  # a dimension is hidden
        raise ValueError(
            f"{name} inside of torch.func.vmap, in which nothing can be looked up: give the model the whole batch"
        )
    return plain


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache that a forward is given, or None."""
    found = None
    for name, value in arguments.items():
        if value is None or value is found or (isinstance(value, (Tensor, bool, int)) and name not in _PASTS):
            continue
        if name in CACHES:
            if not hasattr(value, "get_seq_length"):
                kind = type(value).__name__
                if "Paged" in kind:
                    raise ValueError(
                        f"{name} is a {kind}: Engram does not follow continuous batching: use generate() with another "
                        "cache, or Places with a static one"
                    )
                raise ValueError(f"{name} is a {kind}: give a Cache of transformers")
            if found is not None:
                raise ValueError(f"two caches, {name} is one of them: give one")
            found = value
        elif name in _PASTS or looks_like_cache(value):
            raise ValueError(
                f"{name} is a {type(value).__name__}, a past that Engram does not follow: give a Cache of transformers "
                f"as one of {', '.join(CACHES)}, or use_cache=False"
            )
    return found


def looks_like_cache(value: Any) -> bool:
    """Whether something is a cache, or holds one, as far as can be seen from outside."""
    if isinstance(value, Mapping):
        return any(looks_like_cache(part) for part in value.values())
    if isinstance(value, (tuple, list)):
        return any(looks_like_cache(part) for part in value)
    return _is_cache(value) or any(_is_cache(part) for part in getattr(value, "__dict__", {}).values())


def _is_cache(value: Any) -> bool:
    if hasattr(value, "get_seq_length") or any(kind.__name__.endswith("Cache") for kind in type(value).__mro__):
        return True
    if isinstance(value, (Tensor, Mapping, set)):
        return False
    return hasattr(value, "update") and not hasattr(value, "to_dict")  # a configuration has both


def cache_in(output: Any) -> Any:
    """The cache that a decoder gave back, or None.

    Raises:
        ValueError: several, or one that does not say how many positions it holds.
    """
    if isinstance(output, Mapping):
        parts = list(output.values())
    else:
        parts = list(output) if isinstance(output, (tuple, list)) else list(getattr(output, "__dict__", {}).values())
    found = {id(part): part for part in parts if looks_like_cache(part)}
    if not found:
        return None
    cache, *others = found.values()
    if others or not hasattr(cache, "get_seq_length"):
        kinds = ", ".join(type(part).__name__ for part in found.values())
        raise ValueError(f"the model gives back {kinds}, which Engram does not follow: use_cache=False")
    return cache


def recurs(blocks: nn.ModuleList, config: Any) -> bool:
    """Whether blocks mix positions by states or convolutions, too, and not by attention alone, which has a mask."""
    config = config.get_text_config()
    kinds = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())]
    by_name = any(word in str(kind) for kind in kinds for word in _RECURRENT)
    return by_name or any(isinstance(module, nn.Conv1d) for module in blocks.modules())


def length_of(cache: Any) -> Any:
    """How many positions a cache holds, an integer or a tensor.

    Raises:
        ValueError: it does not say.
    """
    try:
        return cache.get_seq_length()
    except ValueError as error:
        raise ValueError(
            f"a {type(cache).__name__} that does not say how many positions it holds, so Engram cannot follow it: "
            f"use_cache=False ({error})"
        ) from error
