"""Token batches: each one is a window of the text, none comes twice, and decoding continues what came before."""

import hashlib

import numpy as np
import pytest

from bench.setup.streams import Source, standard_library, text_source
from bench.setup.token_batches import text_batches, uniform_batches
from engram_ref.config import EngramConfig
from engram_ref.hashing import DEAD, HashPlan, NgramHasher
from engram_ref.vocab import load_tokenizer


@pytest.fixture(scope="module")
def plan(vocab_small):
    config = EngramConfig.preset("tiny")
    return HashPlan.build(config, len(vocab_small), vocab_small.pad(config.pad_id))


@pytest.fixture
def counted():
    """A text whose ids are their own positions."""
    return Source("counted", "0" * 64, np.arange(1000), np.arange(1000))


@pytest.fixture
def folder(tmp_path):
    """A small library: two modules that count, one of them not in UTF-8, and tests that do not."""
    (tmp_path / "b.py").write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'Zoë'\n".encode("latin-1"))
    for left_out in ("test", "site-packages"):
        (tmp_path / left_out).mkdir()
        (tmp_path / left_out / "c.py").write_text("left = 'out'\n")
    return tmp_path


def test_a_batch_is_one_window_of_each_part(counted):
    batches = text_batches(counted, 4, 10, 0)
    first, second = batches.next(), batches.next()
    assert first.shape == (4, 10)
    assert first.dtype == np.int64
    assert (np.diff(first, axis=1) == 1).all()
    assert (np.diff(first[:, 0]) == 250).all()
    assert (second == first + 10).all()
    assert (batches.name, batches.sha256, batches.tokens, batches.history) == ("counted", "0" * 64, 1000, None)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 10), (4, 10), (5, 64), (10, 50), (3, 31)])
