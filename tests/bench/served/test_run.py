"""The end-to-end benchmark on a CPU: what is served is right, every variant chooses the same tokens, runs continue."""

import json
import sys
from argparse import Namespace
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import gpu_wall
from bench.instruments import bandwidth, timing
from bench.served import memory, one_pass, rounds
from bench.served import run as end_to_end
from bench.served.model import ATTENTION, ServedModel, register_attention
from bench.served.numbers import same_tokens, step_bytes
from bench.served.one_pass import Server
from bench.served.record import Record
from bench.served.requests import TokenSource
from bench.served.variants import Choice
from bench.setup.backbones import build_backbone
from bench.setup.variants import UNSEEN, Variant
from engram_ref.attach import attach
from engram_ref.config import EngramConfig
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.layer import Engram
from engram_ref.prefetch import Prefetcher
from engram_ref.tables.device import DeviceTable
from tests.bench.served.test_numbers import SCHEMA
from tests.bench.setup.test_backbones import TINY

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
VARIANTS = ["no_engram", "own_compute", "resident", "resident again", "offload_disk synchronous"]
VARIANTS += ["offload_disk prefetched", "offload_hot 1 %", "offload_hot 10 %", "throttled 0.01 GB/s"]
VARIANTS += ["throttled 56 us"]


class Served:
    """A small model in float64 with one Engram layer, and everything to serve it with."""

    def __init__(self, vocab, slots, preset, graphs=False):
        register_attention()
        self.vocab = vocab
        width = {"tiny": 64, "v41-flash": 64}[preset]
        config = EngramConfig.preset(preset).replace(
            layer_ids=(1,), hidden=width, hc_mult=1, compressed_size=None, row_dtype="float32", row_width=4
        )
        sizes = (300,) * len(config.orders)
        self.config = config.replace(table_size_per_order=sizes)
        self.plan = HashPlan.build(self.config, len(vocab), vocab.pad(config.pad_id))
        self.decoder = build_backbone(self.backbone, None, CPU, torch.float64, 0, len(vocab.ids), ATTENTION)
        generator = torch.Generator().manual_seed(1)
        self.head = torch.randn(50, 64, dtype=torch.float64, generator=generator)
        torch.manual_seed(2)
        self.fusion = make_fusion(self.config, CPU, torch.float64).eval()
        self.table = DeviceTable(torch.randn(self.plan.layers[0].rows, 4, generator=generator))
        self.model = ServedModel(self.decoder, self.head, self.fusion, self.plan, vocab, slots, 64, graphs)
        self.server = Server(self.model, vocab, self.plan)

    backbone = ""

    @contextmanager
    def variant(self, schedule, on_device=False):
        """One variant; `on_device` hashes as a GPU does."""
        hasher = DeviceHasher(self.plan, CPU) if on_device else NgramHasher(self.plan)
        with Prefetcher(hasher, {1: self.table}, background=schedule == "prefetched") as prefetcher:
            yield Variant("resident", schedule, table=self.table, prefetcher=prefetcher)

    def serve(self, work, schedule, on_device=False):
        with self.variant(schedule, on_device) as variant:
            return self.server.serve(work, variant)


@pytest.fixture
def served(tmp_path, vocab_small):
    def make(slots, preset="tiny", graphs=False):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(TINY))
        Served.backbone = str(path)
        return Served(vocab_small, slots, preset, graphs)

    return make


def attached_choices(one, round_):
    """What the model chooses when an attached one processes each sequence alone and at once: no cache, no batch."""
    engram = Engram(one.fusion, one.table)
    choices = []
    with attach(one.decoder.model, {1: engram}, one.plan, one.vocab), torch.inference_mode():
        for tokens, length in zip(round_.tokens, round_.lengths):
            ids = torch.from_numpy(tokens[: length.prompt + length.output - 1])[None]
            hidden = one.decoder.model(input_ids=ids, use_cache=False).last_hidden_state[0, length.prompt - 1 :]
            choices.append(F.linear(hidden, one.head).argmax(-1).tolist())
    return choices


