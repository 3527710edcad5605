"""Filling with normal numbers: their distribution, and that they depend on the seed and on nothing else."""

import math

import numpy as np
import pytest
import torch

from engram_ref.rows import filling as module
from engram_ref.rows.filling import fill_normal

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def filled(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Filled memory that was NaN before."""
    values = torch.full(shape, float("nan"), dtype=dtype)
    fill_normal(values, seed)
    return values


def assert_normal(values: torch.Tensor) -> None:
    """Mean, variance and tails of N(0, 1), each within 5 of its standard errors (1 in 2 million by chance)."""
    x, n = values.double().view(-1), values.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    for bound in (-2.0, -1.0, 0.0, 1.0, 2.0):
        share = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        # bfloat16 rounds what is up to 2^-8 above 1 down to 1, and the density there is 0.24: a share of 0.001.
        assert abs((x <= bound).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n) + 1e-3


@every_dtype
def test_values_are_normal(dtype):
    assert_normal(filled((5000, 64), dtype=dtype))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + 0.02,
        lambda x: x * 1.02,
        lambda x: x.abs(),
        lambda x: torch.rand_like(x).sub(0.5).mul(math.sqrt(12)),
        lambda x: torch.cat([x[:-200], torch.full_like(x[-200:], float("nan"))]),
    ],
    ids=["shifted", "wider", "positive", "uniform", "unfilled"],
)
def test_other_distributions_are_caught(wrong):
    with pytest.raises(AssertionError):
        assert_normal(wrong(filled((5000, 64))))


@every_dtype
def test_the_number_of_threads_changes_nothing(dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(filled((333, 17), seed=3, dtype=dtype))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@every_dtype
def test_memory_that_was_made_in_inference_mode_is_filled(dtype):
    want = torch.empty(100, dtype=dtype)
    fill_normal(want, 3)
    with torch.inference_mode():
        values = torch.empty(100, dtype=dtype)
        fill_normal(values, 3)
    assert torch.equal(values, want)


def test_chunks_and_seeds_differ(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)
    values = torch.stack([filled((4, 1000), seed) for seed in (0, 1, 2)]).view(12, 1000)
    assert len(values.unique(dim=0)) == 12
    correlation = torch.corrcoef(values) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(1000)


def test_a_larger_table_begins_like_a_smaller_one(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)
    assert torch.equal(filled((2000, 4))[:250], filled((250, 4)))


def test_pieces_are_what_the_whole_holds(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)
    whole, pieces = filled((2300, 2), seed=3), torch.empty(2300, 2)
    for first, last in ((0, 1000), (1000, 1500), (1500, 2300)):
        fill_normal(pieces[first:last], 3, start=2 * first)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("start", [-1000, 1, 1500])
def test_a_piece_that_begins_within_a_chunk_is_refused(start, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)
    with pytest.raises(ValueError, match=rf"start={start}: pieces begin at multiples of 1000 values"):
        fill_normal(torch.empty(5), 0, start)


def uniform(generator: np.random.Generator, n: int) -> list[float]:
    """The low 24 bits of each half of the generator's words, the lower half first."""
    words = generator.bit_generator.random_raw((n + 1) // 2).tolist()
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    return [(half & 0xFFFFFF) / 2**24 for half in halves[:n]]


def box_muller(n: int, seed: int, number: int) -> np.ndarray:
    """What a chunk should hold, one value after the other in float64."""
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(number,))))
    pairs = (n + 1) // 2
    u, v = (uniform(generator, pairs) for _ in range(2))
    radii = [math.sqrt(-2 * math.log(1 - x)) for x in u]
    cosines = [r * math.cos(2 * math.pi * x) for r, x in zip(radii, v)]
    return np.array((cosines + [r * math.sin(2 * math.pi * x) for r, x in zip(radii, v)])[:n])


@pytest.mark.parametrize("n", [1, 2, 9999, 10_000])
def test_float32_values_are_those_of_the_formula(n, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 5000)
    for number, chunk in enumerate(filled((n,), seed=11).split(5000)):
        # An angle of up to 2 pi is rounded twice, by 2^-22 in all, and a radius is at most 5.8; 1 - u is exact.
        expected = box_muller(len(chunk), 11, number)
        assert np.abs(chunk.numpy() - expected).max() < 5.8 * 2**-21
        assert np.abs(chunk.numpy() - box_muller(len(chunk), 12, number)).max() > 0.01


def test_float64_values_are_those_of_the_documented_generators(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 5000)
    for number, chunk in enumerate(filled((8001,), seed=11, dtype=torch.float64).split(5000)):
        sequence = np.random.SeedSequence(11, spawn_key=(number,))
        assert (chunk.numpy() == np.random.Generator(np.random.SFC64(sequence)).standard_normal(len(chunk))).all()


def test_small_types_are_rounded_from_float32():
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(filled((40_000,), seed=5, dtype=dtype), filled((40_000,), seed=5).to(dtype))


def test_a_parameter_is_filled_in_place():
    weight = torch.nn.Parameter(torch.zeros(8, 4))
    address = weight.data_ptr()
    fill_normal(weight, 0)
    assert weight.data_ptr() == address and weight.requires_grad and weight.grad_fn is None
    assert torch.equal(weight.detach(), filled((8, 4)))


def test_nothing_to_fill():
    assert filled((0, 64)).shape == (0, 64)
    assert filled((3, 0), dtype=torch.bfloat16).shape == (3, 0)


@pytest.mark.parametrize(
    ("values", "seed", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int32), 0, r"shape \(4, 4\), torch.int32 on cpu: give contiguous floating"),
        (torch.zeros(4, 8)[:, ::2], 0, "give contiguous floating point numbers"),
        (torch.zeros(4, 4, device="meta"), 0, "torch.float32 on meta: give contiguous"),
        (torch.zeros(4, 4), -1, "seed=-1: must be at least 0"),
    ],
)
def test_what_cannot_be_filled_is_refused(values, seed, message):
    with pytest.raises(ValueError, match=message):
        fill_normal(values, seed)
