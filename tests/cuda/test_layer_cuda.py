"""The layer on a GPU: what it computes on a CPU, in every dtype, in one shot and in chunks."""

from __future__ import annotations

import itertools

import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.fusion import ShortConvHistory
from engram_ref.hashing import HashPlan
from engram_ref.layer import Engram, build_engram

pytestmark = pytest.mark.cuda

CONFIG = EngramConfig.preset("demo").replace(
    layer_ids=(1,), table_size_per_order=(5000, 5000), hidden=256, row_dtype="float32"
)
LAYER = HashPlan.build(CONFIG, 1000, 2).layer(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    """Without TF32, which rounds the inputs of a matrix product to 10 bits."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


def make_inputs(dtype, batch=2, length=300):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, LAYER.rows, (batch, length, CONFIG.columns), generator=generator)
    hidden = torch.randn(batch, length, CONFIG.hc_mult, CONFIG.hidden, generator=generator)
    return hidden.to(dtype), rows


def on_both(dtype, placement="device"):
    """The same layer on the CPU, in float64, and on the GPU."""
    gpu = build_engram(CONFIG, LAYER, placement, "cuda", dtype)
    cpu = build_engram(CONFIG, LAYER, dtype=torch.float64)
    cpu.fusion.load_state_dict(gpu.fusion.state_dict())
    return cpu, gpu


def assert_near(update, want, dtype):
    """Two roundings of the projection and of the result, and the gate's slope where its argument is not tiny."""
    assert update.is_cuda and update.dtype == dtype
    error = (update.cpu().double() - want).abs()
    eps = torch.finfo(dtype).eps
    assert error.mean() < 4 * eps and error.max() < 100 * eps * want.abs().max()


@pytest.mark.parametrize("placement", ["device", "host", "uva"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_computes_what_the_cpu_does(dtype, placement):
    cpu, gpu = on_both(dtype, placement)
    hidden, rows = make_inputs(dtype)
    with torch.no_grad():
        want = cpu(hidden.double(), rows)
        update = gpu(hidden.cuda(), rows)
        wrong = gpu(hidden.cuda(), (rows + 1) % LAYER.rows)
    assert_near(update, want, dtype)
    with pytest.raises(AssertionError):
        assert_near(wrong, want, dtype)
    gpu.table.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_on_the_gpu(dtype):
    cpu, gpu = on_both(dtype)
    hidden, rows = make_inputs(dtype, length=40)
    history = ShortConvHistory(gpu.fusion, 2)
    cuts = [0, 1, 2, 7, 30, *range(31, 41)]
    with torch.no_grad():
        steps = [gpu(hidden[:, a:b].cuda(), rows[:, a:b], history) for a, b in itertools.pairwise(cuts)]
        want = cpu(hidden.double(), rows)
    assert_near(torch.cat(steps, dim=1), want, dtype)


def test_gradients_on_the_gpu():
    cpu, gpu = on_both(torch.float32)
    hidden, rows = make_inputs(torch.float32)
    cpu(hidden.double(), rows).square().mean().backward()
    gpu(hidden.cuda(), rows).square().mean().backward()
    for ours, want in zip(gpu.parameters(), cpu.parameters()):
        error = (ours.grad.cpu().double() - want.grad).norm()
        assert error < 1e-2 * want.grad.norm()  # on a CPU 2e-4: the gate's bend, where float32 is least exact


def test_a_layer_or_a_table_on_the_wrong_device_says_so():
    cpu, gpu = (build_engram(CONFIG, LAYER, device=device) for device in ("cpu", "cuda"))
    hidden, rows = make_inputs(torch.float32)
    e = torch.zeros(2, 300, CONFIG.embedding_width)
    with pytest.raises(ValueError, match=r"e is torch.float32 on cpu; this layer is torch.float32 on cuda"):
        gpu.fusion(e, hidden.cuda())
    with pytest.raises(ValueError, match=r"rows on cpu, hidden on cuda:0: make the table for that device"):
        Engram(gpu.fusion, cpu.table)(hidden.cuda(), rows)