@pytest.mark.parametrize("preset", ["tiny", "v41-flash"])
@pytest.mark.parametrize("schedule", ["in place", "prefetched", "synchronous"])
def test_what_is_served_is_what_the_attached_model_says(served, schedule, preset, monkeypatch):
    """Five sequences of different lengths on two places, token by token, against each of them by itself in one shot.

    Some prompts are shorter than what the convolution looks back, and one than what the hash does.
    """
    one = served(2, preset)
    round_ = TokenSource(None, len(one.vocab.ids), 5).round(0, 5, (1, 14), (1, 5))
    right = attached_choices(one, round_)
    for on_device in (False, True):
        choices, samples = choices_of(one, round_, schedule, on_device, monkeypatch)
        assert choices == right
        assert len(samples["first_token_s"]) == 5 and len(samples["decode_s"]) == len(samples["window_s"])
        assert all(0 <= exposed <= step for exposed, step in zip(samples["decode_exposed_s"], samples["decode_s"]))


@pytest.mark.parametrize("graphs", [True, False])
def test_a_wait_that_no_clock_sees_is_null_and_not_zero(served, graphs, monkeypatch):
    one = served(2)
    monkeypatch.setattr(ServedModel, "graphs", {"used": graphs, "why": None})
    work = one.server.prepare(TokenSource(None, len(one.vocab.ids), 5).round(0, 2, (9, 9), (3, 3)), most_tokens=24)
    for schedule in ("in place", *UNSEEN):
        exposed = one.serve(work, schedule)["decode_exposed_s"]
        assert exposed is None if graphs and schedule in UNSEEN else len(exposed) == 2, schedule


def choices_of(one, round_, schedule, on_device, monkeypatch):
    """What is chosen for each sequence when all of them are served, and the samples."""
    work = one.server.prepare(round_, most_tokens=24)
    seen = []
    monkeypatch.setattr(one_pass, "_digest", lambda work, chosen: seen.append(chosen) or "0" * 64)
    samples = one.serve(work, schedule, on_device)
    choices = [[] for _ in round_.lengths]
    for step, tokens in zip(work.steps, seen[0]):
        if isinstance(step, one_pass.Prompts):
            for sequence, token in zip(step.group.sequences, tokens.tolist()):
                choices[sequence].append(token)
        else:
            for slot, sequence, _ in step.step.running:
                choices[sequence].append(int(tokens[slot]))
    return choices, samples


def test_rows_change_what_is_chosen(served):
    """Else the comparisons above would say nothing about rows."""
    one = served(2)
    round_ = TokenSource(None, len(one.vocab.ids), 5).round(0, 4, (9, 14), (3, 5))
    work = one.server.prepare(round_, most_tokens=24)
    right = one.serve(work, "in place")["tokens_sha256"]
    assert one.serve(work, "prefetched")["tokens_sha256"] == right
    one.table = DeviceTable(torch.randn(one.table.rows, 4))
    assert one.serve(work, "in place")["tokens_sha256"] != right
    assert one.server.serve(work, Variant("no_engram", "none"))["tokens_sha256"] != right


def test_rows_are_counted_from_the_ids_alone(served):
    one = served(2)
    round_ = TokenSource(None, len(one.vocab.ids), 5).round(0, 2, (9, 9), (3, 3))
    work = one.server.prepare(round_, most_tokens=24)
    requested, unique, staged = one.server.count_rows(work, one.table.format)
    on_hand = one.server.fetch(work, one.table)
    rows = [on_hand.start(None)[1].wait() for _ in work.steps]
    assert requested == sum(map(len, rows)) == (2 * 9 + 2 * 2) * one.config.columns  # a prefill, two tokens for each
    assert unique == sum(len(np.unique(values.numpy(), axis=0)) for values in rows)
    assert staged == requested * one.table.format.row_bytes


def test_rows_fetched_before_are_those_that_a_pass_looks_up(served):
    """Hashed apart from what is served, for prompts that come and go, and fetched pass after pass."""
    one = served(2)
    work = one.server.prepare(TokenSource(None, len(one.vocab.ids), 5).round(0, 5, (9, 14), (1, 5)), most_tokens=24)
    on_hand, right = one.server.fetch(work, one.table), one.serve(work, "in place")["tokens_sha256"]
    for _ in range(2):
        assert one.server.serve(work, Variant("own_compute", "none"), on_hand)["tokens_sha256"] == right


# --- the whole program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    words = ["river", "stone", "Lantern", "north", "of", "the", "seventh", "bridge", "sleeps", "until", "rain"]
    path.write_text(" ".join(words[i * i % 11] + words[i * 7 % 11][: i % 5] for i in range(3000)), encoding="utf-8")
    return path


