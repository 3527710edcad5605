"""The layer from row numbers on, in both forms: every way to hand in rows, new layers, and what is refused."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from engram_ref import layer as layer_module
from engram_ref.config import EngramConfig
from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_rows
from engram_ref.fusion import DemoFusion, ShortConvHistory
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.hashing import DEAD, HashPlan, NgramHasher
from engram_ref.layer import Engram, build_engram
from engram_ref.prefetch import Prefetcher
from engram_ref.rows.filling import fill_normal
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables import make_table
from engram_ref.tables.base import Ready
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.hot import HotTable
from tests.ref.fusion.v41_cases import as_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "layer_demo.safetensors"
GOLDEN_V41 = GOLDEN.with_name("layer_v41.safetensors")
RECORDED = EngramConfig(
    layer_ids=(0, 3),
    max_ngram=3,
    heads=2,
    row_width=32,
    table_size_per_order=(3027, 2003),
    hidden=64,
    seed=7,
    row_dtype="float32",
)
CONFIG = EngramConfig(
    layer_ids=(1,),
    max_ngram=3,
    heads=2,
    row_width=4,
    table_size_per_order=(50, 50),
    hidden=16,
    hc_mult=2,
    row_dtype="float32",
)
SIZE = 40  # of the compressed vocabulary
PLAN = HashPlan.build(CONFIG, SIZE, 2)
LAYER = PLAN.layer(1)
CONFIG_V41 = CONFIG.replace(form="v41", kernel_size=0, row_width=32, row_dtype="float8_e4m3fn", hidden=32)
TOLERANCE = 1e-12  # float64, as in test_fusion


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(LAYER.rows, CONFIG.row_width, generator=generator, dtype=torch.float64)


@pytest.fixture
def engram(weights):
    fusion = DemoFusion(CONFIG, dtype=torch.float64)
    fusion.reset_parameters(torch.Generator().manual_seed(0))
    return Engram(fusion, DeviceTable(weights))


def make_batch(batch, length, seed=0):
    """Compressed ids, their row numbers and a residual stream."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SIZE, (batch, length))
    hidden = torch.from_numpy(rng.normal(size=(batch, length, CONFIG.hc_mult, CONFIG.hidden)))
    return ids, NgramHasher(PLAN)(ids, 1), hidden


# --- rows in, residual stream out -----------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.float64, TOLERANCE)], ids=str)
@pytest.mark.parametrize("case", ["A.case0", "A.case1", "A.case2"])
def test_the_recorded_layer_from_token_ids_on(case, dtype, limit, vocab_small):
    recorded = load_file(GOLDEN)
    weights = {name.removeprefix("A.weights."): tensor for name, tensor in recorded.items() if "weights" in name}
    table = weights.pop("multi_head_embedding.embedding.weight").to(dtype)
    weights.pop("multi_head_embedding.offsets")
    fusion = DemoFusion(RECORDED, dtype=dtype)
    fusion.load_state_dict(weights)
    plan = HashPlan.build(RECORDED, len(vocab_small), vocab_small.pad(RECORDED.pad_id))
    rows = NgramHasher(plan)(vocab_small(recorded[f"{case}.input_ids"].numpy()), 3)
    hidden = recorded[f"{case}.hidden_states"].to(dtype)
    want = hidden + recorded[f"{case}.output_f64"]  # what is recorded leaves the stream out
    assert (Engram(fusion, DeviceTable(table))(hidden, rows) - want).abs().max() < limit
    assert (Engram(fusion, DeviceTable(table))(hidden, (rows + 1) % len(table)) - want).abs().max() > limit


def test_every_way_to_hand_in_rows_gives_the_same_bits(engram):
    ids, rows, hidden = make_batch(3, 9)
    want = engram(hidden, rows)
    assert rows.dtype == np.int32
    assert torch.equal(engram(hidden, torch.from_numpy(rows)), want)
    assert torch.equal(engram(hidden, torch.from_numpy(rows).long().transpose(0, 1).contiguous().transpose(0, 1)), want)
    assert torch.equal(engram(hidden, engram.table.start(torch.from_numpy(rows).view(-1))), want)
    with Prefetcher(NgramHasher(PLAN), {1: engram.table}) as prefetcher, prefetcher.start(ids) as fetch:
        assert torch.equal(engram(hidden, fetch[1]), want)


@pytest.mark.slow
def test_a_compiled_layer_takes_rows_from_every_placement(engram, weights, tmp_path):
    """Dynamo traces what it may of a fetch, and breaks its graph at the rest."""
    _, rows, hidden = make_batch(3, 9)
    want = engram(hidden, rows)
    save_rows(tmp_path / "rows.safetensors", weights)
    file, some = StoredRows.find(tmp_path / "rows.safetensors"), torch.arange(0, len(weights), 3)
    tables = [make_table("host", weights), make_table("file", file), HotTable(make_table("host", weights), some)]
    for table in tables:
        torch._dynamo.reset()
        assert torch.equal(torch.compile(Engram(engram.fusion, table), backend="eager")(hidden, rows), want)


