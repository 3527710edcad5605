"""Damaged headers of safetensors files: read, or refused by a ValueError of one line, soon and in little memory.

python -m tests.fuzz --only headers
"""

import json
import random
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_ref.files.header import DTYPE_BITS, read_header

SOON = 5.0  # seconds for a header of some kilobytes, on a machine that does other things, too
MOST_BYTES = 8 << 20  # at any moment while one is read
LONGEST = 3000  # characters of a message
ODD = (None, True, -1, 0, 1.5, 2**31, 2**63, 2**64, 10**400, "", "F8_E4M3", "\x1b[2J\n", [], {}, [1] * 300, [[1]])


def run(count: int, seed: int) -> dict[str, Any]:
    """So many headers, each with one to three changes to its meaning or its bytes."""
    chance, faults, refused = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as folder, _traced():
        path = Path(folder) / "x.safetensors"
        for number in range(count):
            path.write_bytes(damaged(chance))
            tracemalloc.reset_peak()
            before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
            try:
                entries = read_header(path)
                size = path.stat().st_size
                if any(entry.offset + entry.nbytes > size or entry.nbytes < 0 for entry in entries.values()):
                    faults.append(f"header {number}: a tensor outside of the file")
            except ValueError as error:
                refused += 1
                if not str(error).isprintable() or len(str(error)) > LONGEST:
                    faults.append(f"header {number}: {str(error)[:200]!r}")
            except Exception as error:  # whatever else it is, it is what we look for
                faults.append(f"header {number}: {type(error).__name__}: {str(error)[:200]!r}")
            if (seconds := time.monotonic() - began) > SOON:
                faults.append(f"header {number}: {seconds:.1f} s")
            if (most := tracemalloc.get_traced_memory()[1] - before) > MOST_BYTES:
                faults.append(f"header {number}: {most:,} bytes of memory")
    return {"cases": count, "refused": refused, "faults": faults}


@contextmanager
def _traced() -> Iterator[None]:
    """Count the bytes that Python and numpy take."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def damaged(chance: random.Random) -> bytes:
    """A file of some tensors, side by side, and what chance makes of it."""
    header: dict[str, Any] = {"__metadata__": {"k": "v"}} if chance.random() < 0.3 else {}
    end = 0
    for name in "abcd"[: chance.randint(0, 4)]:
        dtype, shape = chance.choice(list(DTYPE_BITS)), [chance.randint(0, 5) * 4, chance.randint(1, 4)]
        begin, end = end, end + shape[0] * shape[1] * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    kinds = chance.sample(("meaning", "bytes", "length", "cut", "none"), chance.randint(1, 3))
    if "meaning" in kinds and header:
        entry = header[chance.choice(list(header))]
        entry[chance.choice(list(entry))] = chance.choice(ODD)
    text = bytearray(json.dumps(header).encode())
    for _ in range(chance.randint(1, 4) if "bytes" in kinds else 0):
        at = chance.randrange(len(text) + 1)  # its end, too: nothing may be left of it
        text[at : at + chance.randint(0, 2)] = chance.choice((b"", b"{", b"]", b"9" * 1500, b"\xff", b"[" * 5000, b'"'))
    length = (
        len(text)
        if "length" not in kinds
        else chance.choice((0, max(0, len(text) - 1), len(text) + 1, 1 << 40, 2**64 - 1))
    )
    content = length.to_bytes(8, "little") + bytes(text) + bytes(end)
    return content[: chance.randrange(len(content) + 1)] if "cut" in kinds else content
