"""The GPU plan's own script at toy sizes on the stand-in: what comes back, and what a cut at any moment leaves."""

from __future__ import annotations

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
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/gpu_checks.sh"
NAMED = {"evidence.tar.gz", "end_to_end.json", "wall.json", "lookup.json", "tests.xml", "tests.log", "machine.txt",
         "summary.txt"}  # fmt: skip
# Each kind of step; the other groups of tests are the same line with other files.
FIRST = "preflight tests_tables served_8b lookup prefill"


@pytest.fixture(scope="module")
def socket(tmp_path_factory):
    """A server that runs commands on the stand-in."""
    path = tmp_path_factory.mktemp("server") / "socket"
    command = [sys.executable, "-m", "tests.rehearsal.server", str(path)]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            if path.exists() or server.poll() is not None:
                break
            time.sleep(0.2)
        assert path.exists(), "the server did not start"
        yield path
    finally:
        server.stdin.close()
        server.kill()
        server.wait()


@pytest.fixture
def call(socket, tmp_path, cache_home):
    """Starts a call of the script; its output goes to tmp_path/told."""

    def start(which, **settings):
        environment = {
            **os.environ, "REHEARSE": "1", "PYTHON": sys.executable, "WORK": str(tmp_path / "work"),
            "RUN": f"{sys.executable} {ROOT}/tests/rehearsal/server.py {socket}", "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(cache_home), "PACK_EVERY": "4", **settings,
        }  # fmt: skip
        with (tmp_path / "told").open("ab") as told:
            command = ["bash", str(SCRIPT), which, str(tmp_path / "out")]
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True
            )

    yield start


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


def test_both_calls_and_what_they_bring_back(call, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    status = call("first", ONLY=FIRST).wait(timeout=500)
    told = (tmp_path / "told").read_text()
    steps = (work / "steps.txt").read_text()
    assert status == 0, f"{steps}\n{told[-3000:]}"
    wanted = set(FIRST.split())
    assert (
        set(re.findall(r"^(\w+) ended with 0 ", steps, re.M)) | set(re.findall(r"^(\w+) not run", steps, re.M))
        == wanted
    )
    archived = assert_can_come_back(out)
    assert {f"{name}.log" for name in wanted if f"{name} not run" not in steps} <= archived
    assert not any("safetensors" in name or "triton/" in name for name in archived)
    labels = ["no_engram", "own_compute", "resident", "resident again", "offload_naive", "offload_prefetch",
              "offload_uva", "offload_hot 1 %"]  # fmt: skip
    for case in json.loads((out / "end_to_end.json").read_text())["cases"]:
        assert [row["label"] for row in case["rows"]] == labels
        assert case["rows"][0]["graphs"] == {"used": True, "why": None}
        assert len({sample["tokens_sha256"] for row in case["rows"][2:] for sample in row["rounds"]}) == 1
    shapes = [step["shape"]["tokens"] for step in json.loads((out / "wall.json").read_text())["steps"]]
    assert shapes == [8, 8]
    assert sum(int(s.get("tests")) for s in xml.parse(out / "tests.xml").getroot()) >= 1
    assert told.endswith((out / "summary.txt").read_text())
    for name in wanted & {"served_8b", "prefill"}:
        assert "0 ranges still registered, 0 calls refused" in (work / f"{name}.log").read_text()

    shutil.rmtree(out)
    assert call("second").wait(timeout=200) == 0, (tmp_path / "told").read_text()[-3000:]
    assert_can_come_back(out)
    assert {label for _, label, _ in passes(out / "end_to_end.json")} == {
        "no_engram", "resident", "resident again", "offload_prefetch", "offload_uva"
    }  # fmt: skip


def kill_session(leader):
    """The script and all that it started, at once: a machine that is taken away."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.mark.parametrize(("seed", "number"), [(1, signal.SIGTERM), (2, signal.SIGKILL)])
def test_a_cut_at_any_moment_loses_nothing_that_was_finished(seed, number, call, tmp_path):
    out, record = tmp_path / "out", tmp_path / "work/served_8b/results.json"
    rng = random.Random(seed)
    wanted, pause = rng.randrange(3, 14), rng.random()
    script = call("first", ONLY="served_8b prefill")
    deadline = time.monotonic() + 120
    while len(passes(record)) < wanted and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(pause)
    before = passes(record)
    assert len(before) >= wanted
    if number == signal.SIGTERM:
        script.terminate()
        assert script.wait(timeout=60) == 143
        assert before <= passes(record) == passes(out / "end_to_end.json")
        assert (tmp_path / "told").read_text().endswith((out / "summary.txt").read_text())
        assert not list((tmp_path / "work").rglob(".results-*")), "a temporary file was left"
    else:
        kill_session(script.pid)
        script.wait()
        assert before <= passes(record)
    assert_can_come_back(out)
    if number == signal.SIGKILL:
        return  # going on is the same after both, and seconds longer
    assert call("first", ONLY="served_8b").wait(timeout=200) == 0
    again = json.loads(record.read_text())
    whole = {case for case, _, _ in before if sum(c == case for c, _, _ in before) == 8}
    assert again["sessions"][1]["kept"] == 8 * len(whole) and len(passes(record)) == 16
    assert assert_can_come_back(out)
