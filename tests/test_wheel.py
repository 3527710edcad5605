"""The wheel by itself: built, installed into a clean environment, its commands run from another folder.

Offline and short: nothing is downloaded, and what it depends on is borrowed from the environment of the tests.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import engram_ref

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("engram_ref", "engram_toy", "engram_price")
SOURCES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left beside the sources."""
    folder = tmp_path_factory.mktemp("build")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder / "out"), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A clean environment with the wheel in it; what it depends on is the tests' own, behind it on the path."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q", "--no-deps"]
    done = subprocess.run([*command, "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # its own .pth files are not followed
    (site / "numba.py").write_text("raise ImportError")  # no dependency, and its loops would be compiled once more
    return home / "bin"


@pytest.fixture(autouse=True)
def _environment(monkeypatch, cache_home):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


def run(program, *argv, cwd, code=0):
    done = subprocess.run([str(program), *argv], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not re.match(r"engram_offload-[^/]+\.dist-info/", name)}
        scripts = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        said = archive.read(scripts).decode()
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert held == sources | {f"{package}/py.typed" for package in PACKAGES}
    assert {line.partition(" ")[0] for line in said.splitlines()[1:] if line} == {
        "engram-plan", "engram-place", "engram-price",
    }  # fmt: skip


def test_what_is_installed_is_the_wheel(installed, tmp_path):
    code = "import engram_ref, engram_toy, engram_price; print(engram_ref.__file__, engram_ref.__version__)"
    where, version = run(installed / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert where.startswith(str(installed.parent)) and version == engram_ref.__version__
    about = "import importlib.metadata as m; print(m.version('engram-offload'))"
    assert run(installed / "python", "-c", about, cwd=tmp_path).stdout.strip() == version
    assert version in run(installed / "engram-plan", "--version", cwd=tmp_path).stdout


def test_its_commands_run_from_another_folder(installed, tmp_path):
    plan = json.loads(run(installed / "engram-plan", "--preset", "tiny", cwd=tmp_path).stdout)
    assert plan["cost"]["columns"] == 16
    text = tmp_path / "text.txt"
    text.write_text("a river of words that flows on and on " * 20)
    options = ("--gpu", "80GB", "--host", "512GB", "--disk", "2TB", "--text", text.name, "--json")
    place = json.loads(run(installed / "engram-place", "--preset", "tiny", *options, cwd=tmp_path).stdout)
    assert place["recommendation"]["placement"] and place["model"]["rows"] == [plan["cost"]["rows"]]
    options = ("--text", text.name, "--tokens", "8", "--padding", "0", "--json")  # the tracer is slow without numba
    price = json.loads(run(installed / "engram-price", *options, cwd=tmp_path).stdout)
    assert price["table_rows"] == plan["cost"]["rows"]
    assert list(tmp_path.iterdir()) == [text]


def test_without_torch_a_command_that_needs_it_says_so_in_one_line(installed, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from engram_ref.place.command import main\n"
        "main(['--preset', 'tiny', '--measure'])"
    )
    done = run(installed / "python", "-c", code, cwd=tmp_path, code=2)
    assert done.stderr.count("\n") == 1 and "pip install 'engram-offload[ref]'" in done.stderr
