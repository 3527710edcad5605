"""NumPy arrays under the tracer: the values are NumPy's to the bit, the reads those of the original."""

import copy
import itertools
import operator
import warnings
from array import array
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from engram_toy.bytedmd import trace, traced_eval
from engram_toy.tracer import arrays
from engram_toy.tracer.tracked import Tracked

NAN = np.nan
BYTES, HALVES, SINGLES = np.array([100, 1], np.int8), np.array([300.5, 0.5], np.float16), np.array([3, 1], np.float32)
GRID = np.arange(1.0, 7).reshape(2, 3)
PAIRS = np.array([(1, 2.0), (3, 4.0)], [("x", "i4"), ("y", "f8")])
OTHER_PAIRS = np.array([(1, 2.0), (3, 5.0)], PAIRS.dtype)


def sorted_in_place(a):
    a.sort()
    return a


def scattered(a, b):
    np.add.at(a, [0, 0, 1], b)
    return a


def copied(a, b):
    np.copyto(a, b, casting="unsafe")
    np.put(a, [0], [7.9])
    return a * 100


def into_itself(a):
    np.copyto(a[1:], a[:-1])
    np.add.at(a, [0, 2], a[:2])
    np.multiply(a[1:], a[:-1], out=a[:-1])
    return a


def filled(a):
    a.fill(a[1])
    return a


def through_a_view(a):
    a.T[0] += 1
    np.real(a)[1] = 5
    return a * 2


def backwards_in_place(a):
    a[::-1] += 1
    return a


def overlapping_in_place(a):
    a[1:] += a[:-1]
    return a


def larger_out(z, a):
    assert np.add(z, 1, out=a) is a
    return a


def histogram(target):
    def program(weights):
        bins = target.copy()
        np.add.at(bins, [0, 2, 0, 0], weights)
        np.maximum.at(bins, [1], weights[:1])
        return bins

    return program


def into(target, write):
    """What `write` leaves in an array that the function makes."""

    def program(*arrays):
        made = target(arrays[0])
        write(made, *arrays)
        return made

    return program


def added(made, a):
    made += a * a


def scattered_itself(made, a):
    np.add.at(made, [0, 0, 1], a)


def scattered_first(made, a):
    np.add.at(made, [0, 0, 1], a[0])


def stored(a, b):
    a[:] = b
    return a


def by_name(a, b):
    np.copyto(src=b, dst=a, casting="unsafe")
    np.put_along_axis(indices=np.array([0]), arr=a, values=b[1:], axis=0)
    return a * 2


def zeros_of_its_type(a):
    return np.zeros(a.shape, a.dtype)


