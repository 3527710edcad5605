"""The fetch of real processes that share tables: bytes counted against the plan's formula, and times beside them.

    torchrun --standalone --nproc-per-node 4 bench/gpu_wall.py --sharded --out out/sharded

Every rank makes its own rows (content that can be computed again, so that every fetched row is checked), hashes tokens
of its own, and fetches both layers through a prefetcher. Ways: `owners` (row numbers to the owners, rows back),
`unique` (each row once) and `same tokens` (tensor parallel). Rank 0 writes one results file; runs with other numbers of
ranks and the same --out are added to it, and so is the model of the exchange. gloo without CUDA; with it nccl, and
a GPU for each rank. It has run over gloo alone.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.instruments.driver import device_head
from bench.instruments.journal import earlier
from bench.instruments.results import write_json
from bench.ranks.model import model_table
from bench.ranks.schedule import schedule_table
from bench.setup.sizes import pick_device
from bench.setup.table_content import expected_rows, require_written
from engram_ref.cli import time_left
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.prefetch import FetchError, Prefetcher
from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows
from engram_ref.sharding.plan import ShardPlan
from engram_ref.tables import make_table
from engram_ref.tables.sharded import ShardedTable

WAYS: dict[str, dict[str, Any]] = {"owners": {}, "unique": {"unique": True}, "same tokens": {"same_tokens": True}}
COMPRESSED, PAD = 9973, 2  # a vocabulary of this size; the rows of a token depend on it, the bytes do not
WARMUP = 2  # rounds that are not kept
_PIECE = 1 << 16  # rows that are made together
_WAIT_S = 300  # for the others: a rank makes all of its rows before it comes
_START = "torchrun --standalone --nproc-per-node 4 bench/gpu_wall.py --sharded"


def measure(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The command's work on each rank; the results on rank 0, None on the others.

    Raises:
        ValueError: not started by torchrun, a row that is not the one asked for, or bytes that are not the formula's.
        OSError: a rank ended, or the file cannot be written.
    """
    if "RANK" not in os.environ:
        raise ValueError(f"--sharded is run by several processes: {_START}")
    device = device_of_rank(options.device)
    # Before anything is measured: what was measured otherwise is refused while that costs nothing.
    results = begun(options, device) if os.environ["RANK"] == "0" else {}
    # nccl is told the GPU, or a barrier would guess one; gloo has none.
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(seconds=_WAIT_S), device_id=own)
    try:
        run = _measure(options, device, tell if dist.get_rank() == 0 else lambda text: None)
        return _written(options, results, run) if dist.get_rank() == 0 else None
    except FetchError as error:  # of a rank that is gone, say
        raise OSError(str(error)) from error
    finally:
        dist.destroy_process_group()


