"""The answer as a whole: every placement of a model's table, the one to take, and why."""

import json
import re
from dataclasses import replace

import pytest

from engram_ref.config import PRESETS, EngramConfig
from engram_ref.place.answer import Question, recommend
from engram_ref.place.engines import engine_flags
from engram_ref.place.formulas import FORMULAS, held_bytes
from engram_ref.place.group import Group
from engram_ref.place.machine import ASSUMED, Rate
from engram_ref.place.model import BACKBONES, Model
from engram_ref.place.table import report
from engram_ref.sharding.on_paper import LINKS
from tests.ref.place.example import EIGHT, GB, ROUND, ask, counted, placement


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
    assert hidden["placement"] == "uva"
    assert hidden["reason"].startswith(
        "uva: it loses at most <0.1 % (502 us) of a step of 512 tokens, and holds 188.8 GiB less GPU memory"
    )
    assert "device would not fit" in hidden["reason"]
    waits = ask(flash, fast, block_s=1e-9)["recommendation"]
    assert waits["placement"] == "uva" and "nothing that fits loses less than 3.0 % of every step" in waits["reason"]
    large = ask(flash, replace(fast, gpu=10**12), block_s=1e-9)["recommendation"]
    assert large["placement"] == "device"
    assert ask(flash, replace(fast, host=GB), block_s=1.0)["recommendation"]["placement"] == "file"
    none = ask(flash, replace(fast, host=0, disk=10 * GB))["recommendation"]
    assert none["placement"] is None and "GiB" in none["reason"]


def test_what_frees_the_most_is_taken_among_ranks_too(flash):
    """A part of the table on each GPU frees less than one copy in host memory, however little its ranks hold."""
    fast, ranks = ROUND.with_rates(ASSUMED), Group(8, 1, LINKS["nvlink"])
    assert ask(flash, fast, block_s=1.0, group=ranks)["recommendation"]["placement"] == "uva"
    parted = ask(flash, replace(fast, host=64 * GB, disk=0), block_s=1.0, group=ranks)["recommendation"]
    assert parted["placement"] == "sharded" and "never measured" in parted["reason"]


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
    assert steps[4]["window_formula"] == "window"
    assert ") of a prompt of 4,096 tokens, and holds" in found["recommendation"]["reason"]
    assert "== a prompt of 4,096 tokens: 196,608 rows" in report(found)
    slow = replace(fast, host=GB).with_rates({"reads": Rate(1e3, "given")})  # from a file: nothing hides
    lost = placement(ask(flash, slow, prompts=(4096,), block_s=1.0), "file")["steps"][-1]
    assert lost["exposed_s"] == lost["beyond_s"] + 2 * 1.1e-3 and lost["beyond_s"] > 0 and lost["loss"] > 0.03


def test_a_decode_step_alone_does_not_decide():
    """What hides in one step and not in another is not as good as what hides in all."""

    def offered(name, freed, decode, prefill):
        steps = [
            {"phase": phase, "tokens": 64, "seconds": 1.0, "exposed_s": exposed, "loss": exposed}
            for phase, exposed in (("decode", 0.01), ("decode", decode), ("prefill", prefill))
        ]
        where = {"freed": freed, "freed_where": "GPU memory"}
        return {"placement": name, "fits": True, "held": {"gpu": 100}, **where, "steps": steps}

    def taken(*placements):
        return recommend(list(placements))["placement"]

    assert taken(offered("device", 0, 0.0, 0.0), offered("file", 100, 0.0, 5.0)) == "device"
    assert taken(offered("device", 0, 0.0, 0.02), offered("file", 100, 0.02, 0.02)) == "file"
    assert taken(offered("device", 0, 0.0, 0.02), offered("file", 100, 5.0, 0.02)) == "device"
    assert taken(offered("host", 0, 2.0, 9.0), offered("file", 100, 3.0, 0.0)) == "file"
    assert taken(offered("host", 0, 2.0, 8.0), offered("file", 100, 2.5, 8.0)) == "host"
    # A buffer decides nothing, wherever the per cent begins; and where no block is known, the longest fetch does.
    for freed in (99.4, 99.5, 99.6, 100):
        assert taken(offered("uva", freed, 0.02, 0.02), offered("host", freed - 0.2, 0.01, 0.01)) == "host"
    unknown = [offered("uva", 100, None, None), offered("host", 0, None, None)]
    for found, seconds in zip(unknown, ((1.0, 9.0, 1.0), (1.0, 2.0, 3.0))):
        for step, taken_s in zip(found["steps"], seconds):
            step["seconds"] = taken_s
    assert taken(*unknown) == "host"


