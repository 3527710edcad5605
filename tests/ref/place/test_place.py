"""`engram-place`: sums by hand, counts against Python's sets, the answer as a whole, and input that is wrong.

python -m pytest tests/ref/place
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engram_ref.checkpoint.config_json import config_fields, table_rows
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.files.texts import read_text
from engram_ref.place import command, energy, price, reads, table
from engram_ref.place.answer import OF_RANKS, WITH_GPU, WITHOUT_GPU, Question, answer, recommend
from engram_ref.place.engines import engine_flags
from engram_ref.place.formulas import (
    BESIDE,
    FORMULAS,
    beside_seconds,
    beyond_seconds,
    held_bytes,
    moved_bytes,
    seconds,
    tier_shares,
)
from engram_ref.place.group import Group
from engram_ref.place.machine import ASSUMED, Machine, Rate
from engram_ref.place.model import BACKBONES, Model
from engram_ref.place.reads import Reads, count_reads
from engram_ref.place.table import report
from engram_ref.sharding.on_paper import LINKS, exchange_bytes, exchange_seconds
from engram_toy.tracer.stack import cumulative_price

ROOT = Path(__file__).parents[3]
GB = 10**9
ROUND = Machine(80 * GB, 512 * GB, 2000 * GB).with_rates(
    {
        name: Rate(value, "given")
        for name, value in {
            **{"device": 1e9, "bus": 1e8, "gather": 1e6, "memory": 1e9, "reads": 1e4},
            **{"start_device": 1e-3, "start_host": 2e-3, "start_bus": 4e-3, "start_disk": 8e-3},
            **{"uva": 1e6, "start_staged": 7e-3},
            **{"beside_uva": 0.5, "beside_staged": 3e-3, "beside_hot": 5e-3, "beside_file": 6e-3},
        }.items()
    }
)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.fixture(scope="module")
def flash():
    return Model.of("v41-flash")


EIGHT = Group(8, 2, LINKS["ethernet"])  # on two machines


def counted(distinct=1.0, first=0.5, root=10.0, hits=0.25):
    steps = {1: distinct, 64: distinct, 512: distinct}
    return Reads("a text", 1000, steps, first, root, hits, {256: distinct, 4096: distinct})


def ask(model, machine=ROUND, **how):
    return answer(Question(model, machine, how.pop("reads", counted()), how.pop("batches", (1, 64, 512)), **how))


def placement(found, name):
    return next(p for p in found["placements"] if p["placement"] == name)


# --- formulas, by hand ------------------------------------------------------------------------------------


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
    flash, one, paper = (BACKBONES[name] for name in ("v41-flash", "qwen38-flash-next", "paper-27b"))
    chosen = np.random.default_rng(0).random((200, 64, 384)).argsort(axis=2)[..., :6]  # [draws, tokens, experts]
    union = np.mean([len(np.unique(draw)) for draw in chosen]) / 384
    shared = flash.token_bytes - 289e9 * 6 / 384
    assert flash.step_bytes(64) == pytest.approx(shared + 289e9 * union, rel=0.005)
    assert flash.step_bytes(1) == flash.token_bytes
    assert one.step_bytes(512) == one.token_bytes and "one token's experts at every batch" in one.source
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


def test_energies_have_two_digits_and_no_exponent():
    assert [table._joules(*pair) for pair in ((5.1e-4, 5.1e-4), (1.84e-4, 2.2e-4), (4.5e-4, 1.9e-3))] == [
        "510 uJ", "180-220 uJ", "0.45-1.9 mJ"
    ]  # fmt: skip


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
    assert count_reads(Model.of("tiny"), read_text(None), (1 << 20,)).distinct == {1 << 20: 1.0}


# --- the answer -------------------------------------------------------------------------------------------


def test_every_prediction_names_its_formula(flash):
    found = ask(flash, group=EIGHT, prompts=(4096,))
    names = set()
    for place in found["placements"]:
        names.add(place["formula"])
        for step in place["steps"]:
            names |= {step[name] for name in step if name.endswith("formula")}
            names |= {step["price"]["formula"], step["joules"]["formula"]}
    assert names <= FORMULAS.keys()
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(ask(flash, group=EIGHT, prompts=(4096,))))


def test_bytes_of_v41_flash(flash):
    found = ask(flash)
    assert found["model"]["table_bytes"] == 768_022_850 * 264
    device, uva, file = (placement(found, name) for name in ("device", "uva", "file"))
    assert not device["fits"] and device["lacking"] == {"gpu": 768_022_850 * 264 - 80 * GB}
    assert uva["fits"] and uva["freed"] == device["held"]["gpu"] - 512 * 48 * 256 * 2
    assert file["steps"][0]["bytes"]["bus"] == 48 * 264 == flash.config.bytes_per_token()
    assert device["steps"][0]["price"]["over_resident"] == 1.0 < uva["steps"][0]["price"]["over_resident"]
    assert [step["rows"] for step in file["steps"]] == [48, 48 * 64, 48 * 512]


def test_what_fits_is_recommended_and_why(flash):
    fast = ROUND.with_rates(ASSUMED)
    hidden = ask(flash, fast, block_s=1.0)["recommendation"]
    assert hidden["placement"] == "uva" and hidden["reason"].startswith("uva: it loses 502 us (0.0 %) of a step of 512")
    assert "device would not fit" in hidden["reason"]
    waits = ask(flash, fast, block_s=1e-9)["recommendation"]
    assert waits["placement"] == "uva" and "nothing that fits loses less than 3.0 %" in waits["reason"]
    large = ask(flash, replace(fast, gpu=10**12), block_s=1e-9)["recommendation"]
    assert large["placement"] == "device"
    assert ask(flash, replace(fast, host=GB), block_s=1.0)["recommendation"]["placement"] == "file"
    none = ask(flash, replace(fast, host=0, disk=10 * GB))["recommendation"]
    assert none["placement"] is None and "GiB" in none["reason"]


def test_ranks_that_share_a_table(flash):
    """Each holds its part; a machine's host memory holds one copy for all its ranks; a wire costs time and no price."""
    found = ask(flash, group=EIGHT, prompts=(4096,))
    table = flash.table_bytes
    sharded, behind, hot, uva, host = (
        placement(found, name) for name in ("sharded", "sharded host", "hot sharded", "uva", "host")
    )
    passing = 4096 * 48 * (2 * 256 + 2 * 264)  # decoded values, rows that arrive, rows that are sent
    assert sharded["held"] == {"gpu": -(-table // 8) + passing, "host": 0, "disk": 0} and sharded["fits"]
    assert behind["held"]["host"] == 4 * -(-table // 8) + 4 * 2 * 4096 * 24 * 264 and behind["held"]["gpu"] == passing
    assert uva["held"]["host"] == table and host["held"]["host"] == table + 4 * 2 * 4096 * 24 * 264
    assert hot["held"]["host"] == 4 * 4 * sum(flash.rows) and hot["held"]["gpu"] > sharded["held"]["gpu"]
    step = sharded["steps"][1]
    assert step["bytes"]["link"] == 64 * 48 * 7 / 8 * 268 + 2 * 7 * 272  # two layers, two exchanges
    assert step["price"]["over_resident"] == 1.0 < behind["steps"][1]["price"]["over_resident"]
    alone = placement(ask(flash), "device")["steps"][1]
    assert step["seconds"] > alone["seconds"] and step["joules"]["least"] > alone["joules"]["least"]
    assert "ranks: 8 on 2 machines, 400 Gb/s Ethernet" in report(found)
    assert "sharded" not in {p["placement"] for p in ask(flash)["placements"]}


@pytest.mark.parametrize(("ranks", "machines", "link", "said"), [
    (8, 3, "ethernet", "8 ranks on 3 machines: give equally many"),
    (16, 2, "nvlink", "16 ranks: NVLink 4 connects 8, use another link"),
])  # fmt: skip
def test_ranks_that_cannot_be(ranks, machines, link, said):
    with pytest.raises(ValueError, match=said):
        Group(ranks, machines, LINKS[link])


def test_a_prompt_hides_behind_blocks_that_compute(flash):
    """A block on 4,096 tokens takes what its operations take, or as long as in a decode step, if that is longer."""
    fast = ROUND.with_rates(ASSUMED)
    found = ask(flash, fast, prompts=(256, 4096), block_s=1e-3)
    steps = placement(found, "uva")["steps"]
    assert [(step["phase"], step["tokens"]) for step in steps[3:]] == [("prefill", 256), ("prefill", 4096)]
    assert [step["block_s"] for step in steps[2:]] == [1e-3, 1e-3, pytest.approx(2 * 16e9 / 40 * 4096 / 4.9e14)]
    assert steps[4]["beyond_s"] == 0.0 and steps[4]["exposed_s"] == pytest.approx(0.6 * steps[4]["seconds"])
    assert steps[4]["window_formula"] == "window.prompt"
    assert ") of a prompt of 4,096 tokens, and leaves" in found["recommendation"]["reason"]
    assert "== a prompt of 4,096 tokens: 196,608 rows" in report(found)
    slow = replace(fast, host=GB).with_rates({"reads": Rate(1e3, "given")})  # from a file: nothing hides
    lost = placement(ask(flash, slow, prompts=(4096,), block_s=1.0), "file")["steps"][-1]
    assert lost["exposed_s"] == lost["beyond_s"] + 2 * 1.1e-3 and lost["beyond_s"] > 0 and lost["loss"] > 0.03


def test_a_decode_step_alone_does_not_decide():
    """What hides in a decode step and not in a prompt is not as good as what hides in both; decoding counts first."""

    def offered(name, freed, decode, prefill):
        steps = [
            {"phase": phase, "tokens": 64, "seconds": 1.0, "exposed_s": exposed, "loss": exposed}
            for phase, exposed in (("decode", 9.0), ("decode", decode), ("prefill", prefill))
        ]
        return {"placement": name, "fits": True, "held": {"gpu": 100}, "freed": freed, "steps": steps}

    def taken(*placements):
        return recommend(list(placements))["placement"]

    assert taken(offered("device", 0, 0.0, 0.0), offered("file", 100, 0.0, 5.0)) == "device"
    assert taken(offered("device", 0, 0.0, 0.02), offered("file", 100, 0.02, 0.02)) == "file"
    assert taken(offered("host", 0, 2.0, 9.0), offered("file", 100, 3.0, 0.0)) == "host"
    assert taken(offered("host", 0, 2.0, 9.0), offered("file", 100, 2.0, 8.0)) == "file"


def test_a_row_in_place_costs_no_more_than_it_takes():
    """Waited for or beside blocks, but not both; the longer the blocks, the less is waited for."""
    for preset in sorted(BACKBONES):
        for block in (None, 1e-6, 1e-4, 1.0):
            found = ask(Model.of(preset), ROUND.with_rates(ASSUMED), block_s=block, prompts=(4096,))
            for step in placement(found, "uva")["steps"]:
                assert 0.6 * step["seconds"] <= step["exposed_s"] * (1 + 1e-9)
                assert step["exposed_s"] <= step["seconds"] * (1 + 1e-9)


def test_what_is_said_of_a_blocks_time(flash):
    """An estimate stands with every step, a given one in the head alone; that of a prompt is a least in any case."""
    demo = Model.of("demo")
    given = report(ask(demo, block_s=330e-6, blocks=36, prompts=(4096,)))
    assert given.count("a block takes 330 us at least") == 1 and "block: 330 us, given; 36 of them a step" in given
    assert report(ask(flash, prompts=(4096,))).count("at least\n") == 4
    assert "takes" not in report(ask(demo, prompts=(4096,)))


def test_without_a_gpu_the_cpu_computes(flash):
    found = ask(flash, replace(ROUND, gpu=None), block_s=1.0)
    lost = {p["placement"]: p["steps"][0]["exposed_s"] for p in found["placements"]}
    assert lost == {"memory": 0.0, "hot file": 2 * 6e-3, "file": 2 * 6e-3}
    assert "beside_file" in report(found) and "beside_hot" not in report(found)
    assert "beside_hot" in report(ask(flash)) and "beside_file" not in report(ask(flash))
    assert [p["placement"] for p in found["placements"]] == ["memory", "hot file", "file"]
    assert placement(found, "file")["freed"] == flash.table_bytes - placement(found, "file")["held"]["host"]
    assert all(p["held"]["gpu"] == 0 for p in found["placements"])


def test_a_model_of_which_nothing_is_known_has_no_window_and_no_price():
    demo = Model.of("demo")
    step = placement(ask(demo), "uva")["steps"][0]
    assert demo.backbone is None and step["exposed_s"] is None and step["price"]["over_resident"] is None
    assert "--block-time" in ask(demo)["recommendation"]["reason"]
    assert step["loss"] is None
    known = placement(ask(demo, block_s=1.0), "uva")["steps"][0]
    assert known["exposed_s"] == 0.5 * known["seconds"] and known["beyond_s"] == 0.0
    assert known["loss"] == known["exposed_s"] / 16  # its last Engram layer is block 15
    more = ask(demo, block_s=1.0, blocks=30)
    assert placement(more, "uva")["steps"][0]["loss"] == known["exposed_s"] / 30 and "30 of them a step" in report(more)


def test_held_bytes_count_a_hot_tier_and_its_entries():
    held = held_bytes(EngramConfig.preset("demo"), [1000], 4, hot_rows=100)
    staging, values = 2 * 4 * 16 * 128, 4 * 32 * 128
    assert held["hot"] == {"gpu": values + 100 * 128, "host": 1000 * 128 + staging + 4000, "disk": 0}
    assert held["file"] == {"gpu": values, "host": staging, "disk": 1000 * 128}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_report_of_every_preset(preset):
    model = Model.of(preset)
    text = report(ask(model))
    assert text.count("== ") == 3 and "assumed" not in text.split("reads")[0] and f"{sum(model.rows):,} rows" in text
    assert (preset in BACKBONES) == (model.backbone is not None)


def test_flags_of_engines():
    assert engine_flags("uva")[0].startswith("""--engram-config '{"cpu_offload": true}'""")
    assert engine_flags("device")[1].startswith("""--engram-config '{"placement": "gpu"}'""")
    for other in ("host", "hot", "file", "memory", None):
        assert all(line.startswith("# ") for line in engine_flags(other)), other


# --- the command ------------------------------------------------------------------------------------------

SIZES = ["--gpu", "80GB", "--host", "512GB", "--disk", "2TB", "--batch", "1", "64"]


@pytest.fixture
def quick(monkeypatch):
    """The command without its counting: what it does with its options."""
    monkeypatch.setattr(command, "count_reads", lambda model, text, batches, *rest: counted())


def run(capsys, *argv):
    command.main([*argv])
    return capsys.readouterr().out


def test_a_checkpoint_and_its_config_json_alone(tmp_path, capsys, quick):
    config = EngramConfig.preset("v41-flash")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_fields(config, table_rows(config), 129_280, 40)))
    by_folder, by_file = (json.loads(run(capsys, str(p), *SIZES, "--json")) for p in (tmp_path, path))
    by_preset = json.loads(run(capsys, "--preset", "v41-flash", *SIZES, "--json"))
    for found in (by_folder, by_file):
        assert found["placements"] == by_preset["placements"] and found["model"]["backbone"]["blocks"] == 40


def test_the_engines_flag_follows_the_recommendation(capsys, quick):
    said = run(capsys, "--preset", "v41-flash", *SIZES, "--block-time", "1s", "--engram-config")
    assert said.splitlines()[0].startswith("""--engram-config '{"cpu_offload": true}'""")


def test_model_time_is_divided_by_the_blocks(capsys, quick):
    found = json.loads(run(capsys, "--preset", "v41-flash", *SIZES, "--model-time", "4ms", "--json"))
    published = {"formula": "window", "blocks": 40, "blocks_source": "as published"}
    assert found["block"] == {"seconds": pytest.approx(1e-4), "source": "given", **published}
    found = json.loads(run(capsys, "--preset", "demo", *SIZES, "--model-time", "16ms", "--blocks", "16", "--json"))
    assert found["block"]["seconds"] == pytest.approx(1e-3)


def test_ranks_links_and_prompts_of_the_command(capsys, quick):
    argv = ["--preset", "demo", *SIZES, "--prompt", "256", "--ranks", "4"]
    found = json.loads(run(capsys, *argv, "--json"))
    assert found["group"]["link"]["name"] == "NVLink 4" and found["prompts"] == [256]
    assert [p["placement"] for p in found["placements"]][-3:] == ["sharded", "hot sharded", "sharded host"]
    apart = json.loads(run(capsys, *argv, "--machines", "2", "--link-rate", "10GB/s", "--json"))
    assert apart["group"]["link"] | {"bytes_per_s": 1e10, "source": "given"} == apart["group"]["link"]
    assert apart["group"]["link"]["name"] == "400 Gb/s Ethernet"
    assert json.loads(run(capsys, "--preset", "demo", *SIZES, "--prompt", "--json"))["prompts"] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a --preset or a checkpoint"),
        (["--preset", "demo", "."], "and one of them only"),
        (["/nowhere"], "/nowhere does not exist"),
        (["--preset", "demo", "--gpu", "80G"], "bytes, such as 80GB"),
        (["--preset", "demo", "--block-time", "56"], "a time with its unit"),
        (["--preset", "demo", "--model-time", "4ms"], "say how many with --blocks"),
        (
            ["--preset", "demo", "--model-time", "4ms", "--blocks", "15"],
            "before block 15, the first being 0, so it has 16",
        ),
        (["--preset", "demo", "--blocks", "4"], "--blocks does nothing without --block-time or"),
        (["--preset", "demo", "--block-time", "0us"], "a block takes longer than no time"),
        (["--preset", "demo", "--model-time", "0s", "--blocks", "20"], "a block takes longer than no time"),
        (["--preset", "demo", "--block-time", "1us", "--blocks", "15"], "so it has 16"),
        (["--preset", "demo", "--json", "--engram-config"], "leave --engram-config away"),
        (["--preset", "tiny", "--gpu", "1GB", "--memory-rate", "1e9"], "--memory-rate does nothing where a GPU"),
        (["--preset", "tiny", "--gpu", "0", "--bus-rate", "1e9"], "--bus-rate does nothing where there is no GPU"),
        (["--preset", "tiny", "--gpu", "0", "--memory-rate", "1e9"], "--memory-rate does nothing where no block is"),
        (
            ["--preset", "v41-flash", "--gpu", "0", "--memory-rate", "1e9", "--block-time", "1ms"],
            "no block is estimated",
        ),
        (["--preset", "v41-flash", "--gpu", "1GB", "--compute-rate", "1e9", "--prompt"], "no prompt's block"),
        (["--preset", "tiny", "--folder", ".", "--disk", "1GB"], "--folder does nothing with --disk"),
        (
            ["--preset", "tiny", "--disk", "0", "--reads-rate", "1e5"],
            "--reads-rate does nothing where there is no disk: leave it out, or --disk 0",
        ),
        (
            ["--preset", "tiny", "--gpu", "1GB", "--host", "0", "--uva-rate", "1e7", "--gather-rate", "1e7"],
            "--uva-rate, --gather-rate do nothing without host memory: leave",
        ),
        (["--preset", "demo", "--link", "pcie"], "--link does nothing without --ranks"),
        (["--preset", "demo", "--link-rate", "1GB/s"], "--link-rate does nothing without --ranks"),
        (["--preset", "demo", "--ranks", "1", "--machines", "1"], "--machines does nothing without --ranks"),
        (["--preset", "demo", "--ranks", "9", "--gpu", "1GB"], "NVLink 4 connects 8, use another link"),
        (["--preset", "demo", "--ranks", "4", "--machines", "3"], "give equally many to each"),
        (["--preset", "demo", "--measure", "--bus-rate", "1GB/s"], "--bus-rate says what --measure would find"),
        (["--preset", "demo", "--bus-rate", "0"], "--bus-rate"),
        (["--preset", "demo", "--text", "/nowhere.txt"], "/nowhere.txt"),
        ([__file__], "not another file"),
    ],
)
def test_wrong_input_ends_in_one_line(argv, said, capsys, quick):
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and said in printed.err and printed.err.count("\n") == 1


