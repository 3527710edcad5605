"""The constants as a file: every number against an independent source, the checksum recomputed by hand, and what the
command does with input that is wrong.
"""

import dataclasses
import hashlib
import json
import lzma
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engram_ref import cli, plan
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan
from engram_ref.plan import check, constants, summary
from engram_ref.vocab import configured_pad, vocab_for

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def flash():
    return constants("v41-flash")


@pytest.fixture
def v3_tokenizer(tmp_path):
    path = tmp_path / "v3.json"
    path.write_bytes(lzma.decompress((GOLDEN / "deepseek_v3_tokenizer.json.xz").read_bytes()))
    return path


def recomputed(content):
    """The checksum as the file itself says that it is made."""
    body = {name: value for name, value in content.items() if name != "checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def fails(capsys, *argv):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        plan.main(list(argv))
    said = capsys.readouterr()
    assert (
        ended.value.code == 2
        and said.out == ""
        and said.err.startswith("engram-plan: error: ")
        and said.err.count("\n") == 1
    )
    return said.err


# --- the numbers ----------------------------------------------------------------------------------


def test_v41_flash_costs_what_the_checkpoint_has(flash):
    """Bytes as published: codes and scales of both tables."""
    cost = flash["cost"]
    assert [x["table_bytes"] for x in cost["layers"]] == [
        98_305_579_008 + 3_072_049_344,
        98_308_270_592 + 3_072_133_456,
    ]
    assert cost["table_bytes"] == sum(x["table_bytes"] for x in cost["layers"]) == 202_758_032_400
    assert (cost["columns"], cost["row_bytes"], cost["rows_per_token"], cost["bytes_per_token"]) == (
        24,
        264,
        48,
        12_672,
    )
    assert cost["rows"] == 768_022_850 and flash["config"]["seed"] == 0


def test_v41_flash_names_its_tokenizer(flash):
    tokenizer = flash["tokenizer"]
    assert tokenizer["sha256"] == "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"
    assert tokenizer["map_sha256"] == "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"
    assert (tokenizer["token_ids"], tokenizer["compressed_size"]) == (129_280, 99_092)
    assert (tokenizer["pad_id"], tokenizer["pad_token"], tokenizer["pad_compressed"]) == (2, "<｜▁pad▁｜>", 2)
    assert (tokenizer["configured_pad_id"], tokenizer["configured_pad_token"]) == (1, "<｜end▁of▁sentence｜>")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_round_trips(preset, plans, vocab_v4):
    content = json.loads(json.dumps(constants(preset)))
    config = EngramConfig.preset(preset)
    vocab = vocab_for(config) if config.form == "qwen" else vocab_v4
    expected = dataclasses.replace(plans[preset], vocab_digest=vocab.digest)
    assert HashPlan.from_json(json.dumps(content["plan"])) == expected
    assert content["checksum"] == recomputed(content) and content["plan"]["checksum"] == recomputed(content["plan"])
    assert EngramConfig(**content["config"]) == EngramConfig.preset(preset)


def test_a_changed_number_breaks_the_checksum(flash):
    content = json.loads(json.dumps(flash))
    content["cost"]["rows"] += 1
    assert recomputed(content) != content["checksum"]
    content["plan"]["layers"][0]["multipliers"][0] += 2
    with pytest.raises(ValueError, match="it was altered"):
        HashPlan.from_json(json.dumps(content["plan"]))


def test_another_tokenizer_is_named_and_changes_the_multipliers(v3_tokenizer, golden):
    """The paper's tables and the demo were hashed with DeepSeek-V3's."""
    found, packaged = constants("demo", str(v3_tokenizer)), constants("demo")
    recorded = golden("hash_demo_deepseek_tokenizers.json")
    assert found["tokenizer"]["sha256"] == "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d"
    assert found["tokenizer"]["compressed_size"] == 98_627 and found["tokenizer"]["configured_pad_token"] is None
    for content, name in ((found, "deepseek-v3 (128815 ids)"), (packaged, "deepseek-v4 (129280 ids)")):
        multipliers = {str(x["layer_id"]): list(x["multipliers"]) for x in content["plan"]["layers"]}
        assert multipliers == recorded[name]["multipliers"]
    assert found["checksum"] != packaged["checksum"]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_json_and_a_summary(capsys, flash):
    plan.main(["--preset", "v41-flash"])
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(json.dumps(flash)) and said.out.isascii()
    for fact in ("384,006,168 rows", "188.833 GiB", "12,672 B", "id 2, <｜▁pad▁｜>, compressed 2", flash["checksum"]):
        assert fact in said.err
    assert "names another, id 1, <｜end▁of▁sentence｜>: the hash does not use it" in said.err


def test_the_command_writes_a_file(capsys, tmp_path, flash):
    out = tmp_path / "plan.json"
    out.write_text("older")
    plan.main(["--preset", "v41-flash", "--out", str(out)])
    assert json.loads(out.read_text("ascii")) == json.loads(json.dumps(flash))
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("configured", "note"),
    [
        ({"pad_token": "<｜end▁of▁sentence｜>"}, "names another, id 1, <｜end▁of▁sentence｜>: the hash does"),
        ({"pad_token": {"content": "<｜end▁of▁sentence｜>"}}, "names another, id 1, <｜end▁of▁sentence｜>: the hash"),
        ({"pad_token": "<｜▁pad▁｜>"}, "id 2, <｜▁pad▁｜>, compressed 2; the same in the tokenizer's configuration"),
        ({"pad_token": "[PAD]"}, "names another, [PAD], which is none of its tokens: the hash does not use it"),
        ({"pad_token": None}, "names none"),
        ({}, "names none"),
        (None, "names none"),
    ],
)
def test_the_pad_of_a_tokenizers_configuration(small_tokenizer, tmp_path, capsys, configured, note):
    (tmp_path / "tokenizer.json").symlink_to(small_tokenizer / "tokenizer.json")
    if configured is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(configured))
    plan.main(["--preset", "tiny", "--tokenizer", str(tmp_path)])
    assert note in capsys.readouterr().err
    assert configured_pad(tmp_path / "tokenizer.json") == configured_pad(tmp_path)