def device_of_rank(name: str) -> torch.device:
    """This rank's device, CUDA's current one from here on: of the machine's GPUs one for each of its ranks.

    Raises:
        ValueError: CUDA was asked for and is not there, or this machine has more ranks than GPUs.
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= gpus:  # nccl takes no two ranks on one GPU
        raise ValueError(f"rank {place} of this machine has no GPU of its own of {gpus}: start {gpus}, or --device cpu")
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def _measure(options: argparse.Namespace, device: torch.device, tell: Callable[[str], None]) -> dict[str, Any]:
    config = _sized(EngramConfig.preset(options.preset), options.table_params[0], options.dtype)
    plan = HashPlan.build(config, COMPRESSED, PAD)
    ranks, cases, began = dist.get_world_size(), list[dict[str, Any]](), time.monotonic()
    for way, choices in WAYS.items():
        tables = _tables(plan, config, device, options.seed, choices)
        for shape in options.steps:
            took = time_left(time.monotonic() - began, len(cases), len(WAYS) * len(options.steps))
            tell(f"{way}, {shape}  {took}")
            cases.append({"way": way, **_case(options, plan, tables, shape.batch, shape.tokens, way)})
        for table in tables.values():
            table.close()
    rows = [layer.rows for layer in plan.layers]
    return {
        **{"ranks": ranks, "preset": options.preset, "rows": rows, "row_bytes": RowFormat.of(config).row_bytes},
        **{"columns": ShardPlan.of_layer(plan.layers[0], ranks).columns, "backend": dist.get_backend(), "cases": cases},
    }


def _sized(config: EngramConfig, params: float, dtype: str) -> EngramConfig:
    """The geometry with tables of so many values in all layers together."""
    rows = params / (config.row_width * config.columns * len(config.layer_ids))
    sizes = (max(2, int(rows)),) * len(config.orders)
    row_dtype = config.row_dtype if config.row_dtype == "float8_e4m3fn" else dtype
    # None, or a plan of COMPRESSED ids would be refused.
    return config.replace(table_size_per_order=sizes, row_dtype=row_dtype, compressed_size=None)


def _tables(
    plan: HashPlan, config: EngramConfig, device: torch.device, seed: int, choices: dict[str, Any]
) -> dict[int, ShardedTable]:
    """Each rank makes the rows that it owns, and no others."""
    found: dict[int, ShardedTable] = {}
    row_format, rank = RowFormat.of(config), dist.get_rank()
    for layer in plan.layers:
        shards = ShardPlan.of_layer(layer, dist.get_world_size())
        own = torch.empty((shards.size(rank), row_format.row_bytes), dtype=torch.uint8)
        for first in range(0, len(own), _PIECE):
            numbers = torch.arange(first, min(first + _PIECE, len(own))) + shards.first(rank)
            own[first : first + len(numbers)] = expected_rows(numbers, row_format, seed + layer.layer_id)
        table = make_table("sharded", Rows(row_format, (own,)), device, plan=shards, **choices)
        assert isinstance(table, ShardedTable)
        found[layer.layer_id] = table
    return found


def _case(
    options: argparse.Namespace, plan: HashPlan, tables: dict[int, ShardedTable], batch: int, tokens: int, way: str
) -> dict[str, Any]:
    """Rounds of one shape; every row of the first is checked, all bytes of all are counted."""
    rank, hasher = dist.get_rank(), NgramHasher(plan)
    # Tensor parallel ranks have one batch between them, all others each their own.
    rng = np.random.default_rng([options.seed, 0 if way == "same tokens" else rank])
    samples = []
    with Prefetcher(hasher, tables) as prefetcher:
        for number in range(WARMUP + options.rounds):
            ids = rng.integers(0, plan.compressed_size, (batch, tokens))
            before = [table.report() for table in tables.values()]
            dist.barrier()  # or the last one to come would be charged to the exchange
            begin = time.perf_counter()
            with prefetcher.start(ids) as fetch:
                values = {layer_id: fetch[layer_id].wait() for layer_id in tables}
                if values[min(values)].is_cuda:
                    torch.cuda.synchronize()  # there only the stream has waited
                samples.append(time.perf_counter() - begin)
                if number == 0:
                    _require_right(hasher, tables, ids, values, options.seed)
            moved = [table.report() for table in tables.values()]

    def counted(name: str) -> int:
        """Bytes of the last round."""
        return sum(getattr(after, name) - getattr(first, name) for after, first in zip(moved, before))

    mine = {
        "samples_s": samples[WARMUP:],
        **{name: counted(name) for name in ("ids", "rows", "control")},
        "formula": _formula(tables, [batch * tokens] * dist.get_world_size(), way),
    }
    found: list[Any] = [None] * dist.get_world_size()  # by rank
    dist.all_gather_object(found, mine)
    _require_formula(found, way)
    return {"tokens": batch * tokens, "by_rank": found}


def _formula(tables: dict[int, ShardedTable], tokens: list[int], way: str) -> dict[str, int] | None:
    """What the plan says before anything runs; None where it depends on the tokens."""
    if way == "unique" or not all(table.plan.columns for table in tables.values()):
        return None
    told = [t.plan.bytes_received(dist.get_rank(), tokens, t.format.row_bytes) for t in tables.values()]
    asks = way != "same tokens"  # there, nobody asks: all ranks know what is wanted
    return {"ids": sum(traffic.ids for traffic in told) * asks, "rows": sum(traffic.rows for traffic in told)}


def _require_formula(found: list[dict[str, Any]], way: str) -> None:
    for rank, mine in enumerate(found):
        told = mine["formula"]
        if told is not None and (told["ids"], told["rows"]) != (mine["ids"], mine["rows"]):
            raise ValueError(f"{way}: rank {rank} received {mine['ids']} + {mine['rows']} B, the plan says {told}")


def _require_right(hasher: NgramHasher, tables: Any, ids: np.ndarray, values: Any, seed: int) -> None:
    for layer_id, table in tables.items():
        numbers = torch.from_numpy(hasher(ids, layer_id).reshape(-1)).long()
        who = f"rank {dist.get_rank()}, layer {layer_id},"
        require_written(who, values[layer_id], numbers, table.format, seed + layer_id)


def begun(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The head of the results file, and what earlier runs of the same by other numbers of ranks have left there.

    Raises:
        ValueError: they were of another configuration or code, which one head could not name.
    """
    configuration = {
        **{"seed": options.seed, "rounds": options.rounds, "table_params": options.table_params[0]},
        **{"preset": options.preset, "steps": [str(shape) for shape in options.steps], "dtype": options.dtype},
    }
    head: dict[str, Any] = {**device_head("sharded", device, configuration, "bench.ranks.run")}
    found = earlier(_file(options), head, options.fresh) or {}
    return {**head, "runs": found.get("runs", [])}


def _file(options: argparse.Namespace) -> Path:
    return Path(options.out) / "results.json"


def _written(options: argparse.Namespace, results: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The results file: this run in its place among those with other numbers of ranks, and the model."""
    kept = [other for other in results["runs"] if other["ranks"] != run["ranks"]]
    model = model_table()
    results = {
        **results,
        **{"runs": sorted([*kept, run], key=lambda x: x["ranks"]), "model": model, "schedule": schedule_table(model)},
    }
    write_json(_file(options), results)
    return results
