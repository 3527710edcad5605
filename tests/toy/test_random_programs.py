"""Random programs: traced they compute what they compute plain, and are priced as the literal oracle prices them."""

import importlib.util

from hypothesis import given, settings
from hypothesis import strategies as st

from engram_toy.bytedmd import record, trace_to_bytedmd, traced_eval
from tests.toy.oracle import oracle_trace
from tests.toy.random_programs import RETURNED, SHAPES, STEPS, arguments, program

ORIGINAL = importlib.util.find_spec("bytedmd")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS, SHAPES, RETURNED, st.integers(0, 3))
def test_a_random_program_is_priced_and_computed_right(steps, shape, returned, aliased):
    function = program(steps, returned)
    plain, traced, literal = (arguments(shape, aliased) for _ in range(3))
    want = function(*plain)
    depths, result = traced_eval(function, traced)
    assert repr(result) == repr(want) and repr(traced) == repr(plain)
    assert identities(traced, result) == identities(plain, want)
    assert depths == oracle_trace(function, literal)
    assert traced_eval(function, arguments(shape, aliased))[0] == depths
    assert [record(function, arguments(shape, aliased)).trace(compiled=False).cost(b) for b in (1, 4)] == [
        trace_to_bytedmd(depths, b) for b in (1, 4)
    ]
    if ORIGINAL:
        import bytedmd

        assert bytedmd.traced_eval(function, arguments(shape, aliased))[0] == depths


def identities(arguments, result):
    """Which lists are one list."""
    matrix, row, _ = arguments
    lists = [*matrix, row, result[0], result[2]["nothing live"]]
    return [[a is b for b in lists] for a in lists]
