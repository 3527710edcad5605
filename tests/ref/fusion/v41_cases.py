"""V4.1's gate for tests: layers in which every weight matters, their inputs, and the formula in plain PyTorch."""

import math

import torch
from torch import nn

from engram_ref.config import EngramConfig
from engram_ref.fusion.v41 import V41Fusion

RECORDED = EngramConfig(
    layer_ids=(1,),
    max_ngram=4,
    heads=4,
    row_width=64,
    table_size_per_order=(50, 50, 50),
    hidden=80,
    kernel_size=0,
    row_dtype="float8_e4m3fn",
    form="v41",
)
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def make_config(**changes):
    usual = RECORDED.replace(heads=1, row_width=32, hidden=32)  # C*D = 96 and (G+1)*H = 160: whole blocks of 32
    return usual.replace(**changes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_fusion_v41(config, dtype=torch.float64, fp8=False, seed=0):
    """A fusion in which every weight matters, gains too."""
    fusion = V41Fusion(config, dtype=dtype, fp8=fp8)
    generator = seeded(seed)
    fusion.reset_parameters(generator)
    with torch.no_grad():
        for gain in (fusion.q_weight, fusion.k_weight):
            gain.add_(0.3 * torch.randn(gain.shape, generator=generator))
    return fusion


def make_inputs(config, batch, length, dtype=torch.float64, seed=1):
    generator = seeded(seed)
    e = torch.randn(batch, length, config.embedding_width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(batch, length, config.hc_mult, config.hidden, generator=generator, dtype=torch.float64)
    return e.to(dtype), hidden.to(dtype)


def make_case(batch, length, dtype=torch.float64, **changes):
    """A fusion of a changed configuration, and inputs for it."""
    fusion = make_fusion_v41(make_config(**changes), dtype)
    return fusion, *make_inputs(fusion.config, batch, length, dtype)


def make_dead(batch, length):
    return torch.rand(batch, length, generator=seeded(2)) < 0.3


def plainly(fusion, e, hidden, dead=None, inner=None):
    """The layer as its definition reads, in plain PyTorch; everything after the projection in `inner`."""
    inner = inner or fusion.inner_dtype
    packed = nn.functional.linear(e, fusion.wkv.rows(slice(0, fusion.wkv.shape[0]), e.dtype)).to(inner)
    *keys, value = packed.split(fusion.config.hidden, dim=-1)
    out = []
    for g, key in enumerate(keys):
        h, q, k = hidden[:, :, g].to(inner), fusion.q_weight[g].to(inner), fusion.k_weight[g].to(inner)
        rstd = torch.rsqrt(h.square().mean(-1) + 1e-20) * torch.rsqrt(key.square().mean(-1) + 1e-20)
        dot = (h * (q * k) * key).sum(-1) * rstd / math.sqrt(fusion.config.hidden)
        gate = torch.sigmoid(torch.copysign(dot.abs().clamp_min(1e-6).sqrt(), dot)).unsqueeze(-1)
        out.append((h + gate * value).to(hidden.dtype))
    stream = torch.stack(out, dim=2)
    return stream if dead is None else torch.where(dead[:, :, None, None], hidden, stream)


def as_bytes(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def make_fp8_pair(dtype, config=None):
    """The same layer with its projection in fp8 and decoded."""
    packed = make_fusion_v41(config or make_config(), dtype, fp8=True)
    plain = V41Fusion(packed.config, dtype=dtype)
    plain.load_state_dict(packed.state_dict())
    return packed, plain