def test_a_stream_without_copies_keeps_its_shape(weights):
    config = CONFIG.replace(hc_mult=1)
    engram = Engram(DemoFusion(config, dtype=torch.float64), DeviceTable(weights))
    _, rows, hidden = make_batch(2, 6)
    plain = engram(hidden[:, :, 0], rows)
    assert plain.shape == (2, 6, 16)
    assert torch.equal(plain, engram(hidden[:, :, :1], rows)[:, :, 0])


def test_rows_are_converted_to_the_fusions_dtype(weights):
    _, rows, hidden = make_batch(2, 6)
    fusion = DemoFusion(CONFIG, dtype=torch.float32)
    stored = weights.bfloat16()
    after = Engram(fusion, DeviceTable(stored))(hidden.float(), rows)
    assert after.dtype == torch.float32
    assert torch.equal(after, Engram(fusion, DeviceTable(stored.float()))(hidden.float(), rows))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_positions_give_no_stream(engram, shape):
    rows = torch.empty((*shape, 4), dtype=torch.int32)
    hidden = torch.empty((*shape, 2, 16), dtype=torch.float64)
    assert engram(hidden, rows).shape == hidden.shape


# --- training -------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_fetched_rows_whatever_is_fetched_before_they_are_asked_for():
    """Several losses, one backward: the buffers of the first fetches have been filled again by then."""
    engram = build_engram(CONFIG, LAYER, "host")
    batches = [make_batch(2, 30, seed) for seed in range(4)]

    want, got = [], []
    with Prefetcher(NgramHasher(PLAN), {1: engram.table}) as prefetcher:
        for ids, rows, hidden in batches:
            want.append(engram(hidden.float(), rows).square().mean())
            with prefetcher.start(ids) as fetch:
                got.append(engram(hidden.float(), fetch[1]).square().mean())
    weight = engram.fusion.projection_weight
    (right,), (ours,) = (torch.autograd.grad(sum(losses), weight) for losses in (want, got))
    assert torch.equal(ours, right) and right.any()
    engram.table.close()


def test_the_state_dict_is_the_fusions(engram):
    assert list(engram.state_dict()) == [f"fusion.{name}" for name in engram.fusion.state_dict()]
    again = Engram(DemoFusion(CONFIG, dtype=torch.float64), engram.table)
    again.load_state_dict(engram.state_dict())
    _, rows, hidden = make_batch(1, 4)
    assert torch.equal(again(hidden, rows), engram(hidden, rows))


# --- new layers -----------------------------------------------------------------------------------


def fetched(engram):
    return engram.table.start(torch.arange(engram.table.rows)).wait()


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_new_layer_has_normal_rows(placement, row_dtype):
    config = CONFIG.replace(row_dtype=row_dtype, table_size_per_order=(5000, 5000))
    plan = HashPlan.build(config, SIZE, 2).layer(1)
    engram = build_engram(config, plan, placement)
    rows = fetched(engram)
    assert engram.table.placement == placement
    assert rows.shape == (plan.rows, 4) and rows.dtype == getattr(torch, row_dtype)
    # 80,000 draws: mean and variance are within 5 of their standard errors.
    assert abs(rows.double().mean()) < 5 * 80_000**-0.5
    assert abs(rows.double().var() - 1) < 5 * (2 / 80_000) ** 0.5
    assert engram.fusion.dtype == torch.float32
    engram.table.close()