class Program:
    """Runs the benchmark with small sizes into one folder."""

    def __init__(self, out, text, patch):
        config = out / "config.json"
        out.mkdir(exist_ok=True)
        config.write_text(json.dumps(TINY))
        patch.setattr(end_to_end, "QWEN3_VOCABULARY", 100)  # that the head can choose
        patch.setattr(bandwidth, "COPY_BYTES", 1 << 20)
        patch.setattr(timing, "FLUSHED", 1 << 16)
        self.out, self._patch = out, patch
        self._common = ["--end-to-end", "--device", "cpu", "--backbones", config, "--table_params", "3e5"]
        self._common += ["--text", text, "--prompt_tokens", 9, 12, "--output_tokens", 2, 4, "--hot_shares", 0.01, 0.1]
        self._common += ["--buses", "0.01", "inf:56", "--sequences", 3]

    def __call__(self, *options):
        arguments = ["gpu_wall", *self._common, "--out", self.out, *options]
        self._patch.setattr(sys, "argv", list(map(str, arguments)))
        gpu_wall.main()
        return self.results()

    def results(self):
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def program(text, tmp_path_factory, kept_maps):
    with pytest.MonkeyPatch.context() as patch:
        yield Program(tmp_path_factory.mktemp("end_to_end") / "run", text, patch)


OPTIONS = ["--batches", 2, "--streams", "text", "uniform", "--rounds", 3]


@pytest.fixture(scope="module")
def results(program):
    """A run that is cut inside a round, and continued."""
    real, served = one_pass.Server.serve, []

    def serve(server, *arguments):
        served.append(1)
        if len(served) == 44:  # of a case's warm-up and rounds of eleven passes each, of which the first is not kept
            raise KeyboardInterrupt
        return real(server, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.Server, "serve", serve)
        with pytest.raises(KeyboardInterrupt):
            program(*OPTIONS)
    return program(*OPTIONS)


def test_the_results_fit_the_schema(results):
    SCHEMA.validate(results)


def test_every_row_is_there_in_order_and_says_that_it_is_a_cpus(results):
    assert [case["stream"]["name"] for case in results["cases"]] == ["tale.txt", "uniform"]
    for case in results["cases"]:
        assert [row["label"] for row in case["rows"]] == case["labels"] == VARIANTS
        assert case["weights"] == "random" and case["device"] == "cpu"
        for row in case["rows"]:
            assert row["device"] == "cpu" and row["device_label"].startswith("CPU ")
            assert row["graphs"]["used"] is False and row["energy"]["value"] is None and row["energy"]["why"]
            assert row["weights"]["value"] is None and "a CPU" in row["weights"]["why"]
            freed = None if row["label"] in VARIANTS[:2] else case["table"]["bytes"] - row["held"]["device"]
            assert row["freed"]["value"] == freed and (freed is not None or row["freed"]["why"])
            assert {sample["board"]["why"] for sample in row["rounds"]} == {"device cpu has no NVIDIA driver"}


def test_every_variant_chose_the_same_tokens_from_the_same_rounds(results):
    for case in results["cases"]:
        assert same_tokens(case)
        chosen = {sample["tokens_sha256"] for row in case["rows"] for sample in row["rounds"]}
        assert len(chosen) == 6  # of three rounds, with Engram and without


def test_a_run_that_was_cut_goes_on_where_it_was(results):
    first, second = results["processes"]
    assert first["kept"] == 0 and second == {"started": second["started"], "kept": 20, "dropped": 9}
    for number, case in enumerate(results["cases"]):
        for row in case["rows"]:
            assert [sample["round"] for sample in row["rounds"]] == [0, 1, 2]
            assert [sample["process"] for sample in row["rounds"]] == ([0, 0, 1] if number == 0 else [1, 1, 1])
        assert [entry["round"] for entry in case["rounds"]] == [0, 1, 2]


def test_figures_and_nothing_else_are_left(results, program):
    names = {path.name for path in program.out.iterdir()}
    assert names == {"config.json", "results.json", "baselines.svg", "overhead_parts.svg", "slower_bus.svg"}


def test_the_same_again_measures_nothing(results, program, monkeypatch):
    """Not even a table is built: one of 96 GiB takes longer than its rounds."""
    monkeypatch.setattr(rounds.Server, "serve", None)
    monkeypatch.setattr(end_to_end, "Contenders", None)
    monkeypatch.setattr(end_to_end, "draw_all", lambda results, out: [])
    monkeypatch.setattr(end_to_end, "report", lambda results: "")
    again = program(*OPTIONS)
    assert again["cases"] == results["cases"] and again["processes"][-1]["kept"] == 2 * 10 * 3
    assert not list(program.out.glob("*.svg"))  # those of the results before, and nothing was drawn


