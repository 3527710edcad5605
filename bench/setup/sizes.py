"""How large a table this machine takes, on which device, and how its rows are stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from engram_ref.config import EngramConfig
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import free_host_bytes

MOST_ROWS = 2**31 - 1000  # of a column; its prime, found from there upwards, must be below 2^31
MOST_TOKENS = 1 << 24  # of a step: far more than any machine computes at once, and refused before it is tried
LAYER = 1  # Engram stands before the second block, as in the paper's offloading experiment
_MAX_SHARE = 0.85  # of free host memory that a table called max takes
_DISK_HEADROOM = 1 << 28  # bytes left to everybody else


def largest(preset: str, dtype: str) -> float:
    """Parameters of the largest table that host memory holds with room to spare; scales of fp8 rows take their part.

    Raises:
        ValueError: the system does not say how much memory is free.
    """
    free = free_host_bytes()
    if free is None:
        raise ValueError("this system does not say how much memory is free: give --table_params a number")
    config = EngramConfig.preset(preset)
    row_bytes = config.replace(row_dtype=stored_dtype(preset, dtype)).row_bytes()
    return float(int(_MAX_SHARE * free * config.row_width / row_bytes))


def stored_dtype(preset: str, dtype: str) -> str:
    """How the rows of a table are stored: fp8 where the preset's are, else in the dtype of the model."""
    config = EngramConfig.preset(preset)
    return config.row_dtype if RowFormat.of(config).scaled else dtype


def pick_device(name: str) -> torch.device:
    """cpu, cuda, or auto: CUDA where there is one.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device on this machine; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def table_config(preset: str, params: float, hidden: int, dtype: str) -> EngramConfig:
    """The preset's geometry with one layer of about `params` parameters, on one residual stream of `hidden` values.

    Raises:
        ValueError: more rows in a column than can be numbered.
    """
    config = EngramConfig.preset(preset).replace(layer_ids=(LAYER,))
    if config.form != "qwen":  # of token ids as they are, the size is part of the hash
        config = config.replace(compressed_size=None)
    per_column = max(2, round(params / (config.columns * config.row_width)))
    if per_column > MOST_ROWS:
        most = MOST_ROWS * config.columns * config.row_width
        raise ValueError(
            f"--table_params {params:.3g}: a table of preset {preset} has at most {most:.3g}, with rows of "
            f"{config.row_width} values; take fewer, or a preset with wider rows"
        )
    return config.replace(
        hidden=hidden,
        hc_mult=1,  # the decoders around it have one residual stream
        row_dtype=stored_dtype(preset, dtype),
        table_size_per_order=(per_column,) * len(config.orders),
    )


def require_disk(nbytes: int, folder: Path) -> None:
    """Refuse with both numbers a file that the disk under `folder` cannot hold.

    Raises:
        ValueError: fewer than `nbytes` are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if nbytes + _DISK_HEADROOM > free:
        raise ValueError(
            f"{nbytes / 2**30:.2f} GiB do not fit onto the disk of {folder}, of which {free / 2**30:.2f} GiB are free: "
            "take a smaller table or another --out"
        )
