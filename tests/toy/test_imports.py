"""The twin needs nothing but Python: imported and run where nothing else can be imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "numba", "engram_ref", "sympy", "tokenizers", "bench"}:
            raise ImportError(name + " must not be imported")

sys.meta_path.insert(0, Refuse())
import importlib, pkgutil
import engram_toy
for module in pkgutil.walk_packages(engram_toy.__path__, "engram_toy."):
    if not module.name.startswith(("engram_toy.fast", "engram_toy.tracer.arrays")):  # loaded on demand
        importlib.import_module(module.name)
from engram_toy.bytedmd import traced_eval
assert traced_eval(lambda a, b, c: (a + b) + c, (1, 2, 3)) == ([1, 2, 1, 2], 6)
"""

# With everything installed: importing the twin must still load none of it.
NOTHING_LOADED = """
import sys, importlib, pkgutil
import engram_toy
for module in pkgutil.walk_packages(engram_toy.__path__, "engram_toy."):
    if not module.name.startswith(("engram_toy.fast", "engram_toy.tracer.arrays")):  # loaded on demand
        importlib.import_module(module.name)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "numpy", "numba", "engram_ref", "bench"}, loaded
"""

REFERENCE_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import engram_ref.config, engram_ref.vocab, engram_ref.hashing, engram_ref.checkpoint.folder, engram_ref.plan
assert "numba" not in sys.modules and "transformers" not in sys.modules and "sympy" not in sys.modules
assert "bench" not in sys.modules
"""


# What a laptop without torch runs: prices, rows at scale, hashing, and whatever shows results.
COMMANDS_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import importlib
for name in ("bytedmd_toy", "production", "row_definitions", "row_speed", "pricing_speed", "hashing_speed", "verdict",
             "compare", "how_far", "findings"):
    importlib.import_module(f"bench.{name}")
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_twin_needs_the_standard_library_only():
    done = run(ALONE)
    assert done.returncode == 0, done.stderr


def test_the_twin_loads_nothing_even_where_it_is_installed():
    done = run(NOTHING_LOADED)
    assert done.returncode == 0, done.stderr


def test_the_reference_needs_no_torch():
    done = run(REFERENCE_WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr


def test_the_check_can_fail():
    done = run(ALONE + "\nimport numpy\n")
    assert done.returncode != 0 and "numpy must not be imported" in done.stderr


def test_commands_that_need_no_torch_load_none():
    done = run(COMMANDS_WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
