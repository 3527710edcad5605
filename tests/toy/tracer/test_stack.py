"""Stack distances against a stack that is really walked, for both definitions and both implementations.

Why: the fast ways never build the stack, so the only proof is to build it. The oracle below is a list that is
searched from the top, written from the definition's words; hand-computed traces anchor the oracle itself, logs
whose depths are known by construction reach sizes that it cannot, and wrong candidates show that it would tell.
"""

from __future__ import annotations

import functools
import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from math import isqrt

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram_toy.fast import stack as fast_stack
from engram_toy.tracer import stack
from engram_toy.tracer.stack import Log, cumulative_price, price, read_price, read_values

StackDepths = Callable[[Log, str], "array[int]"]

IMPLEMENTATIONS = [pytest.param(stack.stack_depths, id="python"), pytest.param(fast_stack.stack_depths, id="numba")]
DEFINITIONS = ["lru", "two-stack"]

both_implementations = pytest.mark.parametrize("stack_depths", IMPLEMENTATIONS)
both_definitions = pytest.mark.parametrize("definition", DEFINITIONS)
fixed_seed = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)


def make_log(inputs: int, instructions: list[tuple[int, ...]], returned: list[int] | None = None) -> Log:
    """A log from tuples of operands; the arguments lie at depth 1, 2, ... for the two-stack definition."""
    columns = [(*operands, -1, -1, -1)[:3] for operands in instructions]
    return Log(
        inputs=inputs,
        left=array("i", [a for a, _, _ in columns]),
        right=array("i", [b for _, b, _ in columns]),
        third={k: c for k, (_, _, c) in enumerate(columns) if c >= 0},
        returned=returned or [],
        argument_depth=array("i", range(1, inputs + 1)),
    )


# --- the oracle ---------------------------------------------------------------------------------------------------


def operands_of(log: Log, k: int) -> list[int]:
    return [v for v in (log.left[k], log.right[k], log.third.get(k, -1)) if v >= 0]


def oracle(log: Log, definition: str) -> list[int]:
    """The definition, word by word, on a list whose last element is the top of the stack."""
    instructions = [operands_of(log, k) for k in range(len(log.left))]
    last_read = {value: k for k, operands in enumerate(instructions) for value in operands}

    def alive_after(value: int, k: int) -> bool:
        return value in log.returned or last_read.get(value, -1) > k

    geometric = [value for value in range(log.inputs) if alive_after(value, -1)]
    unread = {}
    if definition == "two-stack":
        assert log.argument_depth is not None
        unread = dict(enumerate(log.argument_depth))
        geometric = []

    def depth(value: int) -> int:
        return unread[value] if value in unread else len(geometric) - geometric.index(value)

    trace = []
    for k, operands in enumerate(instructions):
        trace += [depth(value) for value in operands]  # 1. priced on the stack as it stood
        for value in dict.fromkeys(operands):  # 2. distinct operands to the top, in order of first occurrence
            if unread.pop(value, None) is None:
                geometric.remove(value)
            geometric.append(value)
        for value in set(operands):  # 3. last reads leave
            if not alive_after(value, k):
                geometric.remove(value)
        if alive_after(log.inputs + k, k):  # 4. the result goes on top, if anybody needs it
            geometric.append(log.inputs + k)
    if definition == "two-stack":
        trace += [depth(value) for value in log.returned]
    return trace


