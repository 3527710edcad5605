"""Arrays that go into a traced run: they compute as NumPy does, and are priced as lists are.

What the operations of arrays read is tested in test_arrays.py.
"""

import copy

import numpy as np
import pytest

from engram_toy.bytedmd import bytedmd, traced_eval


def store(a):
    a[0] = a[0] / 2
    return a[0] * 4


def add_in_place(a):
    a += a
    return a


def into_likes(a):
    out = np.zeros_like(a)
    for i in range(len(a)):
        out[i] = a[i] * a[i]
    return out


def views(a):
    a.T[0] = a.T[0] / 3
    a[:, 1] = [7.9] * len(a)
    return a, a[0] + a[1]


ARRAYS = {
    "structured": (lambda a, b: [a, b], [np.array([(1, 2.5), (3, 4)], "i4,f4"), np.array([(5, 6), (7, 8)], "i4,f4")]),
    "store": (store, [np.array([3, 2])]),
    "int64 wraps": (lambda a: a[0] * a[1], [np.array([2**62, 4])]),
    "uint8 wraps": (lambda a: a + a, [np.array([200, 100], np.uint8)]),
    "in place": (add_in_place, [np.array([100, -128], np.int8)]),
    "float32 rounds": (lambda a: a * 3, [np.array([0.1, 0.2], np.float32)]),
    "float16 overflows": (lambda a: a * a, [np.array([300, 2], np.float16)]),
    "complex64": (lambda a: a[0] * a, [np.array([0.1 + 2j, 3], np.complex64)]),
    "bool": (lambda a: a[0] & a, [np.array([True, False])]),
    "dates": (lambda a: (a[1] - a[0], a), [np.array(["2020-01-01", "2021-01-01"], "M8[D]")]),
    "division by zero": (lambda a: a / 0, [np.array([1.0, -1.0])]),
    "likes": (into_likes, [np.array([0.1, 0.2], np.float32)]),
    "views": (views, [np.arange(6).reshape(2, 3)]),
    "mixed": (lambda a, b: np.concatenate([a, b]) * 2, [np.array([1]), np.array([0.5], np.float32)]),
    "scalar on the left": (lambda a: np.int64(300) + a[0], [np.array([200], np.uint8)]),
    "computed, then stored": (lambda a: store(a / 2), [np.array([3, 2])]),
    "mean": (lambda a: a.mean(axis=0), [np.arange(6).reshape(2, 3)]),
    "empty": (lambda a: a[:0], [np.array([1], np.int16)]),
    "objects": (lambda a: a, [np.array([1, "x", None], object)]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_compute_as_numpy_does(name):
    function, arrays = ARRAYS[name]
    plain_arguments, traced_arguments = copy.deepcopy(arrays), copy.deepcopy(arrays)
    with np.errstate(all="ignore"):
        plain, traced = function(*plain_arguments), traced_eval(function, traced_arguments)[1]
    plain, traced = ([x] if not isinstance(x, (list, tuple)) else x for x in (plain, traced))
    for want, got in zip([*plain, *plain_arguments], [*traced, *traced_arguments], strict=True):
        assert type(got) is type(want) and got.dtype == want.dtype
        assert got.tolist() == want.tolist()


def test_arrays_are_priced_as_lists_are():
    def function(a):
        a[0] = a[1] * a[2] + a[0]
        return a[0] + a[3]

    for kind in (np.float64, np.int8, np.float32, object):
        assert traced_eval(function, (np.arange(4).astype(kind),))[0] == traced_eval(function, ([0, 1, 2, 3],))[0]
    a = np.array([1.0, 2.0])
    assert traced_eval(lambda s, a: s * a, (3.0, a))[0] == [
        3,
        3,
        3,
    ]  # each part on its own, then the scalar, as in the original


TOTALS = {
    "sum": lambda a: a.sum(),
    "sum of rows": lambda a: a.sum(axis=1),
    "kept axes": lambda a: np.sum(a, axis=0, keepdims=True),
    "mean": lambda a: a.mean(),
    "mean of rows": lambda a: np.mean(a, axis=1),
    "average": np.average,
    "weighted": lambda a: np.average(a[0], weights=np.array([3, 1, 4], np.float16)),
    "into a wider one": lambda a: np.add.reduce(a, out=np.zeros_like(a[0], dtype=np.float64)),
    "product": lambda a: a.prod(),
    "running sum": lambda a: a.cumsum(),
    "running product": lambda a: np.cumprod(a, axis=1),
    "trace": lambda a: a[:, :2].trace(),
    "nansum": np.nansum,
    "reduce": lambda a: np.add.reduce(a),
    "reduceat": lambda a: np.add.reduceat(a[0], [0, 2]),
    "across memory": lambda a: a.T.sum(axis=1),
    "backwards": lambda a: a[::-1, ::-1].sum(),
    "none": lambda a: a[:0].sum(),
}


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32])
@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_those_of_numpy_and_cost_what_wide_numbers_cost(name, kind):
    values = np.array([[100, 100, 101], [99, 100, 100]])
    array = (values % 2 if kind is bool else values).astype(kind)
    with np.errstate(all="ignore"):
        want, (trace, got) = TOTALS[name](array), traced_eval(TOTALS[name], (array.copy(),))
    assert type(got) is type(want) and got.dtype == want.dtype
    assert got.tolist() == want.tolist()
    if name != "nansum":  # which asks floats, one by one, whether they are numbers
        assert trace == traced_eval(TOTALS[name], (values.astype(np.int64),))[0]


def test_halves_are_rounded_once_they_are_added_up():
    for function in (np.sum, np.mean):
        ones = np.ones(4096, np.float16)  # added one by one in half precision, they end at 2048
        assert traced_eval(function, (ones,))[1] == function(ones)


@pytest.mark.parametrize("kind", [np.float64, np.int8, np.bool_, np.str_])
def test_numpy_scalars_that_are_one_object_are_separate_values_as_equal_numbers_are(kind):
    zero = kind(0)
    for padding in ([zero] * 4, (zero, [zero], zero, zero), np.array([zero] * 4, object)):
        assert traced_eval(lambda padding, row: (padding, row[0] + 1), (padding, [1]))[0] == [5]  # four lie above it
    assert traced_eval(lambda a, b: a + b, (zero, zero))[0] == [1, 2]


def test_an_array_that_is_not_written_to_is_left_alone():
    array = np.arange(3)
    array.setflags(write=False)
    assert traced_eval(lambda a: a + 1, (array,))[1].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        bytedmd(store, (array,))
    base = np.arange(4)

    def function(whole, half):
        whole[0] = whole[3]
        return half[1]

    traced_eval(function, (base, base[:2]))
    assert base.tolist() == [3, 1, 2, 3]  # the view, which was not written to, does not bring back what it held


def test_in_place_arithmetic_refuses_what_numpy_refuses():
    def halve(a):
        a /= 2
        return a

    for call in (lambda: halve(np.array([1, 2])), lambda: bytedmd(halve, (np.array([1, 2]),))):
        with pytest.raises(TypeError):
            call()
