"""The house: who may import whom, no circles, and no folder that holds more than a reader can look over.

What stands in ROOMS on the left may import what stands on its right, nothing else of the project. A room is a folder
of a package, or a file at its root; modules are found by walking the packages, so that a new folder cannot escape.
"""

from pathlib import Path

import pytest

from bench.instruments.code_digest import imported_modules
from bench.site.file_tree import first_line

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES = 15
_WORDS = "needs_torch quoting"  # may be imported from anywhere in engram_ref
ROOMS = {
    # engram_ref
    "engram_ref": "",
    "engram_ref.needs_torch": "",
    "engram_ref.quoting": "",
    "engram_ref.config": "",
    "engram_ref.ids": "",
    "engram_ref.starting": "cli plan",
    "engram_ref.cli": "",
    "engram_ref.compiled": "",
    "engram_ref.devices": "",
    "engram_ref.loops": "",
    "engram_ref.gpu": "",
    "engram_ref.free_memory": "",
    "engram_ref.recording": "",
    "engram_ref.threads": "",
    "engram_ref.rows": "config compiled free_memory loops gpu threads",
    "engram_ref.files": "config compiled loops threads rows",
    "engram_ref.vocab": "config ids files",
    "engram_ref.hashing": "config ids compiled loops gpu devices vocab",
    "engram_ref.sharding": "",
    "engram_ref.tables": "config devices gpu threads rows files sharding",
    "engram_ref.fusion": "config compiled loops gpu devices rows",
    "engram_ref.calling": "compiled loops gpu threads rows",
    "engram_ref.lookup": "ids gpu devices rows vocab hashing tables",
    "engram_ref.prefetch": "devices threads hashing tables",
    "engram_ref.layer": "config devices recording rows hashing tables fusion",
    "engram_ref.checkpoint": "config cli devices rows files vocab hashing tables fusion layer",
    "engram_ref.histories": "ids hashing tables fusion layer",
    "engram_ref.attach": (
        "config ids devices recording rows files vocab hashing tables fusion lookup calling prefetch layer histories"
    ),
    "engram_ref.plan": "config cli files vocab hashing checkpoint",
    "engram_ref.place": "starting config cli free_memory files vocab hashing checkpoint tables rows sharding",
    # engram_toy
    "engram_toy": "",
    "engram_toy.fp8": "",
    "engram_toy.hashing": "",
    "engram_toy.tracer": "",
    "engram_toy.definitions": "tracer",
    "engram_toy.floor": "tracer definitions",
    "engram_toy.functional": "tracer",
    "engram_toy.fusion": "fp8 functional",
    "engram_toy.fast": "tracer definitions floor",
    "engram_toy.bytedmd": "tracer definitions floor fast",  # `fast` when it is asked for
    "engram_toy.models": "fp8 hashing functional fusion bytedmd",
}
# Where the twins meet; nothing imports it but its own command.
MEETING = {"engram_price": "", "engram_price.command": "", "engram_price.__main__": "command"}
_LIBRARY = "engram_ref engram_toy examples"
BENCH = {
    "schemas": "",  # may be imported from anywhere in bench
    "instruments": "",
    "setup": "instruments",
    "wall": "instruments setup",
    "served": "instruments setup",
    "rivals": "instruments setup",
    "ranks": "instruments setup",
    "price": "instruments setup",
    "sweeps": "instruments setup price",
    "rows": "instruments setup price",
    "reads": "instruments setup",
    "energy": "instruments setup rows",
    "lab": "",
    "gpu": "instruments setup",
    "evidence": "instruments setup wall served rivals price sweeps rows energy",
    "ranges": "instruments setup price sweeps rows energy evidence",
    "site": "instruments price rows evidence",
}


def allowed() -> dict[str, set[str]]:
    """Room -> the rooms that it may import; the commands at the root of bench may import all."""
    table = {
        room: {f"{room.partition('.')[0]}.{name}" for name in [*names.split(), *_WORDS.split()]}
        for room, names in ROOMS.items()
    }
    library = {room for room in table if room.startswith("engram_")}
    for room, names in MEETING.items():
        table[room] = {f"engram_price.{name}" for name in names.split()} | library
    for room, names in BENCH.items():
        table[f"bench.{room}"] = {f"bench.{name}" for name in ["schemas", *names.split()]} | library
    table["bench"] = {f"bench.{room}" for room in BENCH} | library
    return table


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for package in ("engram_ref", "engram_toy", "engram_price", "bench"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, table: dict[str, set[str]]) -> str:
    """The folder of its package that a module is in, or itself."""
    package, _, rest = module.partition(".")
    room = f"{package}.{rest.partition('.')[0]}" if rest else package
    return package if package == "bench" and room not in table else room


def edges(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that it imports, packages for what they hold left out."""
    named = {name for name in imported_modules(path) if name in known and name != module}
    return {name for name in named if not any(other.startswith(f"{name}.") for other in named)} - {
        module.rpartition(".")[0]
    }


def upward(graph: dict[str, set[str]], table: dict[str, set[str]]) -> list[str]:
    """Imports that the table does not allow."""
    return [
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in sorted(names)
        if room_of(name, table) not in table[room_of(module, table)] | {room_of(module, table)}
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, if any do."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for name in sorted(graph.get(module, ())):
            found = walk(name, [*way, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {module: edges(module, path, known) for module, path in known.items()}


def test_every_room_is_in_the_table(graph):
    table = allowed()
    assert {room_of(module, table) for module in graph} == set(table)


def test_imports_point_one_way(graph):
    assert upward(graph, allowed()) == []


def test_no_circle(graph):
    assert circle(graph) == []


def test_folders_can_be_looked_over():
    for folder in {path.parent for path in modules().values()}:
        files = [path for path in folder.iterdir() if path.suffix in (".py", ".sh") and path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, folder


def test_two_levels_and_no_third():
    assert max(len(path.relative_to(ROOT).parts) for path in modules().values()) == 3


def test_every_module_says_what_it_is():
    for path in modules().values():
        assert first_line(path).endswith((".", ":", "?")) or path.name == "__init__.py", path


def test_the_checks_can_fail(graph):
    wrong = {**graph, "engram_ref.rows.fp8": {"engram_ref.layer"}, "bench.wall.step": {"bench.served.run"}}
    assert sorted(upward(wrong, allowed())) == [
        "bench.wall.step imports bench.served.run",
        "engram_ref.rows.fp8 imports engram_ref.layer",
    ]
    assert set(circle(wrong)) >= {"engram_ref.rows.fp8", "engram_ref.layer"}
