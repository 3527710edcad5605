"""Several runs of one machine as one file."""

from __future__ import annotations

import copy
import json
import sys

import jsonschema
import pytest

from bench.schemas.generator import json_schema
from bench.schemas.wall import Results
from bench.wall import merge
from tests.bench.wall.example import example

SCHEMA = json_schema(Results)


@pytest.fixture
def runs():
    first, second = example("cuda", steps=2), copy.deepcopy(example("cuda", steps=1))
    first["components"] = []
    first["limits"]["disk"] = {"reads_per_s": None, "why": "no file was read"}
    first["components_skipped"] = [{"case": part["case"], "why": "not asked for"} for part in second["components"]][:1]
    return [first, second]


def test_steps_and_components_of_all_runs(runs):
    results = merge.merged(runs)
    jsonschema.validate(results, SCHEMA)
    assert results["steps"] == runs[0]["steps"] + runs[1]["steps"]
    assert results["components"] == runs[1]["components"]
    assert results["components_skipped"] == runs[1]["components_skipped"]  # what one run skipped, another did
    assert results["limits"]["disk"] == runs[1]["limits"]["disk"]
    assert len(results["configuration"]["runs"]) == 2


def test_other_machines_are_refused(runs):
    runs[1]["device_name"] = "another"
    with pytest.raises(ValueError, match="runs of different device_name"):
        merge.merged(runs)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge.merged([])


def test_the_command_writes_one_file_and_its_figures(runs, tmp_path, monkeypatch, capsys):
    paths = []
    for number, run in enumerate(runs):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(run), encoding="utf-8")
    out = tmp_path / "all" / "results.json"
    monkeypatch.setattr(sys, "argv", ["merge", str(out), *map(str, paths), str(tmp_path / "killed.json")])
    merge.main()
    said = capsys.readouterr()
    assert said.out.count("== prefill") + said.out.count("== decode") == 3 and "killed.json does not exist" in said.err
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "bandwidth.svg",
        "overhead.svg",
        "results.json",
        "timeline.svg",
    ]