def test_a_damaged_tokenizer_configuration_is_refused(small_tokenizer, tmp_path, capsys):
    (tmp_path / "tokenizer.json").symlink_to(small_tokenizer / "tokenizer.json")
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        said = fails(capsys, "--preset", "tiny", "--tokenizer", str(tmp_path))
        assert "tokenizer_config.json is not a tokenizer's configuration" in said


def test_wrong_input_ends_in_one_line(capsys, tmp_path, v3_tokenizer):
    assert "name a --preset, or a checkpoint with --check" in fails(capsys)
    assert "invalid choice: 'v5'" in fails(capsys, "--preset", "v5")
    said = fails(capsys, "--preset", "v41-flash", "--tokenizer", str(v3_tokenizer))
    assert "compressed vocabulary of 98627 ids; this configuration needs exactly 99092" in said
    assert "no tokenizer at" in fails(capsys, "--preset", "demo", "--tokenizer", str(tmp_path / "none.json"))
    said = fails(capsys, "--preset", "tiny", "--out", str(tmp_path / "none" / "plan.json"))
    assert "No such file or directory" in said and f"'{tmp_path / 'none' / 'plan.json'}'" in said
    for more in (("--out", "x"), ("--tokenizer", "x")):
        assert "leave --tokenizer and --out away" in fails(capsys, "--check", str(tmp_path), *more)
    assert "unrecognized arguments: --nonsense" in fails(capsys, "--preset", "demo", "--nonsense")


def test_help_shows_how(capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for example in ("--preset v41-flash", "--check /models/DeepSeek-V4.1-Flash", "json.dumps(object, sort_keys=True"):
        assert example in said


def test_an_interruption_ends_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(plan, "constants", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: plan.main(["--preset", "demo"]), plan.PROG)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "engram-plan: interrupted; nothing was written"


ALONE = """
import sys
for name in ("torch", "numba", "transformers", "safetensors", "bench"):
    sys.modules[name] = None
import runpy
sys.argv = ["plan", *sys.argv[1:]]
runpy.run_module("engram_ref.plan", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--preset", "v41-flash"], ["--check", "FOLDER"]], ids=" ".join)
def test_the_command_needs_no_torch(options, sample_folder, flash):
    options = [str(sample_folder) if option == "FOLDER" else option for option in options]
    done = subprocess.run([sys.executable, "-c", ALONE, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if options[0] == "--preset":
        assert json.loads(done.stdout)["checksum"] == flash["checksum"]


# --- checking a checkpoint ------------------------------------------------------------------------


def test_a_good_checkpoint_gets_a_line_for_each_thing(sample_folder, capsys):
    plan.main(["--check", str(sample_folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == check(sample_folder) and len(lines) == 4 + 12
    assert lines[0] == f"{sample_folder / 'config.json'}: form v41, layers 1, 14"
    assert lines[1].endswith("sha256 8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf")
    assert "99092 ids" in lines[2] and "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481" in lines[2]
    assert lines[3] == "weights: 13 tensors in 3 files"
    assert lines[4].startswith("layers.1.engram.embed.weight: F8_E4M3 [1998, 256], 511488 bytes from byte ")
    assert lines[4].endswith(" of model-00002-of-00003.safetensors")


def test_a_checkpoint_of_another_geometry_is_told(sample_folder, capsys):
    said = fails(capsys, "--check", str(sample_folder), "--preset", "v41-flash")
    assert "config.json gives table_size_per_order=(31, 31, 31), preset v41-flash has (16000000, " in said


def test_a_checkpoint_of_the_presets_geometry_is_told(sample_folder, capsys, monkeypatch):
    same = dict(PRESETS["v41-flash"], table_size_per_order=(31, 31, 31), hidden=32)
    monkeypatch.setitem(PRESETS, "v41-flash", same)
    plan.main(["--check", str(sample_folder), "--preset", "v41-flash"])
    assert capsys.readouterr().out.splitlines()[0].endswith("layers 1, 14, as preset v41-flash")


def test_a_damaged_checkpoint_is_told_in_one_line(sample_folder, tmp_path, capsys):
    for file in sample_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    said = fails(capsys, "--check", str(tmp_path))
    assert "model-00003-of-00003.safetensors is missing, and it holds Engram tensors: download it" in said
    assert "is not a folder" in fails(capsys, "--check", str(tmp_path / "none"))


def test_qwen_has_no_tokenizer_and_no_compression(capsys):
    found = constants("qwen38-flash-next")
    assert found["cost"]["rows"] == 320_001_536 and found["cost"]["bytes_per_token"] == 16 * 320
    assert found["tokenizer"]["sha256"] is None and found["tokenizer"]["pad_id"] == 248_044
    assert HashPlan.from_json(json.dumps(found["plan"])).segment_end == 248_044
    said = summary(found)
    for fact in (
        "320,001,536 rows",
        "tokenizer: none, 248,320 token ids are hashed as they are",
        "id 248044 ends a text",
    ):
        assert fact in said
    with pytest.raises(ValueError, match="tokenizer 'x': preset qwen38-flash-next hashes token ids as they are"):
        constants("qwen38-flash-next", "x")
