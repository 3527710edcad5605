"""What goes into a traced run stays the caller's: his lists, what is done to them, and repetitions of them."""

import time
from array import array
from collections import deque

import numpy as np
import pytest

from engram_toy.bytedmd import bytedmd, trace, traced_eval
from tests.toy.tracer.values import Pair, Point, Row


def test_the_callers_lists_stay_where_they_are():
    row = [1, 2]
    matrix = [row, [3, 4], (row,)]
    inner = list(map(id, matrix))

    def function(m, r):
        return m[0][0] * r[0] + m[1][1] * r[1] + m[2][0][1]

    first, second = (traced_eval(function, (matrix, row)) for _ in range(2))
    assert first == second == (first[0], function(matrix, row))
    assert list(map(id, matrix)) == inner and matrix[2][0] is row and matrix == [[1, 2], [3, 4], ([1, 2],)]


def test_what_the_function_changes_is_changed_and_nothing_else():
    row, kept = [1, 2], [3]
    matrix = [row, kept]

    def function(m):
        m[0], m[1] = m[1], m[0]
        m[1][0] = m[1][0] + 10
        m.append([m[0][0]])
        return m

    assert traced_eval(function, (matrix,))[1] is matrix
    assert matrix == [[3], [11, 2], [3]] and matrix[0] is kept and matrix[1] is row
    values = [1, 2]
    traced_eval(lambda a: values.append(3) or a[0], (values,))
    assert values == [1, 2, 3]  # what the function did past its argument is not undone


def test_a_new_list_in_an_argument_and_in_the_result_lives_to_the_end():
    def function(xs, y):
        new = [xs[0] + 1]
        xs[0] = new
        y + y
        y + y
        return new

    assert traced_eval(function, ([1], 5))[0] == traced_eval(lambda xs, y: (xs[0] + 1, y + y, y + y)[:1], ([1], 5))[0]


def repeated_in_place(xs, n):
    xs *= n
    return xs


def changed_by_its_repetition(xs, n):
    rows = [xs] * n
    for row in rows:
        row[0] = row[0] + n
    return rows


REPETITIONS = {
    "an argument": lambda xs, n: ([xs] * n)[0].append(7),
    "an argument's part": changed_by_its_repetition,
    "a row": lambda xs, n: (rows := [[0]] * n, rows[0].append(xs[0])),
    "number first": lambda xs, n: (rows := n * ([0],), rows[0].append(xs[0])),
    "dicts": lambda xs, n: (found := [{}] * n, found[0].update(key=xs[0])),
    "deque": lambda xs, n: (rows := deque([xs]) * n, rows[0].append(7)),
    "array": lambda xs, n: (cells := array("q", [0]) * n, cells.append(7)),
    "in place": repeated_in_place,
}


@pytest.mark.parametrize("n", [2, 0, True, np.int64(2)])
@pytest.mark.parametrize("name", REPETITIONS)
def test_a_traced_number_repeats_as_a_plain_one_does(name, n):
    def outcome(run):
        xs = [1, 2]
        try:
            return repr(run((xs, n))), xs
        except IndexError:  # no times
            return xs

    function = REPETITIONS[name]
    assert outcome(lambda args: traced_eval(function, args)[1]) == outcome(lambda args: function(*args))


def test_a_repetition_reads_its_number_once():
    for repeat in (lambda xs, n: xs * n, lambda xs, n: n * xs, lambda xs, n: xs * (n + 0)):
        run = trace(lambda xs, n: [repeat(xs, n)[0] + repeat([xs, 5], n)[1]], ([1], 2))  # noqa: B023 - called at once
        assert run.result == [6] and run.escapes == {"index": 2}
    assert traced_eval(lambda xs, n: (xs * n)[1] + ([5] * 2)[1], ([1], 2)) == ([2, 1], 6)
    with pytest.raises(TypeError):
        traced_eval(lambda xs, x: xs * x, ([1], 2.5))


@pytest.mark.parametrize(
    ("function", "depths"),
    [
        (lambda a, n: ([0] * n)[0] + a, [2, 1, 2]),
        (lambda a, n: sum([0] * n) + a, [2, 3, 1, 3, 1, 2, 1, 2]),
        (lambda a, n: [x * a for x in n * (1,)][-1], [2, 3, 4, 3, 1, 2, 1]),
        (lambda a, n: ([a] * n)[2] + a, [2, 1, 1]),
    ],
)
def test_repeated_numbers_are_new_values_as_in_the_original(function, depths):
    """The depths are those that the original gives."""
    assert traced_eval(function, (5, 3))[0] == depths


def test_changes_before_an_error_are_the_callers():
    values = [1, 2]

    def function(xs):
        xs[0] = xs[0] + 5
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bytedmd(function, (values,))
    assert values == [6, 2] and type(values[0]) is int


def test_containers_keep_their_types():
    row = Row([1, 2])
    row.unit = "km"
    assert traced_eval(lambda p: p.x + p.y, (Pair(1, 2),)) == ([2, 1], 3)
    assert traced_eval(lambda r: (r.total(), r.unit), (row,)) == (traced_eval(sum, ([1, 2],))[0], (3, "km"))
    assert traced_eval(lambda r: r.append(r[0] + 1), (row,)) == ([1], None)
    assert row == [1, 2, 2] and type(row) is Row
    moment = time.gmtime(0)
    assert traced_eval(lambda t: t.tm_year + 1, (moment,)) == ([1], 1971)
    assert traced_eval(lambda t: t, (moment,))[1] is moment


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (lambda p: p["x"], {"x": 1}),
        (lambda p: p.x, Point(1, 2)),
        (lambda p: p.items(), {"x": 1}),
        (lambda p: p.__setitem__("x", 1), {}),
        (list, "abc"),
        (lambda p: "x" in p, {"x": 1}),
        (len, {1, 2}),
    ],
)
def test_what_is_not_looked_into_says_so(function, argument):
    with pytest.raises((TypeError, AttributeError), match=r"tracked \w+ .*only lists, tuples and NumPy arrays"):
        bytedmd(function, (argument,))


def test_too_many_kinds_are_refused():
    values = list(range(300))
    with pytest.raises(ValueError, match=r"301 kinds of values.* at most 256"):
        trace(lambda *a: a[0] + a[1], values, kinds=[f"k{i}" for i in values])
    run = trace(lambda *a: a[254] + a[1], values[:255], kinds=[f"k{i}" for i in values[:255]])
    assert run.tally()["k254"] == {2: 1}
