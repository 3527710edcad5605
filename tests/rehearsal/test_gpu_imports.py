"""Whatever runs on the GPU machine imports only what that machine has, by a list of its packages of a given day."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("gpu_machine_packages.txt")
_AS_IMPORTED = {"yaml": "pyyaml", "pil": "pillow", "sklearn": "scikit_learn", "pynvml": "nvidia_ml_py"}
RUN = ["bench/gpu_wall.py", "bench/gpu/preflight.py", "bench/gpu/evidence.py", "bench/*/*.py", "tests/cuda/*.py",
       "tests/conftest.py", "tests/ref/conftest.py", "tests/ref/rows/test_kernels.py", "tests/ref/tables/test_uva.py",
       "tests/ref/tables/test_in_place.py", "tests/ref/hashing/test_device.py"]  # fmt: skip


def there():
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return {line.strip().lower().replace("-", "_") for line in lines if line and not line.startswith("#")}


def imported(source, whole=""):
    """Modules that are imported when a file is: not those inside functions, nor those for type checkers alone."""
    names, open_nodes = [], list(ast.parse(source).body)
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            open_nodes += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            open_nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names


def own_file(name):
    """The file of one of our modules; tests/ref is on the path of its tests."""
    for base in (ROOT, ROOT / "tests/ref"):
        for path in (base / f"{name.replace('.', '/')}.py", base / name.replace(".", "/") / "__init__.py"):
            if path.exists():
                return path
    return None


def strangers(files, packages):
    """Third-party modules outside `packages`, with the file that imports them, following our own imports."""
    missing, seen, left = set(), set(), list(files)
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported(path.read_text(encoding="utf-8")):
            top = name.split(".")[0]
            if (own := own_file(name)) is not None:
                left.append(own)
                continue
            ours = own_file(top) is not None or (ROOT / top).is_dir()
            there_as = _AS_IMPORTED.get(top.lower(), top.lower())
            if not ours and top not in sys.stdlib_module_names and there_as not in packages:
                missing.add((top, path.name))
    return missing


def test_all_that_runs_there_can_be_imported_there():
    files = [path for pattern in RUN for path in ROOT.glob(pattern) if path.parent != ROOT / "bench/lab"]  # never there
    assert len(files) > 60
    assert strangers(files, there()) == set()


@pytest.mark.parametrize(
    "line", ["import jsonschema", "from mkdocs import x", "try:\n    import jsonschema\nexcept E: pass"]
)
def test_an_import_at_the_top_of_what_is_not_there_is_seen(line, tmp_path):
    (tmp_path / "a.py").write_text(f"import torch, json\n{line}\n", encoding="utf-8")
    assert len(strangers([tmp_path / "a.py"], there())) == 1
    (tmp_path / "a.py").write_text("import torch\ndef f():\n    import jsonschema\n", encoding="utf-8")
    assert strangers([tmp_path / "a.py"], there()) == set()
