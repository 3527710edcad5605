"""A plugin for pytest: of every file's tests the first that the stand-in can judge, since the plan's groups have hundreds.

What needs the device to be slower than the host (delays, races, stress) is left out: nothing is concurrent here.
"""

from __future__ import annotations

_CONCURRENT = ("busy", "without", "stop", "when_it_is_known", "depends_on", "wrong", "stream", "check")


def pytest_collection_modifyitems(config, items):
    """Keep the first test of each file."""
    judged = [item for item in items if not any(word in item.name for word in _CONCURRENT)]
    first = {item.fspath: item for item in reversed(judged)}
    config.hook.pytest_deselected(items=[item for item in items if first.get(item.fspath) is not item])
    items[:] = [item for item in items if first.get(item.fspath) is item]
