"""The compiled hash equals the NumPy definition bit for bit: indices, dtypes and error messages.

The definition is `NgramHasher(plan, "numpy")`; every comparison here is `==` on integers. The remainder by
multiplications gets tests of its own against Python's `%`, and a wrong candidate that these must catch.
"""

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled hash needs numba (pip install 'engram-offload[fast]')")
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import DEAD, INT64_MAX, Hashed, HashPlan, LayerPlan, NgramHasher, TokenHistory
from engram_ref.vocab import CompressedVocab

# Moduli that the compiled loop multiplies by the reciprocals of; an odd one is a prime. One smaller, and it divides.
PRIMES = (2**13, 8209, 10_007, 65_537, 646_403, 16_000_057, 2**28, 2**30 - 35, 2**31 - 19, 2**31 - 1)
SMALL = (2, 3, 5, 7, 9, 1009, 2**12, 2**13 - 1)
EIGHT = {  # columns
    "int32 rows": PRIMES[:8],
    "int64 rows": PRIMES[2:],
    "int32 rows, divided": (*PRIMES[:4], *SMALL[4:]),
    "int64 rows, divided": (*SMALL[:6], *PRIMES[-2:]),
}
either_rows = pytest.mark.parametrize("primes", EIGHT.values(), ids=EIGHT)


def plan_of(
    primes: tuple[int, ...], heads: int, size: int = 1000, multipliers: tuple[int, ...] | None = None
) -> HashPlan:
    """A plan of one layer, number 4, whose columns have these primes; the largest multipliers that fit."""
    max_ngram = len(primes) // heads + 1
    largest = INT64_MAX // max(1, size - 1)
    multipliers = multipliers or tuple(max(1, largest - 2 * s) for s in range(max_ngram))
    offsets = tuple(sum(primes[:i]) for i in range(len(primes)))
    return HashPlan(size, min(2, size - 1), max_ngram, heads, (LayerPlan(4, multipliers, primes, offsets),))


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got == expected).all()


def assert_backends_agree(plan: HashPlan, ids: object, **options: object) -> np.ndarray:
    """Hash with both backends, the candidate first; give back the indices."""
    got = NgramHasher(plan, "numba")(ids, plan.layers[0].layer_id, **options)
    assert_same(got, NgramHasher(plan, "numpy")(ids, plan.layers[0].layer_id, **options))
    return got


def random_ids(rng: np.random.Generator, size: int, shape: tuple[int, int], dead: float = 0.1) -> np.ndarray:
    ids = rng.integers(0, size, shape)
    ids[rng.random(shape) < dead] = DEAD
    return ids


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_plans(data):
    max_ngram, heads = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 9))
    columns = (max_ngram - 1) * heads
    allowed = data.draw(st.sampled_from([PRIMES[:7], PRIMES, SMALL + PRIMES[:2], SMALL + PRIMES]))
    primes = data.draw(st.lists(st.sampled_from(allowed), min_size=columns, max_size=columns))
    size = data.draw(st.sampled_from([1, 2, 50, 99_092, 2**31, INT64_MAX]))
    plan = plan_of(tuple(primes), heads, size)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    ids = random_ids(rng, size, (batch, length), data.draw(st.sampled_from([0.0, 0.1, 0.9])))
    history = None
    if data.draw(st.booleans()):
        history = TokenHistory(plan, batch)
        history.advance(random_ids(rng, size, (batch, data.draw(st.integers(1, 5)))))
    assert_backends_agree(plan, ids, offsets=data.draw(st.booleans()), history=history)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    config = EngramConfig.preset(preset)
    size = config.compressed_size or 98_627
    plan = HashPlan.build(config, size, 2)
    ids = random_ids(np.random.default_rng(0), size, (3, 300))
    for layer_id in config.layer_ids:
        expected = NgramHasher(plan, "numpy")(ids, layer_id)
        assert_same(NgramHasher(plan, "numba")(ids, layer_id), expected)


