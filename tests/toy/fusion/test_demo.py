"""The twin's layer against the demo's recorded layer, in float64; and its arithmetic at the edges."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from engram_toy.functional import copy, dot, linear, mix, rms_norm, sigmoid, softmax
from engram_toy.fusion.demo import EngramWeights, embed, engram, signed_sqrt
from engram_toy.models.attention import AttentionWeights, attention
from engram_toy.models.kv_bank import BankWeights, kv_bank

GOLDEN = Path(__file__).parents[2] / "golden" / "layer_demo.safetensors"
DILATION = 3  # of the recorded layer: its longest n-gram
# A sum of 128 products of order 1 in another order moves by about 128 * 2^-53 = 1.4e-14; the chain of norm, gate
# and convolution multiplies that by less than 10.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def recorded():
    return {name: array.astype(np.float64) for name, array in load_file(GOLDEN).items()}


@pytest.fixture(scope="module")
def weights(recorded):
    def w(name):
        return recorded[f"A.weights.{name}"].tolist()

    copies = range(4)
    return EngramWeights(
        key_projs_weight=[w(f"key_projs.{g}.weight") for g in copies],
        key_projs_bias=[w(f"key_projs.{g}.bias") for g in copies],
        value_proj_weight=w("value_proj.weight"),
        value_proj_bias=w("value_proj.bias"),
        norm1=[w(f"norm1.{g}.weight") for g in copies],
        norm2=[w(f"norm2.{g}.weight") for g in copies],
        short_conv_norms=[w(f"short_conv.norms.{g}.weight") for g in copies],
        short_conv_conv=np.array(w("short_conv.conv.weight")).reshape(4, 64, 4).tolist(),
    )


def run_twin(recorded, weights, case):
    """The twin on one recorded case: table rows by number, sequence by sequence."""
    table = recorded["A.weights.multi_head_embedding.embedding.weight"]
    rows = (recorded[f"{case}.hash_ids"] + recorded["A.weights.multi_head_embedding.offsets"]).astype(int)
    hidden = recorded[f"{case}.hidden_states"].tolist()
    lookups = [[table[position].tolist() for position in sequence] for sequence in rows]
    return np.array([engram(h, x, weights, DILATION) for h, x in zip(hidden, lookups)])


@pytest.mark.parametrize("case", ["A.case0", "A.case1", "A.case2"])
def test_the_recorded_layer(recorded, weights, case):
    output = run_twin(recorded, weights, case)
    want = recorded[f"{case}.output_f64"]
    assert output.shape == want.shape
    assert np.abs(output - want).max() < TOLERANCE


@pytest.mark.parametrize("part", ["norm1", "value_proj_bias", "short_conv_conv", "key_projs_bias"])
def test_a_wrong_layer_fails_the_record(recorded, weights, part):
    damaged = np.array(getattr(weights, part))
    damaged[..., -1] *= 1 + 1e-6
    output = run_twin(recorded, weights._replace(**{part: damaged.tolist()}), "A.case2")
    assert np.abs(output - recorded["A.case2.output_f64"]).max() > TOLERANCE


def test_the_layer_is_causal(recorded, weights):
    """A later position changes nothing before it: a sequence cut short gives the same beginning, to the bit."""
    whole = run_twin(recorded, weights, "A.case0")[0]
    cut = {k: v[:, :9] if k.startswith("A.case0") else v for k, v in recorded.items()}
    assert (run_twin(cut, weights, "A.case0")[0] == whole[:9]).all()


def test_no_taps_means_no_convolution(recorded, weights):
    plain = run_twin(recorded, weights._replace(short_conv_conv=[], short_conv_norms=[]), "A.case1")
    assert np.abs(plain - recorded["A.case1.value"]).max() < 5e-6  # the record's value is float32


@pytest.mark.parametrize(
    ("x", "root"), [(4.0, 2.0), (-9.0, -3.0), (0.0, 0.0), (1e-9, 1e-3), (-1e-9, -1e-3), (1e-6, 1e-3)]
)
def test_signed_sqrt(x, root):
    assert signed_sqrt(x) == pytest.approx(root, rel=1e-15)


def test_copy_keeps_every_bit():
    values = [-0.0, 0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308]
    assert np.array(copy(values)).tobytes() == np.array(values).tobytes()
    added = np.array([v + 0 for v in values])
    assert added.tobytes() != np.array(values).tobytes()  # the copy that would lose a sign
    assert embed([values[:2], values[2:4]]) == values[:4]


def test_functional_against_numpy():
    rng = np.random.default_rng(3)
    a, b, w = rng.normal(size=16), rng.normal(size=16), rng.normal(size=(5, 16))
    close = dict(rel=1e-13)
    assert dot(a.tolist(), b.tolist()) == pytest.approx(a @ b, **close)
    assert linear(w.tolist(), a.tolist(), [1.0] * 5) == pytest.approx((w @ a + 1).tolist(), **close)
    assert rms_norm(a.tolist(), b.tolist(), 1e-5) == pytest.approx(
        (a / np.sqrt((a**2).mean() + 1e-5) * b).tolist(), **close
    )
    powers = np.exp(a - a.max())
    assert softmax(a.tolist()) == pytest.approx((powers / powers.sum()).tolist(), **close)
    assert mix([0.25, -2.0], w[:2].tolist()) == pytest.approx((0.25 * w[0] - 2 * w[1]).tolist(), **close)
    assert sigmoid(1.5) == pytest.approx(1 / (1 + np.exp(-1.5)), **close)


def test_attention_and_bank_against_numpy():
    rng = np.random.default_rng(4)
    hidden, rows = rng.normal(size=(5, 8)), rng.normal(size=(5, 3, 16))
    q, k, v, o = rng.normal(size=(4, 8, 8))

    def weigh(scores):
        powers = np.exp(scores - scores.max())
        return powers / powers.sum()

    want = [
        o @ (weigh((hidden[: t + 1] @ k.T) @ (q @ hidden[t]) / np.sqrt(8)) @ (hidden[: t + 1] @ v.T)) for t in range(5)
    ]
    got = attention(hidden.tolist(), AttentionWeights(*(m.tolist() for m in (q, k, v, o))))
    assert np.abs(np.array(got) - want).max() < TOLERANCE
    want = [o @ (weigh(rows[t, :, :8] @ (q @ hidden[t]) / np.sqrt(8)) @ rows[t, :, 8:]) for t in range(5)]
    got = kv_bank(hidden.tolist(), rows.tolist(), BankWeights(q.tolist(), o.tolist()))
    assert np.abs(np.array(got) - want).max() < TOLERANCE
