"""What tables count: rows, hits and bytes by where they were read. They only grow, and rates follow from them."""

import threading

import pytest
import torch

from engram_ref.attach import attach, offload_table
from engram_ref.hashing import NgramHasher
from engram_ref.lookup.device import DeviceLookup
from engram_ref.prefetch import Prefetcher
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, save_rows
from tests.ref.attach.models import make_ids, make_layers, make_model
from tests.ref.fusion.qwen_oracle import qwen4, text_config

WIDTH, ROW_BYTES = 4, 16
NONE = {"rows": 0, "row_hits": 0, "bytes_device": 0, "bytes_host": 0, "bytes_disk": 0}


@pytest.fixture
def values():
    return torch.randn(50, WIDTH)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("host", {"rows": 7, "bytes_host": 7 * ROW_BYTES}),
        ("device", {"rows": 7, "row_hits": 7, "bytes_device": 7 * ROW_BYTES}),
        ("file", {"rows": 7, "bytes_disk": 6 * ROW_BYTES}),  # a repeat within a fetch is read once
        ("hot", {"rows": 7, "row_hits": 3, "bytes_device": 3 * ROW_BYTES, "bytes_host": 4 * ROW_BYTES}),
        ("hot, device", {"rows": 7, "row_hits": 7, "bytes_device": 7 * ROW_BYTES}),
    ],
)
def test_two_fetches_by_hand(values, tmp_path, placement, expected):
    save_rows(tmp_path / "t.safetensors", values)
    rows = StoredRows.find(tmp_path / "t.safetensors") if placement == "file" else values
    placement, _, behind = placement.partition(", ")
    hot = {"hot": torch.tensor([3, 9]), "behind": behind or "host"} if placement == "hot" else {}
    with make_table(placement, rows, **hot) as table:
        assert table.counters() == NONE
        for numbers in ([3, 3, 8, 9], [20, 21, 22]):
            table.start(torch.tensor(numbers)).wait()
        table.start(torch.tensor([], dtype=torch.int64)).wait()
        assert table.counters() == {**NONE, **expected}
        with pytest.raises(ValueError, match="row 50 does not exist"):
            table.start(torch.tensor([50])).wait()
        assert table.counters() == {**NONE, **expected}


def test_no_fetch_of_many_threads_is_lost(values):
    with make_table("host", values) as table:
        numbers = torch.arange(5)
        threads = [threading.Thread(target=lambda: [table.start(numbers) for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert table.counters()["rows"] == 4 * 500 * 5


def test_by_layer():
    """Of a prefetcher, of a model with Engram, and of what the device looks up by itself."""
    layers = make_layers((1, 2))
    tables = {layer_id: engram.table for layer_id, engram in layers.engrams.items()}
    ids = make_ids(2, 9)
    each = 2 * 9 * len(layers.plan.layers[0].primes)
    with Prefetcher(NgramHasher(layers.plan), tables) as prefetcher:
        with prefetcher.start(ids.numpy()) as fetch:
            fetch[1].wait()
        assert {i: c["rows"] for i, c in prefetcher.counters().items()} == {1: each, 2: each}
    DeviceLookup(layers.plan, tables)(ids)
    assert {table.counters()["rows"] for table in tables.values()} == {2 * each}
    with torch.no_grad(), attach(make_model(), layers.engrams, layers.plan) as attached:
        attached.decoder(ids)
        assert {i: c["rows"] for i, c in attached.counters().items()} == {1: 3 * each, 2: 3 * each}


def test_of_an_offloaded_table():
    model = qwen4.Qwen4ExpForCausalLM(text_config()).eval()
    hot = torch.arange(0, 16_896, 2)
    with torch.no_grad(), offload_table(model, "hot", hot=hot) as offloaded:
        model(torch.tensor([[5, 7, 9]]))
        found = offloaded.counters()[0]
        assert found["rows"] == 3 * 16 and 0 < found["row_hits"] < 48
        assert found["bytes_host"] == (48 - found["row_hits"]) * 8 * 4
