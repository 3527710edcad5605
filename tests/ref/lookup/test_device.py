"""The lookup of a step: NgramHasher's integers and the tables' bits, in one launch or two, history included.

All ways of it, the kernels in Triton's interpreter and plain torch, are compared with the NumPy definition by `==`.
"""

import copy
import dataclasses
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

pytest.importorskip("triton", reason="the kernels need Triton (pip install 'engram-offload[test]' on Linux)")

from engram_ref import gpu
from engram_ref.attach import attach
from engram_ref.attach.lookup import Source
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan, NgramHasher, TokenHistory, device_ids
from engram_ref.hashing import kernels as kernels_hashing
from engram_ref.hashing.device import DeviceHasher
from engram_ref.lookup import device as device_lookup
from engram_ref.lookup import kernels as kernels_lookup
from engram_ref.lookup.device import DeviceLookup, can_fuse
from engram_ref.rows import kernels
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.host import HostTable
from engram_ref.tables.uva import UvaTable
from engram_ref.vocab import CompressedVocab
from tests.ref.attach.models import make_ids, make_layers, make_model, padded_batch
from tests.ref.launches import Launches
from tests.ref.rows.fp8_pairs import assert_bits, random_rows, rows_of

pytestmark = [
    pytest.mark.skipif(not gpu.INTERPRETED, reason="tests/cuda/test_lookup_cuda.py does this on a GPU"),
    # The interpreter multiplies with NumPy, which speaks of an overflow where fp8 rows have infinity for a value.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply"),
]

PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
PLACES = {"device": DeviceTable, "uva": lambda rows: UvaTable(rows, "cpu")}
WAYS = {"one kernel": True, "two kernels": True, "plain": False}
TOKENS, SIZE = 150, 100


def plan_of(layers: int = 2, max_ngram: int = 3, heads: int = 4, size: int = SIZE, pad: int = 2) -> HashPlan:
    """Layers 3, 4, … of other primes and of the largest multipliers that fit."""
    columns = (max_ngram - 1) * heads
    made = []
    for i in range(layers):
        primes = tuple(PRIMES[(i + c) % len(PRIMES)] for c in range(columns))
        largest = INT64_MAX // max(1, size - 1)
        multipliers = tuple(max(1, largest - 2 * s - i) for s in range(max_ngram))
        made.append(LayerPlan(3 + i, multipliers, primes, tuple(sum(primes[:c]) for c in range(columns))))
    return HashPlan(size, pad, max_ngram, heads, tuple(made))


def vocab_of(size: int = SIZE, tokens: int = TOKENS) -> CompressedVocab:
    rest = np.random.default_rng(1).integers(0, size, tokens - size)
    return CompressedVocab.from_map(np.concatenate([np.arange(size), rest]))


def weights_of(plan: HashPlan, width: int = 24) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {x.layer_id: torch.randn(x.rows, width, generator=generator).bfloat16() for x in plan.layers}


def lookup_of(plan, fused=True, place="device", weights=None, vocab=True, launches=None) -> DeviceLookup:
    weights = weights_of(plan) if weights is None else weights
    tables = {layer_id: PLACES[place](rows) for layer_id, rows in weights.items()}
    vocab = vocab_of(plan.compressed_size) if vocab is True else vocab
    return DeviceLookup(plan, tables, vocab, fused, launches)


def expected(plan: HashPlan, compressed: np.ndarray, history: TokenHistory | None = None) -> dict[int, np.ndarray]:
    hasher = NgramHasher(plan, "numpy")
    return {x.layer_id: hasher(compressed, x.layer_id, history=history) for x in plan.layers}


def assert_found(found, want: dict[int, np.ndarray], weights: dict[int, torch.Tensor]) -> None:
    assert list(found.rows) == list(want) == list(found.values)
    for layer_id, rows in want.items():
        assert (found.rows[layer_id].numpy() == rows).all()
        assert torch.equal(found.values[layer_id], weights[layer_id][torch.from_numpy(rows).reshape(-1).long()])


