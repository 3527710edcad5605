"""Figures and quotations that others published: one data file, and what follows from it by arithmetic.

    from bench.evidence.published import figure, values

    figure("tokens_s.4b.baseline")    # 9031.62
    values()["loss.4b"]               # '1.92'

The documents never hold such a figure as typed text: an inline mark names one of the values, and `bench/fill_docs.py`
writes it. The data file says of each where it stands, and whether it was read there, reported by others or inferred.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from bench.energy.tiers import Tier, tiers
from bench.instruments.words import markdown

PATH = Path(__file__).resolve().parents[2] / "docs" / "findings" / "published.json"
KINDS = ("primary", "secondary", "inferred")


@cache
def _content() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding="utf-8"))


def figures() -> dict[str, dict[str, Any]]:
    """Every entry of the data file by its id."""
    return {entry["id"]: entry for entry in _content()["figures"]}


def sources() -> dict[str, dict[str, Any]]:
    """What the entries were taken from, by the name that they use for it."""
    return _content()["sources"]


def figure(name: str) -> float:
    """The number of one entry; ValueError for a quotation, a range or an unknown id."""
    value = figures()[name]["value"] if name in figures() else None
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name!r} is no single figure of {PATH.name}: give the id of one")
    return value


def bounds(name: str) -> tuple[float, float]:
    """Least and most of one entry: of a single figure, twice that figure."""
    value = figures()[name]["value"]
    return (value[0], value[1]) if isinstance(value, list) else (value, value)


def energy_tiers() -> list[Tier]:
    """The places that rows can come from, HBM first, with what others published of them."""
    return tiers(bounds)


def throughput_loss(backbone: str) -> float:
    """Share of the throughput that the paper's Engram costs on a backbone ("4b" or "8b"); no Engram at all is 0."""
    return 1 - figure(f"tokens_s.{backbone}.engram") / figure(f"tokens_s.{backbone}.baseline")


def extra_time(backbone: str) -> float:
    """Seconds that a token takes longer with Engram."""
    return 1 / figure(f"tokens_s.{backbone}.engram") - 1 / figure(f"tokens_s.{backbone}.baseline")


def rows_per_token() -> int:
    """Rows of a token and layer in the paper's geometry."""
    return int(figure("heads") * figure("orders"))


def bytes_per_token(dtype: str) -> float:
    """Bytes of a token's rows in one layer of the paper's geometry; dtype "bf16", "fp8" or "fp32"."""
    return figure("d_mem") * figure(f"bytes_{dtype}")


def pcie_bandwidth() -> float:
    """Bytes per second that a Gen5 x16 slot carries one way, before packet headers."""
    return figure("pcie5_rate") * 1e9 * figure("pcie5_coding") * figure("pcie_lanes") / 8  # a transfer is a bit a lane


def row_traffic(dtype: str) -> float:
    """Bytes per second of rows at the paper's faster throughput, output tokens only."""
    return bytes_per_token(dtype) * figure("tokens_s.4b.engram")


# pJ per bit of each level, from the closest to the farthest.
_LEVELS = {
    "8 KB SRAM": "sram_8k",
    "32 KB SRAM": "sram_32k",
    "1 MB SRAM": "sram_1m",
    "HBM3E": "hbm3e",
    "HBM2": "hbm2",
    "HBM2E": "hbm2e",
    "LPDDR5": "lpddr5",
    "GDDR5": "gddr5",
    "DDR, whole access": "ddr",
    "SerDes lane, 112G": "serdes",
    "flash channel, bus alone": "flash_channel",
    "PCIe link": "pcie",
    "PCIe link, other figures": "pcie_elsewhere",
}


def energy_per_bit() -> dict[str, tuple[float, float, str]]:
    """Per level or path: least and largest pJ/bit, and where it comes from. Paths are sums of ours."""
    found = {}
    for label, name in _LEVELS.items():
        found[label] = (*bounds(f"energy.{name}"), figures()[f"energy.{name}"]["source"])
    link = bounds("energy.pcie_elsewhere")  # as `bench.energy.tiers` takes it, not the one figure above
    for memory, name in (("LPDDR5", "LPDDR5"), ("DDR", "DDR, whole access")):
        low, high, _ = found[name]
        found[f"host memory over PCIe, {memory}"] = (low + link[0], high + link[1], "sum, inferred")
    sequential = 1e12 / (figure("energy.nvme_rate_per_watt") * 1e6) / 8
    random = figure("energy.nvme_random_io") * 1e6 / figure("energy.row_bytes") / 8
    found["NVMe SSD, sequential"] = (sequential, sequential, "pm1743, inferred")
    found["NVMe SSD, random rows, per useful bit"] = (random, random, "pm1743, inferred")
    return found


