"""The twin's V4.1 layer against a recorded one, in float64; and its gate at the edges."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from engram_toy.fp8 import numbers
from engram_toy.functional import linear
from engram_toy.fusion import v41
from engram_toy.fusion.v41 import V41Weights, embed, engram_v41, gate, signed_sqrt

GOLDEN = Path(__file__).parents[2] / "golden" / "layer_v41.safetensors"
WIDTH = 80  # of the recorded stream
# Relative, to values of 1 and more: 768 products in another order move their sum by some 768 * 2^-53 = 9e-14.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def weights(recorded):
    return V41Weights(*(recorded[name].tolist() for name in ("wkv_weight", "q_weight", "k_weight")))


@pytest.fixture(scope="module")
def lookups(recorded):
    stored = np.concatenate([recorded["row_codes_e4m3"], recorded["row_scales_e8m0"]], axis=1)
    table = [numbers(row) for row in stored.tolist()]
    return [[table[row] for row in rows] for rows in recorded["rows"]]


def run_twin(recorded, lookups, weights, dead):
    return np.array(engram_v41(recorded["hidden"].tolist(), lookups, weights, dead))


def off_by(got, want):
    return (np.abs(got - want) / np.maximum(1, np.abs(want))).max()


def test_recorded_rows_are_decoded_exactly(recorded, lookups):
    assert (np.array([embed(rows) for rows in lookups]) == recorded["embeddings_f64"]).all()


def test_the_recorded_layer(recorded, lookups, weights):
    stream = run_twin(recorded, lookups, weights, recorded["dead"].astype(bool).tolist())
    assert stream.shape == recorded["output_f64"].shape
    assert off_by(stream, recorded["output_f64"]) < TOLERANCE
    (dead,) = recorded["dead"].nonzero()[0]
    assert (stream[dead] == recorded["hidden"][dead]).all()
    unmasked = run_twin(recorded, lookups, weights, None)
    assert off_by(unmasked, recorded["output_f64"]) > TOLERANCE


def recorded_gates(recorded, lookups, weights):
    """The twin's gates of every position, [T][G], whether it is dead or not."""
    gains = recorded["q_weight"].astype(np.float64) * recorded["k_weight"]
    gates = []
    for stream, rows in zip(recorded["hidden"].tolist(), lookups):
        packed = linear(weights.wkv_weight, embed(rows))
        keys = [packed[g * WIDTH : (g + 1) * WIDTH] for g in range(len(stream))]
        gates.append([gate(key, x, gain) for key, x, gain in zip(keys, stream, gains.tolist())])
    return np.array(gates)


def test_the_recorded_gate(recorded, lookups, weights):
    gates, alive = recorded_gates(recorded, lookups, weights), recorded["dead"] == 0
    assert off_by(gates[alive], recorded["gate_f64"][alive]) < TOLERANCE
    assert (recorded["gate_f64"][~alive] == 0).all() and (gates[~alive] > 0).all()
    swapped = weights._replace(wkv_weight=weights.wkv_weight[::-1])
    assert off_by(recorded_gates(recorded, lookups, swapped)[alive], recorded["gate_f64"][alive]) > TOLERANCE


@pytest.mark.parametrize("part", V41Weights._fields)
def test_a_wrong_weight_fails_the_record(recorded, lookups, weights, part):
    damaged = np.array(getattr(weights, part))
    damaged[..., -1] *= 1 + 1e-6
    stream = run_twin(recorded, lookups, weights._replace(**{part: damaged.tolist()}), recorded["dead"])
    assert off_by(stream, recorded["output_f64"]) > TOLERANCE


def test_another_eps_fails_the_record(recorded, lookups, weights, monkeypatch):
    monkeypatch.setattr(v41, "NORM_EPS", 1e-6)
    stream = run_twin(recorded, lookups, weights, recorded["dead"])
    assert off_by(stream, recorded["output_f64"]) > TOLERANCE


def test_another_order_of_keys_and_value_fails_the_record(recorded, lookups, weights):
    rolled = weights._replace(wkv_weight=weights.wkv_weight[-WIDTH:] + weights.wkv_weight[:-WIDTH])
    stream = run_twin(recorded, lookups, rolled, recorded["dead"])
    assert off_by(stream, recorded["output_f64"]) > TOLERANCE


@pytest.mark.parametrize(
    ("x", "root"),
    [
        (4.0, 2.0),
        (-9.0, -3.0),
        (0.0, 1e-3),
        (-0.0, -1e-3),
        (1e-9, 1e-3),
        (-1e-9, -1e-3),
        (1e-6, 1e-3),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
    ],
)
def test_signed_sqrt(x, root):
    assert signed_sqrt(x) == pytest.approx(root, rel=1e-15)


def test_signed_sqrt_of_nan():
    assert math.isnan(signed_sqrt(math.nan))


def test_a_gate_of_nothing_is_a_little_open():
    assert gate([0.0] * 4, [0.0] * 4, [1.0] * 4) == pytest.approx(1 / (1 + math.exp(-1e-3)), rel=1e-15)


def test_rows_of_dead_positions_are_not_read(weights, recorded, lookups):
    stream = recorded["hidden"].tolist()
    poisoned = [rows if position else None for position, rows in enumerate(lookups)]
    after = engram_v41(stream, poisoned, weights, [position == 0 for position in range(len(stream))])
    assert after[0] == stream[0] and after[0] is not stream[0]
