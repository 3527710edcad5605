"""`bench/verdict.py`: the whole answer, on one screen, and what it is not concluded from."""

import json
from pathlib import Path

import pytest

from bench.evidence.committed import RESULTS, Evidence
from bench.price.table import find_run
from bench.verdict import screen


def test_all_of_the_answer_fits_a_screen():
    lines = screen(Evidence()).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 150
    text = " ".join(" ".join(lines).split())
    for part in (
        "Dense-8B",
        "V4.1-Flash, one token's experts",
        "What survives: ",
        "What does not: ",
        "Where it turns: ",
    ):
        assert part in text
    for word in ("definition", "on other texts", "every memory manager", "SSD"):
        assert word in text


NAMES = ("engram", "lookup", "resident")


@pytest.fixture
def toy():
    return json.loads((Path(RESULTS) / "bytedmd_toy.json").read_text(encoding="utf-8"))


def test_a_run_that_is_there_twice_or_not_at_all_is_refused(toy):
    run = find_run(toy, *NAMES)
    toy["runs"].insert(0, {**run, "cost": 10**12})
    with pytest.raises(ValueError, match="2 runs of engram/lookup/resident"):
        find_run(toy, *NAMES)
    toy["runs"] = []
    with pytest.raises(ValueError, match="no runs of engram/lookup/resident"):
        find_run(toy, *NAMES)
