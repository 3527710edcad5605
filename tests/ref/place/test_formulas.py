"""Sums by hand of what a placement moves, takes and costs, and a text's reads against Python's sets."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from engram_ref.place import energy, price, reads, words
from engram_ref.place.answer import OF_RANKS, WITH_GPU, WITHOUT_GPU
from engram_ref.place.formulas import BESIDE, beside_seconds, beyond_seconds, moved_bytes, seconds, tier_shares
from engram_ref.place.machine import Rate
from engram_ref.place.model import BACKBONES, Model
from engram_ref.place.reads import count_reads
from engram_ref.sharding.on_paper import exchange_bytes, exchange_seconds
from engram_toy.tracer.stack import cumulative_price
from tests.ref.place.example import EIGHT, ROUND, ask, placement

ROOT = Path(__file__).parents[3]


def test_times_by_hand():
    """1,000 rows of 100 B, 800 of them distinct, a quarter hot: 100 kB asked for, 128 kB in sectors of 32 B."""
    took = {name: seconds(ROUND, name, 1000, 800, 100, 0.25) for name in ("device", "memory", "uva", "host", "hot")}
    assert took == pytest.approx(
        {
            "device": 0.001 + 2 * 1e5 / 1e9,
            "memory": 0.002 + 0.001,
            "uva": 0.001 + 0.004 + 1.28e5 / 1e8,
            "host": 0.007 + 0.001 + 0.001,
            "hot": (0.001 + 2 * 2.5e4 / 1e9) + (0.007 + 0.00075 + 0.00075),
        }
    )
    by_rows = ROUND.with_rates({"uva": Rate(1e5, "given")})
    assert seconds(by_rows, "uva", 1000, 800, 100, 0) == pytest.approx(
        0.001 + 0.004 + 0.01
    )  # not the bus: its requests
    pages = 1 + 24 / 1024  # of the 1,024 places of a row within a page, 24 reach over its end
    assert seconds(ROUND, "file", 1000, 800, 100, 0) == pytest.approx(0.008 + 0.08 * pages + took["host"])
    assert seconds(ROUND, "file, no GPU", 1000, 800, 100, 0) == pytest.approx(0.008 + 0.08 * pages + took["memory"])
    assert seconds(ROUND, "hot", 1000, 800, 100, 0.0) == took["host"]  # nothing hits, nothing is launched for it


def test_times_of_tables_that_are_made_of_others():
    """A tier in front of a file, and rows that ranks own: the sum of their parts, whatever the parts are."""

    def took(name, rows=1000, distinct=800, hits=0.0, group=EIGHT):
        return seconds(ROUND, name, rows, distinct, 100, hits, group)

    assert took("hot file", hits=0.25) == took("device", 250, 200) + took("file", 750, 600)
    assert took("hot file, no GPU", hits=0.25) == took("memory", 250, 200) + took("file, no GPU", 750, 600)
    wire = exchange_seconds(EIGHT.link, 8, exchange_bytes(1000, 8, 100))
    for name, own in (("sharded", "device"), ("sharded host", "host"), ("sharded, no GPU", "memory")):
        assert took(name) == took(own) + wire > wire
    assert took("hot sharded", hits=1.0) == took("device")  # a hit asks nobody
    pages = 0.08 * (1 + 24 / 1024)
    alone = seconds(ROUND, "file", 1000, 800, 100, 0)
    assert took("file") == pytest.approx(alone + 3 * pages)  # the four ranks of a machine share its drive


def test_shares_of_tiers():
    assert tier_shares("uva", 0.0) == {"host": 1.0} and tier_shares("file, no GPU", 0.0) == {"file": 1.0}
    assert tier_shares("hot", 0.25) == {"device": 0.25, "host": 0.75}
    assert tier_shares("hot sharded", 0.25, EIGHT) == {"device": 1.0, "link": 0.75 * 7 / 8}
    assert tier_shares("sharded host", 0.0, EIGHT) == {"host": 1.0, "link": 7 / 8}


def test_moved_bytes_by_hand():
    wire = 1000 * 7 / 8 * (4 + 100) + 7 * 272
    assert moved_bytes("sharded host", 1000, 800, 100, 0, EIGHT) == {"host": 1e5, "bus": 1e5, "link": wire}
    hot_file = moved_bytes("hot file", 1000, 800, 128, 0.25)
    assert hot_file == {"device": 32_000, "disk": 600 * 4096, "bus": 96_000}
    assert moved_bytes("hot", 1000, 800, 100, 0.25) == {"device": 25_000, "host": 75_000, "bus": 75_000}
    assert moved_bytes("uva", 1000, 800, 100, 0)["bus"] == 128_000
    assert moved_bytes("file", 1000, 800, 128, 0) == {"disk": 800 * 4096, "bus": 128_000}


def test_what_blocks_lose_beside_a_fetch():
    """A share of a read in place, a time of its own for what the CPU stages; nothing where nothing was measured."""
    names = ("device", "memory", "uva", "host", "file", "hot", "hot file", "sharded", "hot sharded", "sharded host")
    lost = [beside_seconds(ROUND, name, [0.25], 0.05) for name in names]
    assert lost == pytest.approx([0.0, 0.0, 0.1, 3e-3, 3e-3, 5e-3, 5e-3, 0.0, 0.0, 3e-3])
    assert beside_seconds(ROUND, "file, no GPU", [1.0], 0.0) == beside_seconds(ROUND, "hot file, no GPU", [9.0], 9.0)
    assert beside_seconds(ROUND, "file, no GPU", [1.0, 0.0, 2.0], 0.0) == 2 * 6e-3  # what is not fetched costs nothing
    assert not any(beside_seconds(ROUND, name, [0.0], 0.0) for name in names)
    assert beside_seconds(ROUND, "uva", [2.0, 2.0], 4.0) == 0.0  # blocks that wait lose nothing else
    assert BESIDE.keys() <= {*WITH_GPU, *OF_RANKS, *(f"{name}, no GPU" for name in WITHOUT_GPU)}


def test_a_batch_reads_more_experts():
    """Those that somebody chose, if each token chooses six of 384 by itself; a dense model reads all, once."""
    flash, qwen, paper = (BACKBONES[name] for name in ("v41-flash", "qwen38-flash-next", "paper-27b"))
    chosen = np.random.default_rng(0).random((200, 64, 384)).argsort(axis=2)[..., :6]  # [draws, tokens, experts]
    union = np.mean([len(np.unique(draw)) for draw in chosen]) / 384
    shared = flash.token_bytes - 289e9 * 6 / 384
    assert flash.step_bytes(64) == pytest.approx(shared + 289e9 * union, rel=0.005)
    assert flash.step_bytes(1) == flash.token_bytes
    # 125 B values beside its table; ten of 512 experts and the rest are 6 B.
    assert qwen.step_bytes(1) == 12e9 and qwen.step_bytes(1 << 20) == pytest.approx(250e9) == qwen.live_bytes
    # 21 B values beside its table, all read by a large batch; six of 55 experts and the rest are 3.8 B.
    assert paper.step_bytes(1) == 7.6e9 and paper.step_bytes(4096) == pytest.approx(42e9) == paper.live_bytes
    assert flash.step_bytes(1 << 20) == pytest.approx(shared + 289e9)
    steps = placement(ask(Model.of("v41-flash"), prompts=(4096,)), "uva")["steps"]
    assert [step["block_s"] for step in steps[:3]] == [flash.step_bytes(n) / 40 / 1e9 for n in (1, 64, 512)]
    assert steps[0]["price"]["over_resident"] < steps[1]["price"]["over_resident"]  # more lies above its rows


@pytest.mark.parametrize(
    ("per_layer", "layers", "block", "waited"),
    [
        ([5.0], [1], 2.0, 3.0),
        ([5.0], [1], 9.0, 0.0),
        ([2.0, 2.0], [1, 14], 2.0, 0.0),
        ([3.0, 100.0], [1, 14], 2.0, 75.0),  # 103 s until the second, 28 of them hidden: the first second is in them
        ([3.0, 1.0], [14, 1], 2.0, 0.0),  # whatever order they are named in
        ([1.0], [0], 5.0, 1.0),  # before the first block nothing hides
    ],
)
def test_exposed_time(per_layer, layers, block, waited):
    assert beyond_seconds(per_layer, layers, block) == waited


def test_exposed_time_against_a_step_that_is_played():
    draw = np.random.default_rng(0)
    for _ in range(200):
        layers = sorted(draw.choice(12, 3, replace=False).tolist())
        took, block = draw.random(3).tolist(), float(draw.random() / 4)
        now = arrived = 0.0
        at = dict(zip(layers, took))
        for number in range(12):
            if number in at:
                arrived += at[number]
                now = max(now, arrived)
            now += block
        assert now - 12 * block == pytest.approx(beyond_seconds(took, layers, block), abs=1e-12)


def test_numbers_in_words_take_the_unit_of_what_they_are_rounded_to():
    pairs = ((5.1e-4, 5.1e-4), (1.84e-4, 2.2e-4), (4.5e-4, 1.9e-3), (2.6e-4, 9.99e-4))
    energies = ["510 uJ", "180-220 uJ", "0.45-1.9 mJ", "0.26-1 mJ"]
    assert [words.in_joules(*pair) for pair in pairs] == energies
    assert [words.size(nbytes) for nbytes in (0, 1023, 2**20 - 1, 2**30 - 1, 188.8e4 * 2**40)] == [
        "0 B", "1023 B", "1 MiB", "1 GiB", "1,888,000 TiB"
    ]  # fmt: skip
    assert [words.percent(share) for share in (None, 0, 1e-9, 0.001, 0.0994, 0.0996, 1.24)] == [
        "-", "0.0 %", "<0.1 %", "0.1 %", "9.9 %", "10 %", "124 %"
    ]  # fmt: skip
    assert [words.time(value) for value in (5.7e-6, 9.996e-4, 1234)] == ["5.7 us", "1 ms", "1,234 s"]


def test_energy_by_hand():
    assert energy.pages_per_row(264) == 1 + 32 / 512
    assert energy.joules(energy.TIERS["device"], 10, 100) == pytest.approx((8000 * 3.44e-12, 8000 * 4.3e-12))
    low, high = energy.joules(energy.TIERS["file"], 1, 256)
    assert (low, high) == pytest.approx((2048 * 5e-12 + 1e-5, 2048 * 15e-12 + 1e-5))


def test_energies_are_the_published_ones():
    entries = json.loads((ROOT / "docs" / "findings" / "published.json").read_text(encoding="utf-8"))["figures"]
    said = {entry["id"]: entry["value"] for entry in entries if entry["id"].startswith("energy.")}
    hbm = [said[f"energy.{name}"] for name in ("hbm2", "hbm2e", "hbm3e")]
    assert energy.FIGURES["hbm"] == (min(hbm), max(hbm))
    assert energy.FIGURES["host"] == (said["energy.lpddr5"], said["energy.ddr"][1])
    assert energy.FIGURES["nvme_random_io"] == (said["energy.nvme_random_io"] * 1e6,) * 2
    low, high = energy.FIGURES["pcie_elsewhere"]
    assert [low, high] == said.get("energy.pcie_elsewhere", [5, 15]) and low < said["energy.pcie"] < high


def test_prices_are_the_twins():
    """Weights read once, block by block, and rows that are all first ones, against the twin's exact sum."""
    blocks, nbytes = 10, 10**6
    exact = blocks * (cumulative_price(nbytes) - cumulative_price(nbytes - nbytes // blocks))
    assert price.weights_price(nbytes, blocks) == pytest.approx(exact, rel=1e-3)  # a root against its ceiling
    size, above = 10**6, 10**5
    mean = (cumulative_price(above + size) - cumulative_price(above)) / size
    assert price.rows_price(7, 16, size, 1.0, 1.0, 0.0, above, 5 * above) == pytest.approx(7 * 16 * mean, rel=1e-3)
    again = price.rows_price(7, 16, size, 0.0, 1.0, 25.0, above, 0.0)
    assert again == pytest.approx(7 * 16 * math.sqrt(25 * 25 * 16))
    assert price.rows_price(7, 16, size, 0.0, 1.0, 25.0, above, above) > again


# --- counts of a text -------------------------------------------------------------------------------------


def test_counts_against_sets():
    model = Model.of("demo")
    text = ("some", " ".join(f"word{n % 97} and {n % 13}" for n in range(600)))
    tier = 500
    found = count_reads(model, text, (1, 8), tier / sum(model.rows))
    rows = reads._rows(model, text, None)
    assert rows.shape == (found.tokens, model.config.rows_per_token()) and rows.max() < sum(model.rows)
    half = len(rows) // 2
    before, firsts, hits = set(rows[:half].ravel().tolist()), 0, 0
    counts = {row: int(n) for row, n in zip(*np.unique(rows[:half], return_counts=True))}
    least = sorted(counts.values(), reverse=True)[: min(tier, len(counts))][-1]
    surely, maybe = {r for r, n in counts.items() if n > least}, {r for r, n in counts.items() if n >= least}
    for row in rows[half:].ravel().tolist():
        firsts += row not in before
        before.add(row)
    later = rows[half:].ravel().tolist()
    assert found.first == firsts / len(later)
    hits = found.hits * len(later)
    assert sum(row in surely for row in later) <= round(hits) <= sum(row in maybe for row in later)
    steps = len(rows) // 8
    whole = [len(np.unique(rows[: steps * 8].reshape(8, steps, -1)[:, s])) / (8 * rows.shape[1]) for s in range(steps)]
    assert min(whole) <= found.distinct[8] <= max(whole) and found.distinct[8] < 1


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="has 2 tokens: give a text of at least 64"):
        count_reads(Model.of("tiny"), ("short.txt", "two words"), (1,))


def test_more_tokens_a_step_than_the_text_has_count_as_all_distinct():
    assert count_reads(Model.of("tiny"), ("short.txt", "a few words " * 64), (1 << 20,)).distinct == {1 << 20: 1.0}