def test_a_seed_gives_the_same_layer_again():
    _, rows, hidden = make_batch(1, 5)
    first, again, other = (build_engram(CONFIG, LAYER, dtype=torch.float64, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first(hidden, rows), again(hidden, rows))
    assert not torch.equal(fetched(first), fetched(other))
    assert not torch.equal(first.fusion.projection_weight, other.fusion.projection_weight)


def test_a_new_layer_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    first = build_engram(CONFIG, LAYER)
    assert torch.equal(torch.rand(3), want)
    assert torch.equal(build_engram(CONFIG, LAYER).fusion.projection_weight, first.fusion.projection_weight)


def test_rows_can_be_left_zero():
    engram = build_engram(CONFIG, LAYER, "host", init=False)
    assert not fetched(engram).any() and engram.fusion.projection_weight.any()
    engram.table.close()


@contextmanager
def defaults(dtype=torch.float32, device="cpu"):
    """What a caller may have set for all of torch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "caller", [dict(dtype=torch.bfloat16), dict(dtype=torch.float64), dict(device="meta")], ids=str
)
@pytest.mark.parametrize("config", [CONFIG, CONFIG_V41], ids=["demo", "v41"])
@pytest.mark.parametrize("placement", ["device", "host", "hot", "file"])
def test_the_callers_defaults_change_no_bit(placement, config, caller, tmp_path):
    """From building a layer to its output, with and without gradients: compiled loops know addresses and no types."""
    plan = HashPlan.build(config, SIZE, 2)
    ids, rows, _ = make_batch(2, 11)
    every, some = np.arange(plan.layer(1).rows), np.unique(rows)[:7]
    hidden = torch.randn(2, 11, config.hc_mult, config.hidden, generator=torch.Generator().manual_seed(1))

    def outputs():
        engram = build_engram(config, plan.layer(1), "host" if placement == "host" else "device")
        if placement in ("hot", "file"):
            path = tmp_path / "rows.safetensors"
            save_rows(path, Rows(engram.table.format, (engram.table.stored(torch.from_numpy(every)),)))
            table = make_table("file", StoredRows.find(path))
            engram = Engram(engram.fusion, table if placement == "file" else HotTable(table, torch.from_numpy(some)))
        history = ShortConvHistory(engram.fusion, 2) if config.form == "demo" else None
        prefetcher = Prefetcher(NgramHasher(plan), {1: engram.table})
        with torch.no_grad(), prefetcher, prefetcher.start(ids) as fetch:
            return [engram(hidden, fetch[1], history).clone(), engram(hidden, rows), *engram.state_dict().values()]

    want = outputs()
    with defaults(**caller):
        got = outputs()
    assert all(map(torch.equal, want, got)) and len(want) == len(got)


@pytest.mark.parametrize("placement", ["file", "hot", "nowhere"])
def test_a_placement_without_rows_is_refused(placement):
    with pytest.raises(ValueError, match=rf"placement '{placement}': .* device, host, uva"):
        build_engram(CONFIG, LAYER, placement)


def test_a_plan_of_another_configuration_is_refused():
    for other in (CONFIG.replace(layer_ids=(2,)), CONFIG.replace(heads=3)):
        with pytest.raises(ValueError, match="build the plan from the same configuration"):
            build_engram(other, LAYER)


def test_memory_is_given_back_when_filling_fails(monkeypatch):
    closed = []
    right = HostMemory.close
    monkeypatch.setattr(HostMemory, "close", lambda self: (closed.append(self.nbytes), right(self)))
    monkeypatch.setattr(layer_module, "fill_normal", lambda values, seed: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_engram(CONFIG, LAYER)
    assert closed == [LAYER.rows * 16]


# --- the form v41 ---------------------------------------------------------------------------------


def scaled_rows(count=LAYER.rows):
    """Rows whose blocks have scales of all sizes."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.exp2(torch.randint(-8, 4, (count, 1), generator=generator))
    return Rows.from_packed(
        RowFormat.of(CONFIG_V41).encode((torch.randn(count, 32, generator=generator) * sizes).bfloat16())
    )


def make_v41(table=None):
    fusion = V41Fusion(CONFIG_V41, dtype=torch.bfloat16)
    fusion.reset_parameters(torch.Generator().manual_seed(0))
    return Engram(fusion, table or DeviceTable(scaled_rows()))


def make_masked_batch(batch, length):
    """Compressed ids with dead positions, their row numbers, a bfloat16 stream, and where it is dead."""
    ids, _, _ = make_batch(batch, length)
    dead = np.random.default_rng(9).random((batch, length)) < 0.3
    ids[dead] = DEAD
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, length, 2, 32, generator=generator).bfloat16()
    return ids, NgramHasher(PLAN)(ids, 1), hidden, torch.from_numpy(dead)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_the_recorded_v41_layer_from_row_numbers_on(placement, packed):
    recorded = load_file(GOLDEN_V41)
    codes = recorded["row_codes_e4m3"].view(torch.float8_e4m3fn)
    stored = Rows.from_split(codes, recorded["row_scales_e8m0"].view(torch.float8_e8m0fnu))
    config = CONFIG_V41.replace(
        max_ngram=4, heads=4, row_width=64, table_size_per_order=(50, 50, 50), hidden=80, hc_mult=4
    )
    fusion = V41Fusion(config, dtype=torch.float64)
    names = {"wkv.weight": "wkv_weight", "q_weight": "q_weight", "k_weight": "k_weight"}
    fusion.load_state_dict({ours: recorded[theirs] for ours, theirs in names.items()})
    hidden, rows, dead = recorded["hidden"].double()[None], recorded["rows"][None], recorded["dead"].bool()[None]
    with make_table(placement, stored, packed=packed) as table:
        after = Engram(fusion, table)(hidden, rows, dead=dead)
        wrong = Engram(fusion, table)(hidden, (rows + 1) % 64, dead=dead)
    assert (after[0] - recorded["output_f64"]).abs().max() < 1e-11  # as in test_fusion_v41
    assert (wrong[0] - recorded["output_f64"]).abs().max() > 1e-11


