"""Whether loops can be compiled here: numba makes them faster, and nothing may fail because of it.

    loops = importlib.import_module("engram_ref.rows.gather_fused") if numba_works() else None

An installed numba may still refuse to be imported. That is told once; the loops of NumPy and torch take over, with the
same results.

    python -m pytest tests/ref/test_compiled.py
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

from engram_ref.quoting import one_line


def numba_works() -> bool:
    """Whether numba is installed and can be imported; a broken one is a RuntimeWarning, the first time."""
    return importlib.util.find_spec("numba") is not None and _is_importable()


@functools.cache
def _is_importable() -> bool:
    try:
        for name in ("llvmlite.ir", "numba", "numba.extending"):
            importlib.import_module(name)
        if importlib.import_module("numba").config.DISABLE_JIT:  # by NUMBA_DISABLE_JIT, to debug: it compiles nothing
            return False
    # ImportError, SystemError, OSError, AttributeError: each numba supports some versions of NumPy and Python only.
    except Exception as error:
        versions = ", ".join(f"{name} {_version(name)}" for name in ("numba", "llvmlite", "numpy"))
        warnings.warn(
            f"numba cannot be imported ({type(error).__name__}: {one_line(error, 200)}), so slower loops take its "
            f"place: install versions that fit each other; these are {versions}, Python {platform.python_version()}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
