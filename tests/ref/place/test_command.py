"""`engram-place` with its options, input that is wrong, and rates that are measured."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from engram_ref.checkpoint.config_json import config_fields, table_rows
from engram_ref.config import EngramConfig
from engram_ref.place import command
from tests.ref.place.example import GB, counted

ROOT = Path(__file__).parents[3]
SIZES = ["--gpu", "80GB", "--host", "512GB", "--disk", "2TB", "--batch", "1", "64"]


@pytest.fixture
def quick(monkeypatch):
    """The command without its counting: what it does with its options."""
    monkeypatch.setattr(command, "count_reads", lambda model, text, batches, *rest: counted())


def run(capsys, *argv):
    command.main([*argv])
    return capsys.readouterr().out


def test_a_checkpoint_and_its_config_json_alone(tmp_path, capsys, quick):
    config = EngramConfig.preset("v41-flash")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_fields(config, table_rows(config), 129_280, 40)))
    by_folder, by_file = (json.loads(run(capsys, str(p), *SIZES, "--json")) for p in (tmp_path, path))
    by_preset = json.loads(run(capsys, "--preset", "v41-flash", *SIZES, "--json"))
    for found in (by_folder, by_file):
        assert found["placements"] == by_preset["placements"] and found["model"]["backbone"]["blocks"] == 40


def test_the_engines_flag_follows_the_recommendation(capsys, quick):
    said = run(capsys, "--preset", "v41-flash", *SIZES, "--block-time", "1s", "--engram-config")
    assert said.splitlines()[0].startswith("""--engram-config '{"cpu_offload": true}'""")


def test_model_time_is_divided_by_the_blocks(capsys, quick):
    found = json.loads(run(capsys, "--preset", "v41-flash", *SIZES, "--model-time", "4ms", "--json"))
    published = {"formula": "window", "weights_over": 1, "blocks": 40, "blocks_source": "as published"}
    source = found["block"].pop("source")
    assert found["block"] == {"seconds": pytest.approx(1e-4), **published}
    assert source.startswith("given; of a prompt as long or its operations (compute), the longer, by one that does all")
    found = json.loads(run(capsys, "--preset", "demo", *SIZES, "--model-time", "16ms", "--blocks", "16", "--json"))
    assert found["block"]["seconds"] == pytest.approx(1e-3)


def test_weights_that_are_split_make_blocks_shorter(capsys, quick):
    one, eight = (
        json.loads(run(capsys, "--preset", "v41-flash", *SIZES, "--json", *more))
        for more in ((), ("--weights-over", "8"))
    )
    of_one, of_eight = ([s["block_s"] for s in found["placements"][0]["steps"]] for found in (one, eight))  # by batch
    assert len(of_one) == 3 and of_eight == [seconds / 8 for seconds in of_one]
    assert "each of 8 that" in eight["block"]["source"] and "--weights-over" in one["block"]["source"]


def test_ranks_links_and_prompts_of_the_command(capsys, quick):
    argv = ["--preset", "demo", *SIZES, "--prompt", "256", "--ranks", "4"]
    found = json.loads(run(capsys, *argv, "--json"))
    assert found["group"]["link"]["name"] == "NVLink 4" and found["prompts"] == [256]
    assert [p["placement"] for p in found["placements"]][-3:] == ["sharded", "hot sharded", "sharded host"]
    apart = json.loads(run(capsys, *argv, "--machines", "2", "--link-rate", "10GB/s", "--json"))
    assert apart["group"]["link"] | {"bytes_per_s": 1e10, "source": "given"} == apart["group"]["link"]
    assert apart["group"]["link"]["name"] == "400 Gb/s Ethernet"
    assert json.loads(run(capsys, "--preset", "demo", *SIZES, "--prompt", "--json"))["prompts"] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a --preset or a checkpoint"),
        (["--preset", "demo", "."], "and one of them only"),
        (["/nowhere"], "/nowhere does not exist: give a checkpoint's folder or its config.json, downloaded"),
        (
            ["v41-flash"],
            "v41-flash does not exist: give a checkpoint's folder or its config.json, or --preset v41-flash",
        ),
        (["--preset", "demo", "--weights-over", "8"], "of this model's weights, leave it out; --block-time"),
        (
            ["--preset", "v41-flash", "--weights-over", "8", "--block-time", "1ms", "--prompt"],
            "leave it out, or the time",
        ),
        (["--preset", "v41-flash", "--weights-over", "3", "--ranks", "8"], "one must divide the other"),
        (["--preset", "v41-flash", "--ranks", "8", "--machines", "2", "--link", "nvlink"], "not reach other machines"),
        (["--preset", "demo", "--gpu", "80G"], "bytes, such as 80GB"),
        (["--preset", "demo", "--block-time", "56"], "a time with its unit"),
        (["--preset", "demo", "--model-time", "4ms"], "say how many with --blocks"),
        (
            ["--preset", "demo", "--model-time", "4ms", "--blocks", "15"],
            "before block 15, the first being 0, so it has 16",
        ),
        (["--preset", "demo", "--blocks", "4"], "--blocks does nothing without --block-time or"),
        (["--preset", "demo", "--block-time", "0us"], "a block takes longer than no time"),
        (["--preset", "demo", "--model-time", "0s", "--blocks", "20"], "a block takes longer than no time"),
        (["--preset", "demo", "--block-time", "1us", "--blocks", "15"], "so it has 16"),
        (["--preset", "demo", "--json", "--engram-config"], "leave --engram-config away"),
        (["--preset", "tiny", "--gpu", "1GB", "--memory-rate", "1e9"], "--memory-rate does nothing where a GPU"),
        (["--preset", "tiny", "--gpu", "0", "--bus-rate", "1e9"], "--bus-rate does nothing where there is no GPU"),
        (["--preset", "tiny", "--gpu", "0", "--memory-rate", "1e9"], "--memory-rate does nothing where no block is"),
        (
            ["--preset", "v41-flash", "--gpu", "0", "--memory-rate", "1e9", "--block-time", "1ms"],
            "no block is estimated",
        ),
        (
            ["--preset", "v41-flash", "--gpu", "1GB", "--compute-rate", "1e9", "--prompt", "--block-time", "1s"],
            "no block is",
        ),
        (["--preset", "tiny", "--folder", ".", "--disk", "1GB"], "--folder does nothing with --disk"),
        (
            ["--preset", "tiny", "--disk", "0", "--reads-rate", "1e5"],
            "--reads-rate does nothing where there is no disk: leave it out, or --disk 0",
        ),
        (
            ["--preset", "tiny", "--gpu", "1GB", "--host", "0", "--uva-rate", "1e7", "--gather-rate", "1e7"],
            "--uva-rate, --gather-rate do nothing without host memory: leave",
        ),
        (["--preset", "demo", "--link", "pcie"], "--link does nothing without --ranks"),
        (["--preset", "demo", "--link-rate", "1GB/s"], "--link-rate does nothing without --ranks"),
        (["--preset", "demo", "--ranks", "1", "--machines", "1"], "--machines does nothing without --ranks"),
        (["--preset", "demo", "--ranks", "9", "--gpu", "1GB"], "NVLink 4 connects 8, use another link"),
        (["--preset", "demo", "--ranks", "4", "--machines", "3"], "give equally many to each"),
        (["--preset", "demo", "--measure", "--bus-rate", "1GB/s"], "--bus-rate says what --measure would find"),
        (["--preset", "demo", "--bus-rate", "0"], "--bus-rate"),
        (["--preset", "demo", "--text", "/nowhere.txt"], "/nowhere.txt"),
        ([__file__], "not another file"),
    ],
)
def test_wrong_input_ends_in_one_line(argv, said, capsys, quick):
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and said in printed.err and printed.err.count("\n") == 1


def test_a_given_host_size_serves_where_the_system_says_none(monkeypatch, capsys, quick):
    monkeypatch.setattr("engram_ref.place.machine.free_host_bytes", lambda: None)
    found = json.loads(run(capsys, "--preset", "tiny", "--host", "3GB", "--disk", "1GB", "--json"))
    assert found["machine"]["host"] == 3 * GB
    with pytest.raises(SystemExit):
        command.main(["--preset", "tiny", "--disk", "1GB"])
    assert "give --host" in capsys.readouterr().err


@pytest.mark.slow
def test_it_answers_without_torch(tmp_path):
    (tmp_path / "short.txt").write_text("a few words " * 64)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from engram_ref.place.command import main\n"
        "main(['--preset', 'tiny', '--gpu', '1GB', '--host', '1GB', '--disk', '1GB', '--text', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "short.txt"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "take " in done.stdout, done.stderr


@pytest.fixture
def measure(monkeypatch):
    """Measures little, and in no time."""
    pytest.importorskip("torch")
    from engram_ref.place import measure

    small = {"_TABLE": 1 << 20, "_COPY": 1 << 20, "_MANY": 1 << 8, "_SOME": 1 << 6, "_REPEATS": 2}
    for name, value in small.items():
        monkeypatch.setattr(measure, name, value)
    return measure


def test_measured_rates_replace_the_assumed_ones(tmp_path, measure):
    found = measure.measured(tmp_path, 264)
    assert found.keys() >= {"gather", "memory", "reads", "start_host", "start_disk"}
    assert all(0 < rate.value < math.inf and rate.source.startswith("measured") for rate in found.values())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_not_there_is_not_measured(monkeypatch, capsys, quick, measure):
    def measure_disk(*_):
        raise AssertionError("a file was written")

    monkeypatch.setattr(measure, "_on_disk", measure_disk)
    argv = ["--preset", "tiny", "--host", "3GB", "--disk", "0", "--measure", "--json"]
    rates = json.loads(run(capsys, *argv))["machine"]["rates"]
    assert rates["gather"]["source"].startswith("measured") and rates["reads"]["source"].startswith("assumed")
    with pytest.raises(SystemExit):
        command.main([*argv, "--folder", "."])
    assert "--folder does nothing with --disk 0: leave it out" in capsys.readouterr().err