PROGRAMS = {
    "scalar of a wider type": (lambda a: a + np.int64(100), BYTES),
    "array of a wider type": (lambda a: np.array([300, 100]) + a, BYTES),
    "floats of a wider type": (lambda a: np.array([0.1, 0.1]) * a, SINGLES),
    "traced scalar of a wider type": (lambda a, b: b[0] + a, BYTES, np.array([100])),
    "matrix of a wider type": (lambda a: np.array([[100, 300], [1, 1]]) @ a, BYTES),
    "dot with a wider type": (lambda a: np.dot(np.array([300, 1]), a), BYTES),
    "a Python number is weak": (lambda a: 100 + a, BYTES),
    "no dimensions": (lambda a, b: a + b, np.array(3, np.int8), np.array(100)),
    "max of NaN": (lambda a: a.max(), np.array([1, NAN, 0.5])),
    "maximum of NaN": (lambda a: np.maximum(a, 0) + np.fmin(a, 0), np.array([NAN, 1])),
    "sort with NaN": (np.sort, np.array([2, NAN, 0.5, 1])),
    "sort in place with NaN": (sorted_in_place, np.array([2, NAN, 0.5, 1])),
    "argmax of NaN": (lambda a: a[np.argmax(a)] + a.argmin(), np.array([1, NAN, 5])),
    "median of NaN": (np.median, np.array([1, NAN, 5])),
    "truth of both": (lambda a, b: np.logical_and(a, b).sum(), np.array([5, 7]), np.array([2, 3])),
    "truth of either": (lambda a, b: np.logical_or(a, b) + 0, np.array([5, 7]), np.array([2, 3])),
    "truth of all": (lambda a: a.all() + a, np.array([5, 7])),
    "maximum of a number": (lambda a: np.maximum(a, 100) * np.maximum(a, 100), BYTES),
    "clip": (lambda a: np.clip(a, 1, 99) * 3, BYTES),
    "ceil of integers": (lambda a: np.ceil(a) * 200, np.array([3, 1], np.uint8)),
    "floor of halves": (lambda a: np.floor(a) * np.floor(a), HALVES),
    "trunc": (lambda a: 1 / np.trunc(a), np.array([3.5, -0.5])),
    "trunc of singles": (lambda a: np.trunc(a) / 3, SINGLES),
    "sign": (lambda a: np.sign(a) / 3, SINGLES),
    "where of two types": (lambda a, b: np.where(a > 1, a, b) / 7, SINGLES, np.array([2.5, 3.5])),
    "einsum of bools": (lambda a: np.einsum("i,i", a, a), np.array([True, True])),
    "power of bools": (lambda a: a**2, np.array([True, False])),
    "halves added in pairs": (lambda a: a.sum(), np.full(1000, 0.1, np.float16)),
    "singles added in pairs": (lambda a: (a.mean(), a.sum()), np.arange(1000, dtype=np.float32) / 7),
    "elements as Python numbers": (lambda a: sum(a.tolist()) + a.item(0), BYTES),
    "imaginary part of none": (lambda a: np.imag(a) + a.imag, SINGLES),
    "likes": (lambda a: np.full_like(a, 2.9) + np.zeros_like(a), BYTES),
    "stacked": (lambda a, b: np.stack([a, b]) * 100, BYTES, np.array([2.5, 3])),
    "scattered": (scattered, np.array([100, 1], np.int8), np.array([100, 100, 1], np.int8)),
    "copied": (copied, np.array([100, 1], np.int8), np.array([1.9, 300.5], np.float16)),
    "objects": (lambda a: (a + a, a[1:] * 2, a.sum()), np.array([True, 2, 0.5], object)),
    "texts among objects": (lambda a: (a + a).tolist()[0] + a.sum(), np.array(["x", "y"], object)),
    "into itself": (into_itself, np.array([100, 1, 7, 9], np.int8)),
    "filled": (filled, BYTES),
    "through a view": (through_a_view, np.arange(6, dtype=np.int8).reshape(2, 3) * 20),
    "histogram": (histogram(np.zeros(3)), SINGLES.repeat(2)),
    "histogram of integers": (histogram(np.zeros(3, int)), BYTES.repeat(2)),
    "by name": (by_name, np.array([1, 2]), np.array([0.5, 1.5])),
    "pairs that are equal": (lambda a, b: a == b, PAIRS, OTHER_PAIRS),
    "pairs that differ": (lambda a, b: a != b, PAIRS, OTHER_PAIRS),
    "pairs of another array": (lambda a: (a == OTHER_PAIRS, OTHER_PAIRS[:1] == a, a == PAIRS[0]), PAIRS),
    "accumulated doubles": (into(zeros_of_its_type, added), np.array([0.5, 1.5])),
    "accumulated singles": (into(zeros_of_its_type, added), SINGLES / 7),
    "accumulated bytes": (into(zeros_of_its_type, added), BYTES),
    "accumulated words": (into(zeros_of_its_type, added), np.array([2**63 + 5, 1], np.uint64)),
    "out of its type": (lambda a: np.multiply(a, 2, out=zeros_of_its_type(a)), HALVES),
    "matmul into its type": (lambda a: np.matmul(a, a, out=zeros_of_its_type(a)), np.eye(2, dtype=np.float32) / 3),
    "dot into its type": (lambda a: np.dot(a, a, zeros_of_its_type(a)), np.eye(2) / 3),
    "einsum into its type": (lambda a: np.einsum("ij->ji", a, out=zeros_of_its_type(a.T)), GRID),
    "ones of its type": (lambda a: np.ones(2, a.dtype) * a, SINGLES / 7),
    "threes of its type": (lambda a: np.full(2, 3, a.dtype) * a, BYTES.view(np.uint8)),
    "where of its type": (lambda a: np.where(a > 1, zeros_of_its_type(a), a), HALVES),
    "joined to its type": (lambda a: np.concatenate([zeros_of_its_type(a), a]), HALVES),
    "cast and added": (into(lambda a: a.astype(float), added), BYTES),
    "cast and scattered": (into(lambda a: a.astype(float), scattered_itself), np.array([1, 2, 3])),
    "cast to bytes, which wrap": (into(lambda a: a.astype(np.int8), scattered_itself), np.array([100, 50, 3])),
    "negative, cast to bytes without a sign": (lambda a: a.astype(np.uint8), np.array([-6, 300])),
    "stored as bytes, which wrap": (stored, np.array([100, 1], np.int8), np.array([300, -200])),
    "no number, scattered among integers": (into(lambda a: np.zeros(2, int), scattered_first), np.array([NAN])),
    "at a traced place": (into(lambda a: np.zeros(4), lambda made, a: np.add.at(made, a[0], a[1])), np.array([3, 2])),
    "one value beside an array": (lambda a: (np.array([300, 1]) + a[0], np.int64(300) > a[0]), BYTES),
    "one value added in place": (into(lambda a: np.zeros(2, int), lambda made, a: made.__iadd__(a[0])), BYTES),
    "histogram of bytes, which wrap": (into(lambda a: np.zeros(3, np.uint8), scattered_itself), np.array([200, 90, 3])),
    "added to plain zeros": (into(lambda a: np.zeros(2), added), SINGLES / 7),
    "added to zeros of another type": (into(lambda a: np.zeros_like(a, dtype=complex), added), SINGLES),
    "size in bytes": (lambda a: (a.nbytes, a.itemsize), SINGLES),
    "argument in Fortran order": (lambda a: a @ a.T / 3, np.asfortranarray(GRID.astype(np.float32))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_those_of_numpy(name):
    function, *arrays = PROGRAMS[name]
    plain_arguments, traced_arguments = copy.deepcopy(arrays), copy.deepcopy(arrays)
    with np.errstate(all="ignore"):
        plain, traced = function(*plain_arguments), traced_eval(function, traced_arguments)[1]
    plain, traced = ([*x] if isinstance(x, tuple) else [x] for x in (plain, traced))
    for want, got in zip([*plain, *plain_arguments], [*traced, *traced_arguments], strict=True):
        assert type(got) is type(want)
        want, got = np.asarray(want), np.asarray(got)
        assert got.dtype == want.dtype and got.shape == want.shape
        assert repr(got) == repr(want) if want.dtype == object else got.tobytes() == want.tobytes()


# Programs, and the depths that the original gives.
DEPTHS = {
    "transposed": (lambda a: -a, [GRID.T], [6, 5, 4, 6, 6, 6]),
    "Fortran order": (lambda a: a * 2, [np.asfortranarray(GRID)], [6, 4, 6, 5, 6, 6]),
    "two orders": (lambda a, b: a + b, [GRID.T, GRID.reshape(3, 2)], [6, 12, 6, 11, 6, 10, 6, 9, 6, 8, 6, 7]),
    "total": (lambda a: ((a + 1) * 2).sum(), [GRID.T], [6, 5, 4, *[6] * 10, 5, 1, 5, 1, 4, 1, 3, 1, 2]),
    "copied": (lambda a: a.copy() * a, [GRID.T], [6] * 12),
    "number times array": (lambda s, a: s * a + s, [3.0, GRID.T], [7, 6, 5, *[7] * 5, 1, *[7, 2] * 5]),
    "backwards in place": (backwards_in_place, [np.arange(4.0)], [4, 4, 4, 4]),
    "overlapping in place": (overlapping_in_place, [np.arange(4.0)], [3, 4, 5, 3, 5, 2]),
    "out larger than the operands": (larger_out, [np.array(3.0), np.zeros((2, 2))], [1, 2, 2, 2]),
    "max of NaN": (lambda a: a.max(), [np.array([1, NAN, 0.5])], [3, 2, 1, 1, 2, 1]),
    "sort": (np.sort, [np.array([2.0, 1, 0])], [2, 3, 1, 3, 1, 1, 2, 3, 1]),
    "histogram": (histogram(np.zeros(3)), [np.arange(1.0, 5)], [4, 1, 4, 1, 3, 1, 2, 1, 1, 1, 1]),
    "cast and added": (into(lambda a: a.astype(float), added), [np.arange(2.0)], [*[2] * 9, 1]),
    "cast and scattered": (
        into(lambda a: a.astype(float), scattered_itself),
        [np.array([1, 2, 3])],
        [3, 3, 3, 3, 1, 2, 1, 1, 1],
    ),
    "one value scattered": (into(lambda a: np.zeros(2, int), scattered_first), [BYTES], [1] * 6),
    "one value beside an array": (lambda a: np.array([300, 1]) * a[0], [BYTES], [1, 2]),
    "one value beside a scalar": (lambda a: (np.int64(3) - a[0]) < a[1], [BYTES], [2, 1, 2]),
    "compared to a scalar": (lambda a: (np.int64(3) < a[0], np.less(np.int64(3), a[1])), [BYTES], [2, 2, 1]),
    "pairs moved": (lambda a: np.roll(np.concatenate([a, a]), 1), [PAIRS], []),
    "pairs compared": (lambda a, b: a == b, [PAIRS, OTHER_PAIRS], [4, 8, 1, 3, 6, 1, 2, 4, 1, 1, 2, 1]),
    "nested": (lambda a: a * 2, [np.array([np.arange(2), np.arange(3), None], object)[:2]], [5] * 5),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depths_are_those_of_the_original(name):
    function, arrays, depths = DEPTHS[name]
    assert traced_eval(function, copy.deepcopy(arrays))[0] == depths


FAR, NEAR, PLACES = np.array([-6, 200, 2**31 - 1, 0]), np.array([100, 250, -3, 1]), [0, 0, 2, 1]


def scattered_to(make, write):
    """For a type of numbers: what is left of `a`, where `write` changes what `make` makes of it."""
    return lambda dtype: into(lambda a: make(a, dtype), write)


def untraced(a, dtype):
    return FAR.astype(dtype)


def cast(a, dtype):
    return a.astype(dtype)


SCATTERED = {
    "array to untraced": scattered_to(untraced, lambda made, a, b: np.add.at(made, PLACES, b)),
    "value to untraced": scattered_to(untraced, lambda made, a, b: np.add.at(made, PLACES, b[1])),
    "array to cast": scattered_to(cast, lambda made, a, b: np.add.at(made, PLACES, b)),
    "value to cast": scattered_to(cast, lambda made, a, b: np.subtract.at(made, PLACES, b[0])),
    "untraced to cast": scattered_to(cast, lambda made, a, b: np.add.at(made, PLACES, NEAR)),
    "larger to cast": scattered_to(cast, lambda made, a, b: np.maximum.at(made, PLACES, b)),
    "array to traced": lambda dtype: into(lambda a: a, lambda made, a, b: np.add.at(made, PLACES, b)),
}


def differing(way):
    """The pairs of types, of what is written to and of what is written, for which the values are not NumPy's."""
    types, found = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"], []
    for to, of in itertools.product(types, types):
        program, a, b = SCATTERED[way](to), FAR.astype(to) if way.endswith("traced") else FAR, NEAR.astype(of)
        with np.errstate(all="ignore"):
            want = program(a.copy(), b.copy())
            try:
                got = traced_eval(program, (a.copy(), b.copy()))[1]
            except OverflowError:
                got = want[:0]
        if got.dtype != want.dtype or got.tobytes() != want.tobytes():
            found.append((to, of))
    return found


@pytest.mark.parametrize("way", SCATTERED)
def test_numbers_of_any_type_are_scattered_as_numpy_does_among_those_of_any_other(way):
    assert differing(way) == []


@pytest.mark.parametrize("way", ["value to untraced", "value to cast"])
def test_single_values_among_python_numbers_would_be_found(way, monkeypatch):
    def of_objects(ufunc, method, inputs, options):
        return getattr(ufunc, method)(
            *(np.array(x, object) if isinstance(x, Tracked) else np.asarray(x) for x in inputs)
        )

    monkeypatch.setattr(arrays, "call_ufunc", of_objects)
    assert ("i8", "u1") in differing(way)


def outcome(function, value):
    """The types and the value of a result, or the type of what is raised."""
    try:
        result = function(value)
    except Exception as error:
        return (TypeError if isinstance(error, TypeError) else type(error),)
    return (
        type(result),
        np.asarray(result).dtype,
        np.asarray(result).tolist() if type(result) is not np.ma.MaskedArray else result.tolist(),
    )


BESIDE = {kind: lambda kind=kind: np.array([1, 2, 100]).astype(kind) for kind in ("?", "i1", "u8", "f4", "f8")} | {
    "objects": lambda: np.array([1, 2, 2**65], object),
    "float objects": lambda: np.array([0.5, 2.0, 0.0], object),
    "texts": lambda: np.array(["a", "bc", "d"], object),
    "fractions": lambda: np.array([Fraction(1, 3), Fraction(2), 3], object),
    "no axes": lambda: np.array(5.0),
}
SINGLE = [3, 2.5, True, np.uint8(200), Decimal(3), Fraction(1, 3), "x", 2**70]


def first_scattered(made, value):
    np.add.at(made, (0,) * made.ndim, value)
    return made


def into_floats(made, value):
    return np.add(made, 1, where=value > 1, out=np.zeros(made.shape))


USES = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "lt": operator.lt,
    "eq": operator.eq,
    "iadd": operator.iadd,
    "imod": operator.imod,
    "maximum": np.maximum,
    "at": first_scattered,
    "outer": np.add.outer,
    "where": into_floats,
    "sum": lambda made, value: np.sum(made, where=value > 1),
}
# Types of numbers, for which a traced run computes what NumPy does, the type of the result included.
NUMBERS = (*["?", "i1", "u8", "f4", "f8"], "no axes")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("beside", BESIDE)
def test_single_values_beside_arrays_do_as_numpy_does_or_are_refused(use, beside):
    for value in SINGLE:

        def program(x):
            return USES[use](BESIDE[beside](), x)

        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = outcome(program, value)
            got = outcome(lambda x: traced_eval(program, (x,))[1], value)
        if beside in NUMBERS and type(value) in (int, float, bool, np.uint8) and value != 2**70:
            assert got == want, value
        elif len(got) > 1 and len(want) > 1:  # of objects, Python may compute or refuse what NumPy does not
            assert got[-1] == want[-1], value


OLD_PRICES = {
    "where": (lambda a: np.sum(np.arange(3.0), where=a > 1), 2.0, 2),
    "decimal": (lambda a: np.array([1, 2, 5]) < a, Decimal(3), 6),
    "text": (lambda a: np.array([1, 2, 3]) == a, "x", 6),
    "repeated": (lambda a: np.array(["a", "bc"], object) * a, 2, 3),
    "large": (lambda a: np.add.outer(np.arange(3), a), 2**70, 5),
}


@pytest.mark.parametrize("name", OLD_PRICES)
def test_what_numpy_computes_with_objects_is_priced_as_such(name):
    function, argument, price = OLD_PRICES[name]
    assert trace(function, (argument,)).cost() == price


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_masked_arrays_keep_their_masks_and_matrices_their_type():
    with pytest.raises(TypeError):  # NumPy's own: objects into floats
        traced_eval(lambda a: operator.imod(np.ma.array([1.0, 2, 3], mask=[0, 1, 0]), a), (2,))
    assert type(traced_eval(lambda a: np.matrix([[1, 2]]) < a, (2,))[1]) is np.matrix


def test_large_objects_stored_in_bytes_are_refused_as_by_numpy():
    with pytest.raises(OverflowError):
        traced_eval(lambda a: stored(a, np.array([300, 1], object)), (BYTES.copy(),))


SEQUENCES = [range(2), deque([7, 8]), array("d", [1.9, -1]), memoryview(array("l", [7, 8]))]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: type(sequence).__name__)
def test_any_sequence_is_stored_as_numpy_stores_it(sequence):
    def store(a):
        a[:] = sequence
        return a

    depths, stored = traced_eval(store, (BYTES.copy(),))
    assert depths == [] and stored.dtype == np.int8
    assert stored.tolist() == store(BYTES.copy()).tolist()


def objects(a):
    return np.zeros(a.shape, object)


def integers_then_floats(made, a, b):
    made += a
    made += b
    made /= a


def product(made, a, b):
    for i in range(2):
        made += b[i] * a


# What a function makes of objects holds what Python numbers would hold.
WRITES = {
    "added": (added, np.array([0.5, 1.5])),
    "integers, then floats": (integers_then_floats, np.array([3, 4]), np.array([0.5, 1.5])),
    "quotient": (lambda made, a: np.divide(a, 2, out=made), np.array([3, 4])),
    "row by row": (product, np.array([1.5, 2]), np.array([0.5, 3])),
    "where": (lambda made, a: np.add(a, 1, out=made, where=[True, False]), np.array([0.5, 1.5])),
    "matmul": (lambda made, a: np.matmul(a, a, out=made), np.eye(2) / 3),
    "einsum": (lambda made, a: np.einsum("ij->ji", a, out=made), np.eye(2) / 3),
}


@pytest.mark.parametrize("name", WRITES)
def test_arrays_of_objects_take_what_comes(name):
    write, *arrays = WRITES[name]
    result = traced_eval(into(objects, write), copy.deepcopy(arrays))[1]
    assert result.dtype == np.float64 and result.tolist() == into(objects, write)(*arrays).tolist()


REFUSED = {
    "reshaped": (lambda a: setattr(a, "shape", (1, 2)), r"reshaped an argument in place, \(2,\) to \(1, 2\): return"),
    "resized": (lambda a: a.resize(2, 1), r"reshaped an argument in place, \(2,\) to \(2, 1\): return"),
    "bytes": (lambda a: a.tobytes(), "tobytes of a traced array is not traced: its bytes are pointers"),
    "swapped": (lambda a: a.byteswap(), "byteswap of a traced array is not traced: its bytes are pointers"),
    "dot into numbers": (lambda a: np.dot(a, a[:, None], np.zeros(1)), "output array is not acceptable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_objects_cannot_do_is_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        traced_eval(function, (np.array([0.5, 1.5]),))


@pytest.mark.parametrize("part", [lambda a: a.real, lambda a: a.imag, np.real, np.imag])
def test_parts_of_complex_arrays_are_refused_by_name(part):
    with pytest.raises(ValueError, match=r"\.(real|imag) of a traced complex array .*: pass its parts as two arrays"):
        traced_eval(part, (np.array([1 + 2j]),))


def test_another_number_of_values_than_numpy_finds_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unique of traced values has shape \(3,\), not \(2,\): keep NaN out of it"):
        traced_eval(np.unique, (np.array([NAN, 1, NAN]),))


APPLIED = [(lambda f, a: np.apply_along_axis(f, 0, a), 1), (lambda f, a: np.frompyfunc(f, 1, 1)(a), 2)]


@pytest.mark.parametrize(("apply", "times"), APPLIED)
def test_what_numpy_calls_is_called_once(apply, times):
    calls = []
    depths, result = traced_eval(lambda a: apply(lambda x: calls.append(1) or x + x, a), (SINGLES,))
    assert len(calls) == times and depths == [2, 2, 2, 2]
    assert result.tolist() == [6, 2] and result.dtype == np.float32
