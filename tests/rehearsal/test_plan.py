"""The GPU plan's own script at toy sizes on the stand-in: what comes back, and what a cut at any moment leaves."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the stand-in runs kernels in Triton's interpreter")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/gpu_checks.sh"
NAMED = {"evidence.tar.gz", "hundred_billion.json", "served_8b.json", "wall.json", "lookup.json", "tests.xml",
         "machine.txt", "summary.txt"}  # fmt: skip
# Each kind of step; the other groups of tests, the short runs and the 4B model are the same lines with other names.
CHECKED = "preflight tests_tables"
MEASURED = "hundred_billion served_8b lookup prefill reads"


@pytest.fixture
def call(on_stand_in, tmp_path, cache_home):
    """Starts a call of the script; its output goes to tmp_path/told."""

    def start(which, **settings):
        environment = {
            **os.environ, "REHEARSE": "1", "PYTHON": sys.executable, "WORK": str(tmp_path / "work"),
            "RUN": " ".join(on_stand_in), "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(cache_home), "PACK_EVERY": "10", **settings,
        }  # fmt: skip
        with (tmp_path / "told").open("ab") as told:
            command = ["bash", str(SCRIPT), which, str(tmp_path / "out")]
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True
            )

    return start


def assert_can_come_back(out):
    """Counted as the GPU machine counts: files, their sizes, depth and names; and each is whole."""
    files = [path for path in out.rglob("*") if not path.is_dir()]
    assert len(files) <= 8 and {path.name for path in files} <= NAMED
    for path in files:
        assert path.stat().st_size <= 16 << 20 and len(path.relative_to(out).parts) <= 3
        assert re.fullmatch(r"[A-Za-z0-9._/-]+", str(path.relative_to(out)))
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    if (out / "summary.txt").exists():
        assert len((out / "summary.txt").read_text(encoding="utf-8")) <= 12_000
    if (out / "evidence.tar.gz").exists():
        with tarfile.open(out / "evidence.tar.gz") as archive:
            return {member.name for member in archive.getmembers()}
    return set()


def passes(path):
    """(batch, label, round) of all passes of an end-to-end results file."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else []
    return {(c["batch"], row["label"], s["round"]) for c in cases for row in c["rows"] for s in row["rounds"]}


def kill_session(script):
    """The script and all that it started, at once: a machine that is taken away."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == script.pid:
            os.kill(int(path.parent.name), signal.SIGKILL)
    script.wait()


def wait_for_passes(record, wanted, script):
    """Until a results file has so many passes; those that it has then."""
    deadline = time.monotonic() + 200
    while len(passes(record)) < wanted and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(passes(record)) >= wanted
    return passes(record)


def test_cuts_at_any_moment_lose_nothing_that_was_finished_and_both_calls_bring_everything_back(call, tmp_path):
    """A call killed, cut and gone on with, and the other: they share their passes, so that CI has the time."""
    out, work, told = tmp_path / "out", tmp_path / "work", tmp_path / "told"
    huge, record = work / "hundred_billion/results.json", work / "served_8b/results.json"

    script = call("measure", ONLY="hundred_billion served_8b")
    before = wait_for_passes(huge, random.Random(0).randrange(1, 5), script)
    kill_session(script)
    assert before <= passes(huge)
    assert_can_come_back(out)

    script = call("measure", ONLY="hundred_billion served_8b")
    before = wait_for_passes(record, 9, script)  # then it warms up for the other batch, most likely
    script.terminate()
    assert script.wait(timeout=60) == 143
    assert before <= passes(record) == passes(out / "served_8b.json")
    assert told.read_text().endswith((out / "summary.txt").read_text())
    assert not list(work.rglob(".results-*")), "a temporary file was left"
    assert_can_come_back(out)
    finished = huge.read_bytes()

    (work / "steps.txt").unlink()
    assert call("measure", ONLY=MEASURED).wait(timeout=300) == 0, told.read_text()[-3000:]
    assert json.loads(record.read_text())["processes"][-1]["kept"] == 9, "the batch that was whole"
    assert json.loads(huge.read_bytes())["cases"] == json.loads(finished)["cases"]
    assert (work / "hundred_billion.log").read_text().count("building a table") == 2, "all of it was there already"
    assert_measured(out, work)
    assert told.read_text().endswith((out / "summary.txt").read_text())

    shutil.rmtree(out)
    assert call("check", ONLY=CHECKED).wait(timeout=200) == 0, told.read_text()[-3000:]
    assert ended_well(work) == {*MEASURED.split(), *CHECKED.split()}
    assert_can_come_back(out)
    assert sum(int(suite.get("tests")) for suite in xml.parse(out / "tests.xml").getroot()) == 1


def ended_well(work):
    """The steps that ended with code 0."""
    return set(re.findall(r"^(\w+) ended with 0,", (work / "steps.txt").read_text(), re.M))


def assert_measured(out, work):
    """Every kind of step ended well, and its results are there, in the archive and by name."""
    wanted = set(MEASURED.split())
    assert ended_well(work) == wanted
    archived = assert_can_come_back(out)
    assert {f"{name}.log" for name in wanted} <= archived
    assert not any("safetensors" in name or "triton/" in name for name in archived)
    labels = ["no_engram", "own_compute", "resident", "resident again", "offload_naive", "offload_prefetch",
              "offload_uva", "offload_uva in graph", "offload_hot 1 %"]  # fmt: skip
    cases = json.loads((out / "served_8b.json").read_text())["cases"]
    assert [case["batch"] for case in cases] == [2, 1]
    for case in cases:
        assert [row["label"] for row in case["rows"]] == labels
        assert case["rows"][0]["graphs"] == {"used": True, "why": None}
        assert len({sample["tokens_sha256"] for row in case["rows"][1:] for sample in row["rounds"]}) == 1
    huge = {
        label for label in labels if label.split()[0] in ("no_engram", "resident", "offload_prefetch", "offload_uva")
    }
    assert {label for _, label, _ in passes(out / "hundred_billion.json")} == huge
    assert [step["shape"]["tokens"] for step in json.loads((out / "wall.json").read_text())["steps"]] == [3, 3]
    assert [case["tokens"] for case in json.loads((out / "lookup.json").read_text())["cases"]] == [1, 2]
    assert "\nprefill: 2 x 3 tokens, 1 rounds\n" in (out / "summary.txt").read_text()
    for name in wanted:
        assert "0 ranges still registered, 0 calls refused" in (work / f"{name}.log").read_text().splitlines()[-1]
