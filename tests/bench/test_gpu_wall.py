"""The hardware benchmark end to end where there is no GPU: what it measures, what it refuses, what it leaves behind."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_wall
from bench.instruments import bandwidth
from bench.schemas.common import PLACEMENTS
from bench.schemas.wall import Results
from bench.setup import sizes
from bench.setup.variants import TableSet, Variant
from bench.wall import components
from bench.wall import figures as wall_figures
from bench.wall import options as wall_options
from bench.wall import record as wall_record
from bench.wall import run as wall_run
from bench.wall.numbers import bytes_agree, hidden_share, rows_agree, run_of
from bench.wall.table import wall_table
from engram_ref.config import EngramConfig
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.hashing import HashPlan
from engram_ref.tables.file import FileTable
from tests.bench.setup.test_backbones import TINY
from tests.schemas import validator

ROOT = Path(__file__).parents[2]
SCHEMA = validator(Results)
SMALL = ["--device", "cpu", "--dtype", "float32", "--table_params", "3e5", "--preset", "tiny", "--backbone", "none"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kept_maps")]


V41 = ["--device", "cpu", "--dtype", "float32", "--table_params", "3e5", "--preset", "v41-flash", "--cases", "none"]
V41 += ["--no_trace"]  # half a second each


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    words = ["river", "stone", "Lantern", "north", "of", "the", "seventh", "bridge", "sleeps", "until", "rain"]
    path.write_text(" ".join(words[i * i % 11] + words[i * 7 % 11][: i % 5] for i in range(6000)), encoding="utf-8")
    return path


def run_main(monkeypatch, *arguments, figures=False):
    monkeypatch.setattr(sys, "argv", ["gpu_wall", *map(str, arguments)])
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(components, "_SQUARE", 512)
    if not figures:
        monkeypatch.setattr(wall_figures, "draw_all", lambda results, out: [])
    gpu_wall.main()


@pytest.fixture(scope="module")
def results(text, tmp_path_factory):
    """One small run: every CPU variant, both phases, the two component cases that a CPU can run."""
    out = tmp_path_factory.mktemp("wall")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wall_run, "FIO_SECONDS", 0.2)
        preset = EngramConfig.preset
        small = {"table_size_per_order": (1000, 1000)}  # of the component cases, else 2.6 GB
        patch.setattr(EngramConfig, "preset", lambda name: preset(name).replace(**(small if name == "demo" else {})))
        shapes = ["--steps", "prefill:2x40", "decode:3", "--rounds", 4, "--warmup", 1, "--text", text]
        parts = ["--batch_size", 1, "--seq_len", 16, "--iterations", 2]
        run_main(patch, *SMALL, *shapes, *parts, "--out", out, "--profile", out / "trace.json", figures=True)
    return out, json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_the_results_fit_the_schema(results):
    SCHEMA.validate(results[1])


def test_every_variant_of_a_cpu_is_measured_in_every_step(results):
    _, found = results
    assert [step["shape"]["phase"] for step in found["steps"]] == ["prefill", "decode"]
    disk = [
        ("offload_disk", schedule, cache) for cache in ("cold", "warm") for schedule in ("synchronous", "prefetched")
    ]
    for step in found["steps"]:
        names = [(run["variant"], run["schedule"], run["page_cache"]) for run in step["runs"]]
        assert names == [("resident", "in place", None)] * 2 + disk
        assert all(len(run["step_s"]) == len(run["exposed_s"]) == 4 for run in step["runs"])
        assert all(0 < exposed < step for run in step["runs"] for exposed, step in zip(run["exposed_s"], run["step_s"]))


def test_bytes_read_are_bytes_predicted(results):
    for step in results[1]["steps"]:
        assert rows_agree(step)
        for run in step["runs"]:
            if run["variant"] == "offload_disk":
                assert bytes_agree(run) and run["bytes"]["copied"] == run["bytes"]["from_ids"]
            assert run["freed"] == step["table"]["bytes"] - run["held"]["device"] and run["pcie"] is None


def test_fresh_ids_every_step(results):
    for run in results[1]["steps"][0]["runs"]:
        assert len(set(run["bytes"]["from_ids"])) > 1


def test_a_cpu_time_is_never_a_gpu_time(results):
    _, found = results
    assert found["device"] == "cpu" and found["environment"]["accelerator"] is None
    assert {step["device"] for step in found["steps"]} == {part["device"] for part in found["components"]} == {"cpu"}
    skipped = {entry["case"]: entry["why"] for entry in found["components_skipped"]}
    assert sorted(skipped) == ["full", "up_embed", "up_kv"] and set(skipped.values()) == {
        "there is no CUDA device to upload to"
    }


def test_the_component_cases_count_their_work(results):
    parts = {part["case"]: part for part in results[1]["components"]}
    assert sorted(parts) == ["compute", "hash"]
    assert parts["hash"]["bytes"] == 16 * 16 * 64 * 4  # tokens, columns, values, bytes
    assert parts["compute"]["flops"] == 2 * 16 * 1024 * 5 * 1024


def test_figures_traces_and_nothing_else_are_left(results):
    out, found = results
    names = {path.name for path in out.iterdir()}
    traces = {name for name in names if name.startswith("trace-")}
    assert names - traces == {"results.json", "timeline.svg", "overhead.svg", "bandwidth.svg"}
    assert {f"trace-{phase}-offload_disk-prefetched-cold.json" for phase in ("prefill", "decode")} <= traces
    assert "engram_step" in (out / "trace-prefill-resident.json").read_text(encoding="utf-8")
    lanes = {tuple(span[:2]) for run in found["steps"][0]["runs"] for span in run["spans"]}
    assert {("hash", "background"), ("gather", "background"), ("compute", "main"), ("wait", "main")} <= lanes


def test_a_slow_disk_is_hidden_behind_compute(tmp_path, text, monkeypatch):
    """A backbone that takes longer than the fetch: what is exposed is a small share of the synchronous wait."""
    import time

    real_backbone = wall_run.build_backbone

    def slow(*given):
        backbone = real_backbone(*given)
        backbone.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.05))
        return backbone

    real = FileTable.start
    monkeypatch.setattr(FileTable, "start", lambda table, rows, out=None: (time.sleep(0.02), real(table, rows, out))[1])
    monkeypatch.setattr(wall_run, "build_backbone", slow)
    only = ["--variants", "offload_disk", "--page_cache", "cold", "--steps", "prefill:1x8", "--rounds", 3]
    run_main(monkeypatch, *SMALL, *only, "--cases", "none", "--text", text, "--out", tmp_path)
    step = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["steps"][0]
    assert hidden_share(step, run_of(step, "offload_disk", "prefetched")) > 0.8
    assert min(run_of(step, "offload_disk", "synchronous")["exposed_s"]) >= 0.02


def test_every_variant_is_measured_where_it_can_run(tmp_path, text, monkeypatch):
    """All variants on a CPU, the in-place one in Triton's interpreter: what a GPU adds is streams and their clocks."""
    monkeypatch.setattr(wall_options, "ON_CPU", PLACEMENTS)
    shapes = [
        "--steps",
        "prefill:1x5",
        "decode:2",
        "--rounds",
        2,
        "--cases",
        "none",
        "--page_cache",
        "warm",
        "--no_trace",
    ]
    run_main(monkeypatch, *SMALL, *shapes, "--text", text, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    SCHEMA.validate(results)
    for step in results["steps"]:
        assert {run["variant"] for run in step["runs"]} == set(PLACEMENTS) and rows_agree(step)
        hot = run_of(step, "offload_hot")["hot"]
        assert hot["hot_rows"] == step["table"]["rows"] // 10 and hot["hit_rate"] > 0.1


@pytest.mark.parametrize("layout", ["packed", "split"])
def test_every_variant_of_v41_flash_is_measured(layout, tmp_path, text, monkeypatch):
    """Four orders, 24 columns, fp8 rows both ways, form v41 around a small backbone: equal bits from all variants."""
    monkeypatch.setattr(wall_options, "ON_CPU", PLACEMENTS)
    fused = []
    real = V41Fusion.forward
    monkeypatch.setattr(V41Fusion, "forward", lambda self, e, *given: (fused.append(e), real(self, e, *given))[1])
    backbone = tmp_path / "config.json"
    backbone.write_text(json.dumps(TINY))
    shapes = ["--steps", "prefill:1x5", "decode:2", "--context", 4, "--rounds", 2, "--page_cache", "cold"]
    out = tmp_path / "out"
    run_main(monkeypatch, *V41, "--rows", layout, "--backbone", backbone, *shapes, "--text", text, "--out", out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    SCHEMA.validate(results)
    assert {tuple(e.shape[1:]) for e in fused} == {(5, 24 * 256), (1, 24 * 256)}
    assert all(e.dtype == torch.float32 for e in fused)
    assert [step["prediction"]["rows"] for step in results["steps"]] == [5 * 24, 2 * 24]
    assert results["configuration"]["rows"] == layout
    for step in results["steps"]:
        assert {run["variant"] for run in step["runs"]} == {"no_engram", *PLACEMENTS} and rows_agree(step)
        table = step["table"]
        assert (table["row_bytes"], table["columns"], table["published_rows"]) == (264, 24, 384_006_168)
        assert table["bytes"] == 264 * table["rows"] and table["layout"] == layout
        stored = {"preset": "v41-flash", "row_dtype": "float8_e4m3fn", "layout": layout}
        assert all(run["table"] == {**stored, "share": table["rows"] / 384_006_168} for run in step["runs"])
        disk = run_of(step, "offload_disk", "synchronous")
        assert bytes_agree(disk) and all(count % 264 == 0 for count in disk["bytes"]["from_ids"])
        assert step["prediction"]["bytes_requested"] == 264 * step["prediction"]["rows"]
        assert run_of(step, "resident")["held"]["device"] == table["bytes"]


def test_one_wrong_scale_is_seen(tmp_path):
    """What `check` compares is decoded: the smallest change of a stored row must still be refused."""
    config = sizes.table_config("v41-flash", 3e5, 64, "bfloat16")
    plan = HashPlan.build(config, 1000, 0)
    ids = torch.arange(10).view(1, 10).numpy()
    with TableSet(config, plan, ["resident"], torch.device("cpu"), tmp_path, 0, None, ["cold"], packed=False) as tables:
        assert tables.check(ids)
        codes, scales = tables.in_host.parts
        codes[:, 255] ^= 1
        with pytest.raises(ValueError, match="resident returned other rows than were written"):
            tables.check(ids)
        codes[:, 255] ^= 1
        scales[:, 7] ^= 1
        with pytest.raises(ValueError, match="returned other rows than were written"):
            tables.check(ids)


@pytest.mark.parametrize("layout", ["packed", "split"])
def test_a_table_is_moved_to_a_device_with_its_parts(layout, tmp_path, monkeypatch):
    """The copy in pieces knows nothing of the parts, which need not begin where a piece does."""
    from bench.setup import variants

    monkeypatch.setattr(variants, "_PIECE", 1000)
    config = sizes.table_config("v41-flash", 3e5, 64, "bfloat16")
    plan = HashPlan.build(config, 1000, 0)
    packed = layout == "packed"
    with TableSet(config, plan, [], torch.device("cpu"), tmp_path, 0, None, [], packed=packed) as tables:
        moved = tables._laid_out(variants._to_device(tables.memory.bytes, torch.device("cpu")))
        assert len(moved.parts) == (1 if packed else 2) and tables.layout == layout
        assert all(torch.equal(a, b) for a, b in zip(moved.parts, tables.in_host.parts))
        assert moved.parts[0].data_ptr() != tables.in_host.parts[0].data_ptr()


REFUSED = {
    "--rows split": "--rows split: the rows of tiny have no scales to lay beside or apart; leave --rows out, or take",
    "--rows loose": "argument --rows: invalid choice: 'loose'",
    "--variants offload_uva": "--variants offload_uva: this machine can serve resident, offload_disk, or none",
    "--variants resident --table_params 5e10": "GiB do not fit into host memory, of which",
    "--variants offload_disk --table_params 5e10": "GiB do not fit onto the disk of",
    "--table_params 1": "'1' must be max or a number of parameters from 1e5 to 1e12",
    "--steps prefill:4096": "'prefill:4096' must be prefill:BATCHxTOKENS or decode:BATCH",
    "--backbone gpt-9": "no backbone 'gpt-9': use one of none, qwen3-4b, qwen3-8b, tiny, or the path of a config.json",
    "--blocks 1": "'1' must be an integer of at least 2",
    "--text /nowhere.txt": "No such file or directory: '/nowhere.txt'",
    "--steps prefill:1x400000": "take a longer text or a smaller batch",
    "--out /proc/nothing": "/proc/nothing",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_one_line(arguments, tmp_path, text, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *SMALL, "--cases", "none", "--text", text, "--out", tmp_path, *arguments.split())
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("gpu_wall: error: ") and REFUSED[arguments] in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--device", "cuda", "--out", tmp_path)
    assert "torch sees no CUDA device on this machine; use --device cpu" in capsys.readouterr().err


def test_decode_steps_are_not_launched_one_by_one_on_cuda(monkeypatch, capsys):
    """They would measure Python; a CPU, where nothing is launched, goes on as before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_wall"])
    assert {shape.phase for shape in gpu_wall.parse_arguments().steps} == {"prefill"}
    arguments = ["gpu_wall", "--device", "cuda", "--steps", "prefill:1x8", "decode:64"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        gpu_wall.parse_arguments()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "--steps decode:64: on CUDA" in error and "--end-to-end --batches 64" in error
    monkeypatch.setattr(sys, "argv", [*arguments[:2], "cpu", *arguments[3:]])
    assert [shape.phase for shape in gpu_wall.parse_arguments().steps] == ["prefill", "decode"]


def test_wrong_rows_are_never_timed(tmp_path, text, monkeypatch, capsys):
    real = FileTable.start

    def damaged(table, rows, out=None):
        pending = real(table, rows, out)
        pending.wait().view(torch.uint8)[-1, -1] ^= 1
        return pending

    monkeypatch.setattr(FileTable, "start", damaged)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *SMALL, "--steps", "prefill:1x8", "--cases", "none", "--text", text, "--out", tmp_path)
    assert "returned other rows than were written: nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk():
    """No file of this process can grow beyond 40 kB; the kernel's signal for that is ignored by Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("variant", ["resident", "offload_disk"])
def test_a_full_disk_leaves_nothing_behind(variant, tmp_path, text, monkeypatch, capsys, full_disk):
    """Neither the results (many samples of a resident table) nor a table's file fit; an older file stays."""
    (tmp_path / "results.json").write_text("older")
    arguments = ["--cases", "none", "--variants", variant, "--steps", "prefill:1x8", "--rounds", 800]
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *SMALL, *arguments, "--text", text, "--out", tmp_path)
    assert stopped.value.code == 2
    assert "File too large" in capsys.readouterr().err.strip().splitlines()[-1]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("results.json", "older")]


@pytest.mark.parametrize(("text", "shape"), [("prefill:2x7", ("prefill", 2, 7)), ("decode:64", ("decode", 64, 1))])
def test_shapes(text, shape):
    found = wall_options.step_shape(text)
    assert (found.phase, found.batch, found.tokens) == shape


@pytest.mark.parametrize("params", [1e6, 5.37e8, 1e11])
def test_a_table_has_about_the_parameters_that_were_asked_for(params):
    config = sizes.table_config("paper-27b", params, 2560, "bfloat16")
    assert config.hidden == 2560 and config.hc_mult == 1 and config.layer_ids == (1,)
    rows = sum(size * config.heads for size in config.table_size_per_order)
    assert rows * config.row_width == pytest.approx(params, rel=0.001)


def test_v41_flash_keeps_its_geometry_and_its_rows():
    config = sizes.table_config("v41-flash", 1e9, 2560, "float32")
    published = EngramConfig.preset("v41-flash")
    kept = ("max_ngram", "heads", "row_width", "kernel_size", "pad_id", "seed", "row_dtype", "form", "columns")
    assert all(getattr(config, name) == getattr(published, name) for name in kept)
    assert (config.hidden, config.hc_mult, config.layer_ids) == (2560, 1, (1,))
    assert sum(size * config.heads for size in config.table_size_per_order) * 256 == pytest.approx(1e9, rel=0.001)


def test_max_counts_the_bytes_that_are_stored(monkeypatch):
    monkeypatch.setattr(sizes, "free_host_bytes", lambda: 264 * 10**6)
    assert sizes.largest("v41-flash", "float32") == 0.85 * 256 * 10**6
    assert sizes.largest("paper-27b", "float32") == 0.85 * 66 * 10**6
    assert sizes.largest("paper-27b", "bfloat16") == 0.85 * 132 * 10**6


def test_how_rows_lie():
    assert [wall_options.row_layout("v41-flash", wanted) for wanted in (None, "packed", "split")] == [
        "packed",
        "packed",
        "split",
    ]
    assert wall_options.row_layout("paper-27b", None) == "plain"


def test_a_table_with_too_many_rows_is_refused_in_terms_of_the_option():
    largest = sizes.MOST_ROWS * 16 * 4
    sizes.table_config("tiny", largest, 64, "float32")
    with pytest.raises(ValueError, match=r"--table_params 1e\+12: a table of preset tiny has at most 1\.37e\+11"):
        sizes.table_config("tiny", 1e12, 64, "float32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--energy"], "--energy does nothing without CUDA"),
        (["--end-to-end", "--eager"], "--eager does nothing without CUDA"),
        (["--end-to-end", "--steps", "decode:1"], "--steps does nothing with --end-to-end"),
        (["--end-to-end", "--cases", "hash", "--seq_len", "8"], "--cases, --seq_len do nothing with --end-to-end"),
        (["--end-to-end", "--variants", "resident", "--buses", "1"], "--buses does nothing without throttled"),
        (["--batches", "3"], "--batches does nothing without --end-to-end"),
        (["--cases", "up_kv"], "--cases up_kv: there is no CUDA device to upload to"),
        (["--cases", "hash", "none"], "none stands alone"),
        (["--cases", "none", "--iterations", "3"], "--iterations does nothing with --cases none"),
        (["--variants", "none", "--rounds", "3"], "--rounds does nothing with --variants none"),
        (["--variants", "resident", "--page_cache", "cold"], "--page_cache does nothing without offload_disk"),
        (["--steps", "prefill:1x8", "--context", "3"], "--context does nothing without a decode step"),
        (["--backbone", "none", "--blocks", "4"], "--blocks does nothing with --backbone none"),
        (["--no_trace", "--profile", "a.json"], "--profile does nothing with --no_trace"),
        (["--stream", "uniform", "--text", "a.txt"], "--text does nothing with --stream uniform"),
    ],
)
def test_what_would_do_nothing_is_refused(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["gpu_wall", "--device", "cpu", "--out", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as ended:
        gpu_wall.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


TWO_SHAPES = ["--steps", "prefill:1x5", "decode:2", "--variants", "resident", "--rounds", 2, "--cases", "none"]
UNTRACED = [*TWO_SHAPES, "--no_trace"]


def steps_of(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["steps"]


def test_a_cut_keeps_finished_shapes_and_the_next_run_goes_on(tmp_path, text, monkeypatch):
    real = wall_run.steps.measure
    cuts = [KeyboardInterrupt(), SystemExit(143), RuntimeError("CUDA error")]

    def measure(stepper, *given):
        if stepper.shape.phase == "decode":
            raise cuts[0]
        return real(stepper, *given)

    monkeypatch.setattr(wall_run.steps, "measure", measure)
    kept = []
    while cuts:
        with pytest.raises(type(cuts[0])):
            run_main(monkeypatch, *SMALL, *UNTRACED, "--text", text, "--out", tmp_path)
        assert [step["shape"]["phase"] for step in steps_of(tmp_path)] == ["prefill"]
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
        assert not kept or steps_of(tmp_path) == kept
        kept = steps_of(tmp_path)
        cuts.pop(0)
    measured = []
    monkeypatch.setattr(
        wall_run.steps, "measure", lambda s, *given: (measured.append(s.shape.phase), real(s, *given))[1]
    )
    run_main(monkeypatch, *SMALL, *UNTRACED, "--text", text, "--out", tmp_path)
    found = steps_of(tmp_path)
    assert measured == ["decode"] and [step["shape"]["phase"] for step in found] == ["prefill", "decode"]
    assert [run["step_s"] for run in found[0]["runs"]] == [run["step_s"] for run in kept[0]["runs"]]
    SCHEMA.validate(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    run_main(monkeypatch, *SMALL, *UNTRACED, "--text", text, "--out", tmp_path)
    assert measured == ["decode"] and steps_of(tmp_path) == found
    run_main(monkeypatch, *SMALL, *UNTRACED, "--text", text, "--out", tmp_path, "--fresh")
    assert measured == ["decode", "prefill", "decode"]


def test_a_cut_within_a_shape_keeps_its_whole_rounds(tmp_path, text, monkeypatch):
    """What was left is what comes back, bit for bit; rounds that follow have other ids than any before."""
    monkeypatch.setattr(wall_record, "SAVED_EVERY", 0)
    real, passes, kept, cut = wall_run.steps.Stepper.run, [], [], 7  # of 4 variants a round: within the second
    options = ["--steps", "prefill:1x5", "--variants", "resident", "offload_disk", "--page_cache", "cold"]
    options += ["--rounds", 3, "--warmup", 1, "--cases", "none", "--no_trace", "--text", text, "--out", tmp_path]

    def run(stepper, variant, samples):
        if samples is not None:
            passes.append(variant.label)
            if len(passes) == cut:
                raise KeyboardInterrupt
        return real(stepper, variant, samples)

    monkeypatch.setattr(wall_run.steps.Stepper, "run", run)
    for rounds in (1, 2, 3):
        passes.clear()
        if rounds < 3:
            with pytest.raises(KeyboardInterrupt):
                run_main(monkeypatch, *SMALL, *options)
        else:
            run_main(monkeypatch, *SMALL, *options)
        found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        SCHEMA.validate(found)
        (step,) = found["steps"]
        assert step["finished"] == (rounds == 3) and step["process_of_round"] == list(range(rounds))
        assert ("cut after round" in wall_table(found)) == (rounds < 3)
        samples = [(run["step_s"], *run["bytes"].values()) for run in step["runs"]]
        for before, now in zip(kept, samples):
            assert all(new[: len(old)] == old for old, new in zip(before, now) if isinstance(old, list))
        assert {len(run["step_s"]) for run in step["runs"]} == {rounds}
        kept = samples
    assert [process["kept"] for process in found["processes"]] == [0, 4, 8]
    assert len(passes) == 4, "one round was missing"


def test_a_continued_step_does_not_see_ids_again():
    """A round has the ids that it would have had in one go."""

    def drawn(left):
        ids, seen = iter(range(100)), []
        stepper = SimpleNamespace(shape="", next_ids=lambda: next(ids))
        stepper.run = lambda variant, samples: seen.append((samples is not None, next(ids)))
        variants = [Variant(name, "in place") for name in "ab"]
        samples = {v.label: wall_run.steps.Samples(step_s=[1.0] * left) for v in variants}
        wall_run.steps.measure(stepper, variants, samples, 3, 1, lambda said: None, lambda: None)
        return [number for kept, number in seen if kept]

    assert len(drawn(0)) == 6 and drawn(2) == drawn(0)[4:] and drawn(3) == []


def test_another_configuration_is_not_continued(tmp_path, text, monkeypatch, capsys):
    run_main(monkeypatch, *SMALL, *UNTRACED, "--text", text, "--out", tmp_path)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *SMALL, *UNTRACED, "--text", text, "--out", tmp_path, "--rounds", 3)
    assert "holds rows with another option rounds (2, now 3)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("Kineto"), ValueError("no event"), StopIteration(), KeyError("x")])
def test_a_profiler_that_fails_costs_no_shape(error, tmp_path, text, monkeypatch, capsys):
    """Traces come last: when the first fails, all shapes are on disk, and the others are tried."""
    on_disk = []

    def trace_step(*given):
        on_disk.append(len(steps_of(tmp_path)))
        raise error

    monkeypatch.setattr(wall_run, "trace_step", trace_step)
    run_main(monkeypatch, *SMALL, *TWO_SHAPES, "--text", text, "--out", tmp_path)
    assert on_disk == [2, 2, 2, 2] and len(steps_of(tmp_path)) == 2
    assert f"warning: no trace of resident, prefill 1 x 5: {type(error).__name__}" in capsys.readouterr().err


def test_sigterm_gives_everything_back(tmp_path):
    """Code 143, and what stands in `finally` has run."""
    program = (
        "import os, signal; from engram_ref import cli\n"
        "def main():\n    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n        print('given back')\n"
        "cli.run(main, 'x')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "given back\n")


def test_host_memory_that_the_machine_grows_into(monkeypatch):
    from engram_ref.rows.memory import free_host_bytes, require_host_bytes

    monkeypatch.setenv("ENGRAM_HOST_GIB", "4000")
    assert free_host_bytes() == 4000 << 30
    require_host_bytes(3000 << 30)
    with pytest.raises(ValueError, match=r"5000.00 GiB do not .* 4000.00 GiB are free \(MemTotal [\d.]+ GiB; where"):
        require_host_bytes(5000 << 30)
    monkeypatch.setenv("ENGRAM_HOST_GIB", "much")
    with pytest.raises(ValueError, match="ENGRAM_HOST_GIB='much' must be a number of GiB, such as 118"):
        require_host_bytes(1)
