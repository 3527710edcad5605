"""Foreign text in messages: always one printable line, always short, made in bounded work."""

import ast
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_ref.quoting import listed, one_line, quoted

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@settings(max_examples=60, deadline=None)
@given(JSON, st.integers(40, 200))
def test_what_fits_is_what_python_writes_and_the_rest_is_short(value, limit):
    text = quoted(value, limit)
    assert len(text) <= limit and text.isprintable()
    if isinstance(value, str) and len(repr(value)) <= limit and len(value) <= limit:
        assert ast.literal_eval(text) == value
    if isinstance(value, list) and all(isinstance(item, str) for item in value) and "…" not in text:
        assert ast.literal_eval(text) == value


@settings(deadline=None)
@given(st.text(), st.integers(40, 200))
def test_a_sentence_stays_as_it_is_or_becomes_printable(text, limit):
    line = one_line(text, limit)
    assert len(line) <= limit and line.isprintable()
    assert line == text or not text.isprintable() or len(text) > limit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("layers.1.weight", "'layers.1.weight'"),
        ("a\n\x1b[2J\u202eb\ud800", r"'a\n\x1b[2J\u202eb\ud800'"),
        ([64, 32], "[64, 32]"),
        ((64,), "(64,)"),
        ({"dtype": "F32"}, "{'dtype': 'F32'}"),
        (None, "None"),
        (float("nan"), "nan"),
    ],
)
def test_small_values_are_written_whole(value, text):
    assert quoted(value) == text


@pytest.mark.parametrize(
    ("value", "begins", "ends"),
    [
        ("x" * 5000 + "end", "'xxxx", "end' (5,003 characters)"),
        ("\n" * 10**6, r"'\n\n", "' (1,000,000 characters)"),
        ([2] * 10**6, "[2, 2, ", "2, 2] (1,000,000 items)"),
        ([10**400] * 500, "[<an", " (500 items)"),
        (10**400, "<an integer of some 400 digits>", ""),
        (1 << 40_000, "<an integer of some 12,041 digits>", ""),  # more digits than Python agrees to print
        ([1 << 40_000, "\x00" * 10**6], "[<an intege", "]"),
        ({str(at): at for at in range(10**5)}, "{'0': 0, '1': 1", " (100,000 items)"),
    ],
    ids=["string", "escapes", "shape", "integers", "digits", "unprintable", "mixed", "object"],
)
def test_large_values_show_both_ends_and_how_many_there_are(value, begins, ends):
    text = quoted(value)
    assert text.startswith(begins) and text.endswith(ends) and len(text) <= 80 and text.isprintable()


def test_of_many_names_some_are_given():
    assert listed([]) == "" and listed(["a", "b"]) == "a, b"
    assert listed(["\n"] * 1009) == ", ".join(["\\n"] * 8) + " and 1001 others"


def test_nesting_costs_little():
    value = json.loads("[" * 500 + "]" * 500)
    assert len(quoted(value)) <= 80
    wide = "\x00" * 10**7
    for _ in range(5):
        wide = [wide] * 1000
    begin = time.perf_counter()
    assert len(quoted(wide, 400)) <= 400
    assert time.perf_counter() - begin < 1


def test_a_sentence_of_others_loses_its_quotation_marks_only():
    assert one_line(ValueError("bad \x1b[31m line\nsecond")) == r"bad \x1b[31m line\nsecond"
    assert one_line("y" * 10**6).endswith("y (1,000,000 characters)")
