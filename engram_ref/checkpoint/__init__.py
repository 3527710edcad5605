"""Published weights, in and out.

demo          a layer in the demo's names: save_layer, load_layer
folder        a DeepSeek-V4.1 checkpoint on disk, opened where it lies; without torch until rows are asked for
v41           whole layers of such a folder
qwen_folder   a Qwen3.8-Flash-Next checkpoint, opened likewise
qwen          whole layers of it
qwen_config   its config.json
config_json   its config.json, read and written; without torch
sample        a small folder of this kind

    from engram_ref.checkpoint import load_layer, save_layer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_ref.checkpoint.demo import load_layer, save_layer

__all__ = ["load_layer", "save_layer"]


def __getattr__(name: str) -> Any:
    """`load_layer` and `save_layer` when they are asked for: they need torch, a folder does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engram_ref.checkpoint import demo

    return getattr(demo, name)
