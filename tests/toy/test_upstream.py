"""Where the original ByteDMD is installed (`pip install '.[upstream]'`), every depth is compared with its own."""

import pytest

from engram_toy.bytedmd import traced_eval
from tests.golden import bytedmd_programs as programs

original = pytest.importorskip("bytedmd", reason="the original tracer is not installed: pip install '.[upstream]'")


@pytest.mark.parametrize("seed", range(400, 520))
def test_the_original_gives_the_same_trace(seed):
    func, make_args = programs.random_case(seed)
    ours, theirs = traced_eval(func, make_args()), original.traced_eval(func, make_args())
    assert ours[0] == list(theirs[0])
    assert ours[1] == theirs[1]
