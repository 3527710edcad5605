"""Results files that contradict themselves are refused where they are read, in one line that says where and why."""

import copy
import json

import pytest

from bench import compare, verdict
from bench.evidence.committed import RESULTS
from bench.instruments.reading import read_results
from bench.schemas.plausible import check

WALL, SERVED, TOY = "gpu_wall_h200.json", "end_to_end_h200.json", "bytedmd_toy.json"


@pytest.fixture(scope="module")
def committed():
    return {name: json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in (WALL, SERVED, TOY)}


def run_of(results, variant):
    return next(run for run in results["steps"][0]["runs"] if run["variant"] == variant)


def row_of(results, label):
    return next(row for row in results["cases"][0]["rows"] if row["label"] == label)


def exchange(one, other):
    """Two variants under each other's name; their tables and samples stay."""
    for key in ("variant", "label"):
        if key in one:
            one[key], other[key] = other[key], one[key]


def shorten(run):
    run["step_s"].pop()


def spoil_parts(node, part, whole):
    """Everywhere, more of a part than of the whole."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, (dict, list)):
            spoil_parts(value, part, whole)
    if isinstance(node, dict) and part in node and whole in node:
        node[part] = node[whole] + 1


SPOILT = {
    "a negative time": (WALL, lambda r: run_of(r, "resident")["step_s"].__setitem__(1, -0.01), "step_s holds -0.01"),
    "no time at all": (WALL, lambda r: run_of(r, "resident")["step_s"].__setitem__(1, 0), "is above 0"),
    "an endless time": (WALL, lambda r: run_of(r, "resident")["step_s"].__setitem__(1, float("1e999")), "holds inf"),
    "a negative wait": (WALL, lambda r: run_of(r, "resident")["exposed_s"].__setitem__(0, -1e-9), "not below 0"),
    "waits longer than their steps": (
        WALL,
        lambda r: run_of(r, "offload_uva").update(exposed_s=[1.01 * s for s in run_of(r, "offload_uva")["step_s"]]),
        "steps 0 / runs 5 / exposed_s is 0.422 s of 0.418 s step_s",
    ),
    "a round twice": (
        SERVED,
        lambda r: row_of(r, "resident")["rounds"].append(row_of(r, "resident")["rounds"][1]),
        "cases 0 / resident has round 1 twice",
    ),
    "more rows than were asked for": (
        SERVED,
        lambda r: spoil_parts(r, "rows_unique", "rows_requested"),
        "rows_unique is 489985, of 489984 rows_requested",
    ),
    "half a byte": (WALL, lambda r: run_of(r, "offload_naive")["bytes"]["copied"].append(0.5), "counts are whole"),
    "a round less": (WALL, lambda r: shorten(run_of(r, "offload_uva")), "steps 0 / runs have 5 and 6 rounds"),
    "other names": (
        WALL,
        lambda r: exchange(run_of(r, "resident"), run_of(r, "offload_prefetch")),
        "offload_prefetch holds its table in: device; that variant's is in: host",
    ),
    "names of two schedules": (
        WALL,
        lambda r: exchange(run_of(r, "offload_naive"), run_of(r, "offload_prefetch")),
        "that variant is 'prefetched'",
    ),
    "a step less": (SERVED, lambda r: row_of(r, "resident")["rounds"][2]["decode_s"].pop(), "decode steps in round 2"),
    "other names, served": (
        SERVED,
        lambda r: exchange(row_of(r, "resident"), row_of(r, "no_engram")),
        "resident holds its table in: nowhere; that variant's is in: device",
    ),
    "samples of another": (
        SERVED,
        lambda r: row_of(r, "resident").update(rounds=row_of(r, "offload_naive")["rounds"]),
        "bytes: they are another variant's samples",
    ),
    "bytes of another": (
        WALL,
        lambda r: run_of(r, "resident").update(bytes=run_of(r, "offload_naive")["bytes"]),
        "resident copied",
    ),
    "a price": (TOY, lambda r: r["runs"][0].__setitem__("cost", 7), "runs 0 / cost is 7, which is not the sum"),
    "a negative price": (TOY, lambda r: r["runs"][0].__setitem__("cost", -7), "cost is -7"),
    "another plan": (TOY, lambda r: plan_of(r)["layers"][0].__setitem__("layer_id", 7), "of other numbers"),
}


def plan_of(node):
    """The first object that a checksum is of."""
    if isinstance(node, dict) and "checksum" in node:
        return node
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for part in inner if (found := plan_of(part)) is not None), None)


@pytest.mark.parametrize("what", SPOILT)
def test_what_contradicts_itself_is_refused(what, committed, tmp_path):
    name, spoil, said = SPOILT[what]
    results = copy.deepcopy(committed[name])
    check(results)
    spoil(results)
    path = tmp_path / name
    path.write_text(json.dumps(results).replace("Infinity", "1e999"), encoding="utf-8")
    with pytest.raises(ValueError, match="is not a results file") as refused:
        read_results(path)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_every_committed_file_stands(path):
    read_results(path)


@pytest.mark.parametrize(
    "strange",
    [
        {"held": {"host": 1}, "variant": ["resident"]},
        {"rows": [{"rounds": [{"round": [1], "decode_s": [1.0]}]}, 7], "held": None},
        {"runs": [1, {"step_s": 3}], "cost": "much", "cost_by_kind": {}, "x_s": "soon"},
        {"checksum": "of nothing"},
        {"reads": 10**400},
    ],
)
def test_whatever_json_holds_ends_in_an_answer(strange):
    try:
        check(strange)
    except ValueError as refused:
        assert str(refused)


def test_what_an_older_version_does_not_say_contradicts_nothing(committed):
    results = copy.deepcopy(committed[WALL])
    for run in results["steps"][0]["runs"]:
        del run["schedule"]
    check(results)


def test_the_commands_say_so_in_one_line(committed, tmp_path, capsys, monkeypatch):
    spoilt = copy.deepcopy(committed[TOY])
    spoilt["runs"][0]["wall_time_s"][0] = -1.0
    (tmp_path / TOY).write_text(json.dumps(spoilt), encoding="utf-8")
    for other in RESULTS.glob("*.json"):
        if other.name != TOY:
            (tmp_path / other.name).symlink_to(other)
    monkeypatch.setattr("sys.argv", ["verdict", "--results", str(tmp_path)])
    for command in (verdict.main, lambda: compare.main([str(RESULTS / TOY), str(tmp_path / TOY)])):
        with pytest.raises(SystemExit) as ended:
            command()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and "wall_time_s holds -1.0" in said, said
