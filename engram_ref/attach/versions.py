"""Which releases of torch and transformers this was tested with, and a word, once, about newer ones.

`make ranges` tests both ends of every range that pyproject.toml states; the newest are named here.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings

NEWEST_TESTED = {"torch": (2, 15), "transformers": (5, 24)}


@functools.cache
def tell_untested() -> None:
    """Warn, once in a process, of a release that is newer than all tested ones."""
    for name, tested in NEWEST_TESTED.items():
        version = str(getattr(sys.modules.get(name), "__version__", "0"))
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) > tested:
            warnings.warn(
                f"{name} {version} is newer than {'.'.join(map(str, tested))}, the newest that Engram was tested with: "
                "compare cached with uncached generation before you rely on it",
                stacklevel=3,
            )
