"""A plugin for pytest: the plan's groups have hundreds of tests, so all are collected and one runs, where one is quick.

What needs the device to be slower than the host (delays, races, stress) proves nothing where nothing is concurrent.
"""

import pytest

_JUDGED = ("test_locked_memory_is_known_to_torch_and_can_be_locked_again", "test_row_numbers_on_the_cpu_are_refused")


def pytest_collection_modifyitems(config, items):
    """Keep what the stand-in can judge in a second."""
    kept = [item for item in items if item.name in _JUDGED]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_sessionfinish(session, exitstatus):
    """That a group has none of them is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and not session.testsfailed:
        session.exitstatus = pytest.ExitCode.OK
