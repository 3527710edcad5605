"""Hashing on the device equals the NumPy definition bit for bit, in plain torch and in the Triton kernel.

Integers only, compared by `==`, against the golden numbers of other implementations and against
`NgramHasher(plan, "numpy")`. A hasher with one constant changed shows that the comparisons would tell. The kernel
runs on a GPU where there is one, else in Triton's interpreter.
"""

import ast
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engram_ref
from engram_ref import gpu
from engram_ref.config import PRESETS
from engram_ref.hashing import DEAD, INT64_MAX, HashPlan, LayerPlan, NgramHasher, TokenHistory
from engram_ref.hashing import device as hashing_torch
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory, DeviceVocab
from tests.ref.hashing.recorded import DEMO_BATCHES, v41_ids

WAYS = ["plain", "fused"]
PRIMES = (2, 3, 9, 1009, 65_537, 646_403, 16_000_057, 2**30 - 35, 2**31 - 19, 2**31 - 1)


@pytest.fixture(params=WAYS)
def way(request) -> str:
    """Both ways of the hasher."""
    return request.param


def hasher_of(plan: HashPlan, way: str) -> DeviceHasher:
    if way == "plain":
        return DeviceHasher(plan, "cpu", fused=False)
    pytest.importorskip("triton", reason="the fused hash needs Triton (pip install 'engram-offload[test]' on Linux)")

    return DeviceHasher(plan, "cpu" if gpu.INTERPRETED else "cuda:0", fused=True)


def hash_all(hasher: DeviceHasher, ids: object, history: DeviceHistory | None = None) -> dict[int, np.ndarray]:
    """Indices of every layer for ids [B, T], given in any form; refused ids are refused here at the latest."""
    if not isinstance(ids, torch.Tensor):
        ids = torch.as_tensor(np.asarray(ids))
    rows = {layer_id: x.cpu().numpy() for layer_id, x in hasher(ids.to(hasher.device), history).items()}
    hasher.check()
    return rows


def definition(plan: HashPlan, ids: np.ndarray, history: TokenHistory | None = None) -> dict[int, np.ndarray]:
    hasher = NgramHasher(plan, "numpy")
    return {layer.layer_id: hasher(ids, layer.layer_id, history=history) for layer in plan.layers}


