"""Random programs: the tracer computes what they compute, and prices them as the literal oracle does.

python -m tests.fuzz --only programs
"""

from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from engram_toy.bytedmd import traced_eval
from tests.toy.oracle import oracle_trace
from tests.toy.random_programs import RETURNED, SHAPES, STEPS, arguments, program


def run(count: int, seed: int) -> dict[str, Any]:
    """So many programs."""
    faults: list[str] = []
    ran = 0

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(STEPS, SHAPES, RETURNED, st.integers(0, 3))
    def priced(steps: Any, shape: Any, returned: Any, aliased: int) -> None:
        nonlocal ran
        ran += 1
        function = program(steps, returned)
        plain, traced, literal = (arguments(shape, aliased) for _ in range(3))
        want = function(*plain)
        depths, result = traced_eval(function, traced)
        if repr(result) != repr(want) or repr(traced) != repr(plain):
            faults.append(f"computed otherwise: {steps} of {shape}")
        if depths != oracle_trace(function, literal):
            faults.append(f"priced otherwise: {steps} of {shape}")

    priced()
    return {"cases": ran, "faults": faults}
