"""Going on with an earlier run's results: only where machine, configuration and code are the same.

found = found_at(path)
if found is not None:
    require_same(path, found, head)
"""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import Any

from bench.instruments.reading import set_aside

Json = dict[str, Any]
_SAME = ("benchmark", "device", "device_name", "configuration", "code_sha256")


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def found_at(path: Path) -> Json | None:
    """The results of an earlier run; none there, or a file that holds none and is set aside."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        set_aside(path, f"{path} cannot be continued ({error})")
        return None
    return found


def require_same(path: Path, found: Json, head: Json) -> None:
    """Refuse to go on with results of another configuration, machine or code.

    Raises:
        ValueError: names the first difference.
    """
    for key in _SAME:
        there, here = copy.copy(found.get(key)), head.get(key)
        if there == here:
            continue
        what = key
        if isinstance(there, dict) and isinstance(here, dict):
            option = next(name for name in {**there, **here} if there.get(name) != here.get(name))
            what, there, here = f"option {option}", there.get(option), here.get(option)
        raise ValueError(
            f"{path} holds rows with another {what} ({_brief(there)}, now {_brief(here)}): "
            "continue with the same, give another --out, or start anew with --fresh"
        )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