def test_a_row_in_place_costs_no_more_than_it_takes():
    """Waited for or beside blocks, but not both; the longer the blocks, the less is waited for."""
    for preset in sorted(BACKBONES):
        for block in (None, 1e-6, 1e-4, 1.0):
            found = ask(Model.of(preset), ROUND.with_rates(ASSUMED), block_s=block, prompts=(4096,))
            for step in placement(found, "uva")["steps"]:
                assert 0.6 * step["seconds"] <= step["exposed_s"] * (1 + 1e-9)
                assert step["exposed_s"] <= step["seconds"] * (1 + 1e-9)


def test_what_is_said_of_a_blocks_time(flash):
    """An estimate stands with every step, a given one in the head alone; that of a prompt is estimated in any case."""
    demo = Model.of("demo")
    given = report(ask(demo, block_s=330e-6, blocks=36, prompts=(4096,)))
    assert "by these rates" not in given and "block: 330 us, given; 36 of them a step" in given
    assert report(ask(flash, prompts=(4096,))).count("by these rates\n") == 4
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


def test_a_block_takes_the_longer_of_its_weights_and_its_operations(flash):
    """By each GPU: its part of the weights, used by the tokens of all ranks that split them."""
    machine = ROUND.with_rates({"device": Rate(1e12, "given"), "compute": Rate(1e14, "given")})

    def block(tokens, phase="decode", ranks=1, **how):
        group = Group(ranks, 1, LINKS["nvlink"])
        return Question(flash, machine, counted(), (1,), group=group, **how).block(tokens, phase)

    weights, operations = flash.backbone.step_bytes(64) / 40 / 1e12, 2 * 16e9 / 40 * 4096 / 1e14
    assert block(64) == block(64, ranks=8) == weights and block(4096) == block(4096, "prefill") == operations
    assert block(64, weights_over=8) == weights / 8 and block(4096, weights_over=8) == operations / 8
    dense = 8e9 - 289e9 * 6 / 384  # attention and what else is no expert: each of the ranks reads it whole
    together = flash.backbone.step_bytes(512) + 7 * dense
    assert block(64, ranks=8, weights_over=8) == pytest.approx(together / 40 / 8 / 1e12, rel=1e-9)
    assert block(4096, ranks=8, weights_over=8) == operations
    assert block(4096, block_s=1e-3) == 1e-3 and block(4096, "prefill", block_s=1e-3) == operations
    assert block(4096, "prefill", block_s=1.0) == 1.0


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


def test_rates_have_units_and_one_token_is_one(flash):
    given = {
        "bus": 5e10,
        "uva": 9.997e8,
        "compute": 2.25e15,
        "reads": 999.0,
        "start_device": 9.996e-4,
        "beside_uva": 0.6,
    }
    machine = ROUND.with_rates({name: Rate(value, "given") for name, value in given.items()})
    found = ask(flash, machine, batches=(1,))
    table = {cells[0]: cells[1] for line in report(found).splitlines() if len(cells := re.split("  +", line)) == 3}
    shown = ["50 GB/s", "1 G rows/s", "2.25 P operations/s", "999 reads/s", "1 ms", "60 %"]
    assert [table[name] for name in given] == shown
    assert "== 1 token a step" in report(found) and "a step of 1 token" in found["recommendation"]["reason"]
    assert {name: found["machine"]["rates"][name]["unit"] for name in ("bus", "beside_uva")} == {
        "bus": "B/s",
        "beside_uva": "",
    }


def test_flags_of_engines():
    assert engine_flags("uva", "v41")[0].startswith("""--engram-config '{"cpu_offload": true}'""")
    assert engine_flags("device", "v41")[1].startswith("""--engram-config '{"placement": "gpu"}'""")
    assert all('"none"' in line or '"embedding_across_dp": true' in line for line in engine_flags("sharded", "v41"))
    assert [line.split(" ")[0] for line in engine_flags("uva", "qwen")] == [
        "--engram-config",
        "--ple-offload-embedding",
    ]
    for other in ("host", "hot", "file", "memory", None):
        assert all(line.startswith("# ") for line in engine_flags(other, "v41") + engine_flags(other, "qwen")), other
    (line,) = engine_flags("uva", EngramConfig.preset("paper-40b").form)
    assert line.startswith("# neither vLLM nor SGLang loads a model of the form demo")
