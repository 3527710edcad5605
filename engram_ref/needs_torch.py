"""Imported before torch wherever torch is needed: without it, one line of advice instead of a missing module."""

from __future__ import annotations

try:
    import torch  # noqa: F401, whether it is there
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "this part of engram_ref needs torch, which is not installed: pip install 'engram-offload[ref]'", name="torch"
    ) from None
