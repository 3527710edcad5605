"""Without torch, whatever needs it says in one line how to get it, and the rest works as before."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import engram_ref

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FREE = {
    *("config", "vocab", "hashing", "plan", "cli", "checkpoint", "checkpoint.config_json", "checkpoint.folder"),
    *("files.replacing", "files.header"),
}
CODE = """
import importlib, sys
sys.modules["torch"] = None  # as if it were not installed
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        print(name, "imported")
    except ModuleNotFoundError as error:
        print(name, error.name, error)
"""


def test_every_module_imports_or_says_how_to_get_torch():
    found = pkgutil.walk_packages(engram_ref.__path__, "engram_ref.")
    names = [module.name for module in found if not module.name.endswith("checkpoint.sample")]
    done = subprocess.run([sys.executable, "-c", CODE, *names], capture_output=True, text=True, check=True, cwd=ROOT)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(said) == names
    for name, words in said.items():
        if words != "imported":
            assert words.startswith("torch this part of engram_ref needs torch") and "pip install" in words, name
    assert {f"engram_ref.{name}" for name in FREE} <= {name for name, words in said.items() if words == "imported"}
    assert {name for name, words in said.items() if words != "imported"} >= {"engram_ref.layer", "engram_ref.attach"}