def test_a_given_host_size_serves_where_the_system_says_none(monkeypatch, capsys, quick):
    monkeypatch.setattr("engram_ref.place.machine.free_host_bytes", lambda: None)
    found = json.loads(run(capsys, "--preset", "tiny", "--host", "3GB", "--disk", "1GB", "--json"))
    assert found["machine"]["host"] == 3 * GB
    with pytest.raises(SystemExit):
        command.main(["--preset", "tiny", "--disk", "1GB"])
    assert "give --host" in capsys.readouterr().err


def test_it_answers_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from engram_ref.place.command import main\n"
        "main(['--preset', 'tiny', '--gpu', '1GB', '--host', '1GB', '--disk', '1GB'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "take " in done.stdout, done.stderr


@pytest.fixture
def measure(monkeypatch):
    """Measures little, and in no time."""
    pytest.importorskip("torch")
    from engram_ref.place import measure

    small = {"_TABLE": 1 << 20, "_COPY": 1 << 20, "_MANY": 1 << 8, "_SOME": 1 << 6, "_REPEATS": 2}
    for name, value in small.items():
        monkeypatch.setattr(measure, name, value)
    return measure


def test_measured_rates_replace_the_assumed_ones(tmp_path, measure):
    found = measure.measured(tmp_path, 264)
    assert found.keys() >= {"gather", "memory", "reads", "start_host", "start_disk"}
    assert all(0 < rate.value < math.inf and rate.source.startswith("measured") for rate in found.values())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_not_there_is_not_measured(monkeypatch, capsys, quick, measure):
    def measure_disk(*_):
        raise AssertionError("a file was written")

    monkeypatch.setattr(measure, "_on_disk", measure_disk)
    argv = ["--preset", "tiny", "--host", "3GB", "--disk", "0", "--measure", "--json"]
    rates = json.loads(run(capsys, *argv))["machine"]["rates"]
    assert rates["gather"]["source"].startswith("measured") and rates["reads"]["source"].startswith("assumed")
    with pytest.raises(SystemExit):
        command.main([*argv, "--folder", "."])
    assert "--folder does nothing with --disk 0: leave it out" in capsys.readouterr().err