# --- logs ---------------------------------------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Any small log: dead values, repeated operands, none to three of them, unread and returned inputs."""
    inputs = draw(st.integers(0, 7))
    instructions: list[tuple[int, ...]] = []
    for k in range(draw(st.integers(0, 30))):
        existing = inputs + k
        count = draw(st.integers(0, 3)) if existing else 0
        instructions.append(tuple(draw(st.integers(0, existing - 1)) for _ in range(count)))
    values = inputs + len(instructions)
    returned = draw(st.lists(st.integers(0, values - 1), unique=True, max_size=8)) if values else []
    log = make_log(inputs, instructions, returned)
    log.argument_depth = array("i", draw(st.permutations([i + 1 + i // 3 for i in range(inputs)])))
    return log


@functools.cache
def random_log(seed: int, live: int, instructions: int) -> Log:
    """Most reads near the top, some anywhere down to the bottom; all values are returned or die on the way.

    Made once for all that read it.
    """
    rng = random.Random(seed)
    pool = list(range(live))
    log = make_log(live, [])
    for k in range(instructions):
        # Log-uniform places: every scale of depth and of age is met.
        i, j = (min(live - 1, int(live ** rng.random())) for _ in range(2))
        log.left.append(pool[-i])
        log.right.append(pool[-j] if rng.random() < 0.9 else -1)
        if rng.random() < 0.02 and log.right[k] >= 0:
            log.third[k] = rng.choice(pool)
        if rng.random() < 0.5:
            pool[rng.randrange(live)] = live + k
    log.returned = rng.sample(sorted(set(pool)), len(set(pool)))
    return log


def cyclic_log(live: int, rounds: int) -> Log:
    """Read values 0, 1, ... live-1 over and over: each is always the deepest, at depth `live`."""
    order = array("i", range(live)) * rounds
    return Log(live, left=order, right=array("i", [-1]) * len(order), returned=list(range(live)))


# --- against the oracle -------------------------------------------------------------------------------------------


@both_definitions
@fixed_seed
@given(log=logs())
def test_any_small_log(definition: str, log: Log) -> None:
    """Both implementations, and that in plain Python with words and blocks so small that there are many."""
    right = oracle(log, definition)
    for stack_depths in (stack.stack_depths, fast_stack.stack_depths):
        depths = stack_depths(log, definition)
        assert depths.typecode == "i"
        assert list(depths) == right
    read = [value for k in range(len(log.left)) for value in operands_of(log, k)]
    read += log.returned if definition == "two-stack" else []
    assert list(read_values(log, definition)) == fast_stack.read_values(log, definition).tolist() == read
    for word_shift, block_shift in [(1, 1), (2, 3), (5, 2)]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stack, "_WORD_SHIFT", word_shift)
            patch.setattr(stack, "_BLOCK_SHIFT", block_shift)
            assert list(stack.stack_depths(log, definition)) == right


@both_definitions
@pytest.mark.parametrize(("live", "instructions"), [(40, 60_000), (2_000, 5_000)])
def test_random_logs_over_many_words(definition: str, live: int, instructions: int) -> None:
    # 40 live values over 150,000 slots: words and blocks in number, some of them long empty.
    log = random_log(live, live, instructions)
    right = oracle(log, definition)  # takes seconds, and once for both
    assert list(stack.stack_depths(log, definition)) == right
    assert list(fast_stack.stack_depths(log, definition)) == right


@both_definitions
def test_implementations_agree_where_the_oracle_is_too_slow(definition: str) -> None:
    log = random_log(3, 50_000, 100_000)
    depths = stack.stack_depths(log, definition)
    assert max(depths) > 40_000
    assert depths == fast_stack.stack_depths(log, definition)


# --- depths known by construction ---------------------------------------------------------------------------------


@both_implementations
@pytest.mark.parametrize(
    ("live", "rounds"),
    # Around a word of 64 and of 2**10 slots, and a block of 2**17; the last one keeps three blocks taken.
    [(1, 5), (63, 9), (64, 9), (65, 9), (1023, 5), (1024, 5), (1025, 5), (131_072, 1), (131_073, 2), (300_001, 1)],
)
def test_a_cyclic_scan_always_reads_the_bottom(stack_depths: StackDepths, live: int, rounds: int) -> None:
    assert stack_depths(cyclic_log(live, rounds), "lru") == array("i", [live]) * (live * rounds)


@both_implementations
def test_a_downward_scan_deepens_by_nothing_when_values_die(stack_depths: StackDepths) -> None:
    live = 150_000
    log = Log(live, left=array("i", reversed(range(live))), right=array("i", [-1]) * live)
    assert stack_depths(log, "lru") == array("i", [1]) * live
    # Held live, each value read lands above the others: the next lies one deeper.
    log.returned = list(range(live))
    assert stack_depths(log, "lru") == array("i", range(1, live + 1))


@pytest.mark.slow
def test_numba_reaches_across_twenty_million_slots() -> None:
    alternations = 10**7
    left, right = array("i", [0]) * alternations, array("i", [1]) * alternations
    left.append(2)
    right.append(-1)
    depths = fast_stack.stack_depths(Log(3, left, right, returned=[0, 1, 2]))
    # From the start 2, 1, 0 from the top: 0 and 1 lie at 3 and 2, then at 2 and 1; value 2 waits below.
    assert depths[:2] == array("i", [3, 2])
    assert depths[2:-1] == array("i", [2, 1]) * (alternations - 1)
    assert depths[-1] == 3


@both_implementations
@both_definitions
def test_empty_logs(stack_depths: StackDepths, definition: str) -> None:
    assert stack_depths(make_log(0, []), definition) == array("i")
    assert stack_depths(make_log(3, []), definition) == array("i")
    assert stack_depths(make_log(0, [()], []), definition) == array("i")


# --- by hand ------------------------------------------------------------------------------------------------------

THREE_SUM = make_log(3, [(2, 1), (3, 0)], returned=[4])  # a, b, c are 2, 1, 0: argument 0 is laid down last
THREE_SUM.argument_depth = array("i", [3, 2, 1])


@both_implementations
def test_three_argument_sum(stack_depths: StackDepths) -> None:
    depths = stack_depths(THREE_SUM, "lru")
    assert list(depths) == [1, 2, 1, 2]
    assert (price(depths), price(depths, 2)) == (6, 14)
    depths = stack_depths(THREE_SUM, "two-stack")
    assert list(depths) == [1, 2, 1, 3, 1]
    assert (price(depths), price(depths, 2)) == (7, 19)


@both_implementations
def test_dot_of_two_vectors(stack_depths: StackDepths) -> None:
    # a0, a1, b0, b1 are 2, 3, 0, 1: the second argument lies below the first.
    log = make_log(4, [(2, 0), (3, 1), (4, 5)], returned=[6])
    assert list(stack_depths(log, "lru")) == [2, 4, 2, 3, 2, 1]


@both_implementations
def test_two_stack_example(stack_depths: StackDepths) -> None:
    # a*b + c*d + e with a .. e = 0 .. 4 on the argument stack in this order.
    log = make_log(5, [(0, 1), (2, 3), (5, 6), (7, 4)], returned=[8])
    depths = stack_depths(log, "two-stack")
    assert list(depths) == [1, 2, 3, 4, 2, 1, 1, 5, 1]
    assert price(depths) == 15
    assert list(read_values(log, "two-stack")) == [0, 1, 2, 3, 5, 6, 7, 4, 8]


@both_implementations
def test_three_operands_move_in_order_of_first_occurrence(stack_depths: StackDepths) -> None:
    # pow(a, b, a) leaves b above a: reading b, then a, finds 1 and 2 with everything returned.
    log = make_log(2, [(0, 1, 0), (1, 0)], returned=[0, 1])
    assert list(stack_depths(log, "lru")) == [2, 1, 2, 1, 2]
    assert list(read_values(log)) == [0, 1, 0, 1, 0]


@both_implementations
def test_unread_values_occupy_nothing_unless_returned(stack_depths: StackDepths) -> None:
    log = make_log(1001, [(0,)])
    assert list(stack_depths(log, "lru")) == [1]
    assert list(stack_depths(replace(log, returned=list(range(1, 1001))), "lru")) == [1001]


@both_implementations
def test_an_unread_returned_input_is_charged_its_argument_depth(stack_depths: StackDepths) -> None:
    log = make_log(3, [(0,)], returned=[2, 3])
    assert list(stack_depths(log, "two-stack")) == [1, 3, 1]


# --- wrong candidates: the oracle would tell ----------------------------------------------------------------------


def moves_right_before_left(log: Log, definition: str) -> list[int]:
    swap = [k for k in range(len(log.left)) if log.right[k] >= 0 and k not in log.third]
    swapped = replace(log, left=log.left[:], right=log.right[:])
    for k in swap:
        swapped.left[k], swapped.right[k] = log.right[k], log.left[k]
    depths = iter(stack.stack_depths(swapped, definition))
    trace = []
    for k in range(len(log.left)):
        charged = [next(depths) for _ in operands_of(log, k)]
        trace += charged[::-1] if k in swap else charged
    return trace + list(depths)


def forgets_liveness(log: Log, definition: str) -> list[int]:
    everything = replace(log, returned=list(range(log.inputs + len(log.left))))
    depths = list(stack.stack_depths(everything, definition))
    return depths[: len(read_values(log))] + list(stack.stack_depths(log, definition))[len(read_values(log)) :]


def prices_after_moving(log: Log, definition: str) -> list[int]:
    """Reads the right operand in an instruction of its own, whose result is dead."""
    split = replace(log, left=array("i"), right=array("i"), third={}, returned=[])
    number = {-1: -1} | {value: value for value in range(log.inputs)}
    for k in range(len(log.left)):
        for value in operands_of(log, k) or [-1]:
            split.left.append(number[value])
            split.right.append(-1)
        number[log.inputs + k] = log.inputs + len(split.left) - 1
    split.returned = [number[value] for value in log.returned]
    return list(stack.stack_depths(split, definition))


@both_definitions
@pytest.mark.parametrize("wrong", [moves_right_before_left, forgets_liveness, prices_after_moving])
def test_the_oracle_rejects_wrong_candidates(wrong: Callable[[Log, str], list[int]], definition: str) -> None:
    log = random_log(5, 20, 200)
    right = oracle(log, definition)
    assert list(stack.stack_depths(log, definition)) == right
    candidate = wrong(log, definition)
    assert len(candidate) == len(right)
    assert candidate != right


# --- price --------------------------------------------------------------------------------------------------------


def byte_price(b: int) -> int:
    return isqrt(b - 1) + 1


def test_cumulative_price_is_the_sum_over_bytes() -> None:
    total = 0
    for n in range(3000):
        assert cumulative_price(n) == total
        total += byte_price(n + 1)
    big = 10**30
    assert cumulative_price(big) - cumulative_price(big - 1) == 10**15


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_a_read_costs_all_bytes_of_the_element(size: int) -> None:
    for depth in range(1, 300):
        of_bytes = sum(byte_price(b) for b in range((depth - 1) * size + 1, depth * size + 1))
        assert read_price(depth, size) == of_bytes
    depths = [random.Random(size).randrange(1, 50) for _ in range(500)]
    assert price(array("i", depths), size) == sum(read_price(depth, size) for depth in depths)
    assert price(iter(depths), size) == price(depths, size)


def test_no_reads_cost_nothing() -> None:
    assert price([]) == 0


# --- bad arguments ------------------------------------------------------------------------------------------------


@both_implementations
@pytest.mark.parametrize(
    ("log", "definition", "message"),
    [
        (make_log(1, []), "fifo", "unknown definition 'fifo': use one of lru, two-stack"),
        (Log(-1, array("i"), array("i")), "lru", "inputs is -1"),
        (Log(1, array("i", [0]), array("i")), "lru", "left has 1 entries, right 0"),
        (make_log(1, [(1,)]), "lru", "instruction 0 reads a value that is not stored yet"),
        (make_log(1, [(0,), (0, 3)]), "lru", "instruction 1 reads a value that is not stored yet"),
        (make_log(1, [(0,), (0, 0, 9)]), "lru", "instruction 1 reads a value that is not stored yet"),
        (make_log(1, [(2,), (0,)]), "two-stack", "instruction 0 reads a value that is not stored yet"),
        (replace(make_log(2, [(0, 1)]), third={1: 0}), "lru", "third names instruction 1"),
        (make_log(2, [(0, 1)], returned=[1, 1]), "lru", "returned must name values of the log"),
        (make_log(2, [(0, 1)], returned=[3]), "lru", "returned must name values of the log, 0 .. 2"),
        (make_log(2, [(0, 1)], returned=[-1]), "lru", "returned must name values of the log, 0 .. 2"),
        (Log(1, array("i"), array("i")), "two-stack", "argument_depth is None"),
        (replace(make_log(2, []), argument_depth=array("i", [1])), "two-stack", "argument_depth has 1 entries"),
        (replace(make_log(1, []), argument_depth=array("i", [0])), "two-stack", "argument_depth holds 0"),
    ],
)
def test_impossible_logs_are_refused(stack_depths: StackDepths, log: Log, definition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack_depths(log, definition)


def test_impossible_prices_are_refused() -> None:
    with pytest.raises(ValueError, match="depth 0 is not on the stack"):
        price([1, 0])
    with pytest.raises(ValueError, match="bytes_per_element is 0"):
        price([], 0)
    with pytest.raises(ValueError, match="bytes_per_element is -1"):
        read_price(1, -1)
    with pytest.raises(ValueError, match="cannot price -1 bytes"):
        cumulative_price(-1)