@pytest.mark.parametrize("primes", [PRIMES, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("size", [2, 98_627, INT64_MAX])
def test_largest_id_everywhere(size, primes):
    plan = plan_of(primes, 2, size)
    assert_backends_agree(plan, np.full((2, 9), size - 1))


def remainders(values: Sequence[int] | np.ndarray, primes: tuple[int, ...]) -> np.ndarray:
    """Each value modulo each prime, by the compiled loop alone. [values, primes]

    With multipliers of one, the pad id 0 and one token per sequence, the hash of an id is the id.
    """
    offsets = tuple(sum(primes[:i]) for i in range(len(primes)))
    plan = HashPlan(INT64_MAX, 0, 2, len(primes), (LayerPlan(0, (1, 1), primes, offsets),))
    return NgramHasher(plan, "numba")(np.array(values)[:, None], 0, offsets=False)[:, 0]


def by_reciprocals(values: list[int], primes: tuple[int, ...]) -> np.ndarray:
    """The formula without its limit, a plausible wrong candidate: of small moduli the quotient has no room in a double,
    and is off by more than one."""
    h, p = np.array(values)[:, None], np.array(primes)
    r = h - np.rint(h * (1.0 / p)).astype(np.int64) * p
    return np.where(r < 0, r + p, r)


def hard_values() -> list[int]:
    rng = np.random.default_rng(7)
    values = [int(h) for h in rng.integers(0, INT64_MAX, 100_000)]
    edges = [0, 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62, INT64_MAX - 1]
    # Around multiples, and around the middle between two of them, where the rounded quotient may be of either.
    near = [
        p * (INT64_MAX // p - k) + part + d
        for p in (*SMALL, *PRIMES)
        for k in (1, 2, 12_345)
        for part in (0, p // 2)
        for d in (-1, 0, 1)
    ]
    return values + edges + near + [p - 1 for p in PRIMES] + list(PRIMES)


@either_rows
def test_every_place_of_a_row_longer_than_what_is_hashed_together(primes):
    """Blocks of 64 tokens, eight at a time, and what is left of them: DEAD and a wrong id count wherever they stand."""
    plan, rng = plan_of(primes, 4), np.random.default_rng(0)
    hasher, ids = NgramHasher(plan, "numba"), random_ids(rng, 1000, (2, 83))
    for at in range(83):
        for c, valid in ((DEAD, True), (999, True), (1000, False), (-2, False), (2**32 + 5, False)):
            changed = ids.copy()
            changed[1, at] = c
            if valid:
                assert_backends_agree(plan, changed)
            else:
                rows = np.empty((2, 83, 8), np.int32 if sum(primes) < 2**31 else np.int64)
                given = hasher._by_row[4][0]
                assert not hasher._hash_rows(changed, hasher._no_history, given, rows)
    for strided in (ids[:, ::2], ids[:, ::-1], np.asfortranarray(ids), ids[::-1]):
        assert_backends_agree(plan, strided)


@pytest.mark.parametrize("heads", range(1, 18))
def test_rows_of_any_number_of_heads(heads):
    """Any number of heads, in rows of 32 and of 64 bits, and nothing is written behind the last row."""
    for primes in (PRIMES[3:5], PRIMES[-2:], SMALL[-2:]):
        plan = plan_of((primes * heads)[: 2 * heads], heads)
        ids = random_ids(np.random.default_rng(heads), 1000, (3, 70))
        rows = assert_backends_agree(plan, ids)
        hasher = NgramHasher(plan, "numba")
        for shape in ((3, 70), (1, 1)):
            around = np.full(shape[0] * shape[1] * 2 * heads + 4, -7, rows.dtype)
            into = around[:-4].reshape(*shape, 2 * heads)
            done = hasher._hash_rows(ids[: shape[0], : shape[1]], hasher._no_history, hasher._by_row[4][0], into)
            assert done and (around[-4:] == -7).all()


@pytest.mark.parametrize("max_ngram", [9, 10, 58, 65, 66, 512, 513])
def test_long_ngrams(max_ngram):
    """Hashes of a block are kept in 4 KiB: fewer tokens at once, down to one; beyond, the definition serves."""
    plan = plan_of((PRIMES * max_ngram)[: max_ngram - 1], 1)
    hasher = NgramHasher(plan, "numba")
    assert (4 in hasher._by_row) == (max_ngram <= 512)
    for ids in (random_ids(np.random.default_rng(0), 1000, (2, max_ngram + 70), 0.002), np.full((1, 1), 999)):
        assert_backends_agree(plan, ids)


@pytest.mark.parametrize("size", [2**32, 2**32 + 1])
def test_ids_that_have_an_upper_half(size):
    plan = plan_of(PRIMES[:8], 4, size)
    assert_backends_agree(plan, random_ids(np.random.default_rng(0), size, (2, 40)))
    assert_backends_agree(plan, np.full((1, 20), size - 1))


@pytest.mark.parametrize("primes", [PRIMES, SMALL], ids=["multiplied", "divided"])
def test_remainder_is_exact_and_a_wrong_one_is_caught(primes):
    values = hard_values()
    expected = np.array([[h % p for p in primes] for h in values])
    assert (remainders(values, primes) == expected).all()
    assert (by_reciprocals(values, primes) == expected).all() == (primes is PRIMES)


@pytest.mark.parametrize("modulus", [2**13, 2**13 + 1, 8209, 2**31 - 1])
def test_remainders_of_the_largest_hashes(modulus):
    """The most roundings to an integer that is wrong by the most: of the largest quotients, at all remainders."""
    values = np.arange(INT64_MAX - 300_000, INT64_MAX)
    assert (remainders(values, (modulus,))[:, 0] == values % modulus).all()


def test_hash_of_all_63_bits():
    for primes in (PRIMES, SMALL):
        plan = HashPlan(INT64_MAX, 1, 2, len(primes), (plan_of(primes, len(primes), INT64_MAX).layers[0],))
        rows = assert_backends_agree(plan, np.array([[INT64_MAX - 1]]), offsets=False)  # xor the pad id: 2^63 - 1
        assert rows[0, 0].tolist() == [INT64_MAX % p for p in primes]


def test_layers_above_int32_give_int64():
    plan = plan_of((2**31 - 1, 2**31 - 19, 3), 3)
    ids = random_ids(np.random.default_rng(0), 1000, (2, 30))
    assert assert_backends_agree(plan, ids).dtype == np.int64
    assert assert_backends_agree(plan, ids, offsets=False).dtype == np.int64
    assert assert_backends_agree(plan_of((2**31 - 1,), 1), ids).dtype == np.int32


INPUTS = {
    "int32": lambda ids: ids.astype(np.int32),
    "uint16": lambda ids: np.abs(ids).astype(np.uint16),
    "uint64": lambda ids: np.abs(ids).astype(np.uint64),
    "big-endian": lambda ids: ids.astype(">i8"),
    "list": lambda ids: ids.tolist(),
    "transposed": lambda ids: ids.T,
    "strided": lambda ids: ids[::-1, ::2],
    "broadcast": lambda ids: np.broadcast_to(ids[:1], ids.shape),
    "read-only": lambda ids: np.frombuffer(ids.tobytes(), np.int64).reshape(ids.shape),
    "unaligned": lambda ids: np.frombuffer(b"x" + ids.tobytes(), np.int64, offset=1).reshape(ids.shape),
    "pickled": lambda ids: pickle.loads(pickle.dumps(ids)),
    "masked": lambda ids: np.ma.masked_array(ids, ids > 5),
    "longlong": lambda ids: ids.astype(np.longlong),
}


@either_rows
@pytest.mark.parametrize("kind", INPUTS)
def test_other_inputs(kind, primes):
    plan = plan_of(primes, 4)
    ids = INPUTS[kind](random_ids(np.random.default_rng(0), 1000, (4, 6)))
    assert_backends_agree(plan, ids)
    history = TokenHistory(plan, len(ids))
    history.advance(np.full((len(ids), 1), 7))
    assert_backends_agree(plan, ids, history=history)


BAD = {
    "id too large": (np.array([[1, 1000]]), 4),
    "id too small": (np.array([[1, -2]]), 4),
    "least int64": (np.array([[1, -(2**63)]]), 4),
    "huge uint64": (np.array([[2**64 - 1]], dtype=np.uint64), 4),
    "float": (np.array([[1.0]]), 4),
    "bool": (np.array([[True]]), 4),
    "object": (np.array([[None]]), 4),
    "text": ("ab", 4),
    "None": (None, 4),
    "no dimension": (np.array(3), 4),
    "one dimension": (np.array([1, 2]), 4),
    "three dimensions": (np.ones((1, 1, 1), dtype=np.int64), 4),
    "no sequences": (np.empty((0, 3), dtype=np.int64), 4),
    "no tokens": (np.empty((3, 0), dtype=np.int64), 4),
    "unknown layer": (np.array([[1]]), 5),
    "layer is a list": (np.array([[1]]), [4, 5]),
}


@either_rows
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("with_history", [False, True])
def test_bad_inputs_have_one_message(case, with_history, primes):
    ids, layer_id = BAD[case]
    plan = plan_of(primes, 4)
    messages = []
    for backend in ("numba", "numpy"):
        history = TokenHistory(plan, 1) if with_history else None
        with pytest.raises(ValueError) as caught:
            NgramHasher(plan, backend)(ids, layer_id, history=history)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@either_rows
def test_history_of_other_sequences(primes):
    plan, wider = plan_of(primes, 4), plan_of(primes, 2)
    ids = np.ones((3, 4), dtype=np.int64)
    for history in (*(TokenHistory(plan, batch) for batch in (1, 2, 4)), TokenHistory(wider, 3)):
        for backend in ("numba", "numpy"):
            with pytest.raises(ValueError, match="make one with TokenHistory"):
                NgramHasher(plan, backend)(ids, 4, history=history)


@either_rows
def test_a_history_with_ids_of_another_vocabulary(primes):
    plan, larger = plan_of(primes, 4), plan_of(primes, 4, size=50_000)
    history = TokenHistory(larger, 1)
    history.advance(np.array([[7, 40_000]]))
    for backend in ("numba", "numpy"):
        with pytest.raises(ValueError, match=r"the history's ids contain 40000; the vocabulary has -1 \.\. 999"):
            NgramHasher(plan, backend)(np.ones((1, 4), dtype=np.int64), 4, history=history)


@either_rows
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_equal_one_shot(primes, batch):
    plan = plan_of(primes, 2)
    ids = random_ids(np.random.default_rng(3), 1000, (batch, 160))
    hasher, history = NgramHasher(plan, "numba"), TokenHistory(plan, batch)
    chunks = []
    for chunk in np.split(ids, [1, 2, 3, 10, 11, 90], axis=1):
        chunks.append(hasher(chunk, 4, history=history))
        history.advance(chunk)
    assert_same(np.concatenate(chunks, axis=1), NgramHasher(plan, "numpy")(ids, 4))


@either_rows
@pytest.mark.parametrize("length", [1, 5, 200])
def test_result_is_fresh_and_input_untouched(primes, length):
    hasher = NgramHasher(plan_of(primes, 4), "numba")
    ids = random_ids(np.random.default_rng(0), 1000, (2, length))
    before = ids.copy()
    first, second = hasher(ids, 4), hasher(ids, 4)
    assert first.flags.c_contiguous and first.flags.owndata and first.flags.writeable
    assert not np.shares_memory(first, second) and not np.shares_memory(first, ids)
    assert (ids == before).all()


def vocab_of(size: int, tokens: int) -> CompressedVocab:
    """All compressed ids, then random ones of them, so that token ids and compressed ids differ."""
    more = np.random.default_rng(1).integers(0, size, tokens - size)
    return CompressedVocab.from_map(np.concatenate([np.arange(size), more]))


def layers_of(*primes: tuple[int, ...]) -> HashPlan:
    """A plan of several layers, 0, 1, ..., with multipliers of their own."""
    one = [plan_of(p, 4, multipliers=(3 + i, 5 + i, 7 + i)) for i, p in enumerate(primes)]
    return replace(one[0], layers=tuple(replace(p.layers[0], layer_id=i) for i, p in enumerate(one)))


def in_steps(
    plan: HashPlan, ids: object, vocab: CompressedVocab, history: TokenHistory | None = None, dead: object = None
) -> tuple[np.ndarray, np.ndarray]:
    """By the definition: the vocabulary first, then NumPy, layer by layer."""
    compressed = vocab(ids, dead)
    hasher = NgramHasher(plan, "numpy")
    return np.stack([hasher(compressed, layer.layer_id, history=history) for layer in plan.layers]), compressed


SEVERAL = {
    "int32 rows": layers_of(EIGHT["int32 rows"], EIGHT["int32 rows"][::-1]),
    "int64 rows": layers_of(EIGHT["int64 rows"], EIGHT["int64 rows"][::-1]),
    "both, and a small modulus": layers_of(EIGHT["int32 rows"], (4, *EIGHT["int64 rows"][1:])),
    "segments": replace(layers_of(EIGHT["int32 rows"], EIGHT["int32 rows"][::-1]), segment_end=3),
}


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("plan", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 70), (4, 33)])
def test_from_token_ids_to_rows_of_all_layers_at_once(plan, shape, backend):
    vocab, rng, hasher = vocab_of(1000, 1300), np.random.default_rng(7), NgramHasher(plan, backend)
    history, out = TokenHistory(plan, shape[0]), None
    for again in range(4):
        ids, past = rng.integers(0, 1300, shape), history if again else None
        dead = rng.random(shape) < 0.3 if again == 3 else None
        expected = in_steps(plan, ids, vocab, past, dead)
        hashed = hasher.from_tokens(ids, vocab, past, dead, out)
        for got, wanted in zip(hashed, expected):
            assert_same(got, wanted)
        out = hashed if out is None else out
        assert all(got is kept for got, kept in zip(hashed, out))  # written over from the second time on
        history.advance(hashed.compressed)


@pytest.mark.parametrize("kind", INPUTS)
def test_other_token_ids_at_once(kind):
    plan, vocab = SEVERAL["int32 rows"], vocab_of(1000, 1300)
    ids = INPUTS[kind](np.random.default_rng(0).integers(0, 1300, (4, 6)))
    for got, wanted in zip(NgramHasher(plan, "numba").from_tokens(ids, vocab), in_steps(plan, ids, vocab)):
        assert_same(got, wanted)


@pytest.mark.parametrize("case", [name for name in BAD if "layer" not in name])
def test_bad_token_ids_have_the_messages_of_the_vocabulary(case):
    plan, vocab = SEVERAL["int32 rows"], vocab_of(1000, 1000)
    with pytest.raises(ValueError) as said:
        vocab(BAD[case][0])
    for backend in ("numba", "numpy"):
        with pytest.raises(ValueError) as caught:
            NgramHasher(plan, backend).from_tokens(BAD[case][0], vocab)
        assert str(caught.value) == str(said.value)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_what_does_not_fit_a_pass_from_token_ids(backend):
    plan, ids = SEVERAL["int32 rows"], np.ones((2, 3), np.int64)
    hasher, vocab = NgramHasher(plan, backend), vocab_of(1000, 1300)
    with pytest.raises(ValueError, match="a vocabulary of 999 compressed ids; the plan was made for 1000"):
        hasher.from_tokens(ids, vocab_of(999, 1300))
    for history in (TokenHistory(plan, 1), TokenHistory(plan_of(EIGHT["int32 rows"], 2), 2)):
        with pytest.raises(ValueError, match="make one with TokenHistory"):
            hasher.from_tokens(ids, vocab, history)
    with pytest.raises(ValueError, match=r"dead is bool \(1, 3\): give booleans of shape \(2, 3\)"):
        hasher.from_tokens(ids, vocab, dead=np.ones((1, 3), bool))
    good = hasher.from_tokens(ids, vocab)
    other = Hashed(good.rows[:, :1], good.compressed), Hashed(good.rows.astype(np.int64), good.compressed)
    other += Hashed(good.rows, good.compressed[:, :2]), Hashed(good.rows.transpose(0, 1, 3, 2), good.compressed)
    for out in other:
        with pytest.raises(ValueError, match=r"out has (rows|compressed) of .*these token ids need"):
            hasher.from_tokens(ids, vocab, out=out)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_constants_of_their_own(duplicate):
    hasher = NgramHasher(plan_of(EIGHT["int32 rows"], 4), "numba")
    twin = duplicate(hasher)
    assert twin.plan == hasher.plan and twin.backend == "numba"
    assert not {id(c) for c in twin._constants} & {id(c) for c in hasher._constants}
    ids = random_ids(np.random.default_rng(0), 1000, (2, 5))
    expected = hasher(ids, 4)
    del hasher
    assert_same(twin(ids, 4), expected)
