"""What serving engines call a placement: the flags that vLLM and SGLang take, and what neither can do.

Read in their documentation and sources in November 2026. vLLM's `EngramConfig`, for DeepSeek-V4.1 and for Qwen's n-gram
table: `cpu_offload`, pinned host memory, read in place; `embedding_across_dp`, parts with all ranks. SGLang's page on
Engram tables, for DeepSeek-V4.1: `placement`, `gpu` or `cpu`, the same; `replication`, `none`, parts with the ranks
that split the weights, or `per_node`, one copy. For Qwen's it has `--ple-offload-embedding`, pinned host memory.
"""

from __future__ import annotations

import json

_VLLM = {
    "device": {"cpu_offload": False},
    "uva": {"cpu_offload": True},
    "sharded": {"cpu_offload": False, "embedding_across_dp": True},
    "sharded host": {"cpu_offload": True, "embedding_across_dp": True},
}
_SGLANG = {
    "device": {"placement": "gpu"},
    "uva": {"placement": "cpu", "replication": "per_node"},
    "sharded": {"placement": "gpu", "replication": "none"},
    "sharded host": {"placement": "cpu", "replication": "none"},
}
_SGLANG_QWEN = {"device": "# no flag", "sharded": "# no flag", "uva": "--ple-offload-embedding"}
_SEEN = "as documented in November 2026"


def engine_flags(placement: str | None, form: str) -> list[str]:
    """A line for each engine that loads a model of this form and knows the placement."""
    if form not in ("v41", "qwen"):
        return [f"# neither vLLM nor SGLang loads a model of the form {form}, {_SEEN}"]
    if placement not in _VLLM:
        if placement is None:
            return ["# nothing fits"]
        has = "they hold the table on GPUs, or read it in place from pinned host memory"
        return [f"# neither engine has the placement {placement}, {_SEEN}: {has}"]
    lines = [f"--engram-config '{json.dumps(_VLLM[placement])}'  # vLLM, {_SEEN}"]
    if form == "v41":
        lines.append(f"--engram-config '{json.dumps(_SGLANG[placement])}'  # SGLang, {_SEEN}")
    elif placement in _SGLANG_QWEN:
        lines.append(f"{_SGLANG_QWEN[placement]}  # SGLang, {_SEEN}")
    return lines
