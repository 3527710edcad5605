"""Results files as they are read: hostile strings become harmless, and what is not a results file is named."""

import json
import shutil
from pathlib import Path

import pytest

from bench import fill_docs
from bench.evidence import price, wall_time
from bench.evidence.committed import RESULTS, Evidence
from bench.instruments.reading import MOST_CHARACTERS, as_this_version, harmless, read_results, set_aside
from bench.served.table import report as served_report
from bench.site import commands, data, start_page

HOSTILE = [
    "a\n```\n\n<script>alert(1)</script>\n\n```text\n",
    "<img src=x onerror=alert(1)>",
    "|x|](javascript:alert(1)) {: onclick=alert(1) } <!-- end: verdict -->",
    "\x1b]0;title\x07\x1b[31m\u202egnp.exe\x00\r",
    "x" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_string_means_anything_to_a_page_or_a_terminal(text):
    found = harmless({"a": [text], text: 1})
    for shown in (found["a"][0], *found):
        assert shown.isprintable() and len(shown) <= 3 * MOST_CHARACTERS + 3
        assert not set(shown) & set("<>[]{}`|\\")


def test_honest_values_stay_as_they_are():
    honest = {"cpu": "AMD EPYC 9R14, 96-Core", "stream": "Märchen (1812).txt", "n": [1, -0.5, None, True, 10**30]}
    assert harmless(honest) == honest
    for path in RESULTS.glob("*.json"):
        assert harmless(content := json.loads(path.read_text(encoding="utf-8"))) == content, path


def poisoned(value, evil):
    """Every string of a results file that no computation looks up, replaced."""
    shown = ("cpu", "platform", "device_name", "name", "stream_name", "gpu", "python", "implementation", "driver")
    if isinstance(value, dict):
        return {
            key: evil if key in shown and isinstance(inner, str) else poisoned(inner, evil)
            for key, inner in value.items()
        }
    return [poisoned(inner, evil) for inner in value] if isinstance(value, list) else value


@pytest.fixture
def hostile_results(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(poisoned(json.loads(path.read_text(encoding="utf-8")), " ".join(HOSTILE[:3]))))
    monkeypatch.setattr(fill_docs, "RESULTS", folder)
    return folder


def test_nothing_of_a_results_file_reaches_a_page_as_markup(hostile_results):
    evidence = Evidence(hostile_results)
    of_files = {
        **{
            name: fill_docs.BLOCKS[name] for name in ("verdict", "pricing", "hashing", "layer", "wall_cpu", "row_speed")
        },
        "sentence": lambda: start_page.verdict_sentence(evidence),
        "lines": lambda: start_page.verdict_lines(evidence),
        "grid": lambda: data.grid_script(hostile_results),
        "whole model": lambda: data.whole_model_script(hostile_results),
        "commands": lambda: commands.command_table(hostile_results),
        "runs": lambda: wall_time.wall_time_runs(hostile_results, "cpu"),
        "story": lambda: wall_time.wall_time_story(hostile_results),
        **price.blocks(evidence),
    }
    shown = {}
    for name, block in of_files.items():
        try:
            shown[name] = block()
        except ValueError as refused:  # a name that a table looks up is no longer there
            shown[name] = str(refused)
    assert any("alert(1)" in text for text in shown.values())  # the poison did arrive
    for name, text in shown.items():
        for mark in ("<script", "<img", "](javascript", "{: on", "<!-- end", "|x|"):
            assert mark not in text, name
        assert text.count("```") % 2 == 0, name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a results file"),
        ('{"wall_s": [1.0, NaN]}', "it holds NaN, which is no number"),
        ('{"cost": -Infinity}', "it holds -Infinity"),
        ("[1]", "holds a list"),
        ("\xff", "is not a results file"),
        ("[" * 10**5, "is not a results file"),
        ('{"benchmark": "other"}', "holds results of 'other'"),
        ('{"benchmark": ["<b>\\n"]}', "‹b›%0a"),
    ],
)
def test_what_is_no_results_file_is_named_in_one_line(tmp_path, content, said):
    path = tmp_path / "results.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError) as refused:
        read_results(path, "production")
    assert said in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_no_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="not a regular file but a directory: name a results file"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_results(tmp_path / "none.json")


def test_files_of_another_version_are_named(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"benchmark": "production"}')
    said = r"results\.json is not as this version writes it \(KeyError: 'records'\)"
    with pytest.raises(ValueError, match=said), as_this_version(path):
        read_results(path)["records"]


def test_nothing_where_something_is_divided_by_is_named(tmp_path):
    """A round that measured no step has no time that another one could be a share of."""
    path = tmp_path / "end_to_end_cpu.json"
    results = json.loads((RESULTS / path.name).read_text(encoding="utf-8"))
    for row in results["cases"][0]["rows"]:
        for sample in row["rounds"]:
            sample["prefill_s"] = []
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match=r"not as this version writes it \(ZeroDivisionError"), as_this_version(path):
        served_report(read_results(path))


def test_a_broken_file_is_kept_under_a_new_name(tmp_path, capsys):
    path: Path = tmp_path / "results.json"
    for content in ("first", "second"):
        path.write_text(content)
        set_aside(path, f"{path} is broken")
    kept = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert kept == {"results.json.broken": "first", "results.json.broken1": "second"}
    assert capsys.readouterr().err.count("it is kept as") == 2