def assert_same(got: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> None:
    assert list(got) == list(expected)
    for layer_id, rows in expected.items():
        assert (got[layer_id].dtype, got[layer_id].shape) == (rows.dtype, rows.shape)
        assert (got[layer_id] == rows).all()


def same(got: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> bool:
    return all((got[layer_id] == rows).all() for layer_id, rows in expected.items())


def random_ids(rng: np.random.Generator, size: int, shape: tuple[int, int], dead: float = 0.1) -> np.ndarray:
    ids = rng.integers(0, size, shape)
    ids[rng.random(shape) < dead] = DEAD
    return ids


def with_another_multiplier(plan: HashPlan) -> HashPlan:
    """A wrong candidate: two is taken from the first multiplier of the last layer."""
    *others, last = plan.layers
    multipliers = (last.multipliers[0] - 2, *last.multipliers[1:])
    return dataclasses.replace(plan, layers=(*others, dataclasses.replace(last, multipliers=multipliers)))


# --- against golden numbers -----------------------------------------------------------------------


def within_columns(plan: HashPlan, rows: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Indices without offsets, as the demo has them."""
    return {str(layer.layer_id): rows[layer.layer_id] - np.array(layer.offsets) for layer in plan.layers}


def test_demo_hashes(demo, demo_file, vocab_small, way):
    case, plan = demo
    hasher = hasher_of(plan, way)
    for batch in DEMO_BATCHES:
        got = within_columns(plan, hash_all(hasher, vocab_small(demo_file["batches"][batch])))
        expected = case["hashes"][batch]
        assert list(got) == list(expected)
        assert all((got[layer_id] == np.array(expected[layer_id])).all() for layer_id in expected)


def v41_rows(plan: HashPlan, v41_file: dict, way: str) -> list[np.ndarray]:
    hasher = hasher_of(plan, way)
    return [np.stack([*hash_all(hasher, v41_ids(v41_file, case)).values()], axis=2)[0] for case in ("F1", "F2")]


def test_v41_rows(v41, golden, way):
    file = golden("hash_v41.json")
    expected = [np.array(file[case]["rows_token_layer_col"]) for case in ("F1", "F2")]  # [T, layers, C] each
    assert all((a == b).all() for a, b in zip(v41_rows(v41, file, way), expected))
    wrong = v41_rows(with_another_multiplier(v41), file, way)
    assert not any((a == b).all() for a, b in zip(wrong, expected))


# --- against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, plans, way):
    plan = plans[preset]
    ids = random_ids(np.random.default_rng(0), plan.compressed_size, (2, 37))
    ids[0, 5:12] = plan.compressed_size - 1
    got = hash_all(hasher_of(plan, way), ids)
    assert_same(got, definition(plan, ids))
    assert not same(hash_all(hasher_of(with_another_multiplier(plan), way), ids), definition(plan, ids))
    for layer in plan.layers:
        assert got[layer.layer_id].min() >= 0 and got[layer.layer_id].max() < layer.rows


def plan_of(primes: tuple[int, ...], heads: int, size: int, layers: int) -> HashPlan:
    """Layers 4, 5, …, with the largest multipliers that fit."""
    largest = INT64_MAX // max(1, size - 1)
    offsets = tuple(sum(primes[:i]) for i in range(len(primes)))
    max_ngram = len(primes) // heads + 1
    multipliers = [tuple(max(1, largest - 2 * s - i) for s in range(max_ngram)) for i in range(layers)]
    made = tuple(LayerPlan(4 + i, m, primes, offsets) for i, m in enumerate(multipliers))
    return HashPlan(size, min(2, size - 1), max_ngram, heads, made)


def check_random_plan(data: st.DataObject, way: str, longest: int) -> None:
    max_ngram, heads = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 9))
    columns = (max_ngram - 1) * heads
    allowed = data.draw(st.sampled_from([PRIMES[:6], PRIMES]))
    primes = data.draw(st.lists(st.sampled_from(allowed), min_size=columns, max_size=columns))
    size = data.draw(st.sampled_from([1, 2, 50, 99_092, 2**31, INT64_MAX]))
    plan = plan_of(tuple(primes), heads, size, data.draw(st.integers(1, 3)))
    hasher = hasher_of(plan, way)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, longest))
    ids = random_ids(rng, size, (batch, length), data.draw(st.sampled_from([0.0, 0.1, 0.9])))
    host, device = TokenHistory(plan, batch), DeviceHistory(plan, batch, hasher.device)
    if data.draw(st.booleans()):
        past = random_ids(rng, size, (batch, data.draw(st.integers(1, 5))))
        host.advance(past)
        device.advance(torch.tensor(past, device=hasher.device))
    assert_same(hash_all(hasher, ids, device), definition(plan, ids, host))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_plans_in_plain_torch(data):
    check_random_plan(data, "plain", 40)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_plans_in_the_kernel(data):
    check_random_plan(data, "fused", 20)


def test_layers_whose_indices_are_of_two_kinds(way):
    """A layer with more than 2^31 - 1 rows between two small ones: int64 between int32, in the plan's order."""
    small, large = (7, 11, 13, 17), (2**31 - 1, 2**31 - 19, 101, 103)
    plan = plan_of(small, 2, 1000, 3)
    offsets = tuple(sum(large[:i]) for i in range(4))
    middle = dataclasses.replace(plan.layers[1], primes=large, offsets=offsets)
    plan = dataclasses.replace(plan, layers=(plan.layers[0], middle, plan.layers[2]))
    ids = random_ids(np.random.default_rng(1), 1000, (2, 9))
    got = hash_all(hasher_of(plan, way), ids)
    assert [rows.dtype for rows in got.values()] == [np.int32, np.int64, np.int32]
    assert_same(got, definition(plan, ids))


@pytest.mark.parametrize("size", [2, 98_627, INT64_MAX])
def test_the_largest_id_everywhere(size, way):
    plan = plan_of(PRIMES, 2, size, 1)
    ids = np.full((2, 9), size - 1)
    assert_same(hash_all(hasher_of(plan, way), ids), definition(plan, ids))


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, ::3], lambda x: x[1:2, -1:], lambda x: x[:1].expand(4, -1)],
    ids=["transposed", "every third", "one token", "one row four times"],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_other_forms_of_ids(view, dtype, tiny_plan, way):
    ids = view(torch.tensor(random_ids(np.random.default_rng(2), 100, (4, 12)), dtype=dtype))
    before = ids.clone()
    assert_same(hash_all(hasher_of(tiny_plan, way), ids), definition(tiny_plan, ids.numpy()))
    assert torch.equal(ids, before)


def test_rows_are_contiguous(v41, way):
    rows = hasher_of(v41, way)(torch.zeros((3, 2), dtype=torch.int64).to(hasher_of(v41, way).device))
    assert all(x.shape == (3, 2, 24) and x.is_contiguous() for x in rows.values())


# --- chunks ---------------------------------------------------------------------------------------


def hash_in_chunks(hasher: DeviceHasher, ids: np.ndarray, cuts: list[int]) -> dict[int, np.ndarray]:
    history, parts = DeviceHistory(hasher.plan, len(ids), hasher.device), []
    for chunk in np.split(ids, cuts, axis=1):
        if chunk.size:
            parts.append(hash_all(hasher, chunk, history))
        history.advance(torch.tensor(chunk, device=hasher.device))
    return {layer_id: np.concatenate([part[layer_id] for part in parts], axis=1) for layer_id in parts[0]}


@pytest.mark.parametrize("dead", [0.0, 0.3], ids=["plain", "with DEAD"])
@pytest.mark.parametrize("cuts", [[1], [2, 2, 3, 7], list(range(1, 8))], ids=str)
def test_chunks_equal_one_shot(cuts, dead, v41, way):
    ids = random_ids(np.random.default_rng(3), v41.compressed_size, (1, 8), dead)
    assert_same(hash_in_chunks(hasher_of(v41, way), ids, cuts), definition(v41, ids))


def test_a_history_keeps_the_last_ids_and_copies_are_independent(v41):
    history = DeviceHistory(v41, 2, "cpu")
    assert history.ids.tolist() == [[DEAD] * 3] * 2
    history.advance(torch.empty((2, 0), dtype=torch.int64))
    chunk = torch.tensor([[1], [2]], dtype=torch.int32)
    history.advance(chunk)
    chunk.zero_()
    assert history.ids.tolist() == [[DEAD, DEAD, 1], [DEAD, DEAD, 2]]
    twin = history.copy()
    history.advance(torch.tensor([[3, 4, 5, 6], [7, 8, 9, DEAD]]))
    twin.advance(torch.tensor([[5], [6]]))
    assert history.ids.tolist() == [[4, 5, 6], [8, 9, DEAD]]
    assert twin.ids.tolist() == [[DEAD, 1, 5], [DEAD, 2, 6]]


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (4,), (2, 4, 1)], ids=str)
def test_a_history_refuses_a_chunk_of_other_sequences(shape, v41):
    with pytest.raises(ValueError, match="this history follows 2 sequences"):
        DeviceHistory(v41, 2, "cpu").advance(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("bad", [[[100]], [[-2]], [[10**18]], [[1.5]], [[True]]], ids=str)
def test_a_history_refuses_what_hashing_refuses(bad, tiny_plan):
    history = DeviceHistory(tiny_plan, 1, "cpu")
    with pytest.raises(ValueError, match="compressed ids"):
        history.advance(torch.tensor(bad))
    assert (history.ids == DEAD).all()


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_a_history_of_other_sequences_is_refused(sequences, v41, way):
    hasher = hasher_of(v41, way)
    with pytest.raises(ValueError, match=rf"a history of \({sequences}, 3\); 3 sequences .* need \(3, 3\)"):
        hash_all(hasher, np.zeros((3, 4), dtype=np.int64), DeviceHistory(v41, sequences, hasher.device))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-2, 100, -(2**63), INT64_MAX])
