"""From looked-up rows to the update of the residual stream, in each model's form.

base         what the forms share, and the convolution's history
demo         gate and short convolution of the demo and the paper
qwen         the same of Qwen3.8-Flash-Next
v41          gate of DeepSeek-V4.1-Flash
projection   its projection, plain or in fp8 blocks
factory      one of them, by the configuration's form
fused        what follows the projection in one pass, compiled; kernels: in Triton
"""

from engram_ref.fusion.base import Fusion, ShortConvHistory
from engram_ref.fusion.demo import DemoFusion, causal_conv
from engram_ref.fusion.factory import make_fusion
from engram_ref.fusion.qwen import QwenFusion
from engram_ref.fusion.v41 import V41Fusion

__all__ = ["DemoFusion", "Fusion", "QwenFusion", "ShortConvHistory", "V41Fusion", "causal_conv", "make_fusion"]
