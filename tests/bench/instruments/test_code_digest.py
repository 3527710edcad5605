"""A digest changes with all code that is imported, lazily too, with nothing else, and refuses to be one of nothing."""

import pytest

from bench.instruments.code_digest import code_files, code_sha256

FILES = {
    "bench/__init__.py": "",
    "bench/command.py": "import json\nfrom bench.room import used\nfrom engram_ref.rows import sizes as s\n",
    "bench/room/__init__.py": "",
    "bench/room/used.py": "def late():\n    import engram_toy.fast.loop\n",
    "bench/room/idle.py": "",
    "bench/typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bench.room.idle\n",
    "engram_ref/__init__.py": "",
    "engram_ref/rows/__init__.py": "from engram_ref.rows.again import x\n",
    "engram_ref/rows/sizes.py": "",
    "engram_ref/rows/again.py": "from engram_ref.rows import sizes\nx = 1\n",
    "engram_toy/__init__.py": "",
    "engram_toy/fast/__init__.py": "",
    "engram_toy/fast/loop.py": "",
}


@pytest.fixture
def project(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_followed_into_functions_and_packages(project):
    found = {path.relative_to(project).as_posix() for path in code_files("bench.command", root=project)}
    assert found == set(FILES) - {"bench/room/idle.py", "bench/typed.py"}
    assert [path.name for path in code_files("bench.typed", root=project)] == ["__init__.py", "typed.py"]


@pytest.mark.parametrize("name", FILES)
def test_the_digest_changes_with_what_is_used_only(project, name):
    before = code_sha256("bench.command", root=project)
    with (project / name).open("a") as file:
        file.write("# changed\n")
    idle = name in ("bench/room/idle.py", "bench/typed.py")
    assert (code_sha256("bench.command", root=project) == before) == idle


def test_a_file_that_moved_changes_it(project):
    before = code_sha256("bench.command", root=project)
    (project / "engram_ref/rows/sizes.py").rename(project / "engram_ref/rows/shapes.py")
    assert code_sha256("bench.command", root=project) != before


@pytest.mark.parametrize("names", [(), ("bench.gone",), ("bench.command", "json"), ("bench", "bench.command.nothing")])
def test_no_digest_of_nothing(project, names):
    with pytest.raises(ValueError, match=r"a digest of no code|no module \S+ below"):
        code_sha256(*names, root=project)


def test_the_same_from_the_project_itself():
    assert {path.name for path in code_files("bench.sweeps.pricing")} >= {
        "pricing.py",
        "stack.py",
        "plan.py",
        "fused.py",
    }
