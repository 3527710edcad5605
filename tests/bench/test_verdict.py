"""`bench/verdict.py`: the whole answer, on one screen."""

from __future__ import annotations

from bench.evidence.committed import Evidence
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
    for word in ("definition", "On other texts", "every manager of memory", "SSD"):
        assert word in text