def test_bytes_are_counted_from_ids_and_by_what_was_read(results):
    for case in results["cases"]:
        for name in VARIANTS[4:6]:
            row = next(row for row in case["rows"] if row["label"] == name)
            assert row["held"]["disk"] == case["table"]["bytes"] and row["page_cache"] in ("passed by", "used")
            assert all(sample["copied"] >= 16 for sample in row["rounds"])
        hot = [row for row in case["rows"] if row["hot_share"]]
        for entry, *samples in zip(case["rounds"], *(row["rounds"] for row in hot)):
            assert {sample["lookups"] for sample in samples} == {entry["rows_requested"]}
            assert samples[0]["hits"] <= samples[1]["hits"]
        assert step_bytes(case) == case["batch"] * 16 * 16


def test_another_configuration_is_refused_in_one_line(results, program, capsys):
    with pytest.raises(SystemExit) as ended:
        program(*OPTIONS, "--seed", 1)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "option seed (0, now 1)" in error and "--fresh" in error
    assert program.results()["cases"] == results["cases"]


def test_what_memory_does_not_hold_is_refused_before_anything_is_built(program, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(end_to_end, "Contenders", None)
    monkeypatch.setattr(end_to_end, "build_backbone", None)
    with pytest.raises(SystemExit):
        program(*OPTIONS, "--fresh")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "GiB of host memory are needed (weights" in error and "GiB are free" in error


@pytest.mark.parametrize("fit", [True, False])
def test_a_resident_table_that_does_not_fit_is_left_out_only_if_wanted(fit, capsys):
    run = object.__new__(end_to_end.EndToEnd)
    run.options, run.choice = Namespace(fit=fit), Choice(("no_engram", "resident", "offload_naive"))

    def planned():
        if "resident" in run.choice.names:
            raise ValueError("12 GiB are needed, 10 GiB are free")
        return ["a case"]

    run._planned = planned
    if not fit:
        with pytest.raises(ValueError, match="12 GiB are needed"):
            run._fitting()
        return
    assert run._fitting() == ["a case"] and run.choice.names == ("no_engram", "offload_naive")
    assert capsys.readouterr().out == "resident is left out: 12 GiB are needed, 10 GiB are free\n"


def test_a_file_that_the_disk_does_not_hold_is_left_out_by_itself(capsys, monkeypatch):
    run = object.__new__(end_to_end.EndToEnd)
    run.options, run.choice = Namespace(fit=True, out=None), Choice(("resident", "offload_disk"))
    run.plan, run.config = Namespace(layers=[Namespace(rows=10)]), Namespace(row_bytes=lambda: 264)
    run._planned = lambda: ["a case"]

    def full(nbytes, folder):
        raise ValueError(f"{nbytes} B do not fit")

    monkeypatch.setattr(end_to_end, "require_disk", full)
    assert run._fitting() == ["a case"] and run.choice.names == ("resident",)
    assert capsys.readouterr().out == "offload_disk is left out: 2640 B do not fit\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variants", "offload_uva"], "--variants offload_uva: this machine can serve no_engram, own_compute"),
        (["--prompt_tokens", 9, 8], "--prompt_tokens 9 8: give the lower bound first"),
        (["--output_tokens", 1, 4], "--output_tokens 1: the first is the prompt's, and no step decodes another"),
        (["--table_params", "1e5", "2e5"], "end to end takes one table"),
        (["--table_params", "max", "--batches", "fit"], "give one a number"),
        (["--asking"], "--asking: it is offload_prefetch from CUDA graphs: not on a CPU, not --eager"),
        (["--buses", "fast"], "'fast' must be GB/s or GB/s:us"),
    ],
)
def test_bad_options_are_refused_in_one_line(program, options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        program(*OPTIONS, *options)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[1]", '{"cases": [', "[" * 10**5])
def test_a_broken_results_file_is_set_aside_and_the_run_begins_anew(tmp_path, capsys, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    (tmp_path / "stale.svg").write_text(f"<desc>results sha256 {'0' * 64}</desc>")
    head = dict.fromkeys(("benchmark", "device", "device_name", "configuration", "code_sha256"))
    assert Record.open(path, head, fresh=False).results["cases"] == []
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "results.json.broken"}
    error = capsys.readouterr().err
    assert "results.json cannot be continued" in error and error.count("\n") == 1