@pytest.fixture(params=WAYS)
def fused(request, monkeypatch) -> bool:
    if request.param == "two kernels":
        monkeypatch.setattr(device_lookup, "ONE_LAUNCH_ROWS", 0)
    return WAYS[request.param]


@pytest.fixture
def plan() -> HashPlan:
    return plan_of()


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter takes a millisecond for a program, whatever it does."""
    monkeypatch.setattr(kernels, "ROWS_PER_PROGRAM", 64)
    monkeypatch.setattr(kernels, "SCALED_ROWS_PER_PROGRAM", 16)


# --- the same integers, the same bits --------------------------------------------------------------


@pytest.mark.parametrize(("place", "in_place"), [("device", True), ("uva", False)])
def test_chunks_of_several_sequences(plan, fused, place, in_place):
    """One token, some, many tiles; the tail is advanced where it lies, as a replayed graph needs it, or elsewhere."""
    weights, vocab = weights_of(plan), vocab_of()
    lookup, history, rng = lookup_of(plan, fused, place, weights), TokenHistory(plan, 3), np.random.default_rng(0)
    tail = lookup.new_tail(3)
    for length in (1, 1, 5, 18, 2):
        ids = rng.integers(0, TOKENS, (3, length))
        after = tail if in_place else torch.full_like(tail, 55)
        compressed = vocab(ids)
        found = lookup(torch.from_numpy(ids), tail, after)
        assert (found.compressed.numpy() == compressed).all()
        assert_found(found, expected(plan, compressed, history), weights)
        history.advance(compressed)
        assert (after.numpy() == history.ids).all()
        tail = after
    lookup.check()


def check_random_case(data: st.DataObject, fused: bool) -> None:
    max_ngram, heads = data.draw(st.integers(2, 5)), data.draw(st.sampled_from([1, 2, 3, 8]))
    size = data.draw(st.sampled_from([2, 100, 149]))
    plan = plan_of(data.draw(st.integers(1, 3)), max_ngram, heads, size, data.draw(st.integers(0, size - 1)))
    length = data.draw(st.sampled_from([1, 2, 3, 4, 16, 17, 35]))
    batch = data.draw(st.integers(1, 3 if length < 16 else 1))  # the interpreter runs one program after the other
    stand_in = data.draw(st.sampled_from([DEAD, plan.pad_compressed, size - 1]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vocab = vocab_of(size) if data.draw(st.booleans()) else None
    ids = rng.integers(0, TOKENS if vocab else size, (batch, length))
    mask = rng.random(ids.shape) < 0.3 if data.draw(st.booleans()) else None
    before = rng.integers(DEAD, size, (batch, max_ngram - 1 + data.draw(st.sampled_from([0, 1, 70]))))
    after = torch.full((batch, data.draw(st.sampled_from([1, max_ngram - 1, 9, 80]))), 55)
    compressed = vocab(ids) if vocab else ids
    compressed = compressed if mask is None else np.where(mask, stand_in, compressed)
    history = TokenHistory(plan, batch)
    history.advance(before)
    seen = ids if mask is None else np.where(mask, -77, ids)  # a masked id is not looked at
    masked = None if mask is None else torch.from_numpy(mask)
    lookup = lookup_of(plan, fused, vocab=vocab, launches=data.draw(st.sampled_from([1, 2])))
    found = lookup(torch.from_numpy(seen), torch.from_numpy(before), after, masked, stand_in)
    assert (found.compressed.numpy() == compressed).all()
    assert_found(found, expected(plan, compressed, history), weights_of(plan))
    whole = np.concatenate([np.full((batch, 80), DEAD), before, compressed], axis=1)
    assert (after.numpy() == whole[:, -after.shape[1] :]).all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_cases_in_the_kernels(data):
    check_random_case(data, True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_cases_in_plain_torch(data):
    check_random_case(data, False)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, ::3], lambda x: x[1:2, -1:], lambda x: x[:1].expand(4, -1), lambda x: x.int()],
    ids=["transposed", "every third", "one token", "one row four times", "int32"],
)
def test_other_forms_of_token_ids(view, plan, fused):
    ids = view(torch.from_numpy(np.random.default_rng(3).integers(0, TOKENS, (4, 6))))
    dead = torch.from_numpy(np.random.default_rng(4).random((12, 12)) < 0.3)[: len(ids), : ids.shape[1]]  # strided, too
    compressed = vocab_of()(ids.numpy(), dead.numpy())
    assert_found(lookup_of(plan, fused)(ids, dead=dead), expected(plan, compressed), weights_of(plan))


def test_a_table_beyond_two_to_the_31_makes_all_row_numbers_64_bits(fused):
    plan = plan_of()
    primes = (2**31 - 1, 2**31 - 19, *plan.layers[1].primes[2:])
    large = dataclasses.replace(
        plan.layers[1], primes=primes, offsets=tuple(sum(primes[:i]) for i in range(len(primes)))
    )
    plan = dataclasses.replace(plan, layers=(plan.layers[0], large))
    hasher = DeviceHasher(plan, "cpu", fused)
    ids = np.random.default_rng(5).integers(0, SIZE, (2, 9))
    rows = hasher.from_tokens(torch.from_numpy(ids)).rows
    assert rows.dtype == torch.int64
    assert all((rows[i].numpy() == want).all() for i, want in enumerate(expected(plan, ids).values()))


def test_a_wrong_plan_or_a_lost_tail_would_be_noticed(plan, fused):
    """The comparisons above tell a multiplier that is two too small, and a sequence whose past was forgotten."""
    wrong = dataclasses.replace(plan.layers[0], multipliers=(plan.layers[0].multipliers[0] - 2,) * 3)
    ids = np.random.default_rng(6).integers(1, SIZE, (2, 6))
    want, weights = expected(plan, ids), weights_of(plan)
    lookup = lookup_of(dataclasses.replace(plan, layers=(wrong, plan.layers[1])), fused, weights=weights, vocab=None)
    with pytest.raises(AssertionError):
        assert_found(lookup(torch.from_numpy(ids)), want, weights)
    with pytest.raises(AssertionError):
        found = lookup_of(plan, fused, vocab=None)(torch.from_numpy(ids[:, 3:]))
        assert_found(found, {i: rows[:, 3:] for i, rows in want.items()}, weights)


def test_no_n_gram_reaches_over_an_end_of_text(plan, fused):
    """The one kernel does not know of ends of text, so such a plan takes two launches."""
    ends = dataclasses.replace(plan, segment_end=7)
    weights = weights_of(ends)
    ids = np.array([[7, 1, 2, 7, 3, 4], [5, 7, 7, 6, 8, 9]])
    assert_found(
        lookup_of(ends, fused, weights=weights, vocab=None)(torch.from_numpy(ids)), expected(ends, ids), weights
    )
    assert any((expected(ends, ids)[i] != rows).any() for i, rows in expected(plan, ids).items())
    with pytest.raises(ValueError, match="launches=1: this plan's texts have an end"):
        lookup_of(ends, fused, weights=weights, vocab=None, launches=1)


def test_of_a_plan_s_layers_only_those_with_a_table(plan, fused):
    weights = {4: weights_of(plan)[4]}
    lookup, ids = lookup_of(plan, fused, weights=weights), np.random.default_rng(7).integers(0, TOKENS, (2, 3))
    assert lookup.layer_ids == [4]
    assert_found(lookup(torch.from_numpy(ids)), {4: expected(plan, vocab_of()(ids))[4]}, weights)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_fp8_rows_are_decoded_on_the_way(plan, place, split):
    raw = {x.layer_id: random_rows(x.rows, 64) for x in plan.layers}
    lookup = lookup_of(plan, True, place, {i: rows_of(x, split) for i, x in raw.items()})
    ids = np.random.default_rng(8).integers(0, TOKENS, (2, 3))
    found = lookup(torch.from_numpy(ids))
    for layer_id, rows in expected(plan, vocab_of()(ids)).items():
        assert_bits(found.values[layer_id], raw[layer_id][torch.from_numpy(rows).reshape(-1).long()])


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 33), (torch.bfloat16, 1), (torch.bfloat16, 80)], ids=str)
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_rows_of_any_width_and_alignment_into_a_given_buffer(dtype, width, shift, plan):
    """Nothing is written beside the buffer, whose old content is NaN, and rows that are not asked for are not read."""
    weights = {}
    for layer_id, rows in weights_of(plan, width).items():
        flat = torch.full((rows.numel() + shift,), torch.nan, dtype=dtype)
        weights[layer_id] = flat[shift:].view_as(rows).copy_(rows)
    lookup, ids = lookup_of(plan, weights=weights), np.random.default_rng(9).integers(0, TOKENS, (2, 3))
    want = expected(plan, vocab_of()(ids))
    for layer_id, rows in want.items():
        unused = np.setdiff1d(np.arange(len(weights[layer_id])), rows)
        weights[layer_id][torch.from_numpy(unused)] = torch.nan
    size = lookup.new_rows(2, 3).numel()
    around = torch.full((size + 2 * shift + 2,), torch.nan, dtype=dtype)
    out = around[shift + 1 : shift + 1 + size].view(2, -1, width)
    before = out._version
    found = lookup(torch.from_numpy(ids), out=out)
    assert found.values[3].data_ptr() == out.data_ptr() and out._version > before
    assert_found(found, want, weights)
    assert not out.isnan().any()
    assert around[: shift + 1].isnan().all() and around[shift + 1 + size :].isnan().all()


@pytest.mark.parametrize("max_ngram", [2, 3, 4, 6])
def test_one_program_of_a_sequence_reads_what_came_before(max_ngram):
    """It overwrites that, so no other one may: the first tile reaches over N - 1 positions, or over the whole chunk."""
    for columns in (1, 16, 48, 600, 3000):
        for length in (1, 2, 3, 7, 16, 500):
            tile = kernels_hashing._shape(max_ngram, columns, length)["TILE"]
            assert tile >= min(max_ngram - 1, length)


# --- ids that do not exist -------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch):
    """As on CUDA: a bad id is not looked for at once."""
    monkeypatch.setattr(device_ids, "_known_at_once", lambda device: False)


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(("bad", "length"), [(-1, 1), (TOKENS, 20), (-(2**63), 5), (INT64_MAX, 1)])
def test_a_token_outside_the_vocabulary_counts_as_dead_and_is_raised_once(bad, length, plan, fused):
    lookup, ids = lookup_of(plan, fused), np.random.default_rng(10).integers(0, TOKENS, (2, length))
    ids[1, -1] = bad
    tail = lookup.new_tail(2)
    found = lookup(torch.from_numpy(ids), tail, tail)
    compressed = vocab_of()(np.where(ids == bad, 0, ids), ids == bad)
    assert_found(found, expected(plan, compressed), weights_of(plan))
    assert (found.compressed.numpy() == compressed).all() and tail[1, -1] == DEAD
    with pytest.raises(ValueError, match=rf"^token ids contain {bad}; the vocabulary has 0 \.\. {TOKENS - 1}$"):
        lookup.check()
    lookup.check()


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("where", ["ids", "before", "vocab"])
def test_a_compressed_id_that_does_not_exist_counts_as_dead(where, plan, fused):
    ids, before = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 2]])
    want_ids, want_before = ids.clone(), before.clone()
    vocab = None
    if where == "vocab":  # a map that was put together by hand
        vocab = CompressedVocab(np.array([*range(6), SIZE, *range(7, SIZE)]), SIZE, digest="")
    else:
        (ids if where == "ids" else before)[0, 1] = SIZE
    (want_before if where == "before" else want_ids)[0, 1] = DEAD
    history = TokenHistory(plan, 1)
    history.advance(want_before.numpy())
    lookup, after = lookup_of(plan, fused, vocab=vocab), torch.zeros(1, 2, dtype=torch.int64)
    found = lookup(ids, before, after)
    assert_found(found, expected(plan, want_ids.numpy(), history), weights_of(plan))
    assert torch.equal(found.compressed, want_ids)
    assert (after[0, 0] == DEAD) == (where != "before")
    with pytest.raises(ValueError, match=rf"^compressed ids contain {SIZE}; the vocabulary has -1 \.\. {SIZE - 1}$"):
        lookup.check()


def test_on_a_cpu_a_bad_id_is_refused_at_once(plan):
    lookup = lookup_of(plan, False)
    tail = lookup.new_tail(1)
    with pytest.raises(ValueError, match=f"token ids contain {TOKENS};"):
        lookup(torch.tensor([[3, TOKENS]]), tail, tail)
    assert (tail == DEAD).all()


# --- what is refused -------------------------------------------------------------------------------

IDS, TAIL = torch.ones((2, 4), dtype=torch.int64), torch.full((2, 2), DEAD)
STORAGE = torch.zeros(12, dtype=torch.int64)
REFUSED = {
    "floats": (dict(token_ids=IDS.float()), "token ids of dtype torch.float32: give int32 or int64"),
    "one dimension": (dict(token_ids=IDS[0]), r"token ids of shape \(4,\): give a batch"),
    "no tokens": (dict(token_ids=IDS[:, :0]), r"token ids of shape \(2, 0\): an empty batch"),
    "elsewhere": (dict(token_ids=IDS.to("meta")), "token ids on meta; they are wanted on cpu"),
    "a mask of another shape": (dict(dead=torch.zeros(2, 3, dtype=torch.bool)), "dead is torch.bool"),
    "another stand-in": (dict(stand_in=SIZE), "stand_in=100: give DEAD"),
    "a short tail": (
        dict(before=TAIL[:, :1]),
        r"before is torch.int64 \(2, 1\); 2 sequences of this plan need int64 \[2",
    ),
    "a tail of others": (dict(before=TAIL[:1]), r"before is torch.int64 \(1, 2\); 2 sequences"),
    "an int32 tail": (dict(before=TAIL, after=TAIL.int()), r"after is torch.int32"),
    "a tail elsewhere": (dict(before=TAIL.to("meta")), "before is on meta; the ids are on cpu"),
    "a tail with gaps": (dict(after=torch.zeros(2, 4, dtype=torch.int64)[:, ::2]), "after of strides"),
    "a tail half over": (
        dict(before=STORAGE[:4].view(2, 2), after=STORAGE[2:6].view(2, 2)),
        "after shares memory with what is read",
    ),
    "a tail in the ids": (
        dict(token_ids=STORAGE[:8].view(2, 4), after=STORAGE[6:10].view(2, 2)),
        "after shares memory with what is read",
    ),
    "a short buffer": (dict(out=torch.empty(2, 63, 24, dtype=torch.bfloat16)), r"contiguous \[2, 64, 24\]"),
    "a buffer of floats": (dict(out=torch.empty(2, 64, 24)), "torch.float32: these token ids need"),
    "a trained buffer": (
        dict(out=torch.empty(2, 64, 24, dtype=torch.bfloat16, requires_grad=True)),
        "out requires gradients",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, plan, fused):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        lookup_of(plan, fused)(**{"token_ids": IDS, **given})


def test_tables_and_vocabularies_that_do_not_fit_are_refused(plan):
    weights = weights_of(plan)
    device, other = DeviceTable(weights[3]), DeviceTable(weights[4].float())
    for tables, vocab, message in (
        ({}, None, "no tables"),
        ({7: device}, None, "layer_id=7"),
        ({3: device, 4: other}, None, "one lookup serves tables that are alike"),
        ({3: DeviceTable(weights[3][:-1])}, None, f"a table of {len(weights[3]) - 1} rows for layer 3"),
    ):
        with pytest.raises(ValueError, match=message):
            DeviceLookup(plan, tables, vocab)
    with pytest.raises(ValueError, match="a vocabulary of 99 compressed ids; the plan was made for 100"):
        DeviceLookup(plan, {3: device}, vocab_of(99))(IDS)


def test_rows_that_no_kernel_can_read_are_looked_up_without(plan):
    weights = weights_of(plan)
    trained = {i: DeviceTable(rows.requires_grad_()) for i, rows in weights_of(plan).items()}
    hosted = {i: HostTable(rows, "cpu") for i, rows in weights.items()}
    for tables, place in ((trained, "device"), (hosted, "host")):
        assert not can_fuse(tables)
        with pytest.raises(ValueError, match=f"fused=True: a table of placement {place} whose rows no kernel can read"):
            DeviceLookup(plan, tables, fused=True)
    found = DeviceLookup(plan, hosted)(IDS)
    assert_found(found, expected(plan, IDS.numpy()), weights)
    assert not can_fuse(
        {3: DeviceTable(rows_of(random_rows(9, 64))), 4: DeviceTable(rows_of(random_rows(9, 64), True))}
    )


def test_a_closed_table_is_refused(plan, fused):
    tables = {i: DeviceTable(rows) for i, rows in weights_of(plan).items()}
    lookup = DeviceLookup(plan, tables, vocab_of(), fused=fused)
    tables[4].close()
    with pytest.raises(ValueError, match="this table was closed"):
        lookup(IDS)


# --- launches --------------------------------------------------------------------------------------


class Counted:
    """A kernel that is counted instead of run."""

    def __init__(self, name: str, launches: Launches) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.names.append(self.name)


@contextmanager
def counted(monkeypatch):
    launches = Launches()
    with monkeypatch.context() as patch:
        for module in (kernels, kernels_hashing, kernels_lookup):
            for name, value in list(vars(module).items()):
                if type(value).__module__.startswith("triton.") and hasattr(value, "run"):
                    patch.setattr(module, name, Counted(name, launches))
        with launches:
            yield launches.names


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("length", "launches"), [(1, 1), (1, 2), (40, 2)])
def test_a_lookup_is_one_launch_or_two(place, length, launches, plan, monkeypatch):
    """One for a step of decoding, by itself; the two of a long prompt are the way that it is held against."""
    monkeypatch.setattr(device_lookup, "ONE_LAUNCH_ROWS", 100)
    ids = torch.ones((3, length), dtype=torch.int64)
    fp8 = {x.layer_id: rows_of(random_rows(x.rows, 64)) for x in plan.layers}
    for weights, gather in ((weights_of(plan), "_gather_layers"), (fp8, "_gather_scaled_layers")):
        for asked in (launches, None) if (length, launches) != (1, 2) else (2,):
            lookup = lookup_of(plan, True, place, weights, launches=asked)
            tail, out = lookup.new_tail(3), lookup.new_rows(3, length)
            for _ in range(2):  # the first makes the counts that belong to the tail
                with counted(monkeypatch) as names:
                    lookup(ids, tail, tail, dead=ids == 2, out=out)
            assert names == ["eq", *(["_look_up"] if launches == 1 else ["_hash", gather])]  # the test itself compares
    with counted(monkeypatch) as names:
        lookup_of(plan, False)(ids, tail, tail)
    assert len(names) > 20  # the counter counts


def test_a_history_that_is_advanced_too_early_would_be_noticed(plan, monkeypatch):
    """Where it lies, by the first program instead of the last one: what others read is gone."""
    lookup, before = lookup_of(plan, launches=1), torch.tensor([[5, 7]])
    want = lookup(torch.tensor([[9]]), before, before.clone())
    right = lookup(torch.tensor([[9]]), tail := before.clone(), tail)
    assert all(torch.equal(right.rows[i], want.rows[i]) for i in want.rows) and tail.tolist() == [[7, 9]]
    monkeypatch.setattr(DeviceLookup, "_done", lambda *_: None)
    monkeypatch.setattr(kernels, "ROWS_PER_PROGRAM", 2)
    wrong = lookup(torch.tensor([[9]]), tail := before.clone(), tail)
    assert any(not torch.equal(wrong.rows[i], want.rows[i]) for i in want.rows)


def test_launches_that_there_are_not():
    with pytest.raises(ValueError, match="launches=3: give 1, 2, or None"):
        lookup_of(plan_of(), launches=3)


# --- in a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make_model(num_hidden_layers=3)


def attached_to(model, layers, fused: bool):
    """With the lookup of a GPU, or as on a CPU."""
    return attach(
        model, layers.engrams, DeviceHasher(layers.plan, "cpu", True) if fused else layers.plan, np.arange(97)
    )


def generated(model, layers, fused: bool, padded: bool) -> list[torch.Tensor]:
    """Logits of a prompt and of steps, staged and not, with the beams reordered and the cache copied on the way."""
    ids, mask, _ = padded_batch([make_ids(1, 9)[0], make_ids(1, 6, seed=1)[0]], 9)
    mask = mask if padded else torch.ones_like(ids)
    parts, cache, stays = [], DynamicCache(), StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad(), attached_to(model, layers, fused) as attached:
        assert (attached._source._lookup is not None) == fused
        for first, last in ((0, 4), (4, 5), (5, 6)):
            given = dict(attention_mask=mask[:, :last]) if padded else {}
            parts.append(model(ids[:, first:last], past_key_values=cache, **given).logits)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache = copy.deepcopy(cache)
        if not padded:
            parts.append(model(ids[:, :4], past_key_values=stays).logits)
            with attached.staging():
                for t in (4, 5):
                    attached.stage(ids[:, t : t + 1], stays)
                    parts.append(model(ids[:, t : t + 1], past_key_values=stays).logits)
    return parts


@pytest.mark.parametrize("form", ["demo", "v41"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_a_model_computes_the_same_with_it(model, form, padded, monkeypatch):
    layers = make_layers(form=form)
    got, want = (generated(model, layers, fused, padded) for fused in (True, False))
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    monkeypatch.setattr(Source, "_look_up", forgetful(Source._look_up))
    assert not all(torch.equal(a, b) for a, b in zip(generated(model, layers, True, padded), want))


def forgetful(look_up):
    """A lookup that takes every chunk for the beginning of its sequences."""

    def wrong(source, lookup, ids, padding, history, room):
        def without(token_ids, before, after, *rest):
            return lookup(token_ids, None, after, *rest)

        without.layer_ids = lookup.layer_ids
        return look_up(source, without, ids, padding, history, room)

    return wrong


@pytest.mark.usefixtures("later")
def test_staging_a_step_is_one_launch_into_buffers_that_stay(monkeypatch):
    layers, model, ids = make_layers(dtype=torch.bfloat16), make_model(dtype=torch.bfloat16), make_ids(2, 3)
    addresses, launches, cache = [], [], DynamicCache()
    with torch.no_grad(), attached_to(model, layers, True) as attached, attached.staging():
        for token in ids.split(1, dim=1):
            with counted(monkeypatch) as names:
                attached.stage(token, cache)
            launches.append(names)
            addresses.append([attached._staged.at(layer_id).rows.data_ptr() for layer_id in (1, 2)])
            model(token, past_key_values=cache)
    assert launches[1:] == [["_look_up"]] * 2  # the first makes the buffers, and an empty history
    assert addresses[1:] == addresses[:-1]


@pytest.mark.parametrize("launches", [1, 2])
def test_a_table_is_not_closed_from_under_a_lookup(launches, plan, monkeypatch):
    """Closing waits for a lookup in another thread that is reading the tables' memory."""
    lookup, begun, go_on, closed = lookup_of(plan, launches=launches), threading.Event(), threading.Event(), []
    reader, name = (lookup, "_look_up") if launches == 1 else (lookup._together, "gather")
    real = getattr(reader, name)

    def gather(*given, **named):
        begun.set()
        assert go_on.wait(30)
        closed.append([table._users.closed for table in lookup._tables.values()])
        return real(*given, **named)

    monkeypatch.setattr(reader, name, gather)
    reader = threading.Thread(target=lookup, args=(torch.from_numpy(np.ones((1, 3), np.int64)),))
    reader.start()
    assert begun.wait(30)
    table = next(iter(lookup._tables.values()))
    closing = threading.Thread(target=table.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    for thread in (reader, closing):
        thread.join(30)
    assert not closing.is_alive() and closed and closed[0][0]
