"""A numba that is installed and broken: told once, in one line with the versions, and everything works without it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram_ref import compiled
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ERRORS = [
    ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.5."),
    SystemError("initialization of _internal failed without raising an exception"),
    OSError("Could not find/load shared object file\nlibllvmlite.so"),
    AttributeError("module 'numpy' has no attribute 'long'"),
]


@pytest.fixture
def broken(monkeypatch):
    """Lets the import of numba fail with an error."""
    real = importlib.import_module

    def fail_with(error):
        def refuse(name, package=None):
            if name.split(".")[0] == "numba":
                raise error
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", refuse)

    compiled._is_importable.cache_clear()
    yield fail_with
    compiled._is_importable.cache_clear()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_broken_numba_is_told_once_and_done_without(error, broken):
    plan = HashPlan.build(EngramConfig.preset("tiny"), 97, 2)
    broken(error)
    with pytest.warns(RuntimeWarning) as told:
        assert NgramHasher(plan).backend == "numpy" and NgramHasher(plan).backend == "numpy"
    assert len(told) == 1
    text = str(told[0].message)
    assert type(error).__name__ in text and str(error)[:20] in text and "\n" not in text
    assert all(name in text for name in ("numba", "llvmlite", "numpy", "Python 3."))
    with pytest.raises(ValueError, match="backend='numba': it is not installed or cannot be imported; use 'numpy'"):
        NgramHasher(plan, "numba")


def test_interrupting_the_import_is_not_a_broken_numba(broken):
    broken(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compiled.numba_works()


EVERYTHING = """
import warnings
sys.modules["triton"] = None  # as if it were not installed either
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import numpy, torch
    import engram_ref.layer, engram_ref.prefetch
    from engram_ref.config import EngramConfig
    from engram_ref.hashing import HashPlan, NgramHasher
    from engram_ref.rows import gather
    from engram_ref.tables import make_table
    from engram_ref.tables.file import StoredRows, save_rows
    from engram_ref.rows.rows import Rows
    NgramHasher(HashPlan.build(EngramConfig.preset("tiny"), 97, 2))(numpy.array([[3, 4]]), 1)
told = [str(warning.message) for warning in told if "numba" in str(warning.message)]
assert len(told) == 1 and "Numba needs NumPy 2.4 or less" in told[0], told
assert gather._copy_rows is None
raw, rows = torch.arange(99 * 33).remainder(120).to(torch.uint8).view(99, 33), torch.tensor([5, 98, 5])
table = Rows.from_packed(raw)
save_rows(FILE, table)
plain = torch.arange(99 * 8.0).view(99, 8)
for placement, content, expected, options in (
    ("device", table, table.values(), {}),
    ("host", table, table.values(), {}),
    ("file", StoredRows.find(FILE), table.values(), {}),
    ("device", plain, plain, {}),
    ("hot", plain, plain, {"hot": torch.tensor([5])}),
):
    with make_table(placement, content, **options) as made:
        assert torch.equal(made.start(rows).wait(), expected[rows])
try:
    make_table("uva", plain)
except ValueError as error:
    print(error)
"""


def test_the_package_works_with_a_broken_numba_and_without_triton(tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(f"raise ImportError({str(ERRORS[0])!r})\n", encoding="utf-8")
    code = f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}; FILE = {str(tmp_path / 't')!r}\n{EVERYTHING}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("this machine cannot serve placement uva: needs a CUDA device and Triton")
    assert done.stdout.count("\n") == 1


UNCOMPILED = """
import numpy, torch
import engram_ref.layer
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_toy.bytedmd import traced_eval
assert NgramHasher(HashPlan.build(EngramConfig.preset("tiny"), 97, 2)).backend == "numpy"
assert traced_eval(lambda a, b, c: (a + b) + c, (1, 2, 3)) == ([1, 2, 1, 2], 6)
"""


def test_the_package_works_where_numba_is_told_to_compile_nothing():
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", UNCOMPILED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