def energy_against_hbm(label: str) -> tuple[float, float]:
    """Least and largest energy per bit of a level, as a multiple of HBM2's."""
    low, high, _ = energy_per_bit()[label]
    return low / figure("energy.hbm2"), high / figure("energy.hbm2")


def energy_table() -> str:
    """Published energy per bit of every level, with the multiple of HBM2 and the source, as a table."""
    levels = energy_per_bit().items()
    rows = [(label, _span(low, high), _times_hbm(label), source) for label, (low, high, source) in levels]
    return markdown(["level or path", "pJ/bit", "times HBM2", "source"], rows, right={1, 2})


def overhead_table() -> str:
    """The paper's throughput with and without the offloaded table; the two last columns are our arithmetic."""
    head = ["backbone", "without Engram, tok/s", "with the table in host memory, tok/s", "loss", "more time per token"]
    rows = []
    for key in ("4b", "8b"):
        rates = [figures()[f"tokens_s.{key}.{name}"]["text"] for name in ("baseline", "engram")]
        loss, extra = f"{100 * throughput_loss(key):.2f} %", f"{1e6 * extra_time(key):.2f} µs"
        rows.append([f"Dense-{key.upper()}", *rates, loss, extra])
    return markdown(head, rows, right={1, 2, 3, 4})


def sources_table() -> str:
    """What was read, how much of it, and when."""
    rows = []
    for name, entry in sources().items():
        title = f"[{entry['title']}]({entry['url']})" if entry["url"] else entry["title"]
        accessed = f", {entry['accessed']}" if entry["accessed"] else ""
        rows.append([name, title, f"{entry['read']}{accessed}"])
    return markdown(["short name", "source", "what was read of it"], rows)


def _span(low: float, high: float, digits: int = 3) -> str:
    return _short(low, digits) if low == high else f"{_short(low, digits)}–{_short(high, digits)}"


def _short(value: float, digits: int) -> str:
    return f"{float(f'{value:.{digits}g}'):,g}"


def _times_hbm(label: str) -> str:
    return _span(*energy_against_hbm(label), digits=2)


def _table_gb(dtype: str) -> str:
    return f"{figure('table_parameters') * figure(f'bytes_{dtype}'):.0f}"


def values() -> dict[str, str]:
    """Every figure and quotation as it is written, and what follows from them, by name."""
    return {name: entry["text"] for name, entry in figures().items()} | {
        "loss.4b": f"{100 * throughput_loss('4b'):.2f}",
        "loss.8b": f"{100 * throughput_loss('8b'):.2f}",
        "extra_us.8b": f"{1e6 * extra_time('8b'):.2f}",
        "table_gb.bf16": _table_gb("bf16"),
        "table_gb.fp8": _table_gb("fp8"),
        "table_gib.fp8": f"{figure('table_parameters') * 1e9 * figure('bytes_fp8') / 2**30:.0f}",
        "m_to_M.4b": f"1:{figure('table_parameters') / figure('backbone.4b'):g}",
        "m_to_M.8b": f"1:{figure('table_parameters') / figure('backbone.8b'):g}",
        "rows_per_token": f"{rows_per_token()}",
        "bytes_per_token.bf16": f"{bytes_per_token('bf16'):,.0f}",
        "traffic_mb_s.bf16": f"{row_traffic('bf16') / 1e6:.0f}",
        "traffic_mb_s.fp32": f"{row_traffic('fp32') / 1e6:.0f}",
        "traffic_of_pcie.fp32": f"{100 * row_traffic('fp32') / pcie_bandwidth():.2f}",
        "pcie_gb_s": f"{pcie_bandwidth() / 1e9:.0f}",
        "backbone_gb.4b": f"{figure('backbone.4b') * figure('bytes_bf16'):.0f}",
        # Read once a step: what the window that others computed asks of the machine.
        "cxl.tb_s": f"{figure('cxl.values') * figure('bytes_bf16') / figure('cxl.step'):.0f}",
        "cxl.loss": f"{100 * (1 - figure('cxl.pool') / figure('cxl.host')):.1f}",
        "mlx.loss_prefetched": f"{100 * (1 - figure('mlx.prefetched') / figure('mlx.resident')):.1f}",
        "mlx.loss_synchronous": f"{100 * (1 - figure('mlx.synchronous') / figure('mlx.resident')):.0f}",
        "energy.host_lpddr5": _times_hbm("host memory over PCIe, LPDDR5"),
        "energy.host_ddr": _times_hbm("host memory over PCIe, DDR"),
        "energy.ssd_sequential": _times_hbm("NVMe SSD, sequential"),
        "energy.ssd_random": _times_hbm("NVMe SSD, random rows, per useful bit"),
    }
