"""The lookup alone with other ways to read rows, as a GPU runs it, on the stand-in: what a results file has of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench.schemas.lookup_speed import Results
from tests.schemas import validator

pytest.importorskip("triton", reason="the stand-in runs kernels in Triton's interpreter")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("preset", ["v41-flash", "tiny"])
def test_ways_to_read_are_timed_beside_uva_and_counted(preset, on_stand_in, tmp_path, cache_home):
    command = [*on_stand_in, "bench/lookup_speed.py", "--device", "cuda", "--preset", preset, "--table_params", "2e5"]
    command += ["--tokens", "1", "--repeats", "1", "--reads", "as_is", "scales_there", "--out", str(tmp_path)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    validator(Results).validate(found)
    (case,) = found["cases"]
    others = set(case["samples_s"]) - {"resident", "resident again", "uva", "staged"}
    if preset == "tiny":  # bfloat16 rows of eight bytes
        (left_out,) = found["skipped"]
        assert not others and left_out["way"] == "reads" and "for packed fp8 rows of 256 values" in left_out["why"]
        return
    assert others == {"uva by two", "as_is", "scales_there"} <= set(found["ways"])
    assert case["asked"]["scales_there"] == {"lines": 2 * 24, "sectors": 8 * 24}
    assert 24 * 3 < case["asked"]["as_is"]["lines"] <= 24 * 4