@pytest.mark.parametrize("place", [(0, 0), (1, 17)], ids=str)
def test_a_bad_id_is_refused_once(bad, place, tiny_plan, way):
    ids = random_ids(np.random.default_rng(5), 100, (2, 18))
    hasher = hasher_of(tiny_plan, way)
    good = hash_all(hasher, ids)
    broken = ids.copy()
    broken[place] = bad
    with pytest.raises(ValueError, match=rf"^compressed ids contain {bad}; the vocabulary has -1 \.\. 99$"):
        hash_all(hasher, broken)
    assert_same(hash_all(hasher, ids), good)


def test_in_plain_torch_a_bad_id_counts_as_dead_too(tiny_plan):
    """What CUDA goes on with until somebody checks; a CPU refuses first, so this looks beneath."""
    ids = random_ids(np.random.default_rng(6), 100, (2, 9))
    ids[0, 3], ids[1, 0], ids[1, 8] = -2, 100, INT64_MAX
    hasher = hasher_of(tiny_plan, "plain")
    hasher._ids.device = torch.device("meta")  # stands for one that the CPU does not wait for
    got = hasher._way(torch.tensor(ids), torch.full((2, 2), DEAD))
    ids[(ids < 0) | (ids >= 100)] = DEAD
    assert_same({layer_id: rows.numpy() for layer_id, rows in got.items()}, definition(tiny_plan, ids))
    with pytest.raises(ValueError, match="compressed ids contain -2;"):  # the lowest first, as on a CPU
        hasher.check()
    hasher.check()


