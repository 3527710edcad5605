"""Triton's interpreter, made quick for kernels that call functions of their own.

It puts its own operations in the place of the language's whenever a function is called, some milliseconds each time,
also where they are there already because the caller is interpreted, too. Inside of a call that has done so for the
same modules it need not be done again.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


class _Nothing:
    def restore(self) -> None:
        """There is nothing to put back."""


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test; a Triton that does it in another way stays as it is."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="kernels are interpreted by Triton")
    patch: Any = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    done: set[int] = set()

    def patch_once(function: Any) -> Any:
        modules = {id(x) for x in function.__globals__.values() if isinstance(x, ModuleType) and _is_language(x)}
        if done and modules <= done:
            return _Nothing()
        added = modules - done
        done.update(added)
        scope = patch(function)
        restore = scope.restore

        def put_back() -> None:
            done.difference_update(added)
            restore()

        scope.restore = put_back
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def _is_language(module: ModuleType) -> bool:
    return module.__name__.startswith("triton.language")
