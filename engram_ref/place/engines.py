"""What serving engines call a placement: the flag that vLLM and SGLang take, and what neither can do.

Read in their documentation and sources in November 2026: vLLM's `EngramConfig` (`cpu_offload`: pinned host memory, read
in place), SGLang's page on Engram tables (`placement`: `gpu`, or `cpu`, pinned host memory, read in place). Both load a
DeepSeek-V4.1 model; vLLM takes Qwen's n-gram table under the same flag.
"""

from __future__ import annotations

import json

_FLAGS = {
    "device": ({"cpu_offload": False}, {"placement": "gpu"}),
    "uva": ({"cpu_offload": True}, {"placement": "cpu"}),
}
_SEEN = "as documented in November 2026"


def engine_flags(placement: str | None) -> list[str]:
    """A line for each engine."""
    if placement not in _FLAGS:
        what = "nothing fits" if placement is None else f"neither engine has the placement {placement}"
        return [f"# {what}, {_SEEN}: vLLM and SGLang hold the table on the GPU or read it in place from host memory"]
    vllm, sglang = _FLAGS[placement]
    return [
        f"--engram-config '{json.dumps(vllm)}'  # vLLM, {_SEEN}",
        f"--engram-config '{json.dumps(sglang)}'  # SGLang, {_SEEN}",
    ]
