"""Compiled loops where numba is broken or its cache cannot be written: the same prices, and one word about it."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
BROKEN = """
import sys, warnings
if {broken}:
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "numba.core":
                raise ImportError("Numba needs NumPy 2.4 or less")
    sys.meta_path.insert(0, Broken())
from engram_toy.bytedmd import trace
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        run = trace(lambda a: (a[0] + a[1], a), (list(range(200_000)),))
print(run.compiled, run.cost(), len(caught), *[str(w.message)[:18] for w in caught])
"""


def test_a_numba_that_cannot_be_imported_is_named_once():
    lines = []
    for broken in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", BROKEN.format(broken=broken)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.split(maxsplit=3))
    (_, price, warned, *_), (compiled, same_price, warned_once, text) = lines
    assert (warned, warned_once, compiled, price) == ("0", "1", "False", same_price)
    assert text.startswith("numba is not used")


COMPILED = "from engram_toy.fast.compiling import compiled\n@compiled()\ndef twice(x): return x + x\nprint(twice(3))"


def no_file_may_grow():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize("limit", [None, no_file_may_grow], ids=["nowhere to write", "nothing can be written"])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, limit):
    cache = str(tmp_path / "cache")
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
    if limit is None:
        for name in ("cache", "__pycache__"):
            (tmp_path / name).write_text("a file where the folder would be")
    (tmp_path / "loop.py").write_text(COMPILED)
    done = subprocess.run(
        [sys.executable, "loop.py"], env=env, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit
    )
    assert (done.stdout, done.returncode) == ("6\n", 0), done.stderr
