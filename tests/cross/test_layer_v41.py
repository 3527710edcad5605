"""Both twins compute the same V4.1 layer, from compressed ids and stored fp8 rows to the stream after it.

Each hashes by itself, DEAD positions among the ids, reads the bytes of one table, decodes, projects and gates: plain
Python one position at a time, and the reference in float64.
"""

import json

import numpy as np
import pytest
import torch

import engram_toy.hashing as toy_hashing
from engram_ref.config import EngramConfig
from engram_ref.fusion.v41 import V41Fusion
from engram_ref.hashing import DEAD, HashPlan, NgramHasher
from engram_ref.layer import Engram
from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows
from engram_ref.tables.device import DeviceTable
from engram_toy.fp8 import numbers
from engram_toy.fusion.v41 import V41Weights, engram_v41

SIZE = 60  # of the compressed vocabulary
# Relative, to values of 1 and more. Sums of order 1 in another order differ by some 1e-15; the gate's slope reaches 125
# where its argument is small.
TOLERANCE = 1e-12


def make_config(max_ngram=4, hc_mult=4):
    return EngramConfig(
        layer_ids=(2,),
        max_ngram=max_ngram,
        heads=2,
        row_width=32,
        table_size_per_order=(30,) * (max_ngram - 1),
        hidden=8,
        hc_mult=hc_mult,
        kernel_size=0,
        row_dtype="float8_e4m3fn",
        form="v41",
    )


def make_case(config, batch, length, seed=0):
    """Plan, ids with dead positions, stream, stored rows and a fusion with weights of order 1."""
    plan, generator = HashPlan.build(config, SIZE, 2), torch.Generator().manual_seed(seed)
    ids = np.random.default_rng(seed).integers(0, SIZE, (batch, length))
    ids[:, length // 3 :: 4] = DEAD
    hidden = torch.randn(batch, length, config.hc_mult, 8, generator=generator, dtype=torch.float64)
    values = torch.randn(plan.layer(2).rows, 32, generator=generator).bfloat16()
    fusion = V41Fusion(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return plan, ids, hidden, RowFormat.of(config).encode(values), fusion


def weights_of(fusion):
    state = fusion.state_dict()
    return V41Weights(*(state[name].tolist() for name in ("wkv.weight", "q_weight", "k_weight")))


def run_twin(plan, ids, hidden, raw, weights):
    hasher, table = toy_hashing.NgramHasher(json.loads(plan.to_json())), [numbers(row) for row in raw.tolist()]
    streams = []
    for sequence, stream in zip(ids.tolist(), hidden.tolist()):
        lookups = [[table[row] for row in rows] for rows in hasher(sequence, 2)]
        streams.append(engram_v41(stream, lookups, weights, [c == DEAD for c in sequence]))
    return torch.tensor(streams, dtype=torch.float64)


def run_reference(plan, ids, hidden, raw, fusion):
    engram = Engram(fusion, DeviceTable(Rows.from_packed(raw)))
    with torch.no_grad():
        return engram(hidden, NgramHasher(plan)(ids, 2), dead=ids == DEAD)


def off_by(got, want):
    return ((got - want).abs() / want.abs().clamp_min(1)).max()


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 15)])
@pytest.mark.parametrize("hc_mult", [1, 4])
@pytest.mark.parametrize("max_ngram", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_twins_agree(max_ngram, hc_mult, batch, length, seed):
    plan, ids, hidden, raw, fusion = make_case(make_config(max_ngram, hc_mult), batch, length, seed)
    twin = run_twin(plan, ids, hidden, raw, weights_of(fusion))
    reference = run_reference(plan, ids, hidden, raw, fusion)
    assert twin.shape == reference.shape == hidden.shape
    assert off_by(twin, reference) < TOLERANCE
    dead = torch.from_numpy(ids == DEAD)
    assert dead.any() and torch.equal(twin[dead], hidden[dead]) and torch.equal(reference[dead], hidden[dead])
    assert length == 1 or (reference[~dead] - hidden[~dead]).abs().max() > 0.1


@pytest.mark.parametrize("part", V41Weights._fields)
def test_a_wrong_twin_is_caught(part):
    """One weight a millionth off, in one twin."""
    plan, ids, hidden, raw, fusion = make_case(make_config(), 1, 12)
    damaged = np.array(getattr(weights_of(fusion), part))
    damaged[..., -1] *= 1 + 1e-6
    wrong = weights_of(fusion)._replace(**{part: damaged.tolist()})
    reference = run_reference(plan, ids, hidden, raw, fusion)
    assert off_by(run_twin(plan, ids, hidden, raw, wrong), reference) > TOLERANCE


@pytest.mark.parametrize("byte", [5, 32], ids=["a code", "a scale"])
def test_a_wrong_row_is_caught(byte):
    plan, ids, hidden, raw, fusion = make_case(make_config(), 1, 12)
    reference = run_reference(plan, ids, hidden, raw, fusion)
    raw[:, byte] ^= 1
    assert off_by(run_twin(plan, ids, hidden, raw, weights_of(fusion)), reference) > TOLERANCE