REFUSED = {
    "float": (torch.tensor([[1.0]]), "compressed ids of dtype torch.float32: give int32 or int64"),
    "bool": (torch.tensor([[True]]), "compressed ids of dtype torch.bool: give int32 or int64"),
    "int16": (torch.tensor([[1]], dtype=torch.int16), "compressed ids of dtype torch.int16: give int32 or int64"),
    "one dimension": (torch.tensor([1, 2]), r"compressed ids of shape \(2,\): give a batch of sequences, \[B, T\]"),
    "three dimensions": (torch.ones((1, 2, 3), dtype=torch.int64), r"compressed ids of shape \(1, 2, 3\): give a"),
    "no sequences": (torch.empty((0, 5), dtype=torch.int64), r"compressed ids of shape \(0, 5\): an empty batch"),
    "no tokens": (torch.empty((1, 0), dtype=torch.int64), r"compressed ids of shape \(1, 0\): an empty batch"),
    "elsewhere": (torch.ones((1, 2), dtype=torch.int64, device="meta"), "compressed ids on meta; they are wanted on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_batch_of_ids_is_refused(case, tiny_plan, way):
    ids, message = REFUSED[case]
    hasher = hasher_of(tiny_plan, way)
    with pytest.raises(ValueError, match=message):
        hasher(ids if ids.is_meta else ids.to(hasher.device))


def test_a_cpu_is_refused_outside_the_interpreter(tiny_plan, monkeypatch):
    pytest.importorskip("engram_ref.rows.kernels", reason="needs Triton", exc_type=ImportError)
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(ValueError, match="fused=True on cpu: the kernel needs a CUDA device; use fused=False"):
        DeviceHasher(tiny_plan, "cpu", fused=True)


def test_a_cpu_hashes_in_plain_torch_by_default(tiny_plan):
    assert not DeviceHasher(tiny_plan, "cpu").fused


def test_without_triton_only_the_fused_way_is_refused(tiny_plan, monkeypatch):
    for package, name in ((engram_ref, "gpu"), (engram_ref.hashing, "kernels")):
        monkeypatch.delattr(package, name, raising=False)
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"the fused hash needs Triton \(.*\): pip install triton, or use fused=False"):
        DeviceHasher(tiny_plan, "cpu", fused=True)
    assert not hashing_torch._triton_is_there()
    assert not DeviceHasher(tiny_plan, "cpu").fused


def imports(tree: ast.AST, deep: bool) -> set[str]:
    """Modules that a module imports, anywhere or only when it is imported itself."""
    nodes = ast.walk(tree) if deep else ast.iter_child_nodes(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_triton_is_imported_by_the_kernels_only_and_these_on_demand():
    package = Path(engram_ref.__file__).parent
    trees = {
        str(path.relative_to(package)): ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")
    }
    users = {name for name, tree in trees.items() if any(x.split(".")[0] == "triton" for x in imports(tree, True))}
    kernels = {"hashing/kernels.py", "rows/kernels.py", "calling/kernels.py", "fusion/kernels.py", "lookup/kernels.py"}
    assert users == {"gpu.py", *kernels}
    modules = {"engram_ref." + name.removesuffix(".py").replace("/", ".") for name in users}
    assert {name for name, tree in trees.items() if modules & imports(tree, True)} >= {
        "tables/uva.py",
        "hashing/device.py",
    }
    assert {name for name, tree in trees.items() if modules & imports(tree, False)} <= users


# --- token ids ------------------------------------------------------------------------------------


def test_compressed_ids_equal_the_vocabulary(vocab_small):
    ids = np.arange(len(vocab_small.ids)).reshape(2, -1)
    dead = np.random.default_rng(7).random(ids.shape) < 0.2
    vocab = DeviceVocab(vocab_small, "cpu")
    for dtype in (torch.int32, torch.int64):
        got = vocab(torch.tensor(ids, dtype=dtype))
        assert got.dtype == torch.int64
        assert (got.numpy() == vocab_small(ids)).all()
    masked = np.where(dead, -5, ids)  # where dead, the token id is not looked at
    got = vocab(torch.tensor(masked), torch.tensor(dead))
    assert (got.numpy() == vocab_small(masked, dead)).all()
    assert (got.numpy() != vocab_small(ids)).any()
    vocab.check()


@pytest.mark.parametrize("bad", [-1, 8182, INT64_MAX])
def test_a_token_id_outside_the_vocabulary_is_refused(bad, vocab_small):
    vocab = DeviceVocab(vocab_small, "cpu")
    with pytest.raises(ValueError, match=rf"^token ids contain {bad}; the vocabulary has 0 \.\. 8181$"):
        vocab(torch.tensor([[5, bad]]))
    assert vocab(torch.tensor([[5]])).tolist() == vocab_small([[5]]).tolist()


def test_a_mask_of_another_shape_is_refused(vocab_small):
    vocab = DeviceVocab(vocab_small, "cpu")
    for mask in (torch.zeros(2, dtype=torch.bool), torch.zeros((1, 2))):
        with pytest.raises(ValueError, match=r"dead is .*: give booleans of shape \(1, 2\) on cpu"):
            vocab(torch.tensor([[5, 6]]), mask)
