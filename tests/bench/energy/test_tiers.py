"""Energy by tier: every sum worked out by hand, counts against sets of Python, and what the committed file says."""

import jsonschema
import numpy as np
import pytest

from bench.energy.table import crossing, crossing_table, reuse_table, shares, step_table, weight_bytes
from bench.energy.tiers import Tier, crossings, rows_energy, tiers, weights_energy
from bench.evidence.committed import Evidence
from bench.evidence.published import energy_tiers
from bench.ranges.energy_by_tier import count_steps
from bench.rows import cases
from bench.schemas import ranges
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.place.energy import pages_per_row
from tests.schemas import validator

NEAR, FAR, PAGED = Tier("near", (1.0, 2.0)), Tier("far", (10.0, 40.0)), Tier("paged", (0.0, 0.0), (1e6, 3e6))


@pytest.fixture(scope="module")
def results():
    return Evidence()["energy_by_tier"]


@pytest.mark.parametrize(
    ("row_bytes", "pages"),
    [(1, 1.0), (256, 1.0), (4096, 1.0), (4097, 2.0), (160, 1 + 4 / 128), (264, 1 + 32 / 512), (6144, 2.0)],
)
def test_pages_of_a_row(row_bytes, pages):
    assert pages_per_row(row_bytes) == pages
    starts = range(0, 4096 * row_bytes, row_bytes)  # all rows of a table that ends with a page
    touched = [len(range(start // 4096, (start + row_bytes - 1) // 4096 + 1)) for start in starts]
    assert sum(touched) / len(touched) == pages


def test_energies_by_hand():
    assert FAR.row(10) == pytest.approx((800e-12, 3200e-12))
    assert PAGED.row(160) == pytest.approx((1.03125e-6, 3.09375e-6))
    assert weights_energy(1000, NEAR) == pytest.approx((8e-9, 16e-9))
    assert rows_energy(FAR, NEAR, fetched=3, read=5, row_bytes=10) == pytest.approx(
        (3 * 800e-12 + 2 * 80e-12, 3 * 3200e-12 + 2 * 160e-12)
    )


def test_a_crossing_by_hand():
    """3 % of 10^6 bytes are 30,000; a token reads 2 rows of 10 bytes, and a bit costs 5 to 40 times one of weights."""
    found = crossings(FAR, NEAR, lambda tokens: 10**6, 10, 2, {1: 1.0})
    assert found == pytest.approx((30_000 / 20 / 40, 30_000 / 20 / 5), rel=2e-3)
    half = crossings(FAR, NEAR, lambda tokens: 10**6, 10, 2, {1: 0.5})
    assert half == pytest.approx((30_000 / (10 * 40 + 10), 30_000 / (10 * 5 + 10)), rel=2e-3)
    same = crossings(NEAR, NEAR, lambda tokens: 10**6, 10, 2, {1: 1.0, 1000: 1.0})
    assert same == pytest.approx((1500, 1500), rel=2e-3)
    growing = crossings(NEAR, NEAR, lambda tokens: round(10**6 * tokens), 10, 2, {1: 1.0})
    assert growing == (None, None)  # weights that grow as fast as the rows are never caught up with


def test_the_share_fetched_is_a_line_between_sizes():
    found = crossings(FAR, NEAR, lambda tokens: 10**6, 10, 2, {1: 1.0, 10**6: 0.0})
    tokens = found[1]
    share = 1 - np.log(tokens) / np.log(10**6)
    assert tokens * 20 * (share * 5 + 1 - share) == pytest.approx(30_000, rel=2e-3)


def test_published_tiers():
    """Ranges: HBM 3.44 to 4.3; LPDDR5 7 and DDR 20 to 41, with 5 to 15 for the link; 10 uJ a random read."""
    hbm, lpddr, ddr, sequential, random = energy_tiers()
    assert (hbm.per_bit, lpddr.per_bit, ddr.per_bit) == ((3.44, 4.3), (12, 22), (25, 56))
    assert sequential.per_bit == pytest.approx((205.6, 205.6), rel=1e-3)
    assert random.per_bit == (0, 0) and random.per_page == (1e7, 1e7)
    assert tiers(lambda name: (1.0, 2.0))[1].per_bit == (2.0, 4.0)
    low, high = tiers(lambda name: (1.0, 2.0))[3].per_bit  # the most bytes for a joule are the least energy
    assert (low, high) == (1e6 / 2 / 8, 1e6 / 8)


@pytest.fixture
def small(monkeypatch):
    """A small table for 50 ids, hashed by the reference, and ids that recur."""
    config = EngramConfig.preset("tiny").replace(table_size_per_order=(20, 20), heads=2)
    plan = HashPlan.build(config, compressed_size=50, pad_compressed=2)
    monkeypatch.setattr(cases, "plan_of", lambda config: plan)
    ids = np.random.default_rng(3).integers(0, 9, 259)
    return ids, config, plan


def test_counts_are_those_of_sets(small):
    """259 tokens, four a step: 64 steps, the last 32 count; token b of step t is token 64 b + t of the text."""
    ids, config, plan = small
    found = count_steps(ids, config, tokens_per_step=4)
    rows = {layer.layer_id: NgramHasher(plan)(ids[None], layer.layer_id)[0] for layer in plan.layers}
    seen, reads, distinct, first = set(), 0, 0, 0
    for t in range(64):
        here = [(layer, row) for layer in rows for b in range(4) for row in rows[layer][64 * b + t].tolist()]
        if t >= 32:
            reads, distinct, first = reads + len(here), distinct + len(set(here)), first + len(set(here) - seen)
        seen |= set(here)
    assert (found["reads"], found["distinct_in_step"], found["first_ever"]) == (reads, distinct, first)
    assert found["tokens"] == 256 and found["steps_counted"] == 32
    assert first < distinct < reads


def test_too_few_steps_are_refused(small):
    with pytest.raises(ValueError, match="take a text of 32 steps"):
        count_steps(small[0], small[1], tokens_per_step=9)


def test_the_committed_file_fits_its_schema(results):
    schema = validator(ranges.EnergyByTier)
    schema.validate(results)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate({**results, "joules": 1.0})


def test_reuse_falls_with_the_step_and_never_again_is_least(results):
    for table in ("paper-100b", "v41-flash"):
        once, never = (shares(results, table, key) for key in ("distinct_in_step", "first_ever"))
        assert list(once.values()) == sorted(once.values(), reverse=True) and once[1] == 1.0
        assert all(never[step] < once[step] for step in once)


def test_the_first_sum(results):
    """Without reuse: 3 % of Dense-4B's 8.04 GB at 2,560 B a token. By hand at HBM2's 3.92 pJ and 7.5 for the link."""
    hbm2 = Tier("HBM2", (3.92, 3.92))
    weights = weight_bytes("dense-4b", "", 512)
    every = {1: 1.0, 10**5: 1.0}

    def at(per_bit: float) -> float:
        return crossings(Tier("x", (per_bit, per_bit)), hbm2, lambda _: weights, 160, 16, every)[0]

    assert [at(e) for e in (14.5, 48.5, 27.5, 205.6)] == pytest.approx([25_485, 7_619, 13_437, 1_797], rel=3e-3)
    random = energy_tiers()[-1]
    found = crossings(random, hbm2, lambda _: weights, 160, 16, every)[0]
    assert found == pytest.approx(0.03 * weights * 8 * 3.92e-12 / (16 * 1.03125 * 10e-6), rel=2e-3)  # 45.9
    places = energy_tiers()
    first, last = crossing(results, places, places[-1], "v41-flash", "one", "reads")
    assert 12 < first < 15.7 < last < 17


def test_tables_name_every_model_and_tier(results):
    places = energy_tiers()
    for table in (crossing_table(results, places), step_table(places, 512)):
        for name in ("Dense-4B", "Dense-8B", "expected experts", *(tier.name for tier in places)):
            assert name in table
    assert reuse_table(results).count("\n") == 1 + len(results["records"])