def test_no_window_comes_twice_until_the_text_is_exhausted(counted, batch, tokens):
    batches = text_batches(counted, batch, tokens, 1)
    starts = [int(batches.next()[0, 0]) for _ in range(3000 // (batch * tokens) + 2)]
    assert max(starts) + tokens <= 1000 // batch
    turns = [at for at in range(1, len(starts)) if starts[at] != starts[at - 1] + tokens]
    assert turns
    for begin, end in zip([0, *turns], turns):
        assert starts[end - 1] + 2 * tokens > 1000 // batch  # this walk went to the end
        assert starts[begin] != starts[end] < starts[end - 1] + tokens  # and the next one begins elsewhere


def test_the_seed_says_where_the_walk_starts(counted):
    one, same, other = (text_batches(counted, 2, 50, seed).next() for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).all()


def decoded(plan, text, steps, with_history):
    """Rows of `steps` single-token batches, [B, steps, C], and the ids that they were."""
    batches = text_batches(text, 3, 1, 5, plan=plan)
    hasher = NgramHasher(plan, "numpy")
    ids, rows = [], []
    for _ in range(steps):
        ids.append(batches.next())
        rows.append(hasher(ids[-1], 1, history=batches.history if with_history else None))
    return np.concatenate(rows, axis=1), np.concatenate(ids, axis=1)


@pytest.mark.parametrize("with_history", [True, False])
def test_decoding_hashes_as_one_shot_does_and_only_with_the_history(plan, counted, with_history):
    rows, ids = decoded(plan, counted, 20, with_history)
    assert (rows == NgramHasher(plan, "numpy")(ids, 1)).all() == with_history


def test_a_history_stays_as_it_was_given(plan, counted):
    batches = text_batches(counted, 2, 1, 0, plan=plan)
    ids = [batches.next() for _ in range(3)]
    held = batches.history
    batches.next()
    assert held is not batches.history
    assert (held.ids[:, -2:] == np.concatenate(ids[:2], axis=1)).all()


def test_where_the_text_starts_over_sequences_do_too(plan):
    batches = text_batches(Source("short", "", np.arange(8), np.arange(8)), 2, 1, 0, plan=plan)
    seen = []
    for _ in range(9):
        ids = batches.next()
        began = bool((batches.history.ids == DEAD).all())
        seen.append((int(ids[0, 0]), began))
    starts_over = [at == 0 or seen[at][0] <= seen[at - 1][0] for at in range(9)]
    assert [began for _, began in seen] == starts_over
    assert sum(starts_over) >= 2


def test_uniform_ids_are_fresh_seeded_and_cover_the_vocabulary(vocab_small):
    batches = uniform_batches(vocab_small, 8, 1024, 3)
    first, second = batches.next(), batches.next()
    assert first.dtype == np.int64
    assert (first.min(), first.max()) >= (0, len(vocab_small) - 10)
    assert first.max() < len(vocab_small)
    assert (first != second).mean() > 0.99
    assert (first == uniform_batches(vocab_small, 8, 1024, 3).next()).all()
    assert batches.sha256 != uniform_batches(vocab_small, 8, 1024, 4).sha256
    assert (batches.name, batches.tokens, batches.history) == ("uniform", None, None)


def test_uniform_sequences_continue_too(plan, vocab_small):
    batches = uniform_batches(vocab_small, 2, 1, 0, plan=plan)
    ids = np.concatenate([batches.next() for _ in range(5)], axis=1)
    width = batches.history.ids.shape[1]
    assert (batches.history.ids == ids[:, 4 - width : 4]).all()


def test_the_library_is_its_sources_in_order(folder, vocab_small, small_tokenizer):
    text = standard_library(vocab_small, small_tokenizer, folder=folder)
    texts = ["# -*- coding: latin-1 -*-\nname = 'Zoë'\n", "def double(x):\n    return 2 * x\n"]
    encoder = load_tokenizer(small_tokenizer)
    tokens = [token for text in texts for token in encoder.encode(text, add_special_tokens=False).ids]
    assert text.name == "python-stdlib"
    assert text.sha256 == hashlib.sha256("".join(texts).encode()).hexdigest()
    assert text.ids.tolist() == vocab_small([tokens])[0].tolist()


def test_no_more_sources_are_read_than_asked_for(folder, vocab_small, small_tokenizer):
    text = standard_library(vocab_small, small_tokenizer, nbytes=1, folder=folder)
    assert text.sha256 == hashlib.sha256("# -*- coding: latin-1 -*-\nname = 'Zoë'\n".encode()).hexdigest()


def test_this_python_has_sources(vocab_small, small_tokenizer):
    text = standard_library(vocab_small, small_tokenizer, nbytes=100_000)
    assert 20_000 < len(text.ids) < 200_000  # source code has 1 to 5 characters a token
    assert text.ids.max() < len(vocab_small)


def test_a_text_file_will_do(tmp_path, vocab_small, small_tokenizer):
    (tmp_path / "some.txt").write_text("A few words, " * 50)
    text = text_source(tmp_path / "some.txt", vocab_small, small_tokenizer)
    assert text.name == "some.txt"
    assert text_batches(text, 2, 20, 0).next().shape == (2, 20)


def test_a_short_text_is_refused_with_both_numbers(counted):
    text_batches(counted, 5, 100, 0).next()
    with pytest.raises(ValueError, match=r"counted has 1,000 tokens: 5 sequences of 101 need at least 1,010"):
        text_batches(counted, 5, 101, 0)


def test_single_tokens_need_a_plan(vocab_small, counted):
    for make, ids in ((text_batches, counted), (uniform_batches, vocab_small)):
        with pytest.raises(ValueError, match="give the plan"):
            make(ids, 4, 1, 0)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 8), (4, 0), (4, -1)])
def test_nothing_is_not_a_batch(batch, tokens, vocab_small):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        uniform_batches(vocab_small, batch, tokens, 0)


def test_a_folder_without_sources_is_refused(tmp_path, vocab_small):
    with pytest.raises(ValueError, match=r"no Python sources in .*name a text file"):
        standard_library(vocab_small, folder=tmp_path)
