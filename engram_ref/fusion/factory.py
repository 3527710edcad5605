"""A fusion of the form that the configuration names.

fusion = make_fusion(config, device="cuda", dtype=torch.bfloat16)
"""

from __future__ import annotations

import torch

from engram_ref.config import EngramConfig
from engram_ref.devices import as_device
from engram_ref.fusion.demo import DemoFusion
from engram_ref.fusion.qwen import QwenFusion
from engram_ref.fusion.v41 import V41Fusion


def make_fusion(
    config: EngramConfig,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    fused: bool | None = None,
) -> DemoFusion | V41Fusion:  # a QwenFusion is a DemoFusion
    """A fusion of the configuration's form.

    Args:
        config: geometry.
        device, dtype: of the parameters, and of what goes in and comes out.
        fp8: in the form v41, keep the projection as fp8 codes and scales.
        fused: whether what follows the projection is done in one pass where it can be; see `Fusion`.

    Raises:
        ValueError: fp8 weights for another form than v41, or for a projection that is not made of 32 x 32 blocks; a
            dtype in which nothing can be computed.
    """
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: a fusion computes in float64, float32, float16 or bfloat16")
    if device is not None and str(device) != "meta":
        device = as_device(device)
    if config.form == "v41":
        return V41Fusion(config, device, dtype, fp8, fused)
    if fp8:
        raise ValueError(f"fp8=True: form {config.form} has no fp8 weights; use fp8=False, or form v41")
    return (QwenFusion if config.form == "qwen" else DemoFusion)(config, device, dtype, fused)
