"""Fixtures of the hash's tests: records, and plans that most of them take."""

import pytest

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from tests.ref.hashing.recorded import DEMO_CONFIGS, demo_config


@pytest.fixture(scope="session")
def tiny_plan():
    return HashPlan.build(EngramConfig.preset("tiny"), 100, 2)


@pytest.fixture
def v41(plans):
    return plans["v41-flash"]


@pytest.fixture(scope="session")
def demo_file(golden):
    return golden("hash_demo.json")


@pytest.fixture(scope="session")
def v41_file(golden):
    return golden("hash_v41.json")


@pytest.fixture(params=DEMO_CONFIGS)
def demo(request, demo_file, vocab_small):
    """One configuration of the demo, and our plan for it."""
    case = demo_file["configs"][request.param]
    config = demo_config(case["config"])
    return case, HashPlan.build(config, len(vocab_small), vocab_small.pad(config.pad_id))
