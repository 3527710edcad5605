"""Every guard of the stand-in fires, and what it replays is what eager decoding gives, to the bit."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the stand-in runs kernels in Triton's interpreter")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CHECKS = ast.parse((Path(__file__).with_name("checks.py")).read_text(encoding="utf-8"))
NAMES = [
    node.id
    for found in CHECKS.body
    if isinstance(found, ast.Assign) and found.targets[0].id == "CHECKS"
    for node in found.value.elts
]


@pytest.fixture(scope="module")
def found(on_stand_in):
    """By check: nothing, or what went wrong; from a process of its own, which the stand-in may change."""
    command = [*on_stand_in, "-m", "tests.rehearsal.checks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_check(name, found):
    assert found[name] is None, found[name]
