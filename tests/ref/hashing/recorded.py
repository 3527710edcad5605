"""What the records of the hash need: the demo's configurations and batches, V4.1's ids, and how rows are compared.

Rows are integers and are compared by `==`, or by their digest where a record has no more of them. `candidate` is the
hash in plain Python, with one plausible mistake or none.
"""

import hashlib

import numpy as np

from engram_ref.config import EngramConfig
from engram_ref.hashing import DEAD, HashPlan, LayerPlan

DEMO_CONFIGS = ["demo_default", "small", "ngram4", "pad_other"]
DEMO_BATCHES = {"text_0", "text_padded_id2", "single", "three", "rand_3x17"}  # those that we accept


def demo_config(fields: dict) -> EngramConfig:
    """Our configuration for one of the demo's."""
    return EngramConfig(
        layer_ids=fields["layer_ids"],
        max_ngram=fields["max_ngram_size"],
        heads=fields["n_head_per_ngram"],
        row_width=fields["n_embed_per_ngram"] // fields["n_head_per_ngram"],
        table_size_per_order=fields["engram_vocab_size"],
        hidden=64,
        pad_id=fields["pad_id"],
        seed=fields["seed"],
    )


def recipe_ids(recipe: dict, tokens: int) -> np.ndarray:
    return np.random.default_rng(recipe["seed"]).integers(0, tokens, recipe["shape"])


def flat(orders: list[list[int]]) -> list[int]:
    """Column order: one order after the other."""
    return [prime for order in orders for prime in order]


def digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()


def random_ids(size: int, shape: tuple[int, int], dead: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(5)
    ids = rng.integers(0, size, shape)
    ids[rng.random(shape) < dead] = DEAD
    return ids


def assert_rows(got: np.ndarray, expected: object) -> None:
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    assert (got == expected).all()


def v41_ids(v41_file: dict, case: str) -> np.ndarray:
    """Compressed ids of F1 or F2, [1, 8]."""
    tokens, mask = v41_file[case]["tokens"], v41_file[case]["mask"]
    ids = [v41_file["token_map_synthetic"][token] for token in tokens]
    return np.array([[c if alive else DEAD for c, alive in zip(ids, mask or [1] * len(ids))]])


def plan_layers(plan: HashPlan) -> list[int]:
    return [layer.layer_id for layer in plan.layers]


def candidate(plan: HashPlan, layer: LayerPlan, ids: list[int], bug: str | None) -> list[list[int]]:
    """Indices of one sequence in plain Python, without offsets; right unless it has a bug."""
    rows = []
    for p in range(len(ids)):
        mix, blocked, row = 0, False, []
        for s in range(plan.max_ngram):
            at = p - s - (bug == "shift off by one" and s > 0)
            term, blocked = candidate_id(plan, ids, at, blocked, bug)
            term *= layer.multipliers[s]
            primes = layer.primes[(s - 1) * plan.heads : s * plan.heads] if s else ()
            if bug == "order of heads":
                primes = primes[::-1]
            row += [mix ^ (term % p) if bug == "precedence" else (mix ^ term) % p for p in primes]
            mix ^= term
        rows.append(row)
    return rows


def candidate_id(plan: HashPlan, ids: list[int], at: int, blocked: bool, bug: str | None) -> tuple[int, bool]:
    absent = at < 0 or ids[at] == DEAD
    blocked = absent or (blocked and bug != "only the DEAD token is padded")
    pad = 0 if bug == "no pad" else plan.pad_compressed
    return (pad if blocked else ids[at]), blocked