def test_a_prefetched_layer_passes_dead_positions_through():
    ids, rows, hidden, dead = make_masked_batch(3, 9)
    engram = make_v41()
    with Prefetcher(NgramHasher(PLAN), {1: engram.table}) as prefetcher, prefetcher.start(ids) as fetch:
        after = engram(hidden, fetch[1], dead=dead)
    assert torch.equal(after, engram(hidden, rows, dead=dead.numpy()))
    assert torch.equal(as_bytes(after[dead]), as_bytes(hidden[dead]))
    assert (after[~dead] != hidden[~dead]).any()
    assert (engram(hidden, rows)[dead] != hidden[dead]).any()


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_new_v41_layer_has_normal_rows_in_fp8(placement, monkeypatch):
    """The rows that a plain table would have, quantised; drawn in pieces."""
    monkeypatch.setattr(layer_module, "_ENCODED", 1 << 13)  # of 32 values: one chunk of numbers
    config = CONFIG_V41.replace(table_size_per_order=(5000, 5000))
    plan = HashPlan.build(config, SIZE, 2).layer(1)
    engram = build_engram(config, plan, placement, dtype=torch.bfloat16, seed=3)
    assert plan.rows > 2 << 13 and engram.table.format == RowFormat(torch.bfloat16, 32, scaled=True)
    assert engram.table.placement == placement and isinstance(engram.fusion, V41Fusion)
    want = torch.empty(plan.rows, 32, dtype=torch.bfloat16)
    fill_normal(want, 3)
    assert torch.equal(fetched(engram), engram.table.format.decode(engram.table.format.encode(want)))
    assert sum(engram.table.bytes_held().values()) == plan.rows * 33
    engram.table.close()
    empty = build_engram(config, plan, placement, init=False)
    assert not fetched(empty).any()
    empty.table.close()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "hidden", "message"),
    [
        ((2, 5, 3), (2, 5, 2, 16), r"row numbers of shape \(2, 5, 3\); hidden needs \(2, 5, 4\)"),
        ((2, 4, 4), (2, 5, 2, 16), r"hidden needs \(2, 5, 4\)"),
        ((40,), (2, 5, 2, 16), r"hidden needs \(2, 5, 4\)"),
        ((2, 5, 4), (2, 5, 16), r"hidden of shape \(2, 5, 16\); this layer needs \[B, T, 2, 16\]"),
        ((2, 5, 4), (5, 16), r"this layer needs \[B, T, 2, 16\]"),
        ((2, 5, 4), (2, 5, 2, 17), r"this layer needs \[B, T, 2, 16\]"),
    ],
)
def test_wrong_shapes_are_refused(engram, rows, hidden, message):
    with pytest.raises(ValueError, match=message):
        engram(torch.zeros(hidden, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(39, 4), (41, 4), (40, 5), (2, 5, 16)])
def test_a_fetch_of_something_else_is_refused(engram, shape):
    with pytest.raises(ValueError, match=r"hidden needs the rows of \(2, 5, 4\) and 4 values each"):
        engram(torch.zeros(2, 5, 2, 16, dtype=torch.float64), Ready(torch.zeros(shape, dtype=torch.float64)))


def test_rows_of_another_width_are_refused(engram):
    with pytest.raises(ValueError, match="rows of 5 values; this layer needs 4"):
        Engram(engram.fusion, DeviceTable(torch.zeros(10, 5)))
    with pytest.raises(ValueError, match="rows of 64 values; this layer needs 32"):
        make_v41(DeviceTable(Rows.from_packed(torch.zeros(10, 66, dtype=torch.uint8))))


def test_programs_that_would_keep_the_rows_of_an_example_are_refused(engram):
    hidden, rows = torch.zeros(2, 5, 2, 16, dtype=torch.float64), torch.zeros(2, 5, 4, dtype=torch.int64)
    recorders = (torch.jit.trace, torch.export.export, lambda layer, given: make_fx(layer)(*given))
    with torch.no_grad():
        for record in recorders:
            with pytest.raises(ValueError, match=r"would keep the rows of this example: use torch\.compile"):
                record(engram, (hidden, rows))
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="would keep the rows"):
            engram(hidden, rows)
        assert engram(hidden, rows).shape == hidden.shape
        # Shapes of what has no values anyway may be asked for.
        nothing = Engram(DemoFusion(CONFIG, "meta"), DeviceTable(torch.empty(LAYER.rows, 4, device="meta")))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert nothing(hidden.float().to("meta"), rows.to("meta")).shape == hidden.shape
