"""The factory of tables: rows in files go everywhere; what is no placement, row, device or option is refused."""

import numpy as np
import pytest
import torch

from engram_ref.attach import ExposedTime
from engram_ref.checkpoint import load_layer
from engram_ref.config import EngramConfig
from engram_ref.devices import as_device
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import HashPlan
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab
from engram_ref.layer import build_engram
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, save_rows
from engram_ref.tables.host import HostTable
from engram_ref.vocab import CompressedVocab
from tests.ref.tables.placements import (
    CASES,
    ROWS,
    D,
    R,
    assert_same_bits,
    device_for,
    every_case,
    fetch,
    random_rows,
    random_values,
    ranks_for,
)


@every_case
def test_rows_in_a_file_go_to_every_place(case, tmp_path):
    values, rows = random_values(), random_rows(100)
    save_rows(tmp_path / "table.safetensors", values)
    stored = StoredRows.find(tmp_path / "table.safetensors")
    with ranks_for(case), make_table(case.split(",")[0], stored, device_for(case), **CASES[case]) as table:
        assert_same_bits(fetch(table, rows), values, rows)


def test_rows_with_gaps_are_copied_without():
    values = random_values(width=2 * D)[:, ::2]
    for placement in ("device", "host"):
        with make_table(placement, values) as table:
            assert_same_bits(fetch(table, ROWS["all"]), values.contiguous(), ROWS["all"])


REFUSED = {
    "an unknown placement": (("gpu",), {}, "no placement 'gpu': use one of device, host, uva, hot, file"),
    "a device without CUDA": (("host",), {"device": "cuda"}, "torch sees no CUDA device on this machine"),
    "another accelerator": (("host",), {"device": "mps"}, "device 'mps': use 'cpu' or 'cuda'"),
    "no device at all": (("host",), {"device": "gpu"}, "device 'gpu': use 'cpu' or 'cuda'"),
    "hot without rows": (("hot",), {}, "needs hot=row numbers"),
    "hot behind hot": (("hot",), {"hot": torch.tensor([1]), "behind": "hot"}, "another placement behind it"),
    "hot rows elsewhere": (("host",), {"hot": torch.tensor([1])}, "use placement 'hot', behind='host'"),
    "rows for file": (("file",), {}, "write them with save_rows first"),
    "an option": (("host",), {"threads": 3}, "placement 'host' has no option threads"),
    "no name": ((None,), {}, "no placement None: use one of"),
    "no device": (("host",), {"device": None}, "device None: use 'cpu' or 'cuda'"),
    "a number for a device": (("host",), {"device": 3}, "device 3: use 'cpu' or 'cuda'"),
    "packed or not": (("host",), {"packed": "yes"}, "packed='yes': use True, False or None"),
    "hot rows in a list": (("hot",), {"hot": [1, 2]}, "hot is a list: give a tensor of row numbers"),
    "scales of plain rows": (("host",), {"packed": True}, "packed=True: only fp8 rows have scales"),
    "behind nothing": (("hot",), {"hot": torch.tensor([1]), "behind": "nothing"}, "no placement 'nothing'"),
    "behind what is not hot": (("device",), {"behind": "file"}, "has no placement behind it: use placement 'hot'"),
}
NO_ROWS = {
    "a list": [[1.0, 2.0]],
    "an array": np.zeros((3, 4), np.float32),
    "nothing": None,
    "a path": "table.safetensors",
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.zeros(3, 4, device="meta"),
    "integers": torch.zeros(3, 4, dtype=torch.int32),
    "complex numbers": torch.zeros(3, 4, dtype=torch.complex64),
}


@pytest.mark.parametrize("placement", ["device", "host", "hot", "file"])
@pytest.mark.parametrize("rows", NO_ROWS.values(), ids=NO_ROWS)
def test_what_is_no_rows_is_refused(rows, placement):
    hot = {"hot": torch.tensor([1])} if placement == "hot" else {}
    with pytest.raises(ValueError, match=r"^rows is a [^\n]*: give a [^\n]*$"):
        make_table(placement, rows, **hot)


@pytest.mark.parametrize("placement", ["device", "host", "hot"])
@pytest.mark.parametrize("count", [3, 0])
def test_rows_of_no_value_are_refused(count, placement):
    """A table of no row is none to refuse: a rank may own none."""
    hot = {"hot": torch.tensor([1])} if placement == "hot" else {}
    with pytest.raises(ValueError, match=r"^rows of 0 values: a row has one at least$"):
        make_table(placement, torch.zeros(count, 0), **hot)


def test_an_option_that_a_file_table_has_not_is_refused(tmp_path):
    save_rows(tmp_path / "table.safetensors", Rows.of(random_values()))
    with pytest.raises(ValueError, match="placement 'file' has no option thread: it has threads and direct"):
        make_table("file", StoredRows.find(tmp_path / "table.safetensors"), thread=3)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = EngramConfig.preset("tiny").replace(layer_ids=(1,))
    plan = HashPlan.build(config, 97, 2)
    for ask in (
        lambda device: build_engram(config, plan.layer(1), device=device),
        lambda device: make_fusion(config, device),
        lambda device: load_layer("layer.safetensors", config, plan.layer(1), device=device),
        lambda device: DeviceHasher(plan, device),
        lambda device: DeviceHistory(plan, 1, device),
        lambda device: DeviceVocab(CompressedVocab.from_map([0]), device),
        lambda device: ExposedTime(device),
        lambda device: HostTable(torch.zeros(3, 4), device),
    ):
        with pytest.raises(ValueError, match=r"^device 'cuda': torch sees no CUDA device on this machine; use 'cpu'$"):
            ask("cuda")
        with pytest.raises(ValueError, match=r"^device 'gpu': use 'cpu' or 'cuda'$"):
            ask("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert as_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"^device 'cuda:2': torch sees 2 CUDA devices, from 0$"):
        as_device("cuda:2")


@pytest.mark.parametrize("case", REFUSED)
def test_the_factory_refuses(case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        make_table(*arguments, random_values(), **options)
    assert "\n" not in str(caught.value)


def test_a_table_of_one_dimension_is_refused():
    with pytest.raises(ValueError, match=r"rows of shape \(301,\): a table is \[rows, values per row\]"):
        make_table("host", torch.zeros(R))


@pytest.mark.parametrize("placement", ["device", "host", "uva"])
def test_a_table_that_does_not_fit_is_refused_with_both_numbers(placement):
    rows = torch.zeros(1, 64).expand(1 << 42, 64)  # one row in memory; a petabyte to copy
    with pytest.raises(
        ValueError, match=r"^1048576.00 GiB do not fit into host memory, of which \d+.\d\d GiB are free"
    ):
        make_table(placement, rows, device_for(placement))


def test_a_refused_hot_table_closes_the_one_behind(monkeypatch):
    closed = []
    monkeypatch.setattr(HostMemory, "close", lambda memory: closed.append(memory.nbytes))
    with pytest.raises(ValueError, match="row 301 does not exist"):
        make_table("hot", random_values(), hot=torch.tensor([R]))
    assert closed == [R * D * 4]
