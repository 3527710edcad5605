"""The layer on a GPU, in both forms: what it computes on a CPU, in every dtype, in one shot and in chunks."""

import itertools

import pytest
import torch

from engram_ref.config import EngramConfig
from engram_ref.fusion import ShortConvHistory
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.hashing import HashPlan
from engram_ref.layer import Engram, build_engram

pytestmark = pytest.mark.cuda

CONFIG = EngramConfig.preset("demo").replace(
    layer_ids=(1,), table_size_per_order=(5000, 5000), hidden=256, row_dtype="float32"
)
# As wide as the demo's, so that as many products are added up; its rows are fp8.
V41 = EngramConfig.preset("v41-flash").replace(
    layer_ids=(1,), heads=2, table_size_per_order=(500, 500, 500), hidden=256, compressed_size=None
)
FORMS = {config.form: (config, HashPlan.build(config, 1000, 2).layer(1)) for config in (CONFIG, V41)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    """Without TF32, which rounds the inputs of a matrix product to 10 bits."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def make_inputs(form, dtype, batch=2, length=300):
    config, layer = FORMS[form]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, layer.rows, (batch, length, config.columns), generator=generator)
    hidden = torch.randn(batch, length, config.hc_mult, config.hidden, generator=generator)
    return hidden.to(dtype), rows


def on_both(form, dtype, placement="device"):
    """The same layer on the CPU, in float64, and on the GPU; every learned gain matters."""
    gpu = build_engram(*FORMS[form], placement, "cuda", dtype)
    cpu = build_engram(*FORMS[form], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for gain in gpu.fusion.parameters():
            if (gain == 1).all():
                gain.add_(0.1 * torch.randn(gain.shape, generator=generator).to(gain))
    cpu.fusion.load_state_dict(gpu.fusion.state_dict())
    return cpu, gpu


def assert_near(stream, want, dtype):
    """Roundings of the projection, the update and the sum, and the gate's slope where its argument is not tiny."""
    assert stream.is_cuda and stream.dtype == dtype
    error = (stream.cpu().double() - want).abs()
    eps = torch.finfo(dtype).eps
    assert error.mean() < 4 * eps and error.max() < 100 * eps * want.abs().max()


@pytest.mark.parametrize("placement", ["device", "host", "uva"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_computes_what_the_cpu_does(form, dtype, placement):
    cpu, gpu = on_both(form, dtype, placement)
    hidden, rows = make_inputs(form, dtype)
    with torch.no_grad():
        want = cpu(hidden.double(), rows)
        stream = gpu(hidden.cuda(), rows)
        wrong = gpu(hidden.cuda(), (rows + 1) % gpu.table.rows)
    assert_near(stream, want, dtype)
    with pytest.raises(AssertionError):
        assert_near(wrong, want, dtype)
    gpu.table.close()


def test_where_the_rows_are_changes_no_bit(form):
    hidden, rows = make_inputs(form, torch.bfloat16, length=50)
    streams = []
    for placement in ("device", "host", "uva"):
        _, gpu = on_both(form, torch.bfloat16, placement)
        with torch.no_grad(), gpu.table:
            streams.append(gpu(hidden.cuda(), rows))
    assert all(torch.equal(streams[0], stream) for stream in streams[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_on_the_gpu(form, dtype):
    cpu, gpu = on_both(form, dtype)
    hidden, rows = make_inputs(form, dtype, length=40)
    history = ShortConvHistory(gpu.fusion, 2) if form == "demo" else None
    cuts = [0, 1, 2, 7, 30, *range(31, 41)]
    with torch.no_grad():
        steps = [gpu(hidden[:, a:b].cuda(), rows[:, a:b], history) for a, b in itertools.pairwise(cuts)]
        want = cpu(hidden.double(), rows)
    assert_near(torch.cat(steps, dim=1), want, dtype)


@pytest.mark.parametrize("length", [4, 9, 12], ids=["below the reach", "at the reach", "above the reach"])
def test_compiled_with_a_history(length):
    """A compiler may not put the write to the history before the reads of it."""
    _, gpu = on_both("demo", torch.float32)
    assert gpu.fusion.reach == 9
    e = torch.randn(2, length, CONFIG.embedding_width, generator=torch.Generator().manual_seed(5)).cuda()
    hidden = make_inputs("demo", torch.float32, length=length)[0].cuda()
    eager, ours = ShortConvHistory(gpu.fusion, 2), ShortConvHistory(gpu.fusion, 2)
    torch.compiler.reset()
    compiled = torch.compile(gpu.fusion, dynamic=False)
    with torch.no_grad(), gpu.table:
        for _ in range(3):
            want, got = gpu.fusion(e, hidden, eager), compiled(e, hidden, ours)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # sums in another order
            torch.testing.assert_close(ours.values, eager.values, rtol=0, atol=1e-4)


def test_gradients_on_the_gpu(form):
    cpu, gpu = on_both(form, torch.float32)
    hidden, rows = make_inputs(form, torch.float32)
    cpu(hidden.double(), rows).square().mean().backward()
    gpu(hidden.cuda(), rows).square().mean().backward()
    for ours, want in zip(gpu.parameters(), cpu.parameters()):
        error = (ours.grad.cpu().double() - want.grad).norm()
        assert error < 1e-2 * want.grad.norm()  # on a CPU 2e-4: the gate's bend, where float32 is least exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dead_position_passes_through_bit_for_bit(dtype):
    cpu, gpu = on_both("v41", dtype)
    hidden, rows = make_inputs("v41", dtype, length=50)
    dead = torch.rand(2, 50, generator=torch.Generator().manual_seed(3)) < 0.3
    with torch.no_grad():
        want = cpu(hidden.double(), rows, dead=dead)
        stream = gpu(hidden.cuda(), rows, dead=dead.cuda())
        blind = gpu(hidden.cuda(), rows)
    assert torch.equal(stream.cpu()[dead], hidden[dead])
    assert torch.equal(stream.cpu()[~dead], blind.cpu()[~dead])
    assert_near(stream, want, dtype)
    with pytest.raises(AssertionError):
        assert_near(blind, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_weights_are_the_decoded_weights(dtype):
    coded = V41Fusion(V41, "cuda", dtype, fp8=True)
    plain = V41Fusion(V41, "cuda", dtype)
    plain.load_state_dict(coded.state_dict())
    hidden = make_inputs("v41", dtype)[0].cuda()
    e = torch.randn(2, 300, V41.embedding_width, generator=torch.Generator().manual_seed(4)).to("cuda", dtype)
    with torch.no_grad():
        want = plain(e, hidden)
        assert torch.equal(coded(e, hidden), want)
        plain.wkv.weight.mul_(2)
        assert not torch.equal(plain(e, hidden), want)


def test_a_layer_or_a_table_on_the_wrong_device_says_so():
    cpu, gpu = (build_engram(*FORMS["demo"], device=device) for device in ("cpu", "cuda"))
    hidden, rows = make_inputs("demo", torch.float32)
    e = torch.zeros(2, 300, CONFIG.embedding_width)
    with pytest.raises(ValueError, match=r"e is torch.float32 on cpu; this layer is torch.float32 on cuda"):
        gpu.fusion(e, hidden.cuda())
    with pytest.raises(ValueError, match=r"rows on cpu, hidden on cuda:0: make the table for that device"):
        Engram(gpu.fusion, cpu.table)(hidden.cuda(), rows)
